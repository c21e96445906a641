//! What a kernel does wrong when it runs.

use std::{fmt, panic::Location};

/// The first thing that went wrong, with the place in the kernel's source that asked for it.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub struct Fault {
    pub kind: FaultKind,
    /// The operation, as [`crate::Counters::ops`] names it.
    pub operation: &'static str,
    pub location: &'static Location<'static>,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}: {}: {}", self.location.file(), self.location.line(), self.operation, self.kind)
    }
}

#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum FaultKind {
    #[error("{size} elements from {start} along axis {axis} do not lie within {whole}")]
    OutOfBounds { axis: usize, start: i64, size: usize, whole: usize },
    #[error("an index is {index}, and the axis has {size} lanes")]
    Index { index: i64, size: usize },
    #[error("it reads what the copy started at {started} may still be writing: wait for the copy first")]
    ReadInFlight { started: Place },
    #[error("it writes what the copy started at {started} may still be reading or writing: wait for the copy first")]
    WriteInFlight { started: Place },
    #[error("it writes into operand {operand}, which no output takes over (`Builder::output_in_place`)")]
    OperandWritten { operand: usize },
    #[error("a copy of {source_dims:?} to {destination_dims:?}: they must be equal")]
    CopyShapes { source_dims: Vec<usize>, destination_dims: Vec<usize> },
    #[error(
        "it waits for {bytes} bytes, and copies of only {outstanding} that were started on this semaphore have not been \
         waited for: on a TPU it would hang"
    )]
    NothingToWaitFor { bytes: usize, outstanding: usize },
    #[error("{bytes} bytes of copies on a semaphore, the first started here, were never waited for")]
    NeverWaitedFor { bytes: usize },
    #[error("it waits for {wanted}, and the semaphore is at {count}: on a TPU it would hang")]
    SemaphoreHangs { wanted: i64, count: i64 },
    #[error("a semaphore ends at {count}, last signalled here: it must end at 0")]
    SemaphoreLeft { count: i64 },
    #[error("a semaphore cannot count {count}")]
    NegativeCount { count: i64 },
    #[error("a {what} depends on memory that was never written")]
    UndefinedControl { what: &'static str },
    #[error("memory that was never written reaches the output {output} in HBM")]
    UndefinedOutput { output: usize },
    #[error("{value} is no multiple of {multiple}")]
    NotMultiple { value: i32, multiple: u32 },
    #[error("division by zero")]
    DivisionByZero,
    #[error("a loop's step is {step}")]
    Step { step: i32 },
    #[error("the box is not contiguous, or splits rows of packed elements")]
    NotContiguous,
    #[error("the kernel ran {limit} operations and has not ended (`RunOptions::max_ops`)")]
    Endless { limit: u64 },
}

/// A line of source.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Place(pub &'static Location<'static>);

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.0.file(), self.0.line())
    }
}
