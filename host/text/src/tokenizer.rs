//! Text to token ids and back.

mod folder;
mod gguf;
mod pre_tokenizer;

use std::collections::BTreeMap;

use serde_json::Value;

pub use self::gguf::GgufTokenizer;
use crate::{
    ChatTemplateSource, DetokenizeOptions, TextError,
    detokenizer::DetokenizerCore,
    pieces::{PieceDecoder, PieceTable, Token},
};

/// Input is refused above this many bytes unless [`Tokenizer::set_max_input_bytes`] says otherwise.
const DEFAULT_MAX_INPUT_BYTES: usize = 4 << 20;

/// Ids above this are taken for a broken file, not for a vocabulary.
const MAX_VOCAB_SIZE: usize = 1 << 24;

/// Tokens that end a turn. A model's own files may name only one of its end tokens, or none.
///
/// `<|end|>` is not among them: it ends a message of gpt-oss, not its turn; models that end with it name it themselves.
const END_OF_TURN_TOKENS: [&str; 8] = [
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|eot|>",
    "<end_of_turn>",
    "<|end_of_turn|>",
    "<|END_OF_TURN_TOKEN|>",
    "<|return|>",
];

/// A tokenizer, with what its files say about special tokens and chat templates.
///
/// Shared by all requests; encoding a long text takes long enough that it belongs on a blocking thread.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    pieces: PieceTable,
    /// What `add_special` puts before and after a text.
    prefix: Vec<u32>,
    suffix: Vec<u32>,
    /// Text of special tokens by role (`bos_token`, …), as chat templates see them.
    special_tokens: BTreeMap<String, String>,
    bos_id: Option<u32>,
    end_ids: Vec<u32>,
    chat_template: Option<ChatTemplateSource>,
    max_input_bytes: usize,
}

/// What the ways of making a [`Tokenizer`] find out before the common rest is done.
struct Parts {
    inner: tokenizers::Tokenizer,
    pieces: PieceTable,
    prefix: Vec<u32>,
    suffix: Vec<u32>,
    special_tokens: BTreeMap<String, String>,
    /// End tokens that the files name, beside `eos_token`.
    end_ids: Vec<u32>,
    chat_template: Option<ChatTemplateSource>,
}

impl Tokenizer {
    fn assemble(parts: Parts) -> Self {
        let Parts { inner, pieces, prefix, suffix, special_tokens, mut end_ids, chat_template } = parts;
        let named = |role: &str| special_tokens.get(role).and_then(|text| inner.token_to_id(text));
        // A lone `tokenizer.json` names no roles, but what it puts before every text is the BOS token.
        let bos_id = named("bos_token").or(prefix.first().copied());
        let of_turn = END_OF_TURN_TOKENS.iter().filter_map(|text| inner.token_to_id(text));
        end_ids.extend(named("eos_token").into_iter().chain(of_turn.filter(|&id| pieces.is_special(id))));
        end_ids.sort_unstable();
        end_ids.dedup();
        let max_input_bytes = DEFAULT_MAX_INPUT_BYTES;
        Self { inner, pieces, prefix, suffix, special_tokens, bos_id, end_ids, chat_template, max_input_bytes }
    }

    /// Refuses longer texts from now on. Encoding takes about 100 bytes of memory per byte of ordinary text, and up to 350
    /// per byte of digits; time is linear.
    pub fn set_max_input_bytes(&mut self, bytes: usize) {
        self.max_input_bytes = bytes;
    }

    /// The tokens of `text`. Special tokens written in the text are recognized.
    ///
    /// With `add_special`, tokens that the model expects around every text (usually BOS) are added. The output of a chat
    /// template has them already and is encoded without.
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>, TextError> {
        if text.len() > self.max_input_bytes {
            return Err(TextError::TextTooLong { bytes: text.len(), limit: self.max_input_bytes });
        }
        let encoding = self.inner.encode_fast(text, false).map_err(|error| TextError::Encode(error.to_string()))?;
        let ids = encoding.get_ids();
        if add_special { Ok([&self.prefix, ids, &self.suffix].concat()) } else { Ok(ids.to_vec()) }
    }

    /// The text of a whole sequence. For one that comes bit by bit there is [`Detokenizer`](crate::Detokenizer).
    ///
    /// Ids outside the vocabulary have no text. Unlike the reference implementation, `clean_up_tokenization_spaces` is
    /// ignored, as engines do: it would alter what the model said.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> String {
        let options = DetokenizeOptions { skip_special_tokens: skip_special, continues_text: false };
        let (mut core, mut text) = (DetokenizerCore::new(&self.pieces, options), String::new());
        ids.iter().for_each(|&id| core.push(&self.pieces, id, &mut text));
        core.finish(&mut text);
        text
    }

    /// The text of one token for display (in logprobs), with U+FFFD for incomplete characters.
    pub fn token_to_string(&self, id: u32) -> String {
        String::from_utf8_lossy(self.token_bytes(id)).into_owned()
    }

    /// The bytes that a token contributes to the text. Empty for ids outside the vocabulary.
    pub fn token_bytes(&self, id: u32) -> &[u8] {
        self.pieces.bytes(id)
    }

    /// The id of a token by its name in the vocabulary (not its text): `<|im_end|>`, `Ġthe`.
    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// One more than the highest token id. A model may have more rows in its embedding.
    pub fn vocab_size(&self) -> usize {
        self.pieces.len()
    }

    /// Whether `skip_special_tokens` leaves the token out.
    pub fn is_special(&self, id: u32) -> bool {
        self.pieces.is_special(id)
    }

    pub fn bos_id(&self) -> Option<u32> {
        self.bos_id
    }

    /// Tokens that end the model's turn, as far as the tokenizer's files tell; `generation_config.json` may name more.
    /// Sorted.
    pub fn end_ids(&self) -> &[u32] {
        &self.end_ids
    }

    /// Whether [`encode`](Self::encode) with `add_special` begins with BOS.
    pub fn adds_bos(&self) -> bool {
        self.bos_id.is_some() && self.prefix.first().copied() == self.bos_id
    }

    /// Text of special tokens by role (`bos_token`, `eos_token`, …).
    pub fn special_tokens(&self) -> &BTreeMap<String, String> {
        &self.special_tokens
    }

    /// The chat templates that came with the tokenizer.
    pub fn chat_template(&self) -> Option<&ChatTemplateSource> {
        self.chat_template.as_ref()
    }

    pub(crate) fn pieces(&self) -> &PieceTable {
        &self.pieces
    }
}

/// Reads the decoder and the vocabulary of a complete library tokenizer.
fn piece_table(inner: &tokenizers::Tokenizer, file: &str) -> Result<PieceTable, TextError> {
    let invalid = |reason: String| TextError::InvalidTokenizer { file: file.to_owned(), reason };
    let decoder = serde_json::to_value(inner.get_decoder()).map_err(|error| invalid(error.to_string()))?;
    let decoder = match decoder {
        Value::Null => return Err(TextError::UnsupportedTokenizer(format!("{file} has no decoder"))),
        decoder => PieceDecoder::from_json(&decoder)?,
    };
    let added = inner.get_added_tokens_decoder();
    let vocab = inner.get_vocab(true);
    let size = vocab.values().max().map_or(0, |&id| id as usize + 1);
    if size > MAX_VOCAB_SIZE {
        return Err(invalid(format!("token id {} is out of all proportion", size - 1)));
    }
    let mut texts: Vec<Option<&str>> = vec![None; size];
    for (text, &id) in &vocab {
        texts[id as usize] = Some(text);
    }
    for (&id, token) in &added {
        texts[id as usize] = Some(&token.content);
    }
    let tokens = texts.into_iter().enumerate().map(|(id, text)| {
        let added = added.get(&(id as u32));
        text.map(|text| Token { text, added: added.is_some(), special: added.is_some_and(|token| token.special) })
    });
    Ok(PieceTable::new(tokens, &decoder))
}

#[cfg(test)]
#[path = "tokenizer/tests.rs"]
mod tests;
