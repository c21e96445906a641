//! How byte-level tokenizers cut text into words before merging, by the name that GGUF files give it
//! (`tokenizer.ggml.pre`).
//!
//! Splits are applied one after the other; what a pattern does not match stays as it is between the matches. The patterns
//! are those of the models' own `tokenizer.json`.

/// A way to cut text into words.
pub(super) struct PreTokenizer {
    pub splits: &'static [&'static str],
    /// Text is put into Unicode normal form C first.
    pub nfc: bool,
    /// A word that is a token becomes this token, whatever the merges say.
    pub ignore_merges: bool,
    /// Whether BOS is added if the file does not say.
    pub adds_bos: bool,
}

const DIGIT: &str = r"\p{N}";
const UP_TO_THREE_DIGITS: &str = r"\p{N}{1,3}";
const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN35: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const CHINESE_AND_KANA: &str = "[\u{4e00}-\u{9fa5}\u{3040}-\u{309f}\u{30a0}-\u{30ff}]+";
const DEEPSEEK3: &str = r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"##;
const GPT4O: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const PUNCTUATION: &str = r"[\p{P}\$\+<=>\^~\|]+";

impl PreTokenizer {
    const fn new(splits: &'static [&'static str]) -> Self {
        Self { splits, nfc: false, ignore_merges: false, adds_bos: false }
    }

    /// The way called `name`, if it is known.
    pub fn named(name: &str) -> Option<Self> {
        Some(match name {
            // What files from before the key existed were made for.
            "default" => Self::new(&[PUNCTUATION, GPT2, r"\p{N}+", "[0-9][0-9][0-9]"]),
            "gpt-2" | "phi-2" | "olmo" | "mpt" | "jina-en" | "jina-es" | "jina-de" | "gigachat" | "exaone4"
            | "trillion" | "granite-docling" => Self::new(&[GPT2]),
            "smollm" | "starcoder" | "refact" | "command-r" | "codeshell" | "exaone" | "minerva-7b" => {
                Self::new(&[DIGIT, GPT2])
            }
            "llama-bpe" | "llama3" | "llama-v3" | "falcon3" | "falcon-h1" | "pixtral" | "lfm2" => {
                Self { ignore_merges: true, adds_bos: true, ..Self::new(&[LLAMA3]) }
            }
            "dbrx" | "smaug-bpe" | "chatglm-bpe" | "glm4" => Self::new(&[LLAMA3]),
            "qwen2" | "deepseek-r1-qwen" | "megrez" => Self { nfc: true, ..Self::new(&[QWEN2]) },
            "qwen35" => Self { nfc: true, ..Self::new(&[QWEN35]) },
            "stablelm2" | "hunyuan" | "grok-2" => Self::new(&[QWEN2]),
            "deepseek-v3" | "hunyuan-dense" => Self::new(&[UP_TO_THREE_DIGITS, CHINESE_AND_KANA, DEEPSEEK3]),
            "gpt-4o" | "llama4" => Self::new(&[GPT4O]),
            "tekken" => Self { ignore_merges: true, adds_bos: true, ..Self::new(&[TEKKEN]) },
            _ => return None,
        })
    }
}
