//! Attention over pages, alone and with all that stands before and after it in a layer.

use std::marker::PhantomData;

use torus_abi::{
    DType,
    fault::Fault,
    kernel::{Bf16, Call, Element as Tensorial, Kernel, Tensor},
};

use super::{Activations, MATRIX, cache_index, cleared, expect, matrix, profile, real_rows};
use crate::{
    Norm,
    attention::{Block, Inputs, KvElement, Params, Rows, Step, attention},
};

/// An element of the cache as XLA's FFI and as the kernels know it.
pub trait Cached: Tensorial {
    /// Index into the names of kernels.
    const INDEX: usize;
    type Own: KvElement;

    fn own_mut(values: &mut [Self]) -> &mut [Self::Own];
}

impl Cached for f32 {
    const INDEX: usize = 0;
    type Own = f32;

    fn own_mut(values: &mut [f32]) -> &mut [f32] {
        values
    }
}

impl Cached for Bf16 {
    const INDEX: usize = 1;
    type Own = half::bf16;

    fn own_mut(values: &mut [Bf16]) -> &mut [half::bf16] {
        Activations::own_mut(values)
    }
}

impl Cached for i8 {
    const INDEX: usize = 2;
    type Own = i8;

    fn own_mut(values: &mut [i8]) -> &mut [i8] {
        values
    }
}

/// The name of the kernel [`Attention`] for activations and a cache of these dtypes, if there is one.
pub fn name(dtype: DType, kv_dtype: DType) -> Option<&'static str> {
    let names = match dtype {
        DType::F32 => f32::ATTENTION,
        DType::Bf16 => Bf16::ATTENTION,
        _ => return None,
    };
    Some(names[cache_index(kv_dtype)?])
}

/// Step inputs that the kernels take as context, in this order.
const CONTEXT: usize = 6;

/// The attributes `q_heads`, `kv_heads`, `head_dim`, `page_size`, `scale`, `window`?, `soft_cap`?.
fn params(call: &Call<'_>) -> Result<Params, Fault> {
    let params = Params {
        q_heads: call.attribute("q_heads")?,
        kv_heads: call.attribute("kv_heads")?,
        head_dim: call.attribute("head_dim")?,
        page_size: call.attribute("page_size")?,
        scale: call.attribute("scale")?,
        window: call.optional_attribute("window")?,
        soft_cap: call.optional_attribute("soft_cap")?,
    };
    let fits = params.supports().map_err(Fault::invalid);
    fits.map(|()| params)
}

/// The context that begins with argument `first`: slots, query bounds, lengths, page begins, page table, sequences.
fn step<'c>(call: &'c Call<'_>, first: usize) -> Result<Step<'c>, Fault> {
    let input = |index: usize| call.argument::<i32>(first + index).map(|tensor| tensor.as_slice());
    let num_seqs = input(5)?.first().map_or(0, |count| *count as usize);
    Ok(Step {
        kv_slot: input(0)?,
        cu_q_lens: input(1)?,
        kv_lens: input(2)?,
        page_begin: input(3)?,
        page_table: input(4)?,
        num_seqs,
    })
}

/// `(q [tokens, q_heads, head_dim], k, v [tokens, kv_heads, head_dim], pool, scales?, slots, query bounds, lengths, page
/// begins, page table, sequences) -> (like q, pool, scales?)`, the pool in place.
pub struct Attention<X, K>(PhantomData<(X, K)>);

impl<X: Activations, K: Cached> Kernel for Attention<X, K> {
    const NAME: &'static str = X::ATTENTION[K::INDEX];

    fn call(call: &Call<'_>) -> Result<(), Fault> {
        profile::timed(Self::NAME, || {
            let params = params(call)?;
            let [q, k, v] = [call.argument::<X>(0)?, call.argument::<X>(1)?, call.argument::<X>(2)?];
            let step = step(call, call.arguments() - CONTEXT)?;
            let (mut out, mut pool) = (call.result::<X>(0)?, call.result::<K>(1)?);
            let mut scales = K::Own::SCALED.then(|| call.result::<f32>(2)).transpose()?;
            let [tokens, q_heads, head_dim] = q.dims()?;
            expect("the number of query heads", q_heads, params.q_heads)?;
            expect("the size of a head", head_dim, params.head_dim)?;
            expect("the size of keys", k.len(), tokens * params.kv_heads * head_dim)?;
            expect("the size of values", v.len(), k.len())?;
            let stride = params.kv_heads * head_dim;
            let inputs = Inputs {
                q: Rows { data: X::own(&q), stride: q_heads * head_dim },
                k: Rows { data: X::own(&k), stride },
                v: Rows { data: X::own(&v), stride },
            };
            let scales = scales.as_deref_mut().unwrap_or_default();
            attention(&params, &step, &inputs, K::own_mut(&mut pool), scales, X::own_mut(&mut out))
                .map_err(Fault::invalid)
        })
    }
}

/// See [`super::attention_block`].
pub(super) struct AttentionBlock<X, K>(PhantomData<(X, K)>);

impl<X: Activations, K: Cached> Kernel for AttentionBlock<X, K> {
    const NAME: &'static str = X::ATTENTION_BLOCK[K::INDEX];

    fn call(call: &Call<'_>) -> Result<(), Fault> {
        profile::timed(Self::NAME, || {
            let params = params(call)?;
            let (x, norm) = (call.argument::<X>(0)?, call.argument::<f32>(1)?);
            let has_bias: bool = call.attribute("bias")?;
            let bias = has_bias.then(|| call.argument::<f32>(2 + MATRIX)).transpose()?;
            let output = 2 + MATRIX + usize::from(has_bias);
            let rotary = output + MATRIX;
            let mut next = rotary + 2;
            let mut vector_if = |name: &str| -> Result<Option<Tensor<'_, f32>>, Fault> {
                let is_there = call.optional_attribute::<bool>(name)?.unwrap_or(false);
                next += usize::from(is_there);
                is_there.then(|| call.argument::<f32>(next - 1)).transpose()
            };
            // Both norms of heads go by one attribute.
            let head_norms = [vector_if("head_norms")?, vector_if("head_norms")?];
            let (o_bias, post_norm) = (vector_if("o_bias")?, vector_if("post_norm")?);
            let block = Block {
                params,
                norm: Norm { weights: &norm, eps: call.attribute("norm_eps")? },
                qkv: matrix(call, 2)?,
                bias: bias.as_deref(),
                output: matrix(call, output)?,
                cos: call.argument::<f32>(rotary)?.as_slice(),
                sin: call.argument::<f32>(rotary + 1)?.as_slice(),
                rotary: call.argument::<f32>(rotary)?.dims::<2>()?[1],
                head_norms: match &head_norms {
                    [Some(queries), Some(keys)] => Some([queries.as_slice(), keys.as_slice()]),
                    _ => None,
                },
                o_bias: o_bias.as_deref(),
                post_norm: post_norm.as_deref(),
                step: step(call, call.arguments() - CONTEXT)?,
            };
            let (mut y, mut pool) = (call.result::<X>(0)?, call.result::<K>(1)?);
            let mut scales = K::Own::SCALED.then(|| call.result::<f32>(2)).transpose()?;
            let [rows, columns] = x.dims()?;
            expect("the input's size", columns, block.qkv.columns())?;
            expect("the result's size", y.len(), x.len())?;
            let scales = scales.as_deref_mut().unwrap_or_default();
            let rows = real_rows(call, 2, rows)?;
            let y = cleared(X::own_mut(&mut y), rows * columns);
            block.apply(&X::own(&x)[..rows * columns], K::own_mut(&mut pool), scales, y).map_err(Fault::invalid)
        })
    }
}
