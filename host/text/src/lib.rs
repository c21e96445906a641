//! Text at the edges of the engine, which itself knows only token ids.
//!
//! On the way in: [`ChatTemplate`] renders a conversation to a prompt, [`Tokenizer`] turns text into tokens. On the way
//! out: [`Detokenizer`] turns tokens into text as they come, [`StopMatcher`] ends it at stop strings, and [`TextStream`]
//! is the two together for one request.
//!
//! Tokenizers are read from Hugging Face's files or from GGUF metadata ([`GgufTokenizer`]), byte-level BPE and SentencePiece
//! with byte fallback. Left out on purpose: fetching files, reading GGUF files, clocks, and any truncation or clean-up of
//! text.
//!
//! Invariants:
//! - What streams out does not depend on how tokens are divided among calls, and joined it is the text of the whole.
//! - No part of a stream ends inside a character, and none contains text that a stop string may yet take back.
//! - A prompt rendered from a chat template is encoded as it is: no token is added to it.
//! - Templates and texts may be hostile. They end in an error within bounded time, never in a crash; memory is bounded
//!   but for one gap of the template engine, told in `template.rs`.
#![forbid(unsafe_code)]

mod detokenizer;
mod error;
mod files;
mod pieces;
mod stop;
mod stream;
mod template;
#[cfg(test)]
mod testing;
mod tokenizer;
mod utf8;

pub use crate::{
    detokenizer::{DetokenizeOptions, Detokenizer},
    error::TextError,
    stop::{StopMatcher, StopOutcome},
    stream::{Delta, TextStream, TextStreamOptions},
    template::{ChatInput, ChatTemplate, ChatTemplateSource, ContentFormat, TemplateLimits},
    tokenizer::{GgufTokenizer, Tokenizer},
};
