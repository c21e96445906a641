//! Kernels for TPUs: written in Rust, printed as the text that libtpu compiles, and run on a CPU to check them.
//!
//! ```
//! use torus_mosaic::{Array, CallOptions, Elem, Generation, Interpreter, Kernel, RunOptions, Space};
//!
//! // Adds up the rows of pages that a table names.
//! let kernel = Kernel::build("sum_pages", |k| {
//!     let table = k.prefetch(Elem::I32.of([3]));
//!     let pages = k.input(Space::Hbm, Elem::F32.of([16, 8, 128]));
//!     let out = k.output(Space::Vmem, Elem::F32.of([1, 128]));
//!     let page = k.scratch(Space::Vmem, Elem::F32.of([8, 128]));
//!     let arrived = k.dma_semaphores(&[]);
//!     let zero = k.zeros(Elem::F32.of([1, 128]));
//!     let sum = k.for_range(0, 3, &[zero], |i, sum| {
//!         let copy = pages.at((table.get((i,)),)).copy_to(page, arrived);
//!         copy.start();
//!         copy.wait();
//!         vec![sum[0] + page.load().sum(0)]
//!     });
//!     out.store(sum[0]);
//! })?;
//!
//! // As StableHLO, which PJRT compiles for a TPU that need not be there.
//! let program = kernel.program(&CallOptions::new(Generation::V6e))?;
//! assert!(program.contains("tpu_custom_call"));
//!
//! // On this machine. A page that was not waited for, or one behind the end, would be an error that names the line.
//! let operands = [
//!     Array::from_i32(Elem::I32.of([3]), &[4, 15, 0]),
//!     Array::from_f32(Elem::F32.of([16, 8, 128]), &[0.5; 16 * 8 * 128]),
//! ];
//! let outcome = Interpreter::new(&kernel).run(&operands, &RunOptions::default())?;
//! assert_eq!(outcome.outputs[0].to_f32(), [12.0; 128]);
//! assert_eq!(outcome.counters.bytes_in, 3 * 4096);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! A [`Builder`] collects memories ([`Ref`]), values in registers ([`Value`]: scalars and vectors), [`Semaphore`]s and
//! operations, in typed SSA form with regions for loops and branches. The finished [`Kernel`] prints itself in any
//! version of the format ([`Kernel::text`]), becomes a custom call in a StableHLO graph ([`Kernel::custom_call`]) or a
//! program of its own ([`Kernel::program`]), and is run by an [`Interpreter`], whose documentation says what of it is
//! exact and what is modelled ([`interpret`]). What libtpu makes of it is read by [`schedule`].
//!
//! Deliberately absent:
//! - grids and windows: kernels loop and copy by themselves, operands in VMEM are there as a whole;
//! - several cores, remote copies, barriers, SparseCores;
//! - masked loads (load and [`Value::select`]), products of more than two axes, gathers across registers;
//! - what the compiler knows better: which layouts and alignments a generation takes, whether registers suffice, cycles.
//!
//! Invariants:
//! - Building never panics and no operation returns a `Result`: the first mistake is kept with its place in the caller's
//!   code, all that depends on it is silent, and [`Kernel::build`] returns it.
//! - The same calls give the same bytes, and the same operands the same outcome.
//! - What is printed is what is run: there is one representation, and the interpreter adds nothing to it.
//! - Every operation and every version of the format here was accepted by libtpu 0.0.52 for v5e, v6e and TPU7x; the
//!   tests say so. None was ever run on a TPU.

#![forbid(unsafe_code)]

mod builder;
mod call;
mod error;
pub mod interpret;
mod ir;
mod kernel;
mod ops;
mod print;
pub mod schedule;
mod target;
mod types;
mod value;

#[cfg(test)]
mod tests;

pub use builder::Builder;
pub use call::{CallError, CallOptions, CostEstimate};
pub use error::BuildError;
pub use interpret::{
    Array, Completion, CopyRaces, Counters, Fault, FaultKind, Interpreter, Outcome, Place, RunError, RunOptions,
};
pub use ir::Scalar;
pub use kernel::{Footprint, Kernel, MAX_RANK, Operand, Output};
pub use ops::{Contract, Dim, Dma, IntoIndices, Position, ds, ds_dynamic, strided};
pub use print::{VERSIONS, VersionError};
pub use target::Generation;
pub use types::{Elem, Space, Tensor};
pub use value::{IntoValue, Ref, Semaphore, Value};
