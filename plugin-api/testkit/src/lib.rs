//! Conformance tests that any plugin's author can run: cases and plain references for each kind of plugin.
//!
//! In a plugin's own tests, without a host and without a device:
//!
//! ```no_run
//! # use torus_abi::{attention::*, author::Attention, fault::Fault, fragment::Package};
//! # struct MyBackend;
//! # impl Attention for MyBackend {
//! #     fn query(_: &AttentionQuery) -> Result<AttentionAnswer, Fault> { Ok(AttentionAnswer::refuse("")) }
//! #     fn emit(_: &EmitAttention) -> Result<Package, Fault> { Ok(Package { fragment: Default::default() }) }
//! # }
//! torus_testkit::attention::check::<MyBackend>().assert();
//! ```
//!
//! [`attention::check`] and [`model::check`] look at what is emitted; [`attention::run`] and [`model::run`] also run it on
//! a [`Device`] and compare the numbers, which is what `torus plugins check` does with the built library.
//! [`speculative::check`] needs no device: the target model it decodes with is a small Markov chain.
//!
//! Deliberately absent: devices and the loading of libraries. Everything here is behind a trait ([`Device`],
//! [`attention::Backend`], [`model::Opened`], [`speculative::Proposer`]), so that a test and the host check alike.
//!
//! Invariants:
//! - Everything is drawn from fixed seeds: the same plugin gives the same report.
//! - A check that fails says which case, where, and what was expected; one that a plugin declines is no failure.

pub mod attention;
mod device;
pub mod model;
mod numbers;
mod program;
mod report;
mod signature;
pub mod speculative;
pub mod step;

pub use device::{Device, Tensor};
pub use report::{Finding, Outcome, Report};
