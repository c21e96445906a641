//! Runs models: assembles step programs, keeps them compiled, drives the step loop, samples.
//!
//! [`api`] is the only part that the HTTP server and the tools see.

pub mod api;
mod compile;
pub mod config;
mod device;
mod handle;
mod load;
mod memory;
mod program;
mod request;
mod sampling;
#[cfg(test)]
mod testing;
