//! The host's own implementations of what models import: native kernels where the weights are packed for them
//! (`super::native`), else embedding and linear over dense weights in plain StableHLO.
//!
//! Where devices share a model, a product whose input features are split is summed over them, and each embeds the tokens of
//! its part of the vocabulary. A head gives the logits of that part.
//!
//! Coarser imports (`gated_mlp`, `attention_block`) have no StableHLO here and fall back to the default bodies of the
//! model's fragment. Kernels and quantized storage come in at this place: a model never learns of them.

use torus_abi::{
    DType, TensorType,
    fragment::{Import, LinearRole, Operation},
    model::Parallel,
};
use torus_hlo::{Axis, Builder, Dot, Group, Precision, Shape};
use torus_plugins::{LinkError, link::Implementation};

use super::{
    native::{self, Native},
    weights::STACKED,
};

const LAYERS: Axis = Axis("layers");
const ROWS: Axis = Axis("rows");
const IN: Axis = Axis("in");
const OUT: Axis = Axis("out");

/// The exchanges of row-split products, and that of the embedding.
const SUM_CHANNEL: u32 = 1;
const EMBED_CHANNEL: u32 = 2;

/// Supplies an import; `attention` names the function that serves a kind of layers, and `exact` is how weights in f32 are
/// multiplied.
pub(crate) fn implement(
    import: &Import,
    native: &Native<'_>,
    parallel: Parallel,
    exact: Precision,
    attention: &dyn Fn(usize) -> String,
) -> Result<Implementation, LinkError> {
    if let Some(implementation) = native::implement(import, native)? {
        return Ok(implementation);
    }
    match &import.operation {
        Operation::Attention { kind, .. } => Ok(Implementation::Alias(attention(*kind))),
        Operation::GatedMlp { .. } | Operation::AttentionBlock { .. } => Ok(Implementation::Default),
        Operation::Embed { result, .. } if parallel.tensor > 1 => embed_shared(import, parallel, *result),
        Operation::Embed { result, .. } => embed(import, *result),
        Operation::Linear { weight, role, bias, residual, result } => {
            let sums = *role == LinearRole::Row && parallel.tensor > 1;
            let linear = Linear {
                weight_parts: weight.parts,
                stacked: weight.storage.starts_with(STACKED),
                bias: bias.is_some(),
                residual: *residual,
                result: *result,
                exact,
                sum: sums.then(|| Group::all(parallel.tensor, SUM_CHANNEL)),
            };
            linear.implement(import)
        }
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

/// `(tokens [rows], weight [out, in], device []) -> [rows, in]`: each device holds as many rows of the table, and all but one
/// give zeros for a token.
fn embed_shared(import: &Import, parallel: Parallel, result: DType) -> Result<Implementation, LinkError> {
    let [tokens, weight, _] = arguments(import)?;
    functions(import, |builder| {
        builder.define(&import.symbol, |f| {
            let tokens = f.argument(named(tokens, &[ROWS]));
            let weight = f.argument(named(weight, &[OUT, IN]));
            let device = f.argument(Shape::scalar(DType::I32));
            let place = tokens - device * weight.size(OUT) as i32;
            let is_here = place.ge(0i32) & place.lt(weight.size(OUT) as i32);
            let row = weight.take(OUT, place).convert(result);
            let row = is_here.select(row, row.full_like(0.0f32));
            vec![row.all_reduce_sum(&Group::all(parallel.tensor, EMBED_CHANNEL))]
        });
    })
}

/// `(x [rows, in], weight [out, in], bias [out]?, residual [rows, out]?) -> [rows, out]`, summed in f32.
struct Linear {
    /// Of which the first is the matrix.
    weight_parts: usize,
    /// The first part is `[layers, out, in]`, the second the matrix's number in it.
    stacked: bool,
    bias: bool,
    residual: bool,
    result: DType,
    /// How weights in f32 are multiplied.
    exact: Precision,
    /// The devices whose products are summed, in the dtype of the result.
    sum: Option<Group>,
}

impl Linear {
    fn implement(&self, import: &Import) -> Result<Implementation, LinkError> {
        let types = &import.arguments;
        let beside = usize::from(self.bias) + usize::from(self.residual);
        if self.weight_parts == 0 || types.len() != 1 + self.weight_parts + beside {
            return Err(malformed(import));
        }
        functions(import, |builder| {
            builder.define(&import.symbol, |f| {
                let x = f.argument(named(&types[0], &[ROWS, IN]));
                let axes = [LAYERS, OUT, IN];
                let mut weight = f.argument(named(&types[1], if self.stacked { &axes } else { &axes[1..] }));
                let parts = types[2..1 + self.weight_parts].iter().map(|part| f.argument(Shape::opaque(part)));
                let parts: Vec<_> = parts.collect();
                if let (true, Some(number)) = (self.stacked, parts.first()) {
                    weight = weight.dynamic_slice(&[(LAYERS, *number, 1)]).squeeze(LAYERS);
                }
                // Weights kept wider than the activations are multiplied as they are.
                let (x, precision) = match weight.dtype() {
                    DType::F32 => (x.convert(DType::F32), self.exact),
                    _ => (x, Precision::Default),
                };
                let mut y = x.dot(weight, Dot::over(IN).result(DType::F32).precision(precision));
                if let Some(group) = &self.sum {
                    y = y.convert(self.result).all_reduce_sum(group).convert(DType::F32);
                }
                if self.bias {
                    y = y + f.argument(named(&types[1 + self.weight_parts], &[OUT])).convert(DType::F32);
                }
                if self.residual {
                    y = y + f.argument(named(&types[types.len() - 1], &[ROWS, OUT])).convert(DType::F32);
                }
                vec![y.convert(self.result)]
            });
        })
    }
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
