//! Finds, checks and loads plugins, keeps a registry of them, and links the fragments they emit.
//!
//! A plugin is either linked into the binary or loaded from a shared library; both offer the same entry
//! (`torus_abi::export::PluginEntry`) and are used through [`Plugin`].
//!
//! Deliberately absent: compiling and running what is linked (`torus-engine`), and unloading: code that was loaded
//! stays mapped until the process ends, because nothing in it can be proved unreachable.
//!
//! Invariants:
//! - Only this crate opens plugin libraries, and only copies of them under their content's hash, so that a file
//!   overwritten by its author never changes under a running server.
//! - A plugin that cannot be used is an error with its path and reason, never left out silently.
//! - The linker compares signatures; it never reads a function's body, but for the targets of kernels that
//!   the function lists.
//!
//! Plugins run in this process with its full rights. Their panics are caught; a segmentation fault is not.

mod elf;
mod error;
mod kernels;
mod library;
pub mod link;
mod plugin;
mod registry;
mod search;
mod speculative;
mod threads;

pub use error::{CallError, LinkError, LoadError};
pub use kernels::Kernels;
pub use library::LibraryCache;
pub use plugin::{AttentionInterface, ModelInterface, OpenModel, Origin, Plugin};
pub use registry::{Registry, RegistryError, Update};
pub use search::{SearchPath, candidates};
pub use speculative::{Drafts, SpeculativeInterface, Speculator};
pub use threads::{kernel_threads_are_idle, limit_kernel_threads, pin_kernel_threads};
