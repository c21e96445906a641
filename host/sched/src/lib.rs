//! Requests, queues, budgets and batches: what the device computes next.
//!
//! [`Scheduler`] does continuous batching: each step takes one token of every sequence that decodes, and fills the rest
//! of the token budget with chunks of prompts. Prefixes that are cached are not computed again. Steps are pipelined:
//! a step may be scheduled while earlier ones run, with inputs that are still on the device.
//!
//! Deliberately absent: devices, sampling, text, clocks, threads, I/O. When a sequence ends is the caller's to say,
//! but for lengths.
//!
//! Invariants:
//! - Every admitted request ends exactly once, by the caller ([`Outcome::Finished`], [`Scheduler::abort`]) or with an
//!   [`Ended`].
//! - Pages that a step in flight may read or write belong to its sequences until it is complete.
//! - The prefix cache is given only pages whose tokens are known and computed.
//! - A request overtaken by [`OVERTAKEN_MAX`] others goes first, whatever the policy.

#![forbid(unsafe_code)]

mod admit;
mod complete;
mod policy;
mod recovery;
mod scheduler;
mod sequence;
mod sequences;
#[cfg(test)]
mod sim;
mod types;

pub use policy::{OVERTAKEN_MAX, Policy};
pub use scheduler::Scheduler;
pub use types::{
    AdmitError, Batch, BatchId, Config, Ended, Outcome, PrefillLimit, Request, RequestId, Row, SlotId, Stats,
};
