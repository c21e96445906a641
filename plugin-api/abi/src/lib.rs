//! The stable boundary between the Torus host and its plugins.
//!
//! A plugin is a compiler front end: it answers requests with *program fragments* (StableHLO text with signatures) and
//! never touches a device. What crosses the boundary is bytes: JSON messages ([`model`], [`attention`]) that carry
//! [`fragment::Fragment`]s. Below them lie a frozen root ([`root`]) and append-only function tables ([`table`]).
//!
//! Deliberately absent: device buffers (but for the views of native kernels on the CPU, [`kernel`]), PJRT handles, trait objects, futures, Rust enums with payload, shared
//! allocators, and everything that knows the host.
//!
//! Invariants:
//! - [`root`] never changes. [`table`] only grows at the end; a reader checks `struct_size` before it reads a slot.
//! - Messages only gain optional fields; unknown fields are ignored; unknown variants are an error that names them.
//! - No panic crosses: every exported function catches it and answers with a [`fault::Fault`].
//! - The same request gives byte-identical answers.

pub mod attention;
pub mod author;
mod dtype;
pub mod export;
pub mod fault;
pub mod fragment;
pub mod kernel;
pub mod log;
pub mod manifest;
pub mod model;
pub mod root;
pub mod speculative;
pub mod step;
pub mod table;

pub use dtype::{DType, TensorType, TensorTypeError};

/// Version of the messages and tables together. It stays `0.x` until a speculative and an MoE plugin have shipped.
pub const ABI_VERSION: (u32, u32) = (0, 1);
