//! The engine on Gemma 3 270M, whose layers have two kinds of state, against Hugging Face `transformers`.

use futures::future::join_all;
use torus_engine::api::{Engine, LogprobOptions};
use torus_weights::ResolvedModel;

use crate::{
    golden::{self, TOKENS, assert_first_top, assert_golden},
    support::{answer, block_on, config, gemma3, greedy, ready, request},
};

#[test]
fn greedy_tokens_equal_the_reference_past_the_window_and_with_cached_prefixes() {
    const WINDOW: usize = 512;
    let goldens = golden::cases(include_str!("data/gemma3-270m.json"));
    assert!(goldens.iter().any(|golden| golden.prompt.len() > WINDOW));
    let mut config = config(ResolvedModel::Gguf(gemma3()));
    config.end_token_ids = vec![1];
    // Few and small programs: the head alone has 168 million weights.
    config.memory.max_total_tokens = Some(2048);
    config.schedule.max_running_requests = Some(4);
    config.schedule.chunked_prefill_size = Some(32);
    let engine = ready(config);
    for round in 0..2 {
        let requests = goldens.iter().enumerate().map(|(i, golden)| {
            let engine = &engine;
            async move {
                let mut request = request(&format!("{round}-{i}"), &golden.prompt, greedy(TOKENS));
                request.logprobs = LogprobOptions { output: true, top_n: 5, prompt_from: None };
                let answer = answer(engine, request).await;
                assert_golden(golden, &answer);
                assert_first_top(golden, &answer);
                // The second time the whole pages of the prompt are there, but for its last token.
                let cached = if round == 0 { 0 } else { (golden.prompt.len() - 1) / 16 * 16 };
                assert_eq!(answer.cached_tokens, cached);
            }
        });
        block_on(join_all(requests));
    }
    assert_eq!(engine.stats().serving_compiles, 0);
}
