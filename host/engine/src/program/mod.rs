//! Step programs: what they take, how they are put together.

mod assemble;
mod imports;
mod layout;
mod loops;
mod native;
mod rows;
mod weights;

pub use assemble::AssembleError;
pub(crate) use assemble::{Arguments, Assembler, Program, ScalePart};
pub use layout::Rows;
pub(crate) use layout::{Field, StepBuffer, StepBytes, StepLayout, flag, result};
pub(crate) use rows::{LOAD_ENTRIES, initial_state, load_pages, load_row};
pub(crate) use weights::{Place, WeightMap};
