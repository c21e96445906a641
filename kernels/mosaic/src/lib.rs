#![doc = "placeholder"]
#![forbid(unsafe_code)]

mod builder;
mod call;
mod error;
mod interpret;
mod ir;
mod kernel;
mod ops;
mod print;
mod target;
mod types;
mod value;

#[cfg(test)]
mod tests;

pub use builder::Builder;
pub use call::{CallError, CallOptions, CostEstimate};
pub use error::BuildError;
pub use interpret::{Array, Completion, CopyRaces, Counters, Fault, FaultKind, Interpreter, Outcome, Place, RunError, RunOptions};
pub use kernel::{Footprint, Kernel, MAX_RANK, Operand, Output};
pub use ops::{Contract, Copy, Dim, IntoIndices, ds, ds_dynamic, strided};
pub use print::{VERSIONS, VersionError};
pub use target::Generation;
pub use types::{Elem, Space, Tensor};
pub use value::{IntoValue, Ref, Semaphore, Value};
