//! Paged attention in plain StableHLO: the oracle for every other backend, and what runs where there is no faster one.
//!
//! K and V of a layer are two pools `[slots, kv_heads, head_dim]`; a slot is `page * page_size + offset`. A step writes
//! the new rows and then walks over blocks of pages of each token's sequence, keeping a running softmax (Milakov and
//! Gimelshein, "Online normalizer calculation for softmax", 2018). Memory grows with tokens times a block, never with
//! tokens times context.
//!
//! Does: causal attention, grouped queries, sliding windows, soft caps; f32 and bf16, with sums in f32; caches in f32, bf16
//! and `f8e4m3fn` with the host's scales for each layer. Does not: other caches of 8 bits, attention sinks, custom masks.

#![forbid(unsafe_code)]

mod graph;
#[cfg(test)]
mod tests;

use torus_abi::{
    DType, TensorType,
    attention::{AttentionAnswer, AttentionQuery, EmitAttention, scales_type},
    author::Attention,
    fault::Fault,
    fragment::Package,
};

/// The backend. It has no state.
pub struct Native;

torus_abi::declare_plugin! {
    name: "native",
    description: "Paged attention in plain StableHLO",
    attention: Native,
}

/// Plain StableHLO: any kernel made for a target scores higher.
const SCORE: u32 = 1;

impl Attention for Native {
    fn query(query: &AttentionQuery) -> Result<AttentionAnswer, Fault> {
        let AttentionQuery { spec, dtype, kv_dtype, shape, .. } = query;
        let float = |dtype: DType| matches!(dtype, DType::F32 | DType::Bf16);
        if !float(*dtype) || !(float(*kv_dtype) || *kv_dtype == DType::F8E4M3) {
            let reason = format!("it computes in f32 and bf16, not {dtype} with a cache of {kv_dtype}");
            return Ok(AttentionAnswer::refuse(reason));
        }
        if spec.kv_heads == 0 || !spec.q_heads.is_multiple_of(spec.kv_heads) {
            let reason = format!("{} query heads do not divide among {} KV heads", spec.q_heads, spec.kv_heads);
            return Ok(AttentionAnswer::refuse(reason));
        }
        let Some(slots) = shape.pages.checked_mul(shape.page_size).filter(|slots| *slots <= i32::MAX as u64) else {
            return Ok(AttentionAnswer::refuse("the pool has more slots than an i32 can count"));
        };
        let part = TensorType::new(graph::stored(*kv_dtype), [slots, spec.kv_heads, spec.head_dim]);
        let mut pool = vec![part.clone(), part];
        let scales = graph::has_scales(query).then_some(pool.len());
        pool.extend(scales.map(|_| scales_type()));
        let row_bytes = spec.kv_heads * spec.head_dim * kv_dtype.bytes() as u64;
        Ok(AttentionAnswer {
            score: SCORE,
            reason: String::new(),
            pool,
            page_bytes: 2 * shape.page_size * row_bytes,
            inputs: graph::INPUTS.to_vec(),
            context: graph::context_types(shape),
            layout: None,
            scales,
        })
    }

    fn emit(request: &EmitAttention) -> Result<Package, Fault> {
        Ok(Package { fragment: graph::emit(request)? })
    }
}
