//! Paged flash attention, `fa`: one call per layer of a kernel that writes the new keys and values into their pages and
//! attends to them.
//!
//! - On CPUs ([`cpu`]): native SIMD kernels of `torus-cpu`, whose [`pages`](torus_cpu::attention::pages) say how a pool
//!   lies in memory. Activations in f32 and bf16, caches in f32, bf16 and int8; heads and pages of a multiple of 16.
//! - On TPUs ([`tpu`]): the Mosaic kernel of `torus-attention`, for v5e, v6e and TPU7x. Activations in bf16, caches in
//!   bf16, fp8 and int8 with two scales a layer that the host sets (an even number of KV heads of 128 and 256, a multiple of
//!   4 of 64), heads of 64, 128 and 256, pages of 128. It compiles for these chips and is exact in the interpreter; it has
//!   never run on one.
//!
//! Both: causal attention in ragged batches of prompts and decoding sequences, grouped queries, sliding windows, soft
//! caps. Neither: attention sinks and trees of draft tokens, which the interface does not carry yet.

#![forbid(unsafe_code)]

mod cpu;
#[cfg(test)]
mod tests;
mod tpu;

use torus_abi::{
    attention::{AttentionAnswer, AttentionQuery, EmitAttention},
    author::Attention,
    fault::Fault,
    fragment::Package,
    kernel::Bf16,
};
use torus_cpu::ffi::attention::Attention as Kernel;

/// The backend. It has no state.
pub struct Flash;

torus_abi::declare_plugin! {
    name: "fa",
    description: "Paged flash attention: SIMD kernels on CPUs, Mosaic kernels on TPUs",
    attention: Flash,
    kernels: [
        Kernel<f32, f32>, Kernel<f32, Bf16>, Kernel<f32, i8>, Kernel<Bf16, f32>, Kernel<Bf16, Bf16>, Kernel<Bf16, i8>,
    ],
}

/// A kernel made for the target.
const SCORE: u32 = 100;

impl Attention for Flash {
    fn query(query: &AttentionQuery) -> Result<AttentionAnswer, Fault> {
        match query.target.platform.as_str() {
            "cpu" => Ok(cpu::query(query)),
            "tpu" => Ok(tpu::query(query).unwrap_or_else(AttentionAnswer::refuse)),
            other => Ok(AttentionAnswer::refuse(format!("it has no kernels for {other}"))),
        }
    }

    fn emit(request: &EmitAttention) -> Result<Package, Fault> {
        match request.query.target.platform.as_str() {
            "tpu" => tpu::emit(request),
            _ => cpu::emit(request),
        }
    }
}
