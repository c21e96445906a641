//! Runs models: assembles step programs, keeps them compiled, drives the step loop, samples.
//!
//! [`start`] loads in the background and returns a handle at once. A thread of its own then runs the model: it takes
//! requests from a channel, schedules and launches steps, and hands each step's tokens to another that puts them into the
//! streams. [`api`] is all that the HTTP server and the tools see of it.
//!
//! Deliberately absent: text (`torus-text`), protocols (`torus-http`), the order of requests (`torus-sched`).
//!
//! Invariants:
//! - Nothing is compiled once the engine is ready: the step loop holds finished programs only.
//! - Only the engine's thread touches its buffers after loading; the device itself and the memory budget are shared.
//! - A sampled token depends on the request's seed and the position, not on batch, bucket or order.
//! - A failed step ends no request but the one that causes it.

pub mod api;
mod blueprint;
mod budget;
mod compile;
pub mod config;
mod core;
mod delivery;
mod device;
mod handle;
mod kernels;
mod kv_scales;
mod load;
mod mailbox;
mod memory;
mod null;
mod pace;
mod pack;
mod profile;
mod program;
mod request;
mod requests;
mod results;
pub mod roofline;
mod sampling;
mod sink;
mod start;
mod stats;
#[cfg(test)]
mod testing;
mod watchdog;
mod weight_cache;

pub use blueprint::{Blueprint, StepKind};
pub use budget::{MemoryBudget, Shortage};
pub use compile::{AheadCompiler, AheadProgram, CompileError, Compiled, CompiledAhead};
pub use config::{EngineConfig, KvCacheDtype, NullConfig};
pub use device::{Device, client_options, compile_options};
pub use handle::EngineHandle;
pub use kernels::register_kernels;
pub use kv_scales::check as check_kv_scales;
pub use load::StartError;
pub use program::{AssembleError, Rows};
pub use start::{start, start_null};
