//! TPU kernels for products whose weights are read from HBM once, and for copies of KV pages.
//!
//! - [`Matmul`]: rows in `bf16` times a [`Weights`] in `bf16`, integers of 8 or 4 bits, or 8-bit floats, with scales for
//!   outputs and groups of inputs. With experts, each row meets the weights of its own; experts without rows are not
//!   read.
//! - [`PageCopy`]: pages of a pool copied to others, of the same or another pool.
//!
//! Both give a kernel of `torus-mosaic` and the call of it in a StableHLO graph ([`Matmul::emit`], [`PageCopy::emit`]).
//!
//! Deliberately absent: who calls them (the host's `linear` and `moe`), zero points (only symmetric quantization), the
//! activation between two products of an expert, sharding (each device has its own part of the weights).
//!
//! Invariants:
//! - The kernels were compiled by libtpu for v5e, v6e and TPU7x, and run by the interpreter of `torus-mosaic` against
//!   plain loops. None was ever run on a TPU.
//! - A shape that has no kernel is an error that says what to change, never a slower or wrong kernel.

#![forbid(unsafe_code)]

mod emit;
mod error;
mod kernel;
mod multiply;
mod pages;
mod product;
mod tuned;
mod weights;

#[cfg(test)]
mod tests;

pub use emit::Operands;
pub use error::MatmulError;
pub use pages::PageCopy;
pub use product::{Activations, Matmul, Tiles};
pub use weights::{Format, Layout, Weights, interleave_float8, pack_int4};
