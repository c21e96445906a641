//! Tokenizers for tests.

use std::{
    fs::File,
    io::{self, BufReader, Read},
    path::PathBuf,
    sync::{Arc, LazyLock},
};

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::{GgufTokenizer, Tokenizer};

/// The metadata of SmolLM2-135M-Instruct.
pub static SMOLLM2_GGUF: LazyLock<GgufTokenizer> = LazyLock::new(|| fetched("SmolLM2-135M-Instruct.Q4_1.gguf"));

pub static SMOLLM2: LazyLock<Arc<Tokenizer>> = LazyLock::new(|| Arc::new(Tokenizer::from_gguf(&SMOLLM2_GGUF).unwrap()));

/// Of Gemma 3 270M: SentencePiece with 262144 tokens.
pub static GEMMA3: LazyLock<Arc<Tokenizer>> =
    LazyLock::new(|| Arc::new(Tokenizer::from_gguf(&fetched("gemma-3-270m-q4_k_m.gguf")).unwrap()));

/// The tokenizer of a model that the setup script fetches.
fn fetched(model: &str) -> GgufTokenizer {
    let cache = std::env::var_os("TORUS_CACHE").map(PathBuf::from).unwrap_or_else(|| {
        let base = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
        base.unwrap_or_else(|| PathBuf::from(std::env::var_os("HOME").unwrap()).join(".cache")).join("torus")
    });
    let path = cache.join("models").join(model);
    let file =
        File::open(&path).unwrap_or_else(|error| panic!("{}: {error}; run `.make/setup.sh test`", path.display()));
    read_gguf_tokenizer(&mut BufReader::new(file)).unwrap()
}

/// A SentencePiece tokenizer that knows a few English words and spells everything else in bytes.
pub static BYTE_FALLBACK: LazyLock<Arc<Tokenizer>> =
    LazyLock::new(|| Arc::new(Tokenizer::from_gguf(&byte_fallback_gguf()).unwrap()));

pub fn byte_fallback_gguf() -> GgufTokenizer {
    let mut gguf = GgufTokenizer {
        model: "llama".into(),
        bos_id: Some(1),
        eos_id: Some(2),
        unknown_id: Some(0),
        ..GgufTokenizer::default()
    };
    let (mut types, mut scores) = (Vec::new(), Vec::new());
    let mut add = |text: &str, kind: i32| {
        scores.push(if kind == 1 { -(gguf.tokens.len() as f32) } else { 0.0 });
        types.push(kind);
        gguf.tokens.push(text.to_owned());
    };
    add("<unk>", 2);
    add("<s>", 3);
    add("</s>", 3);
    (0..=u8::MAX).for_each(|byte| add(&format!("<0x{byte:02X}>"), 6));
    add("<tool>", 4);
    for word in ["he", "ll", "hell", "▁hell", "hello", "▁hello", "▁w", "or", "ld", "▁wor", "▁world", "▁▁", "好"]
    {
        add(word, 1);
    }
    "▁helowrd!.好".chars().for_each(|char| {
        if char != '好' {
            add(&char.to_string(), 1);
        }
    });
    gguf.token_types = Some(types);
    gguf.scores = Some(scores);
    gguf
}

/// Some tokens of `tokenizer`; half of them from text, so that characters of several tokens are common.
pub fn random_tokens(tokenizer: &Tokenizer, seed: u64) -> Vec<u32> {
    const TEXT: &str = "Hello, wörld! 你好世界 🙂👩‍👩‍👧 مرحبا\n\tनमस्ते 1234567890 e\u{301}\u{fffd}";
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let known = tokenizer.encode(TEXT, false).unwrap();
    let len = rng.random_range(0..40);
    let mut ids = Vec::with_capacity(len);
    while ids.len() < len {
        if rng.random_bool(0.5) {
            ids.push(rng.random_range(0..tokenizer.vocab_size() as u32 + 2));
        } else {
            let start = rng.random_range(0..known.len());
            let count = rng.random_range(1..8);
            ids.extend(known[start..].iter().take(count));
        }
    }
    ids
}

/// `items` cut into random portions, some of them empty.
pub fn random_portions<T>(items: &[T], seed: u64) -> Vec<&[T]> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let (mut rest, mut portions) = (items, Vec::new());
    while !rest.is_empty() {
        let (portion, after) = rest.split_at(rng.random_range(0..=rest.len().min(5)));
        portions.push(portion);
        rest = after;
    }
    portions
}

/// Reads `tokenizer.*` from the metadata of a GGUF file, which is all these tests need of the format.
fn read_gguf_tokenizer(file: &mut impl Read) -> io::Result<GgufTokenizer> {
    let mut reader = GgufReader(file);
    let [_magic, _version] = [reader.u32()?, reader.u32()?];
    let [_tensors, pairs] = [reader.u64()?, reader.u64()?];
    let mut gguf = GgufTokenizer::default();
    for _ in 0..pairs {
        let key = reader.string()?;
        let kind = reader.u32()?;
        let value = reader.value(kind)?;
        let Some(key) = key.strip_prefix("tokenizer.") else { continue };
        match key {
            "ggml.model" => gguf.model = value.strings.concat(),
            "ggml.pre" => gguf.pre = Some(value.strings.concat()),
            "ggml.tokens" => gguf.tokens = value.strings,
            "ggml.merges" => gguf.merges = Some(value.strings),
            "ggml.token_type" => gguf.token_types = Some(value.numbers.iter().map(|&n| n as i32).collect()),
            "ggml.scores" => {
                gguf.scores = Some(value.numbers.iter().map(|&n| f32::from_bits(n as u32)).collect());
            }
            "ggml.bos_token_id" => gguf.bos_id = Some(value.numbers[0] as u32),
            "ggml.eos_token_id" => gguf.eos_id = Some(value.numbers[0] as u32),
            "ggml.unknown_token_id" => gguf.unknown_id = Some(value.numbers[0] as u32),
            "ggml.padding_token_id" => gguf.padding_id = Some(value.numbers[0] as u32),
            "ggml.add_bos_token" => gguf.add_bos = Some(value.numbers[0] != 0),
            "ggml.add_eos_token" => gguf.add_eos = Some(value.numbers[0] != 0),
            // Of models that compare two texts.
            "ggml.add_sep_token" => {}
            "ggml.add_space_prefix" => gguf.add_space_prefix = Some(value.numbers[0] != 0),
            "chat_template" => gguf.chat_template = Some(value.strings.concat()),
            other => panic!("unexpected key tokenizer.{other}"),
        }
    }
    Ok(gguf)
}

/// A value or an array of them: strings, or numbers as 64 bits.
#[derive(Default)]
struct GgufValue {
    strings: Vec<String>,
    numbers: Vec<u64>,
}

struct GgufReader<'a, R>(&'a mut R);

impl<R: Read> GgufReader<'_, R> {
    fn bytes<const N: usize>(&mut self) -> io::Result<[u8; N]> {
        let mut bytes = [0; N];
        self.0.read_exact(&mut bytes)?;
        Ok(bytes)
    }

    fn u32(&mut self) -> io::Result<u32> {
        self.bytes().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> io::Result<u64> {
        self.bytes().map(u64::from_le_bytes)
    }

    fn string(&mut self) -> io::Result<String> {
        let mut bytes = vec![0; self.u64()? as usize];
        self.0.read_exact(&mut bytes)?;
        String::from_utf8(bytes).map_err(io::Error::other)
    }

    fn value(&mut self, kind: u32) -> io::Result<GgufValue> {
        let (kind, count) = if kind == 9 { (self.u32()?, self.u64()?) } else { (kind, 1) };
        let mut value = GgufValue::default();
        for _ in 0..count {
            match kind {
                0 | 1 | 7 => value.numbers.push(u8::from_le_bytes(self.bytes()?).into()),
                2 | 3 => value.numbers.push(u16::from_le_bytes(self.bytes()?).into()),
                4..=6 => value.numbers.push(self.u32()?.into()),
                8 => value.strings.push(self.string()?),
                10..=12 => value.numbers.push(self.u64()?),
                other => return Err(io::Error::other(format!("unknown type {other}"))),
            }
        }
        Ok(value)
    }
}
