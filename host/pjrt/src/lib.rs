//! A safe client for PJRT, the C interface through which XLA serves CPUs, TPUs and GPUs.
//!
//! A [`Plugin`] is a shared library that exports `GetPjrtApi`. From it come a [`Client`] (devices, [`Buffer`]s, programs
//! that run) or a [`Topology`] (devices that need not exist, programs that are only compiled). Programs are StableHLO
//! text. Everything is asynchronous underneath: executing returns at once with buffers whose contents arrive later,
//! and an [`Event`] tells when.
//!
//! Left out on purpose: what programs mean, where plugins are found or fetched, caches of compiled programs, and any
//! policy about devices. Those belong to the crates above.
//!
//! What holds everywhere in this crate:
//!
//! - It is the only crate that names PJRT types, and none of them appears in its public interface.
//! - Any plugin of API major 0 can be used, older or newer than the header this was built with: argument structs are
//!   padded with zeros (`args.rs`), and a function that the plugin's table does not reach is
//!   [`PjrtError::Unsupported`], never a wild call.
//! - A loaded plugin stays loaded until the process ends, so its function table lives for ever.
//! - Every object keeps the client it came from alive. Objects of two clients never meet in one call.
//! - Memory that a device may still read or write is kept until the device says that it is done.
//! - PJRT objects may be used from several threads at once, so every type here is `Send + Sync`.

mod args;
mod buffer;
mod bytes;
mod client;
mod compile;
mod element;
mod error;
mod event;
mod executable;
mod execute;
pub mod ffi;
mod plugin;
#[cfg(test)]
mod testing;
mod topology;
mod traffic;
mod value;

pub use buffer::{Buffer, HostCopy};
pub use bytes::AlignedBytes;
pub use client::{Client, ClientOptions, Device, DeviceMemoryStats};
pub use compile::{CompileOptions, OverrideValue};
pub use element::ElementType;
pub use error::{ErrorCode, PjrtError, Result};
pub use event::Event;
pub use executable::{Executable, MemoryStats};
pub use execute::{ExecuteOptions, Execution, LoadedExecutable};
pub use plugin::{Plugin, prepare_libtpu_environment};
pub use topology::{DeviceDescription, Topology};
pub use traffic::{Collective, Traffic};
pub use value::OptionValue;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_can_be_shared_between_threads() {
        fn shared<T: Send + Sync>() {}
        shared::<(Plugin, Client, Device, Buffer, HostCopy, Event)>();
        shared::<(LoadedExecutable, Executable, Topology, AlignedBytes, PjrtError)>();
    }
}
