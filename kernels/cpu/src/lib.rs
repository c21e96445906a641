//! Kernels for CPUs: linear layers over packed weights, paged attention, the small operations around them, sampling.
//!
//! Each kernel is a safe function over slices, with a code path for each [`Level`] of the machine, chosen at run time.
//! [`ffi`] wraps them as the native functions that a step program calls.
//!
//! Not here: which kernel serves which import of a program (the engine says so), who starts threads (the host; kernels
//! ask it through `torus_abi::kernel::parallel_for`), reading model files.
//!
//! Invariants:
//! - No kernel calls a BLAS, takes a lock, or allocates once its thread's [`workspace`] has grown to the largest call.
//! - All levels compute the same function; each is tested against a plain reference, and can be forced.
//! - Results do not depend on how many threads there are, as far as each output element is summed by one of them.

pub mod activations;
pub mod attention;
pub mod bench;
mod error;
pub mod ffi;
mod level;
mod linear;
pub mod math;
pub mod packed;
pub mod rotary;
pub mod sampling;
mod shared;
#[cfg(target_arch = "x86_64")]
mod tiles;
pub mod workspace;

pub use error::PackError;
pub use level::{LEVEL_VARIABLE, Level, level};
pub use linear::{
    Epilogue, Finished, Norm, Tile, gated_mlp, gated_mlp_fits, linear, linear_normed, linear_prepared, product,
};
