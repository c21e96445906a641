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
//! - [`root`] never changes. [`table`] only grows at the end; a reader checks `struct_size` before it reads a slot. What
//!   was released is listed in `released.rs`, and a change to it fails the build.
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
// Offsets are those of 64-bit targets, the only ones that servers run on.
#[cfg(target_pointer_width = "64")]
mod released;
pub mod root;
pub mod shard;
pub mod speculative;
pub mod step;
pub mod table;

pub use dtype::{DType, TensorType, TensorTypeError};

/// Version of the messages and tables together. It stays `0.x` until a speculative and an MoE plugin have shipped.
///
/// Tables that grow and messages that gain optional fields do not change it: older plugins work with newer hosts and
/// newer plugins with older hosts. It changes when something that was there no longer means what it meant: the minor
/// number below 1.0, the major one after.
pub const ABI_VERSION: (u32, u32) = (0, 1);

/// Whether a host and a plugin built with these versions of the API understand each other: same major version and,
/// below 1.0, same minor version.
pub const fn compatible(host: (u32, u32), plugin: (u32, u32)) -> bool {
    host.0 == plugin.0 && (host.0 > 0 || host.1 == plugin.1)
}

#[cfg(test)]
mod tests {
    use super::compatible;

    #[test]
    fn versions_are_compatible_within_a_major_and_below_one_within_a_minor() {
        assert!(compatible((0, 1), (0, 1)) && compatible((1, 0), (1, 7)) && compatible((1, 7), (1, 0)));
        assert!(!compatible((0, 1), (0, 2)) && !compatible((0, 2), (0, 1)));
        assert!(!compatible((0, 1), (1, 1)) && !compatible((2, 0), (1, 0)));
    }
}
