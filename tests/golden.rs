//! What Hugging Face `transformers` makes of real models, kept in `data/{model}.json`.

use serde_json::Value;
use torus_engine::api::FinishReason;

use crate::support::Answer;

/// Tokens that every case was generated to.
pub const TOKENS: u32 = 32;

pub struct Golden {
    pub prompt: Vec<u32>,
    /// Up to the first step at which two tokens are nearly equally likely.
    pub tokens: Vec<u32>,
    pub first_top: Vec<(u32, f32)>,
}

/// The cases of such a file.
pub fn cases(json: &str) -> Vec<Golden> {
    /// Steps with a smaller margin between the two likeliest tokens may go either way.
    const MARGIN_MIN: f64 = 0.01;
    let golden: Value = serde_json::from_str(json).unwrap();
    let ids = |value: &Value| -> Vec<u32> {
        value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
    };
    let case = |case: &Value| {
        let margins = case["top1_minus_top2"].as_array().unwrap();
        let clear = margins.iter().take_while(|margin| margin.as_f64().unwrap() >= MARGIN_MIN).count();
        let top = case["first_step_top5"].as_array().unwrap().iter();
        Golden {
            prompt: ids(&case["input_ids"]),
            tokens: ids(&case["greedy_ids"])[..clear].to_vec(),
            first_top: top.map(|t| (t["id"].as_u64().unwrap() as u32, t["logprob"].as_f64().unwrap() as f32)).collect(),
        }
    };
    golden["cases"].as_array().unwrap().iter().map(case).collect()
}

/// The answer to a greedy request for [`TOKENS`] tokens.
pub fn assert_golden(golden: &Golden, answer: &Answer) {
    assert_eq!(answer.tokens[..golden.tokens.len()], golden.tokens);
    assert_eq!((answer.tokens.len(), &answer.reason), (TOKENS as usize, &FinishReason::Length));
}

/// The likeliest first tokens, of an answer with logprobs.
pub fn assert_first_top(golden: &Golden, answer: &Answer) {
    const TOLERANCE: f32 = 1e-3;
    for ((id, logprob), (expected_id, expected)) in answer.logprobs[0].top.iter().zip(&golden.first_top) {
        assert_eq!(id, expected_id);
        assert!((logprob - expected).abs() < TOLERANCE, "{logprob} against {expected}");
    }
}
