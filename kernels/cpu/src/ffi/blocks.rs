//! The coarse kernels: whole halves of a layer in one call.

use std::marker::PhantomData;

use torus_abi::{
    fault::Fault,
    kernel::{Call, Kernel},
};

use super::{ACTIVATIONS, Activations, expect, matrix, profile};
use crate::{gated_mlp, gated_mlp_fits};

pub(super) struct GatedMlp<X>(PhantomData<X>);

impl<X: Activations> Kernel for GatedMlp<X> {
    const NAME: &'static str = X::GATED_MLP;

    fn call(call: &Call<'_>) -> Result<(), Fault> {
        profile::timed(Self::NAME, || {
            let (x, norm) = (call.argument::<X>(0)?, call.argument::<f32>(1)?);
            let (gate_up, down) = (matrix(call, 2)?, matrix(call, 4)?);
            let activation = ACTIVATIONS.get(call.attribute::<usize>("activation")?);
            let activation = *activation.ok_or_else(|| Fault::invalid("there is no activation of this number"))?;
            let eps: f32 = call.attribute("norm_eps")?;
            let mut y = call.result::<X>(0)?;
            expect("the input's size", x.dims::<2>()?[1], gate_up.columns())?;
            expect("the norm's size", norm.len(), gate_up.columns())?;
            expect("the result's size", y.dims::<2>()?[1], down.rows())?;
            if !gated_mlp_fits(&gate_up, &down) {
                return Err(Fault::invalid("gate, up and down do not fit each other"));
            }
            gated_mlp(X::own(&x), &norm, eps, &gate_up, &down, activation, X::own_mut(&mut y));
            Ok(())
        })
    }
}
