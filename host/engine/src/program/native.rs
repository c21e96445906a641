//! The CPU's native kernels behind what models import: one call each, the coarser the better, for a call costs some
//! microseconds in a step that streams its weights through the caches.

use torus_abi::{
    DType,
    attention::{AttentionAnswer, AttentionQuery},
    fragment::{Activation, Import, Operation, WeightOperand},
};
use torus_cpu::ffi;
use torus_hlo::{Attribute, CustomCall, Shape};
use torus_plugins::{LinkError, link::Implementation};

use super::{
    imports::functions,
    weights::{PACKED, PACKED_HALVES},
};

/// What the native kernels must know beside an import.
pub(crate) struct Native<'a> {
    /// For each kind of layers, what the attention plugin was asked and answered.
    pub kinds: &'a [(AttentionQuery, AttentionAnswer)],
}

/// An import served by one call of a kernel, if there is one for it.
pub(crate) fn implement(import: &Import, native: &Native<'_>) -> Result<Option<Implementation>, LinkError> {
    let call = match &import.operation {
        Operation::Embed { weight, result } if is_packed(weight) => call(import, ffi::embed(*result)),
        Operation::Linear { weight, bias, residual, result, .. } if is_packed(weight) => {
            let Some(input) = input_dtype(import) else { return Ok(None) };
            call(import, ffi::linear(input, *result))
                .with("bias", Attribute::Bool(bias.is_some()))
                .with("residual", Attribute::Bool(*residual))
        }
        Operation::GatedMlp { gate_up, down, activation, norm_eps, .. }
            if gate_up.storage == PACKED_HALVES && is_packed(down) =>
        {
            let Some(input) = input_dtype(import) else { return Ok(None) };
            call(import, ffi::gated_mlp(input))
                .with("activation", Attribute::I64(activation_number(*activation)))
                .with("norm_eps", Attribute::F32(*norm_eps))
        }
        _ => return Ok(None),
    };
    functions(import, |builder| {
        builder.define(&import.symbol, |f| {
            let arguments: Vec<_> = import.arguments.iter().map(|tensor| f.argument(Shape::opaque(tensor))).collect();
            f.custom_call(&call, &arguments)
        });
    })
    .map(Some)
}

fn is_packed(weight: &WeightOperand) -> bool {
    weight.storage == PACKED || weight.storage == PACKED_HALVES
}

/// The dtype of the activations that go in, if there is a kernel for it.
fn input_dtype(import: &Import) -> Option<DType> {
    let dtype = import.arguments.first()?.dtype;
    matches!(dtype, DType::F32 | DType::Bf16).then_some(dtype)
}

fn call(import: &Import, target: String) -> CustomCall {
    let results = import.results.iter().map(Shape::opaque).collect();
    CustomCall { row_major: true, ..CustomCall::new(target, results) }
}

fn activation_number(activation: Activation) -> i64 {
    ffi::ACTIVATIONS.iter().position(|known| *known == activation).unwrap_or_default() as i64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn activations_have_numbers() {
        for (number, activation) in ffi::ACTIVATIONS.into_iter().enumerate() {
            assert_eq!(activation_number(activation), number as i64);
        }
    }
}
