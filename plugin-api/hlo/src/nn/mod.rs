//! Layers in terms of operations. All of them compute in f32 inside and round their result once, so bf16 models lose
//! nothing between the steps of a layer.

mod activation;
mod blocks;
mod norm;
mod rope;

pub(crate) use blocks::{attention_block_default, gated_mlp_default};
pub use rope::{Frequencies, LongRope, Rope, RopeScaling, Yarn};
