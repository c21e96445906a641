//! Ragged paged flash attention for TPUs, as one Mosaic kernel per layer: decoding sequences, chunks of prompts and
//! both together, with the new keys and values written into their pages.
//!
//! - [`spec`]: what a kernel is made for, and what is refused.
//! - [`layout`]: how keys and values lie in HBM.
//! - [`queue`]: what the kernel is told of a batch.
//! - [`launch`]: operands, and the order of the kernel's parts, `decode` and `prefill`.
//! - [`graph`]: both in a step program.
//! - [`tuned`]: sizes that make it fast.
//! - [`cost`], [`route`]: what a batch moves and computes, and its way through the compiler's schedule.
//! - [`reference`]: the same attention in plain loops.

#![forbid(unsafe_code)]

pub mod cost;
mod decode;
pub mod graph;
pub mod launch;
pub mod layout;
mod prefill;
pub mod queue;
pub mod reference;
pub mod route;
pub mod spec;
pub mod tuned;

#[cfg(test)]
mod tests;

pub use cost::Work;
pub use launch::{call_options, check, kernel};
pub use layout::Layout;
pub use queue::Queue;
pub use route::Route;
pub use spec::{KvFormat, Scales, Shape, Spec, Unsupported};
pub use torus_mosaic::Generation;
pub use tuned::{Tiles, Tuning};
