//! What can go wrong, told apart by what the operator can do about it.

use std::{fmt, io, path::PathBuf, ptr::NonNull};

use pjrt_sys::PJRT_Error;

use crate::{
    args::{Api, Function, args, copy_text},
    plugin::{API_MAJOR, TABLE_BYTES},
};

/// The result of whatever may fail in this crate.
pub type Result<T, E = PjrtError> = std::result::Result<T, E>;

/// An error of this crate or of a plugin.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PjrtError {
    /// There is no such file, or it cannot be reached: correct the path, or fetch the plugin.
    #[error("PJRT plugin {} cannot be opened: {reason}", path.display())]
    PluginMissing { path: PathBuf, reason: io::Error },

    /// The dynamic loader refuses the file: it is damaged, for another machine, or lacks a library it needs.
    #[error("{} is not a shared library that loads here: {reason}", path.display())]
    NotALibrary { path: PathBuf, reason: String },

    /// A library without (a working) `GetPjrtApi`: correct the path.
    #[error("{} is a shared library, but not a PJRT plugin: {reason}", path.display())]
    NotAPlugin { path: PathBuf, reason: String },

    /// Too old, or of another major version: use another version of the plugin.
    #[error(
        "PJRT plugin {} speaks API {major}.{minor} with a table of {table_bytes} bytes, but major version {API_MAJOR} and \
         at least {TABLE_BYTES} bytes are needed: use another version of the plugin",
        path.display()
    )]
    IncompatibleApi { path: PathBuf, major: i32, minor: i32, table_bytes: usize },

    /// The plugin's own start failed, for instance because its hardware is missing or in use.
    #[error("PJRT plugin {} refused to start: {reason}", path.display())]
    InitializeFailed { path: PathBuf, reason: Box<PjrtError> },

    /// The plugin's function table ends before this function, or its slot is empty.
    #[error("this PJRT plugin has no {function}")]
    Unsupported { function: &'static str },

    /// The plugin itself reports an error.
    #[error("{function}: {message} ({code})")]
    Plugin { function: &'static str, code: ErrorCode, message: String },

    /// Memory of the host, not of a device; a device's is [`ErrorCode::ResourceExhausted`].
    #[error("no memory for {bytes} bytes on the host")]
    OutOfMemory { bytes: usize },

    /// Refused by this crate before the plugin was called, or nonsense from the plugin.
    #[error("{0}")]
    Invalid(String),

    /// Names of handlers are taken for ever: choose one that is unique to the library and its version.
    #[error("an FFI handler named `{target}` is already registered for {platform} in this process, at another address")]
    DuplicateHandler { target: String, platform: String },
}

impl PjrtError {
    /// The plugin's own code, if it is the plugin that reports this error.
    pub fn code(&self) -> Option<ErrorCode> {
        match self {
            Self::Plugin { code, .. } => Some(*code),
            Self::InitializeFailed { reason, .. } => reason.code(),
            _ => None,
        }
    }

    /// Whether the plugin lacks what was asked, by its table or by its own word.
    pub fn is_unsupported(&self) -> bool {
        matches!(self, Self::Unsupported { .. } | Self::Plugin { code: ErrorCode::Unimplemented, .. })
    }
}

macro_rules! error_codes {
    ($($number:literal $code:ident $text:literal,)*) => {
        /// The status codes that plugins use (Abseil's canonical codes).
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[non_exhaustive]
        pub enum ErrorCode { $($code,)* }

        impl ErrorCode {
            fn from_raw(number: u32) -> Self {
                match number {
                    $($number => Self::$code,)*
                    _ => Self::Unknown,
                }
            }
        }

        impl fmt::Display for ErrorCode {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(match self { $(Self::$code => $text,)* })
            }
        }
    };
}

error_codes! {
    1 Cancelled "cancelled",
    2 Unknown "unknown",
    3 InvalidArgument "invalid argument",
    4 DeadlineExceeded "deadline exceeded",
    5 NotFound "not found",
    6 AlreadyExists "already exists",
    7 PermissionDenied "permission denied",
    8 ResourceExhausted "resource exhausted",
    9 FailedPrecondition "failed precondition",
    10 Aborted "aborted",
    11 OutOfRange "out of range",
    12 Unimplemented "unimplemented",
    13 Internal "internal",
    14 Unavailable "unavailable",
    15 DataLoss "data loss",
    16 Unauthenticated "unauthenticated",
}

/// Copies a plugin's error and frees the original.
///
/// # Safety
/// `error` came from this plugin, is owned by the caller, and is not used again.
pub(crate) unsafe fn take_error(api: Api, error: NonNull<PJRT_Error>, function: &'static str) -> PjrtError {
    let error = error.as_ptr();
    // SAFETY: the error is alive until the end of this function, and so is the text it owns. The three slots lie within
    // the part of the table that every accepted plugin has.
    unsafe {
        let mut text = args!(PJRT_Error_Message_Args { error: error });
        if let Some(message) = (*api.table()).PJRT_Error_Message {
            message(text.as_mut_ptr());
        }
        let message = copy_text(text.message, text.message_size).trim_end().to_owned();

        // Not through `Api::call`: an error about this error would need converting in turn.
        let mut code = args!(PJRT_Error_GetCode_Args { error: error });
        if let Some(get_code) = pjrt_sys::PJRT_Error_GetCode_Args::slot(api.table()) {
            get_code(code.as_mut_ptr());
        }

        let mut owned = args!(PJRT_Error_Destroy_Args { error: error });
        if let Some(destroy) = (*api.table()).PJRT_Error_Destroy {
            destroy(owned.as_mut_ptr());
        }
        PjrtError::Plugin { function, code: ErrorCode::from_raw(code.code), message }
    }
}
