//! Why a kernel could not be built.

use std::{fmt, panic::Location};

/// The first mistake made while a kernel was built: always a defect of the code that builds it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub struct BuildError {
    pub kernel: String,
    /// Where the operation was asked for.
    pub location: &'static Location<'static>,
    /// The operation, without its dialect: `matmul`.
    pub operation: &'static str,
    /// Types of the operands, as MLIR spells them.
    pub operands: Vec<String>,
    pub reason: String,
}

impl fmt::Display for BuildError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { kernel, location, operation, operands, reason } = self;
        let (file, line) = (location.file(), location.line());
        write!(f, "{file}:{line}: in '{kernel}': {operation}({}): {reason}", operands.join(", "))
    }
}
