//! The text of one sequence, as its tokens come.

use std::sync::Arc;

use torus_text::{DetokenizeOptions, Detokenizer, StopMatcher, TextError, Tokenizer};

/// How tokens become output text.
#[derive(Clone, Debug, Default)]
pub(crate) struct TextOptions {
    pub detokenize: DetokenizeOptions,
    /// Strings that end the text.
    pub stop: Vec<String>,
    /// The stop string or token that ended the text is part of it.
    pub include_stop: bool,
    /// Stop strings are looked for in the text of later tokens only.
    pub min_tokens: usize,
    /// Tokens that end the sequence.
    pub end_tokens: Vec<u32>,
}

/// Detokenizer and stop strings of one sequence. Beyond [`torus_text::TextStream`] it knows where each token begins in
/// the text, which logprobs tell, and when stop strings begin to count.
pub(crate) struct OutputText {
    detokenizer: Detokenizer,
    matcher: StopMatcher,
    options: Arc<TextOptions>,
    tokens: usize,
    chars: usize,
}

/// What became of a token.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Placed {
    /// Where its text begins, in characters.
    pub char_offset: usize,
    /// It ended the sequence and is left out of the output.
    pub is_hidden: bool,
    /// The stop string that it completed. No token may follow.
    pub stopped: Option<String>,
}

impl OutputText {
    pub fn new(tokenizer: Arc<Tokenizer>, options: Arc<TextOptions>) -> Result<Self, TextError> {
        let detokenizer = Detokenizer::new(tokenizer, options.detokenize);
        let matcher = StopMatcher::new(options.stop.clone(), options.include_stop)?;
        Ok(Self { detokenizer, matcher, options, tokens: 0, chars: 0 })
    }

    /// Takes the next token and appends to `text` what is now certain to be output.
    pub fn push(&mut self, id: u32, text: &mut String) -> Placed {
        let char_offset = self.chars;
        self.tokens += 1;
        if !self.options.include_stop && self.options.end_tokens.contains(&id) {
            return Placed { char_offset, is_hidden: true, stopped: None };
        }
        let piece = self.detokenizer.push(&[id]);
        self.chars += piece.chars().count();
        if self.tokens < self.options.min_tokens {
            text.push_str(&piece);
            return Placed { char_offset, is_hidden: false, stopped: None };
        }
        let outcome = self.matcher.push(&piece);
        text.push_str(&outcome.emit);
        let stopped = outcome.matched.and_then(|index| self.options.stop.get(index).cloned());
        Placed { char_offset, is_hidden: false, stopped }
    }

    /// Appends what was held back, once no more tokens come.
    pub fn finish(&mut self, text: &mut String) {
        let rest = self.detokenizer.finish();
        text.push_str(&self.matcher.push(&rest).emit);
        text.push_str(&self.matcher.finish());
    }
}
