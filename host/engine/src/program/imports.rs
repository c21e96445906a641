//! The host's own implementations of what models import: native kernels where the weights are packed for them
//! (`super::native`), else embedding and linear over dense weights in plain StableHLO.
//!
//! Coarser imports (`gated_mlp`, `attention_block`) have no StableHLO here and fall back to the default bodies of the
//! model's fragment. Kernels and quantized storage come in at this place: a model never learns of them.

use torus_abi::{
    DType, TensorType,
    fragment::{Import, Operation},
};
use torus_hlo::{Axis, Builder, Dot, Shape};
use torus_plugins::{LinkError, link::Implementation};

use super::native::{self, Native};

const ROWS: Axis = Axis("rows");
const IN: Axis = Axis("in");
const OUT: Axis = Axis("out");

/// Supplies an import; `attention` names the function that serves a kind of layers.
pub(crate) fn implement(
    import: &Import,
    native: &Native<'_>,
    attention: &dyn Fn(usize) -> String,
) -> Result<Implementation, LinkError> {
    if let Some(implementation) = native::implement(import, native)? {
        return Ok(implementation);
    }
    match &import.operation {
        Operation::Attention { kind, .. } => Ok(Implementation::Alias(attention(*kind))),
        Operation::GatedMlp { .. } | Operation::AttentionBlock { .. } => Ok(Implementation::Default),
        Operation::Embed { result, .. } => embed(import, *result),
        Operation::Linear { bias, residual, result, .. } => linear(import, bias.is_some(), *residual, *result),
    }
}

/// `(tokens [rows], weight [out, in]) -> [rows, in]`.
fn embed(import: &Import, result: DType) -> Result<Implementation, LinkError> {
    let [tokens, weight] = arguments(import)?;
    functions(import, |builder| {
        builder.define(&import.symbol, |f| {
            let tokens = f.argument(named(tokens, &[ROWS]));
            let weight = f.argument(named(weight, &[OUT, IN]));
            vec![weight.take(OUT, tokens).convert(result)]
        });
    })
}

/// `(x [rows, in], weight [out, in], bias [out]?, residual [rows, out]?) -> [rows, out]`, summed in f32.
fn linear(import: &Import, bias: bool, residual: bool, result: DType) -> Result<Implementation, LinkError> {
    let types = &import.arguments;
    if types.len() != 2 + usize::from(bias) + usize::from(residual) {
        return Err(malformed(import));
    }
    functions(import, |builder| {
        builder.define(&import.symbol, |f| {
            let x = f.argument(named(&types[0], &[ROWS, IN]));
            let weight = f.argument(named(&types[1], &[OUT, IN]));
            // Weights kept wider than the activations are multiplied as they are.
            let x = if weight.dtype() == DType::F32 { x.convert(DType::F32) } else { x };
            let mut y = x.dot(weight, Dot::over(IN).result(DType::F32));
            if bias {
                y = y + f.argument(named(&types[2], &[OUT])).convert(DType::F32);
            }
            if residual {
                y = y + f.argument(named(&types[types.len() - 1], &[ROWS, OUT])).convert(DType::F32);
            }
            vec![y.convert(result)]
        });
    })
}

fn arguments<const N: usize>(import: &Import) -> Result<&[TensorType; N], LinkError> {
    import.arguments.as_slice().try_into().map_err(|_| malformed(import))
}

fn malformed(import: &Import) -> LinkError {
    LinkError::Malformed {
        plugin: "host".into(),
        message: format!(
            "'{}' has {} arguments, which its operation does not take",
            import.symbol,
            import.arguments.len()
        ),
    }
}

fn named(tensor: &TensorType, axes: &[Axis]) -> Shape {
    let axes: Vec<_> = axes.iter().copied().zip(tensor.dims.iter().copied()).collect();
    Shape::new(tensor.dtype, axes)
}

pub(super) fn functions(import: &Import, build: impl FnOnce(&Builder)) -> Result<Implementation, LinkError> {
    let builder = Builder::new("host");
    build(&builder);
    let fragment = builder.finish().map_err(|error| LinkError::Malformed {
        plugin: "host".into(),
        message: format!("'{}' cannot be built: {error}", import.symbol),
    })?;
    Ok(Implementation::Functions(fragment.functions))
}
