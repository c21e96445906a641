//! The tokenizer in the metadata.

use super::metadata::{GgufArray, GgufMetadata, GgufValue};

/// The tokenizer in the metadata of a GGUF file, under the keys `tokenizer.*`. Nothing but types was checked.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct GgufTokenizerParts {
    /// `tokenizer.ggml.model`: `gpt2` (byte-level BPE), `llama` (SentencePiece BPE).
    pub model: String,
    /// `tokenizer.ggml.pre`: how text is cut into words.
    pub pre: Option<String>,
    /// By id.
    pub tokens: Vec<String>,
    /// 1 normal, 2 unknown, 3 control, 4 user-defined, 5 unused, 6 byte.
    pub token_types: Option<Vec<i32>>,
    pub scores: Option<Vec<f32>>,
    /// Pairs separated by a space, earlier ones first.
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
    pub chat_template: Option<String>,
}

impl GgufMetadata {
    /// The tokenizer; the error says which key has the wrong type. A file without one gives empty parts.
    pub(crate) fn tokenizer(&self) -> Result<GgufTokenizerParts, String> {
        let id = |key| self.typed(key, |value| value.as_u64().and_then(|id| u32::try_from(id).ok()));
        let flag = |key| self.typed(key, GgufValue::as_bool);
        let text = |key| self.typed(key, |value| value.as_str().map(str::to_owned));
        let texts = |key| self.typed(key, texts);
        Ok(GgufTokenizerParts {
            model: text("tokenizer.ggml.model")?.unwrap_or_default(),
            pre: text("tokenizer.ggml.pre")?,
            tokens: texts("tokenizer.ggml.tokens")?.unwrap_or_default(),
            token_types: self.typed("tokenizer.ggml.token_type", small_integers)?,
            scores: self.typed("tokenizer.ggml.scores", floats)?,
            merges: texts("tokenizer.ggml.merges")?,
            bos_id: id("tokenizer.ggml.bos_token_id")?,
            eos_id: id("tokenizer.ggml.eos_token_id")?,
            eot_id: id("tokenizer.ggml.eot_token_id")?,
            eom_id: id("tokenizer.ggml.eom_token_id")?,
            unknown_id: id("tokenizer.ggml.unknown_token_id")?,
            padding_id: id("tokenizer.ggml.padding_token_id")?,
            add_bos: flag("tokenizer.ggml.add_bos_token")?,
            add_eos: flag("tokenizer.ggml.add_eos_token")?,
            add_space_prefix: flag("tokenizer.ggml.add_space_prefix")?,
            chat_template: text("tokenizer.chat_template")?,
        })
    }

    fn typed<T>(&self, key: &str, read: impl Fn(&GgufValue) -> Option<T>) -> Result<Option<T>, String> {
        let read = |value| read(value).ok_or_else(|| format!("metadata '{key}' has the wrong type"));
        self.get(key).map(read).transpose()
    }
}

fn texts(value: &GgufValue) -> Option<Vec<String>> {
    match value {
        GgufValue::Array(GgufArray::String(texts)) => Some(texts.clone()),
        _ => None,
    }
}

fn floats(value: &GgufValue) -> Option<Vec<f32>> {
    match value {
        GgufValue::Array(GgufArray::F32(floats)) => Some(floats.clone()),
        _ => None,
    }
}

fn small_integers(value: &GgufValue) -> Option<Vec<i32>> {
    match value {
        GgufValue::Array(GgufArray::Signed(values)) => values.iter().map(|value| i32::try_from(*value).ok()).collect(),
        GgufValue::Array(GgufArray::Unsigned(values)) => {
            values.iter().map(|value| i32::try_from(*value).ok()).collect()
        }
        _ => None,
    }
}
