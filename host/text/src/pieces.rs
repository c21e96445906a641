//! What each token id stands for, in bytes.
//!
//! Detokenizing is concatenating these, so it needs no look at earlier tokens. The one exception is a leading space that
//! SentencePiece-like tokenizers put before the first word ([`LeadingSpace`]).

use std::collections::HashMap;

use serde_json::Value;

use crate::TextError;

/// Bytes of all tokens, by id.
pub(crate) struct PieceTable {
    bytes: Vec<u8>,
    /// Where the bytes of each token end in `bytes`.
    ends: Vec<usize>,
    special: Vec<bool>,
    pub leading_space: LeadingSpace,
}

/// Spaces that the decoder removes from the start of a text, because the encoder puts one there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum LeadingSpace {
    Keep,
    /// At most this many at the start of the text.
    StripText(usize),
    /// All at the start of the first token.
    StripFirstToken,
}

/// A token of the vocabulary, before decoding.
pub(crate) struct Token<'a> {
    pub text: &'a str,
    /// Matched in the text as it is, instead of being made of merges.
    pub added: bool,
    /// Left out of text by `skip_special_tokens`.
    pub special: bool,
}

impl PieceTable {
    pub fn new<'a>(tokens: impl IntoIterator<Item = Option<Token<'a>>>, decoder: &PieceDecoder) -> Self {
        let mut table = Self {
            bytes: Vec::new(),
            ends: Vec::new(),
            special: Vec::new(),
            leading_space: match decoder {
                PieceDecoder::ByteLevel(_) => LeadingSpace::Keep,
                PieceDecoder::Text { leading_space, .. } => *leading_space,
            },
        };
        for token in tokens {
            if let Some(token) = &token {
                decoder.decode(token, &mut table.bytes);
            }
            table.ends.push(table.bytes.len());
            table.special.push(token.is_some_and(|token| token.special));
        }
        table
    }

    /// Bytes of token `id`; none of an id that is not in the vocabulary.
    pub fn bytes(&self, id: u32) -> &[u8] {
        let id = id as usize;
        let Some(&end) = self.ends.get(id) else { return &[] };
        let start = if id == 0 { 0 } else { self.ends[id - 1] };
        &self.bytes[start..end]
    }

    pub fn is_special(&self, id: u32) -> bool {
        self.special.get(id as usize).copied().unwrap_or(false)
    }

    /// One more than the highest token id.
    pub fn len(&self) -> usize {
        self.ends.len()
    }
}

/// How token strings stand for bytes.
pub(crate) enum PieceDecoder {
    /// Each character stands for a byte (GPT-2 and its many successors). Added tokens stand for themselves.
    ByteLevel(HashMap<char, u8>),
    /// Text with substitutions, usually `▁` for a space; `<0x0A>` stands for a byte if `byte_fallback`.
    Text { replace: Vec<(String, String)>, byte_fallback: bool, leading_space: LeadingSpace },
}

impl PieceDecoder {
    pub fn byte_level() -> Self {
        Self::ByteLevel(byte_level_alphabet().zip(0..=u8::MAX).collect())
    }

    /// SentencePiece with byte fallback.
    pub fn sentence_piece(leading_space: LeadingSpace) -> Self {
        Self::Text { replace: vec![("▁".into(), " ".into())], byte_fallback: true, leading_space }
    }

    /// From the `decoder` of a `tokenizer.json`.
    pub fn from_json(decoder: &Value) -> Result<Self, TextError> {
        let unsupported = || TextError::UnsupportedTokenizer(format!("decoder {decoder}"));
        if decoder["type"] == "ByteLevel" {
            return Ok(Self::byte_level());
        }
        let steps = match decoder["type"].as_str() {
            Some("Sequence") => decoder["decoders"].as_array().ok_or_else(unsupported)?.as_slice(),
            _ => std::slice::from_ref(decoder),
        };
        let (mut replace, mut byte_fallback, mut fused) = (Vec::new(), false, false);
        let mut leading_space = LeadingSpace::Keep;
        for step in steps {
            match step["type"].as_str().ok_or_else(unsupported)? {
                "ByteLevel" if steps.len() == 1 => return Ok(Self::byte_level()),
                "Replace" if !fused => {
                    let from = step["pattern"]["String"].as_str().ok_or_else(unsupported)?;
                    let to = step["content"].as_str().ok_or_else(unsupported)?;
                    replace.push((from.to_owned(), to.to_owned()));
                }
                "Metaspace" if !fused => {
                    let mark = step["replacement"].as_str().ok_or_else(unsupported)?;
                    replace.push((mark.to_owned(), " ".to_owned()));
                    if step["prepend_scheme"] != "never" && step["add_prefix_space"] != false {
                        leading_space = LeadingSpace::StripFirstToken;
                    }
                }
                "ByteFallback" => byte_fallback = true,
                "Fuse" => fused = true,
                "Strip" if fused && step["content"] == " " && step["stop"] == 0 => {
                    let count = step["start"].as_u64().ok_or_else(unsupported)?;
                    leading_space = LeadingSpace::StripText(count as usize);
                }
                _ => return Err(unsupported()),
            }
        }
        Ok(Self::Text { replace, byte_fallback, leading_space })
    }

    fn decode(&self, token: &Token, bytes: &mut Vec<u8>) {
        match self {
            Self::ByteLevel(_) if token.added => bytes.extend_from_slice(token.text.as_bytes()),
            Self::ByteLevel(alphabet) => {
                let before = bytes.len();
                for char in token.text.chars() {
                    let Some(&byte) = alphabet.get(&char) else {
                        bytes.truncate(before);
                        bytes.extend_from_slice(token.text.as_bytes());
                        return;
                    };
                    bytes.push(byte);
                }
            }
            Self::Text { replace, byte_fallback, .. } => {
                if *byte_fallback && let Some(byte) = parse_byte_token(token.text) {
                    bytes.push(byte);
                    return;
                }
                let text = replace.iter().fold(token.text.to_owned(), |text, (from, to)| text.replace(from, to));
                bytes.extend_from_slice(text.as_bytes());
            }
        }
    }
}

/// The byte that `<0x0A>` stands for.
pub(crate) fn parse_byte_token(token: &str) -> Option<u8> {
    let digits = token.strip_prefix("<0x")?.strip_suffix('>')?;
    if digits.len() == 2 { u8::from_str_radix(digits, 16).ok() } else { None }
}

/// The characters that byte-level tokens use for bytes 0 to 255: printable Latin-1 for itself, the others in order from
/// U+0100 on.
fn byte_level_alphabet() -> impl Iterator<Item = char> {
    let mut next_substitute = 0x100;
    (0..=u8::MAX).map(move |byte| match byte {
        b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF => char::from(byte),
        _ => {
            next_substitute += 1;
            char::from_u32(next_substitute - 1).unwrap_or(char::REPLACEMENT_CHARACTER)
        }
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn decode(decoder: &PieceDecoder, text: &str, added: bool) -> Vec<u8> {
        let mut bytes = Vec::new();
        decoder.decode(&Token { text, added, special: false }, &mut bytes);
        bytes
    }

    #[test]
    fn byte_level_tokens_are_bytes() {
        let decoder = PieceDecoder::byte_level();
        assert_eq!(decode(&decoder, "ĠHello", false), b" Hello");
        assert_eq!(decode(&decoder, "ÃĬ", false), "Ê".as_bytes());
        assert_eq!(decode(&decoder, "Ċ", false), b"\n");
        assert_eq!(decode(&decoder, "Ń", false), [0xAD]);
        assert_eq!(decode(&decoder, "é", true), "é".as_bytes(), "an added token stands for itself");
        assert_eq!(decode(&decoder, "<｜end｜>", false), "<｜end｜>".as_bytes(), "no byte-level characters");
    }

    #[test]
    fn sentence_piece_tokens_are_text_or_bytes() {
        let decoder = PieceDecoder::sentence_piece(LeadingSpace::Keep);
        assert_eq!(decode(&decoder, "▁the▁", false), b" the ");
        assert_eq!(decode(&decoder, "<0xE5>", false), [0xE5]);
        assert_eq!(decode(&decoder, "<0xE5", false), b"<0xE5");
    }

    #[test]
    fn decoders_of_tokenizer_json() {
        let llama2 = json!({"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"},
            {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]});
        let PieceDecoder::Text { byte_fallback, leading_space, .. } = PieceDecoder::from_json(&llama2).unwrap() else {
            panic!("not a text decoder")
        };
        assert!(byte_fallback);
        assert_eq!(leading_space, LeadingSpace::StripText(1));

        let metaspace = json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": false});
        let PieceDecoder::Text { leading_space, .. } = PieceDecoder::from_json(&metaspace).unwrap() else {
            panic!("not a text decoder")
        };
        assert_eq!(leading_space, LeadingSpace::StripFirstToken);

        let word_piece = json!({"type": "WordPiece", "prefix": "##", "cleanup": true});
        let error = PieceDecoder::from_json(&word_piece).err().unwrap().to_string();
        assert!(error.contains("WordPiece"), "{error}");
        assert!(PieceDecoder::from_json(&Value::Null).is_err());
    }
}
