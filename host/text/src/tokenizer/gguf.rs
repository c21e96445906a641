//! Tokenizers in the metadata of GGUF files.

use std::collections::{BTreeMap, HashSet};

use tokenizers::{
    AddedToken,
    decoders::byte_level::ByteLevel,
    models::bpe::{BPE, Vocab},
    normalizers::{NFC, NormalizerWrapper, Prepend, Replace, Sequence as Normalizers},
    pre_tokenizers::{
        PreTokenizerWrapper,
        sequence::Sequence as PreTokenizers,
        split::{Split, SplitPattern},
    },
    tokenizer::SplitDelimiterBehavior,
};

use super::{Parts, Tokenizer, pre_tokenizer::PreTokenizer};
use crate::{
    ChatTemplateSource, TextError,
    pieces::{LeadingSpace, PieceDecoder, PieceTable, Token},
};

/// The keys under `tokenizer.` of a GGUF file.
#[derive(Clone, Debug, Default)]
pub struct GgufTokenizer {
    /// `tokenizer.ggml.model`: `gpt2` (byte-level BPE) or `llama` (SentencePiece BPE).
    pub model: String,
    /// `tokenizer.ggml.pre`: how text is cut into words, for `gpt2`.
    pub pre: Option<String>,
    /// `tokenizer.ggml.tokens`, by id.
    pub tokens: Vec<String>,
    /// `tokenizer.ggml.token_type`: 1 normal, 2 unknown, 3 control, 4 user-defined, 5 unused, 6 byte.
    pub token_types: Option<Vec<i32>>,
    /// `tokenizer.ggml.scores`: of `llama`, higher merges first.
    pub scores: Option<Vec<f32>>,
    /// `tokenizer.ggml.merges`: of `gpt2`, two tokens separated by a space, earlier merges first.
    pub merges: Option<Vec<String>>,
    pub bos_id: Option<u32>,
    pub eos_id: Option<u32>,
    pub eot_id: Option<u32>,
    pub eom_id: Option<u32>,
    pub unknown_id: Option<u32>,
    pub padding_id: Option<u32>,
    pub add_bos: Option<bool>,
    pub add_eos: Option<bool>,
    pub add_space_prefix: Option<bool>,
    /// `tokenizer.chat_template`.
    pub chat_template: Option<String>,
}

const UNKNOWN: i32 = 2;
const CONTROL: i32 = 3;
const USER_DEFINED: i32 = 4;
const BYTE: i32 = 6;

impl Tokenizer {
    /// From the metadata of a GGUF file.
    ///
    /// Control and user-defined tokens are matched in the text as they are and never split; control tokens are special.
    pub fn from_gguf(gguf: &GgufTokenizer) -> Result<Self, TextError> {
        gguf.validate()?;
        let (mut inner, decoder, adds_bos) = match gguf.model.as_str() {
            "gpt2" => gguf.byte_level()?,
            "llama" => gguf.sentence_piece()?,
            other => {
                let reason = format!("tokenizer.ggml.model is {other:?}; this server reads \"gpt2\" and \"llama\"");
                return Err(TextError::UnsupportedTokenizer(reason));
            }
        };
        inner.add_tokens(&gguf.added_tokens());
        let tokens = gguf.tokens.iter().enumerate().map(|(id, text)| {
            let kind = gguf.kind(id);
            Some(Token { text, added: matches!(kind, CONTROL | USER_DEFINED), special: is_special(kind) })
        });
        let pieces = PieceTable::new(tokens, &decoder);
        let surrounding = |wanted: bool, id: Option<u32>| id.filter(|_| wanted).into_iter().collect();
        Ok(Self::assemble(Parts {
            inner,
            pieces,
            prefix: surrounding(gguf.add_bos.unwrap_or(adds_bos), gguf.bos_id),
            suffix: surrounding(gguf.add_eos.unwrap_or(false), gguf.eos_id),
            special_tokens: gguf.special_tokens(),
            end_ids: [gguf.eos_id, gguf.eot_id, gguf.eom_id].into_iter().flatten().collect(),
            chat_template: gguf.chat_template.clone().map(ChatTemplateSource::from_text),
        }))
    }
}

impl GgufTokenizer {
    fn validate(&self) -> Result<(), TextError> {
        let count = self.tokens.len();
        if count == 0 {
            return Err(invalid("tokenizer.ggml.tokens is missing or empty".into()));
        }
        let lens =
            [("token_type", self.token_types.as_ref().map(Vec::len)), ("scores", self.scores.as_ref().map(Vec::len))];
        for (key, len) in lens {
            if let Some(len) = len.filter(|&len| len != count) {
                return Err(invalid(format!("tokenizer.ggml.{key} has {len} entries for {count} tokens")));
            }
        }
        let ids = [
            ("bos", self.bos_id),
            ("eos", self.eos_id),
            ("eot", self.eot_id),
            ("eom", self.eom_id),
            ("unknown", self.unknown_id),
            ("padding", self.padding_id),
        ];
        for (role, id) in ids {
            if let Some(id) = id.filter(|&id| id as usize >= count) {
                return Err(invalid(format!("tokenizer.ggml.{role}_token_id is {id}, but there are {count} tokens")));
            }
        }
        Ok(())
    }

    fn kind(&self, id: usize) -> i32 {
        self.token_types.as_ref().map_or(1, |types| types[id])
    }

    /// Ids by text; of equal texts the first.
    fn vocab(&self) -> Vocab {
        (0..self.tokens.len() as u32).zip(&self.tokens).rev().map(|(id, text)| (text.clone(), id)).collect()
    }

    fn added_tokens(&self) -> Vec<AddedToken> {
        let added = (0..self.tokens.len()).filter(|&id| matches!(self.kind(id), CONTROL | USER_DEFINED));
        added.map(|id| AddedToken::from(&self.tokens[id], is_special(self.kind(id))).normalized(false)).collect()
    }

    fn special_tokens(&self) -> BTreeMap<String, String> {
        let roles = [
            ("bos_token", self.bos_id),
            ("eos_token", self.eos_id),
            ("unk_token", self.unknown_id),
            ("pad_token", self.padding_id),
        ];
        let named = roles.into_iter().filter_map(|(role, id)| Some((role.to_owned(), id?)));
        named.map(|(role, id)| (role, self.tokens[id as usize].clone())).collect()
    }

    /// Byte-level BPE, and whether it adds BOS unless told otherwise.
    fn byte_level(&self) -> Result<(tokenizers::Tokenizer, PieceDecoder, bool), TextError> {
        let name = self.pre.as_deref().unwrap_or("default");
        let pre = PreTokenizer::named(name).ok_or_else(|| {
            TextError::UnsupportedTokenizer(format!("tokenizer.ggml.pre is {name:?}, which this server does not know"))
        })?;
        let merges = self.merges.as_deref().ok_or_else(|| invalid("tokenizer.ggml.merges is missing".into()))?;
        let merges = merges.iter().map(|merge| {
            // A half may itself begin with a space only if it is the first character.
            let space = merge.char_indices().skip(1).find(|(_, char)| *char == ' ');
            let (at, _) = space.ok_or_else(|| invalid(format!("tokenizer.ggml.merges: {merge:?} is not a pair")))?;
            Ok((merge[..at].to_owned(), merge[at + 1..].to_owned()))
        });
        let bpe = BPE::builder()
            .vocab_and_merges(self.vocab(), merges.collect::<Result<_, TextError>>()?)
            .ignore_merges(pre.ignore_merges)
            .build()
            .map_err(library_error)?;
        let mut inner = tokenizers::Tokenizer::new(bpe);
        if pre.nfc {
            inner.with_normalizer(Some(NFC));
        }
        let mut steps = Vec::new();
        for pattern in pre.splits {
            steps.push(split(pattern, SplitDelimiterBehavior::Isolated)?);
        }
        steps.push(PreTokenizerWrapper::ByteLevel(ByteLevel::new(false, false, false)));
        inner.with_pre_tokenizer(Some(PreTokenizers::new(steps)));
        Ok((inner, PieceDecoder::byte_level(), pre.adds_bos))
    }

    /// SentencePiece BPE with byte fallback, and whether it adds BOS unless told otherwise.
    fn sentence_piece(&self) -> Result<(tokenizers::Tokenizer, PieceDecoder, bool), TextError> {
        let mut bpe =
            BPE::builder().vocab_and_merges(self.vocab(), self.merges_by_score()?).byte_fallback(true).fuse_unk(true);
        if let Some(id) = self.unknown_id {
            bpe = bpe.unk_token(self.tokens[id as usize].clone());
        }
        let mut inner = tokenizers::Tokenizer::new(bpe.build().map_err(library_error)?);
        let space_prefix = self.add_space_prefix.unwrap_or(true);
        let mut normalizers: Vec<NormalizerWrapper> = Vec::new();
        if space_prefix {
            normalizers.push(Prepend::new("▁".into()).into());
        }
        normalizers.push(Replace::new(" ", "▁").map_err(library_error)?.into());
        inner.with_normalizer(Some(Normalizers::new(normalizers)));
        let leading_space = if space_prefix { LeadingSpace::StripText(1) } else { LeadingSpace::Keep };
        Ok((inner, PieceDecoder::sentence_piece(leading_space), true))
    }

    /// The merges that make SentencePiece's choice: of all neighbours that make a token together, those that make the
    /// one with the highest score merge first.
    fn merges_by_score(&self) -> Result<Vec<(String, String)>, TextError> {
        let scores = self.scores.as_ref().ok_or_else(|| invalid("tokenizer.ggml.scores is missing".into()))?;
        let is_mergeable = |id: &usize| !matches!(self.kind(*id), UNKNOWN | CONTROL | BYTE);
        let mergeable: Vec<usize> = (0..self.tokens.len()).filter(is_mergeable).collect();
        let texts: HashSet<&str> = mergeable.iter().map(|&id| self.tokens[id].as_str()).collect();
        let mut merges = Vec::new();
        for &id in &mergeable {
            let text = self.tokens[id].as_str();
            let halves = text.char_indices().skip(1).map(|(at, _)| text.split_at(at));
            let known = halves.filter(|(left, right)| texts.contains(left) && texts.contains(right));
            merges.extend(known.map(|(left, right)| (scores[id], left, right)));
        }
        merges
            .sort_by(|(a, left_of_a, _), (b, left_of_b, _)| b.total_cmp(a).then(left_of_b.len().cmp(&left_of_a.len())));
        Ok(merges.into_iter().map(|(_, left, right)| (left.to_owned(), right.to_owned())).collect())
    }
}

fn is_special(kind: i32) -> bool {
    matches!(kind, CONTROL | UNKNOWN)
}

fn split(pattern: &str, behavior: SplitDelimiterBehavior) -> Result<PreTokenizerWrapper, TextError> {
    let split = Split::new(SplitPattern::Regex(pattern.to_owned()), behavior, false).map_err(library_error)?;
    Ok(PreTokenizerWrapper::Split(split))
}

fn invalid(reason: String) -> TextError {
    TextError::InvalidTokenizer { file: "GGUF metadata".into(), reason }
}

fn library_error(error: tokenizers::Error) -> TextError {
    invalid(error.to_string())
}
