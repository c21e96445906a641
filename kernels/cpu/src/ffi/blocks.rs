//! The coarse kernels: whole halves of a layer in one call.

use std::marker::PhantomData;

use torus_abi::{
    fault::Fault,
    kernel::{Call, Kernel},
};

use super::{ACTIVATIONS, Activations, MATRIX, cleared, expect, matrix, profile, real_rows};
use crate::{Norm, gated_mlp, gated_mlp_fits};

pub(super) struct GatedMlp<X>(PhantomData<X>);

impl<X: Activations> Kernel for GatedMlp<X> {
    const NAME: &'static str = X::GATED_MLP;

    fn call(call: &Call<'_>) -> Result<(), Fault> {
        profile::timed(Self::NAME, || {
            let (x, norm_weights) = (call.argument::<X>(0)?, call.argument::<f32>(1)?);
            let (gate_up, down) = (matrix(call, 2)?, matrix(call, 2 + MATRIX)?);
            let activation = ACTIVATIONS.get(call.attribute::<usize>("activation")?);
            let activation = *activation.ok_or_else(|| Fault::invalid("there is no activation of this number"))?;
            let eps: f32 = call.attribute("norm_eps")?;
            let has_post_norm = call.optional_attribute::<bool>("post_norm")?.unwrap_or(false);
            let post_norm = has_post_norm.then(|| call.argument::<f32>(2 + 2 * MATRIX)).transpose()?;
            let mut y = call.result::<X>(0)?;
            let [rows, columns] = x.dims()?;
            expect("the input's size", columns, gate_up.columns())?;
            expect("the norm's size", norm_weights.len(), gate_up.columns())?;
            let post_norm_len = post_norm.as_ref().map_or(down.rows(), |weights| weights.len());
            expect("the size of the result's norm", post_norm_len, down.rows())?;
            expect("the result's size", y.dims::<2>()?[1], down.rows())?;
            if !gated_mlp_fits(&gate_up, &down) {
                return Err(Fault::invalid("gate, up and down do not fit each other"));
            }
            let rows = real_rows(call, 2, rows)?;
            let y = cleared(X::own_mut(&mut y), rows * columns);
            let norm = |weights| Norm { weights, eps };
            let norms = (norm(norm_weights.as_slice()), post_norm.as_ref().map(|weights| norm(weights.as_slice())));
            gated_mlp(&X::own(&x)[..rows * columns], norms, &gate_up, &down, activation, y);
            Ok(())
        })
    }
}
