//! Errors that cross the boundary.

use serde::{Deserialize, Serialize};

/// Why a plugin refused a request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct Fault {
    pub code: FaultCode,
    pub message: String,
}

/// What kind of refusal it is. The numbers cross the boundary and never change.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FaultCode {
    /// The request asks for something this plugin does not do: a config field, a shape, a dtype.
    Unsupported = 1,
    /// The request is malformed or contradicts itself.
    Invalid = 2,
    /// The plugin panicked or broke an invariant of its own.
    Internal = 3,
}

impl FaultCode {
    pub fn number(self) -> u32 {
        self as u32
    }

    /// The code of a number; numbers of later versions read as [`FaultCode::Internal`].
    pub fn from_number(number: u32) -> Self {
        match number {
            1 => FaultCode::Unsupported,
            2 => FaultCode::Invalid,
            _ => FaultCode::Internal,
        }
    }
}

impl Fault {
    pub fn unsupported(message: impl Into<String>) -> Self {
        Self { code: FaultCode::Unsupported, message: message.into() }
    }

    pub fn invalid(message: impl Into<String>) -> Self {
        Self { code: FaultCode::Invalid, message: message.into() }
    }

    pub fn internal(message: impl Into<String>) -> Self {
        Self { code: FaultCode::Internal, message: message.into() }
    }
}
