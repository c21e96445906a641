//! The CPU's native kernels in a whole engine: against plain StableHLO, and quantized against float32.

use torus_engine::{
    KvCacheDtype,
    api::{Engine, LogprobOptions},
    config::DtypeChoice,
};
use torus_text::{GgufTokenizer, Tokenizer};
use torus_weights::{Checkpoint, ResolvedModel};

use crate::{
    golden::{TOKENS, assert_golden, cases},
    support::{answer, block_on, config, greedy, ready, request, smollm2},
};

#[test]
fn plain_stablehlo_gives_the_same_tokens_in_float32() {
    let mut plain = config(ResolvedModel::Gguf(smollm2()));
    plain.cpu_kernels = false;
    plain.attention_backend = Some("native".into());
    let engine = ready(plain);
    assert_eq!(engine.info().unwrap().attention_backend, "native");
    for golden in cases(include_str!("data/smollm2-135m.json")).iter().take(2) {
        let found = block_on(answer(&engine, request("plain", &golden.prompt, greedy(TOKENS))));
        assert_golden(golden, &found);
    }
}

/// The first 2,000 tokens of the licence.
fn text() -> Vec<u32> {
    const LEN: usize = 2000;
    let model = ResolvedModel::Gguf(smollm2());
    let parts = Checkpoint::open(&model).unwrap().gguf_tokenizer().unwrap().unwrap();
    let tokenizer = Tokenizer::from_gguf(&GgufTokenizer {
        model: parts.model,
        pre: parts.pre,
        tokens: parts.tokens,
        token_types: parts.token_types,
        merges: parts.merges,
        bos_id: parts.bos_id,
        eos_id: parts.eos_id,
        ..GgufTokenizer::default()
    });
    let mut tokens = tokenizer.unwrap().encode(include_str!("../LICENSE"), false).unwrap();
    assert!(tokens.len() >= LEN, "{} tokens", tokens.len());
    tokens.truncate(LEN);
    tokens
}

/// The sum of the logprobs of all tokens but the first.
fn log_likelihood(text: &[u32], dtype: DtypeChoice, kv_cache_dtype: KvCacheDtype) -> f64 {
    let mut config = config(ResolvedModel::Gguf(smollm2()));
    config.dtype = dtype;
    config.kv_cache_dtype = kv_cache_dtype;
    config.schedule.chunked_prefill_size = Some(128);
    let engine = ready(config);
    assert_eq!(engine.info().unwrap().attention_backend, "fa");
    let mut request = request("text", text, greedy(0));
    request.logprobs = LogprobOptions { output: false, top_n: 0, prompt_from: Some(0) };
    let answer = block_on(answer(&engine, request));
    let logprobs: Vec<f32> = answer.prompt_logprobs.iter().filter_map(|token| token.logprob).collect();
    assert_eq!(logprobs.len(), text.len() - 1);
    logprobs.iter().map(|logprob| f64::from(*logprob)).sum()
}

#[test]
fn quantized_weights_and_caches_keep_the_likelihood_of_a_text() {
    const TOLERANCE: f64 = 5e-3;
    let text = text();
    let exact = log_likelihood(&text, DtypeChoice::Float32, KvCacheDtype::Auto);
    assert!(exact < -500.0, "{exact}");
    for (dtype, kv_cache_dtype) in [
        (DtypeChoice::Auto, KvCacheDtype::Auto),
        (DtypeChoice::Bfloat16, KvCacheDtype::Int8),
        (DtypeChoice::Float32, KvCacheDtype::Int8),
    ] {
        let found = log_likelihood(&text, dtype, kv_cache_dtype);
        let off = (found - exact).abs() / exact.abs();
        assert!(off < TOLERANCE, "{dtype:?} with a cache of {kv_cache_dtype:?}: {found}, and {exact} in float32");
    }
}
