use super::*;
use crate::testing::{BYTE_FALLBACK, SMOLLM2, random_portions, random_tokens};

fn options(skip_special_tokens: bool) -> DetokenizeOptions {
    DetokenizeOptions { skip_special_tokens, ..DetokenizeOptions::default() }
}

/// The text of `portions`, checked for what every part of a stream promises.
fn stream(tokenizer: &Arc<Tokenizer>, skip_special: bool, portions: &[&[u32]]) -> String {
    let mut detokenizer = Detokenizer::new(tokenizer.clone(), options(skip_special));
    let mut parts: Vec<String> = portions.iter().map(|portion| detokenizer.push(portion)).collect();
    parts.push(detokenizer.finish());
    parts.concat()
}

#[test]
fn any_split_is_the_decoded_whole() {
    for tokenizer in [&*SMOLLM2, &*BYTE_FALLBACK] {
        for seed in 0..500 {
            let ids = random_tokens(tokenizer, seed);
            for skip_special in [false, true] {
                let whole = tokenizer.decode(&ids, skip_special);
                assert_eq!(stream(tokenizer, skip_special, &random_portions(&ids, seed)), whole, "seed {seed}");
                let single: Vec<&[u32]> = ids.chunks(1).collect();
                assert_eq!(stream(tokenizer, skip_special, &single), whole, "seed {seed}, token by token");
            }
        }
    }
}

#[test]
fn characters_appear_whole() {
    let text = "naïve 你好 🙂 👩‍👩‍👧";
    for tokenizer in [&*SMOLLM2, &*BYTE_FALLBACK] {
        let ids = tokenizer.encode(text, false).unwrap();
        let mut detokenizer = Detokenizer::new(tokenizer.clone(), options(true));
        let mut seen = String::new();
        let mut silent = 0;
        for &id in &ids {
            let part = detokenizer.push(&[id]);
            silent += usize::from(part.is_empty());
            seen.push_str(&part);
            assert!(text.starts_with(&seen), "{seen:?}");
        }
        assert!(silent > 0, "no character took several tokens");
        assert_eq!(seen, text);
        assert_eq!(detokenizer.finish(), "");
    }
}

#[test]
fn an_incomplete_character_is_given_up_at_the_end_only() {
    let ids = SMOLLM2.encode("🙂", false).unwrap();
    let (last, beginning) = ids.split_last().unwrap();
    let mut detokenizer = Detokenizer::new(SMOLLM2.clone(), options(true));
    assert_eq!(detokenizer.push(beginning), "");
    let mut completed = detokenizer.clone();
    assert_eq!(completed.push(&[*last]), "🙂");
    assert_eq!(detokenizer.finish(), "\u{fffd}");
    assert_eq!(detokenizer.finish(), "");
}

#[test]
fn invalid_bytes_do_not_hold_up_the_text_behind_them() {
    let byte = |byte: u8| BYTE_FALLBACK.token_to_id(&format!("<0x{byte:02X}>")).unwrap();
    let mut detokenizer = Detokenizer::new(BYTE_FALLBACK.clone(), options(true));
    assert_eq!(detokenizer.push(&[byte(0xFF)]), "\u{fffd}");
    assert_eq!(detokenizer.push(&[byte(0xE5), byte(b'a')]), "\u{fffd}a");
    assert_eq!(detokenizer.push(&[byte(0xE5)]), "");
    assert_eq!(detokenizer.push(&[BYTE_FALLBACK.token_to_id("!").unwrap()]), "\u{fffd}!");
}

#[test]
fn special_tokens_are_shown_or_skipped() {
    let ids = SMOLLM2.encode("<|im_start|>user\nHi<|im_end|>", false).unwrap();
    assert_eq!(stream(&SMOLLM2, false, &[&ids]), "<|im_start|>user\nHi<|im_end|>");
    assert_eq!(stream(&SMOLLM2, true, &[&ids]), "user\nHi");
    let unknown = [SMOLLM2.vocab_size() as u32, u32::MAX];
    assert_eq!(stream(&SMOLLM2, false, &[&unknown]), "", "ids outside the vocabulary have no text");
}

#[test]
fn leading_space_belongs_to_continued_text_only() {
    let ids = BYTE_FALLBACK.encode("hello world", true).unwrap();
    assert_eq!(stream(&BYTE_FALLBACK, true, &[&ids[..1], &ids[1..]]), "hello world");
    let continued = DetokenizeOptions { continues_text: true, ..DetokenizeOptions::default() };
    let mut detokenizer = Detokenizer::new(BYTE_FALLBACK.clone(), continued);
    assert_eq!(detokenizer.push(&ids), " hello world");
    // Shown, the BOS token is what the text begins with.
    assert_eq!(stream(&BYTE_FALLBACK, false, &[&ids]), "<s> hello world");
}
