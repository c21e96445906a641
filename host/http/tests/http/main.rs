//! The server from outside: real connections on the loopback device, over an engine that says what it is told to say.
#![expect(clippy::unwrap_used, reason = "helpers of tests fail the test")]

mod admin;
mod chat;
mod completions;
mod engine;
mod generate;
mod guard;
mod leaving;
mod operate;
mod refusals;
mod support;
