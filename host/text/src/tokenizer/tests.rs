use std::path::Path;

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::{Value, json};

use super::*;
use crate::testing::{BYTE_FALLBACK, GEMMA3, SMOLLM2, SMOLLM2_GGUF, byte_fallback_gguf, random_tokens};

fn ids(value: &Value) -> Vec<u32> {
    serde_json::from_value(value.clone()).unwrap()
}

#[test]
fn smollm2_tokenizes_as_the_reference_does() {
    let cases: Vec<Value> = serde_json::from_str(include_str!("../../testdata/smollm2-golden.json")).unwrap();
    assert!(cases.len() >= 4);
    for case in &cases {
        let prompt = case["prompt"].as_str().unwrap();
        assert_eq!(SMOLLM2.encode(prompt, true).unwrap(), ids(&case["input_ids"]), "{prompt:?}");
        assert_eq!(SMOLLM2.decode(&ids(&case["input_ids"]), false), prompt);
        assert_eq!(SMOLLM2.decode(&ids(&case["greedy_ids"]), true), case["greedy_text"].as_str().unwrap());
    }
}

#[test]
fn gemma3_tokenizes_as_the_reference_does() {
    let cases: Vec<Value> = serde_json::from_str(include_str!("../../testdata/gemma3-golden.json")).unwrap();
    assert!(cases.len() >= 5);
    for case in &cases {
        let prompt = case["prompt"].as_str().unwrap();
        assert_eq!(GEMMA3.encode(prompt, true).unwrap(), ids(&case["input_ids"]), "{prompt:?}");
        assert_eq!(GEMMA3.decode(&ids(&case["input_ids"]), true), prompt);
        assert_eq!(GEMMA3.decode(&ids(&case["greedy_ids"]), true), case["greedy_text"].as_str().unwrap());
    }
}

#[test]
fn gemma3_special_tokens() {
    let id = |name| GEMMA3.token_to_id(name).unwrap();
    assert_eq!((GEMMA3.vocab_size(), GEMMA3.bos_id(), GEMMA3.adds_bos()), (262_144, Some(2), true));
    assert_eq!(GEMMA3.end_ids(), [id("<eos>"), id("<end_of_turn>")]);
    assert_eq!(GEMMA3.token_to_string(id("▁the")), " the");
    assert!(GEMMA3.is_special(id("<start_of_turn>")) && !GEMMA3.is_special(id("\n\n")));
    // Runs of line ends and of spaces are tokens of their own, and no space is put before a text.
    assert_eq!(GEMMA3.encode("a\n\n    b", false).unwrap(), [id("a"), id("\n\n"), id("    "), id("b")]);
    assert!(GEMMA3.chat_template().is_none(), "it is no chat model");
}

#[test]
fn smollm2_special_tokens() {
    let id = |name| SMOLLM2.token_to_id(name).unwrap();
    assert_eq!(SMOLLM2.vocab_size(), 49152);
    assert_eq!(SMOLLM2.bos_id(), Some(id("<|im_start|>")));
    assert_eq!(SMOLLM2.end_ids(), [id("<|im_end|>")]);
    assert!(!SMOLLM2.adds_bos());
    assert!(SMOLLM2.is_special(id("<|im_end|>")) && !SMOLLM2.is_special(id("Ġthe")));
    assert_eq!(SMOLLM2.special_tokens()["eos_token"], "<|im_end|>");
    assert_eq!(SMOLLM2.token_to_string(id("Ġthe")), " the");
    assert!(SMOLLM2.chat_template().unwrap().default_template().unwrap().contains("<|im_start|>system"));
    assert_eq!(SMOLLM2.encode("a<|im_end|>b", false).unwrap()[1], id("<|im_end|>"), "never split");
}

#[test]
fn a_whole_is_decoded_as_the_library_decodes_it() {
    let mut library = SMOLLM2.inner.clone();
    library.with_decoder(Some(tokenizers::decoders::byte_level::ByteLevel::default()));
    for seed in 0..200 {
        let ids = random_tokens(&SMOLLM2, seed);
        assert_eq!(SMOLLM2.decode(&ids, true), library.decode(&ids, true).unwrap(), "seed {seed}");
    }
}

#[test]
fn text_survives_the_round_trip() {
    let texts = [
        "",
        " ",
        "  two  spaces ",
        "\r\n\t\u{0}\u{7f}",
        "e\u{301} é",
        "👩‍👩‍👧🏳️‍🌈",
        "مرحبا بالعالم",
        "\u{feff}\u{200b}\u{fffd}",
        "\u{10ffff}\u{e000}",
        "a\u{300}\u{301}\u{302}\u{303}",
    ];
    for text in texts {
        for tokenizer in [&*SMOLLM2, &*BYTE_FALLBACK, &*GEMMA3] {
            let ids = tokenizer.encode(text, false).unwrap();
            assert_eq!(tokenizer.decode(&ids, false), text);
        }
    }
}

#[test]
fn sentence_piece_merges_by_score_and_falls_back_to_bytes() {
    let tokens = |text| {
        let ids = BYTE_FALLBACK.encode(text, true).unwrap();
        ids.iter().map(|&id| BYTE_FALLBACK.inner.id_to_token(id).unwrap()).collect::<Vec<_>>()
    };
    assert_eq!(tokens("hello world!"), ["<s>", "▁hello", "▁world", "!"]);
    // "he" has a higher score than "▁h", which does not exist, and "ll" than "lo".
    assert_eq!(tokens("hellhe"), ["<s>", "▁hell", "he"]);
    assert_eq!(tokens("é好"), ["<s>", "▁", "<0xC3>", "<0xA9>", "好"]);
    assert_eq!(tokens("<tool>hello</s>"), ["<s>", "<tool>", "▁hello", "</s>"]);
    assert!(BYTE_FALLBACK.adds_bos());
    assert_eq!(BYTE_FALLBACK.end_ids(), [2]);
    assert!(!BYTE_FALLBACK.is_special(BYTE_FALLBACK.token_to_id("<tool>").unwrap()));
}

#[test]
fn contradictory_gguf_metadata_is_refused() {
    let refused = |change: fn(&mut GgufTokenizer), part: &str| {
        let mut gguf = byte_fallback_gguf();
        change(&mut gguf);
        let error = Tokenizer::from_gguf(&gguf).err().unwrap().to_string();
        assert!(error.contains(part), "{error}");
    };
    refused(|gguf| gguf.model = "t5".into(), "\"t5\"");
    refused(|gguf| gguf.tokens.clear(), "tokens");
    refused(|gguf| gguf.scores = Some(vec![0.0]), "scores has 1");
    refused(|gguf| gguf.scores = None, "scores is missing");
    refused(|gguf| gguf.eos_id = Some(100_000), "eos_token_id is 100000");
    refused(|gguf| (gguf.model, gguf.pre) = ("gpt2".into(), Some("klingon".into())), "\"klingon\"");
    refused(|gguf| gguf.model = "gpt2".into(), "merges is missing");
    refused(|gguf| (gguf.model, gguf.merges) = ("gpt2".into(), Some(vec!["he".into()])), "\"he\" is not a pair");
    refused(|gguf| (gguf.model, gguf.merges) = ("gpt2".into(), Some(vec!["x y".into()])), "vocabulary");
}

#[test]
fn every_known_pre_tokenizer_compiles() {
    let mut gguf = SMOLLM2_GGUF.clone();
    gguf.tokens.truncate(300);
    (gguf.merges, gguf.token_types, gguf.scores) = (Some(Vec::new()), None, None);
    let names = [
        "default",
        "gpt-2",
        "smollm",
        "llama-bpe",
        "dbrx",
        "qwen2",
        "qwen35",
        "stablelm2",
        "deepseek-v3",
        "gpt-4o",
        "tekken",
    ];
    for name in names {
        gguf.pre = Some(name.into());
        let tokenizer = Tokenizer::from_gguf(&gguf).unwrap();
        let text = "It's 12345 O'Clock —\n\n  déjà vu!";
        assert_eq!(tokenizer.decode(&tokenizer.encode(text, false).unwrap(), false), text, "{name}");
    }
}

#[test]
fn long_and_odd_texts_take_linear_work() {
    let megabyte = 1 << 20;
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    let odd: String = (0..megabyte / 4).filter_map(|_| char::from_u32(rng.random_range(0..0x11_0000))).collect();
    // Quadratic work would take hours for these.
    let texts = ["a".repeat(megabyte), " ".repeat(megabyte) + "b", "\n".repeat(megabyte), "好".repeat(megabyte / 3)];
    for text in &texts {
        assert!(SMOLLM2.decode(&SMOLLM2.encode(text, false).unwrap(), false) == *text, "{:?}", &text[..3]);
    }
    for text in texts[..2].iter().chain([&odd]) {
        let ids = BYTE_FALLBACK.encode(text, false).unwrap();
        assert!(BYTE_FALLBACK.decode(&ids, false) == *text, "{:?}", text.chars().next());
    }
}

#[test]
fn long_texts_are_refused_by_the_given_limit() {
    let mut tokenizer = Tokenizer::from_gguf(&byte_fallback_gguf()).unwrap();
    tokenizer.set_max_input_bytes(4);
    assert!(tokenizer.encode("1234", false).is_ok());
    let error = tokenizer.encode("12345", false).unwrap_err();
    assert!(matches!(error, TextError::TextTooLong { bytes: 5, limit: 4 }) && error.is_request_error());
}

/// A checkpoint's folder with a small byte-level `tokenizer.json`.
fn folder(tokenizer_config: Value) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let added = |id, content, special| {
        json!({"id": id, "content": content, "special": special, "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false})
    };
    let tokenizer = json!({
        "version": "1.0",
        "truncation": {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0},
        "padding": {"strategy": {"Fixed": 8}, "direction": "Right", "pad_to_multiple_of": null, "pad_id": 0,
            "pad_type_id": 0, "pad_token": "<s>"},
        "added_tokens": [added(0, "<s>", true), added(1, "</s>", true), added(2, "<|eot_id|>", true),
            added(3, "<call>", false)],
        "normalizer": null,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        "post_processor": {"type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}}},
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
            "vocab": {"<s>": 0, "</s>": 1, "<|eot_id|>": 2, "<call>": 3, "a": 4, "b": 5, "Ġ": 6, "ab": 7},
            "merges": ["a b"]},
    });
    write(folder.path(), "tokenizer.json", &tokenizer.to_string());
    write(folder.path(), "tokenizer_config.json", &tokenizer_config.to_string());
    folder
}

fn write(folder: &Path, name: &str, text: &str) {
    std::fs::write(folder.join(name), text).unwrap();
}

#[test]
fn folder_of_a_checkpoint() {
    let config = json!({
        "bos_token": "<s>",
        "eos_token": {"__type": "AddedToken", "content": "</s>"},
        "additional_special_tokens": ["<call>"],
        "chat_template": "old",
    });
    let folder = folder(config);
    write(folder.path(), "special_tokens_map.json", r#"{"pad_token": "</s>", "eos_token": "ignored"}"#);
    write(folder.path(), "chat_template.jinja", "new");
    std::fs::create_dir(folder.path().join("additional_chat_templates")).unwrap();
    write(folder.path(), "additional_chat_templates/tool_use.jinja", "tools");

    let tokenizer = Tokenizer::from_folder(folder.path()).unwrap();
    assert_eq!(tokenizer.encode("ab ab ab", true).unwrap(), [0, 7, 6, 7, 6, 7], "no truncation, no padding");
    assert_eq!(tokenizer.encode("ab", false).unwrap(), [7]);
    assert!(tokenizer.adds_bos());
    assert_eq!(tokenizer.bos_id(), Some(0));
    assert_eq!(tokenizer.end_ids(), [1, 2], "EOS, and the end of a turn that the vocabulary has");
    assert!(tokenizer.is_special(3), "made special by the configuration");
    assert_eq!(tokenizer.special_tokens()["pad_token"], "</s>");
    let template = tokenizer.chat_template().unwrap();
    assert_eq!((template.default_template(), template.tool_use_template()), (Some("new"), Some("tools")));
}

#[test]
fn configured_bos_and_eos_win_over_the_post_processor() {
    let with = |add_bos: bool, add_eos: bool| {
        let config =
            json!({"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": add_bos, "add_eos_token": add_eos});
        Tokenizer::from_folder(folder(config).path()).unwrap()
    };
    assert_eq!(with(true, false).encode("a", true).unwrap(), [0, 4]);
    assert_eq!(with(false, true).encode("a", true).unwrap(), [4, 1]);
    assert!(!with(false, false).adds_bos());
}

#[test]
fn tokens_of_the_configuration_are_added() {
    let entry = json!({"content": "<new>", "special": true, "single_word": false, "lstrip": false, "rstrip": false,
        "normalized": false});
    let tokenizer = Tokenizer::from_folder(folder(json!({"added_tokens_decoder": {"8": entry}})).path()).unwrap();
    assert_eq!(tokenizer.encode("a<new>", false).unwrap(), [4, 8]);
    assert!(tokenizer.is_special(8));
}

#[test]
fn a_lone_file_is_enough() {
    let tokenizer = Tokenizer::from_file(&folder(json!({})).path().join("tokenizer.json")).unwrap();
    assert_eq!((tokenizer.bos_id(), tokenizer.end_ids()), (Some(0), [2].as_slice()));
    assert!(tokenizer.chat_template().is_none());
}

#[test]
fn broken_files_are_named() {
    let empty = tempfile::tempdir().unwrap();
    let error = Tokenizer::from_folder(empty.path()).err().unwrap();
    assert!(matches!(&error, TextError::Read { path, .. } if path.ends_with("tokenizer.json")), "{error}");

    let broken = folder(json!([]));
    let error = Tokenizer::from_folder(broken.path()).err().unwrap().to_string();
    assert!(error.contains("tokenizer_config.json"), "{error}");

    write(broken.path(), "tokenizer_config.json", "{}");
    for text in [
        "",
        "{",
        "{}",
        "null",
        r#"{"version": "1.0", "model": {"type": "BPE", "vocab": {"a": 4294967295}, "merges": []}}"#,
    ] {
        write(broken.path(), "tokenizer.json", text);
        let error = Tokenizer::from_folder(broken.path()).err().unwrap().to_string();
        assert!(error.contains("tokenizer.json"), "{error}");
    }
}

#[test]
fn damaged_files_end_in_errors() {
    let folder = folder(json!({"bos_token": "<s>", "eos_token": "</s>"}));
    let path = folder.path().join("tokenizer.json");
    let intact = std::fs::read(&path).unwrap();
    let mut rng = ChaCha8Rng::seed_from_u64(7);
    let mut refused = 0;
    for _ in 0..500 {
        let mut damaged = intact.clone();
        for _ in 0..rng.random_range(1..4) {
            let at = rng.random_range(0..damaged.len());
            damaged[at] = b"0{}[],:\"a"[rng.random_range(0..9)];
        }
        std::fs::write(&path, &damaged).unwrap();
        match Tokenizer::from_folder(folder.path()) {
            Ok(tokenizer) => drop(tokenizer.encode("ab <s> ba", true)),
            Err(error) => refused += usize::from(!error.is_request_error()),
        }
    }
    assert!(refused > 100, "{refused}");
    // The library panics on this.
    write(
        folder.path(),
        "tokenizer.json",
        &String::from_utf8(intact).unwrap().replace(r#""decoder":{"#, r#""decoder":5,"x":{"#),
    );
    assert!(matches!(Tokenizer::from_folder(folder.path()), Err(TextError::InvalidTokenizer { .. })));
}
