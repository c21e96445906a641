//! Runs models: assembles step programs, keeps them compiled, drives the step loop, samples.
//!
//! [`api`] is the only part that the HTTP server and the tools see.

pub mod api;
