//! Token ids to text, as they come.

use std::sync::Arc;

use crate::{
    Tokenizer,
    pieces::{LeadingSpace, PieceTable},
    utf8::Utf8Stream,
};

/// How tokens become text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DetokenizeOptions {
    /// Leave special tokens (`<|im_end|>`, …) out.
    pub skip_special_tokens: bool,
    /// The tokens continue a text (a completion) rather than begin one (an answer): a space before the first word stays.
    /// Matters only for tokenizers that put a space before every text (Llama 2 and its kin).
    pub continues_text: bool,
}

impl Default for DetokenizeOptions {
    fn default() -> Self {
        Self { skip_special_tokens: true, continues_text: false }
    }
}

/// Turns the tokens of one sequence into text, in constant time per token.
///
/// However the tokens are divided among calls, the parts joined are [`Tokenizer::decode`] of all of them. No part ends
/// inside a character. Bytes that are not UTF-8 become U+FFFD, as few as the Unicode standard recommends.
#[derive(Clone)]
pub struct Detokenizer {
    tokenizer: Arc<Tokenizer>,
    core: DetokenizerCore,
}

impl Detokenizer {
    pub fn new(tokenizer: Arc<Tokenizer>, options: DetokenizeOptions) -> Self {
        let core = DetokenizerCore::new(tokenizer.pieces(), options);
        Self { tokenizer, core }
    }

    /// The text that `ids` complete.
    pub fn push(&mut self, ids: &[u32]) -> String {
        let mut text = String::new();
        for &id in ids {
            self.core.push(self.tokenizer.pieces(), id, &mut text);
        }
        text
    }

    /// What is left when no more tokens come: U+FFFD if they end inside a character.
    pub fn finish(&mut self) -> String {
        let mut text = String::new();
        self.core.finish(&mut text);
        text
    }
}

/// The state of a [`Detokenizer`], without its tokenizer.
#[derive(Clone)]
pub(crate) struct DetokenizerCore {
    skip_special_tokens: bool,
    /// What may still have to be removed.
    leading_space: LeadingSpace,
    utf8: Utf8Stream,
}

impl DetokenizerCore {
    pub fn new(pieces: &PieceTable, options: DetokenizeOptions) -> Self {
        Self {
            skip_special_tokens: options.skip_special_tokens,
            leading_space: if options.continues_text { LeadingSpace::Keep } else { pieces.leading_space },
            utf8: Utf8Stream::default(),
        }
    }

    pub fn push(&mut self, pieces: &PieceTable, id: u32, text: &mut String) {
        if self.skip_special_tokens && pieces.is_special(id) {
            return;
        }
        let bytes = self.strip_leading_space(pieces.bytes(id));
        self.utf8.push(bytes, text);
    }

    pub fn finish(&mut self, text: &mut String) {
        self.utf8.finish(text);
    }

    fn strip_leading_space<'a>(&mut self, bytes: &'a [u8]) -> &'a [u8] {
        if self.leading_space == LeadingSpace::Keep || bytes.is_empty() {
            return bytes;
        }
        let spaces = bytes.iter().take_while(|&&byte| byte == b' ').count();
        match self.leading_space {
            LeadingSpace::StripText(most) => {
                let stripped = spaces.min(most);
                let may_go_on = stripped == bytes.len() && stripped < most;
                self.leading_space =
                    if may_go_on { LeadingSpace::StripText(most - stripped) } else { LeadingSpace::Keep };
                &bytes[stripped..]
            }
            LeadingSpace::StripFirstToken => {
                self.leading_space = LeadingSpace::Keep;
                &bytes[spaces..]
            }
            LeadingSpace::Keep => bytes,
        }
    }
}

#[cfg(test)]
#[path = "detokenizer/tests.rs"]
mod tests;
