//! Wire types of the HTTP APIs: OpenAI's chat and text completions, the native `/generate`, models and errors.
//!
//! Requests say what a client wrote, with its names and its defaults still open: every optional field is an `Option`,
//! and ranges are the server's to check. Responses are written the way SGLang-JAX writes them, nulls included.
//! Left out on purpose: input and output, validation against a model, and everything about tokens but their ids.
//!
//! Invariants:
//! - Memory is bounded by the body: lists, maps and free-form JSON have limits ([`limits`]) that hold *while* they are
//!   read, so a small body cannot become a large structure.
//! - No field is dropped silently. A feature that does not exist is an [`Unsupported`] field, which knows whether it was
//!   asked for; hints that cannot change an answer are [`Ignored`]; anything else unknown is an error.
#![forbid(unsafe_code)]

pub mod chat;
pub mod completion;
pub mod error;
pub mod generate;
mod json;
pub mod limits;
pub mod model;
mod prompt;
mod scalar;
mod usage;

pub use crate::{
    json::BoundedJson,
    prompt::{Prompt, TokenPrompt},
    scalar::{Ignored, Int, LogitBias, Number, OneOrMany, Unsupported},
    usage::{CachedTokens, Matched, Usage, UsageChunk, UsageWithoutNulls},
};
