//! The output text of one request: detokenization and stop strings together.

use std::sync::Arc;

use crate::{DetokenizeOptions, Detokenizer, StopMatcher, TextError, Tokenizer};

/// How the tokens of a request become its output text.
#[derive(Clone, Debug, Default)]
pub struct TextStreamOptions {
    pub detokenize: DetokenizeOptions,
    /// Strings that end the text.
    pub stop: Vec<String>,
    /// The stop string that ended the text is part of it (`no_stop_trim`).
    pub include_stop: bool,
    /// Tokens that have no text here, though they may have some elsewhere: those that end the sequence.
    pub hidden_tokens: Vec<u32>,
}

/// What some more tokens came to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Delta {
    /// New output text; text that may be the beginning of a stop string comes once that is decided.
    pub text: String,
    /// The stop string that ended the text.
    pub stopped: Option<String>,
    /// How many of the pushed tokens belong to the output: all, or those up to the one that completed the stop string.
    pub tokens_consumed: usize,
}

/// Output text of one request, from its tokens.
///
/// What comes out does not depend on how the tokens are divided among calls.
#[derive(Clone)]
pub struct TextStream {
    detokenizer: Detokenizer,
    matcher: StopMatcher,
    stop: Vec<String>,
    hidden_tokens: Vec<u32>,
}

impl TextStream {
    pub fn new(tokenizer: Arc<Tokenizer>, options: TextStreamOptions) -> Result<Self, TextError> {
        Ok(Self {
            detokenizer: Detokenizer::new(tokenizer, options.detokenize),
            matcher: StopMatcher::new(options.stop.clone(), options.include_stop)?,
            stop: options.stop,
            hidden_tokens: options.hidden_tokens,
        })
    }

    /// Takes the next tokens. After a stop string none are consumed any more.
    pub fn push(&mut self, ids: &[u32]) -> Delta {
        let mut delta = Delta::default();
        for &id in ids {
            if self.matcher.matched().is_some() {
                break;
            }
            delta.tokens_consumed += 1;
            if !self.hidden_tokens.contains(&id) {
                let text = self.detokenizer.push(&[id]);
                delta.text.push_str(&self.matcher.push(&text).emit);
            }
        }
        delta.stopped = self.stopped();
        delta
    }

    /// The text still held back, when no more tokens come.
    pub fn finish(&mut self) -> Delta {
        let rest = self.detokenizer.finish();
        let mut text = self.matcher.push(&rest).emit;
        text.push_str(&self.matcher.finish());
        Delta { text, stopped: self.stopped(), tokens_consumed: 0 }
    }

    fn stopped(&self) -> Option<String> {
        self.matcher.matched().map(|index| self.stop[index].clone())
    }
}

#[cfg(test)]
#[path = "stream/tests.rs"]
mod tests;
