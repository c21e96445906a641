//! Why a graph could not be built.

use std::{fmt, panic::Location};

use torus_abi::fault::Fault;

use crate::Shape;

/// The first mistake made while a graph was built: always a defect of the code that builds it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub struct BuildError {
    /// The function being built, as its author named it.
    pub function: String,
    /// Where the operation was asked for.
    pub location: &'static Location<'static>,
    /// The operation, without its dialect: `dot_general`.
    pub operation: &'static str,
    pub operands: Vec<Shape>,
    pub reason: String,
}

impl fmt::Display for BuildError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { function, location, operation, operands, reason } = self;
        write!(f, "{}:{}: in '{function}': {operation}(", location.file(), location.line())?;
        for (i, operand) in operands.iter().enumerate() {
            let comma = if i == 0 { "" } else { ", " };
            write!(f, "{comma}{operand}")?;
        }
        write!(f, "): {reason}")
    }
}

impl From<BuildError> for Fault {
    fn from(error: BuildError) -> Self {
        Fault::internal(error.to_string())
    }
}
