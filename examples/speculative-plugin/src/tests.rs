use torus_plugin::serde_json::{Value, json};

use super::*;

fn open(parameters: Value) -> Result<PromptLookup, Fault> {
    PromptLookup::open(&SpeculativeOptions {
        vocab: 100,
        context_length: 64,
        max_sequences: 4,
        max_draft_tokens: 5,
        parameters: torus_plugin::serde_json::from_value(parameters).unwrap(),
    })
}

#[test]
fn the_longest_match_wins_and_then_the_latest() {
    let lookup = open(json!({})).unwrap();
    assert_eq!(lookup.continuation(&[1, 2, 3, 9, 3, 8, 2, 3]), [9, 3, 8, 2, 3]);
    assert_eq!(lookup.continuation(&[3, 9, 3, 8, 3]), [8, 3]);
    assert_eq!(lookup.continuation(&[7, 7, 7, 7]), [7]);
}

#[test]
fn what_was_not_seen_before_or_too_long_ago_proposes_nothing() {
    assert!(open(json!({})).unwrap().continuation(&[1, 2, 3]).is_empty());
    assert!(open(json!({"ngram_min": 2})).unwrap().continuation(&[1, 5, 2, 1]).is_empty());
    assert!(open(json!({"lookback": 3})).unwrap().continuation(&[1, 5, 2, 1]).is_empty());
}

#[test]
fn options_that_are_unknown_or_contradict_each_other_are_named() {
    let refused = |parameters| open(parameters).err().unwrap().message;
    assert!(refused(json!({"ngram": 2})).starts_with("ngram: known are"));
    assert!(refused(json!({"ngram_max": "x"})).contains("ngram_max"));
    assert!(refused(json!({"ngram_min": 4})).contains("larger than ngram_max"));
}

/// With it, tokens are the same and distributed the same as without.
#[test]
fn it_conforms() {
    torus_plugin::testkit::speculative::check::<PromptLookup>(&Default::default()).assert();
}
