//! The CPU's native kernels behind what models import: one call each, the coarser the better, for a call costs some
//! microseconds in a step that streams its weights through the caches.

use torus_abi::{
    DType,
    attention::{AttentionAnswer, AttentionQuery},
    fragment::{Activation, Import, LinearRole, Operation, WeightOperand},
    model::AttentionSpec,
};
use torus_cpu::{attention, ffi};
use torus_hlo::{Attribute, CustomCall, Shape};
use torus_plugins::{LinkError, link::Implementation};

use super::{
    imports::functions,
    loops,
    weights::{PACKED, PACKED_HALVES},
};

/// What the native kernels must know beside an import.
pub(crate) struct Native<'a> {
    /// For each kind of layers, what the attention plugin was asked and answered.
    pub kinds: &'a [(AttentionQuery, AttentionAnswer)],
    /// Where layers run in loops, the pages of one layer.
    pub pages_in_loops: Option<u64>,
}

/// An import served by one call of a kernel, if there is one for it.
pub(crate) fn implement(import: &Import, native: &Native<'_>) -> Result<Option<Implementation>, LinkError> {
    let call = match &import.operation {
        Operation::Embed { weight, result } if is_packed(weight) => call(import, ffi::embed(*result)),
        Operation::Linear { weight, role, bias, residual, result } if is_packed(weight) => {
            let Some(input) = input_dtype(import) else { return Ok(None) };
            call(import, ffi::linear(input, *result))
                .with("bias", Attribute::Bool(bias.is_some()))
                .with("residual", Attribute::Bool(*residual))
                // What samples natively knows which rows of logits are real.
                .with("clears", Attribute::Bool(*role != LinearRole::Head))
        }
        Operation::GatedMlp { gate_up, down, activation, norm_eps, post_norm, .. }
            if gate_up.storage == PACKED_HALVES && is_packed(down) =>
        {
            let Some(input) = input_dtype(import) else { return Ok(None) };
            let call = call(import, ffi::gated_mlp(input))
                .with("activation", Attribute::I64(activation_number(*activation)))
                .with("norm_eps", Attribute::F32(*norm_eps));
            with_flags(call, &[("post_norm", post_norm.is_some())])
        }
        Operation::AttentionBlock {
            qkv,
            qkv_bias,
            o,
            kind,
            pool_parts,
            norm_eps,
            head_norms,
            o_bias,
            post_norm,
            ..
        } if is_packed(qkv) && is_packed(o) => {
            let has = [qkv_bias.is_some(), head_norms.is_some(), o_bias.is_some(), post_norm.is_some()];
            let block = Block { kind: *kind, has, pool_parts: *pool_parts, norm_eps: *norm_eps };
            let Some(call) = attention_block(import, native, &block) else { return Ok(None) };
            if let Some(pages) = native.pages_in_loops {
                return block_in_pool(import, call, &block, &native.kinds[block.kind], pages).map(Some);
            }
            call
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

/// Attributes of what a kernel is given beside; what is not there is left out.
fn with_flags(call: CustomCall, flags: &[(&'static str, bool)]) -> CustomCall {
    flags.iter().filter(|(_, is_set)| *is_set).fold(call, |call, (name, _)| call.with(name, Attribute::Bool(true)))
}

struct Block {
    kind: usize,
    /// Whether there are a bias of QKV, norms of heads, a bias and a norm of the output.
    has: [bool; 4],
    pool_parts: usize,
    norm_eps: f32,
}

/// The whole attention half of a layer, if the plugin keeps pages in the layout that the kernels here know.
fn attention_block(import: &Import, native: &Native<'_>, block: &Block) -> Option<CustomCall> {
    let (query, answer) = native.kinds.get(block.kind)?;
    if answer.layout.as_deref() != Some(attention::LAYOUT) {
        return None;
    }
    let AttentionSpec { q_heads, kv_heads, head_dim, scale, window, soft_cap, .. } = query.spec.clone();
    let [bias, head_norms, o_bias, post_norm] = block.has;
    let mut call = call(import, ffi::attention_block(input_dtype(import)?, query.kv_dtype)?)
        .with("bias", Attribute::Bool(bias))
        .with("norm_eps", Attribute::F32(block.norm_eps))
        .with("q_heads", Attribute::I64(q_heads as i64))
        .with("kv_heads", Attribute::I64(kv_heads as i64))
        .with("head_dim", Attribute::I64(head_dim as i64))
        .with("page_size", Attribute::I64(query.shape.page_size as i64))
        .with("scale", Attribute::F32(scale));
    if let Some(window) = window {
        call = call.with("window", Attribute::I64(window as i64));
    }
    if let Some(cap) = soft_cap {
        call = call.with("soft_cap", Attribute::F32(cap));
    }
    call = with_flags(call, &[("head_norms", head_norms), ("o_bias", o_bias), ("post_norm", post_norm)]);
    for part in 0..answer.pool.len() {
        call = call.alias(1 + part, block.first_pool_part() + part);
    }
    Some(call)
}

impl Block {
    /// The argument that is the first part of the pool: x, norm, QKV (three parts), bias?, output (three parts), cos, sin,
    /// norms of queries' and keys' heads?, bias and norm of the output? come before it.
    fn first_pool_part(&self) -> usize {
        let [bias, head_norms, o_bias, post_norm] = self.has;
        let beside = [bias, head_norms, head_norms, o_bias, post_norm];
        10 + beside.into_iter().map(usize::from).sum::<usize>()
    }
}

/// The block of a layer whose pool is that of all layers: the pool's last part is the layer's number, the context are the
/// step's inputs.
fn block_in_pool(
    import: &Import,
    mut call: CustomCall,
    block: &Block,
    (query, answer): &(AttentionQuery, AttentionAnswer),
    pages: u64,
) -> Result<Implementation, LinkError> {
    let number = block.first_pool_part() + block.pool_parts - 1;
    call.results.truncate(1 + answer.pool.len());
    functions(import, |builder| {
        builder.define(&import.symbol, |f| {
            let arguments: Vec<_> = import.arguments.iter().map(|tensor| f.argument(Shape::opaque(tensor))).collect();
            let (before, rest) = arguments.split_at(number);
            let inputs = answer.inputs.iter().zip(&rest[1..]);
            let inputs = inputs.map(|(input, value)| loops::of_layer(*input, *value, rest[0], pages, &query.shape));
            let operands: Vec<_> = before.iter().copied().chain(inputs).collect();
            let mut results = f.custom_call(&call, &operands);
            results.push(rest[0]);
            results
        });
    })
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
