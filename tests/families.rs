//! Tiny random models of every variant of every stock family, and of one from outside, against Hugging Face `transformers`
//! (`data/{family}/make.py`), through the whole engine: batched, in chunks, and again with cached prefixes. Where a
//! variant is also there as a GGUF file, that gives the same.

use std::path::{Path, PathBuf};

use futures::future::join_all;
use serde_json::Value;
use torus_engine::{EngineConfig, EngineHandle, api::LogprobOptions};
use torus_plugins::{LibraryCache, Registry};
use torus_weights::ResolvedModel;

use crate::{
    server::example_library,
    support::{answer, block_on, config, greedy, linked_plugins, ready, request},
};

fn variants(family: &str) -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("data").join(family);
    let entries = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let mut variants: Vec<_> = entries.filter(|path| path.join("config.json").exists()).collect();
    variants.sort();
    variants
}

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
}

fn floats(value: &Value) -> Vec<f32> {
    value.as_array().unwrap().iter().map(|x| x.as_f64().unwrap() as f32).collect()
}

/// Runs a case. With prompt logprobs nothing of a cached prefix is used; without, whole pages of it are.
async fn check(engine: &EngineHandle, name: &str, case: &Value, with_prompt_logprobs: bool) {
    const TOLERANCE: f32 = 1e-3;
    let (prompt, expected) = (ids(&case["input_ids"]), ids(&case["greedy_ids"]));
    let mut asked = request(name, &prompt, greedy(expected.len() as u32));
    asked.logprobs = LogprobOptions { output: true, top_n: 5, prompt_from: with_prompt_logprobs.then_some(0) };
    let answer = answer(engine, asked).await;
    let margins = floats(&case["top1_minus_top2"]);
    let clear = margins.iter().take_while(|margin| **margin >= 0.01).count();
    assert_eq!(answer.tokens[..clear], expected[..clear], "{name}");
    for ((id, logprob), top) in answer.logprobs[0].top.iter().zip(case["first_step_top5"].as_array().unwrap()) {
        assert_eq!(u64::from(*id), top["id"].as_u64().unwrap(), "{name}");
        assert!((logprob - top["logprob"].as_f64().unwrap() as f32).abs() < TOLERANCE, "{name}: {logprob}, {top}");
    }
    if with_prompt_logprobs {
        let found: Vec<_> = answer.prompt_logprobs.iter().filter_map(|token| token.logprob).collect();
        let expected = floats(&case["prompt_logprobs"]);
        assert_eq!(found.len(), expected.len(), "{name}");
        for (found, expected) in found.iter().zip(&expected) {
            assert!((found - expected).abs() < TOLERANCE, "{name}: {found} against {expected}");
        }
    }
}

/// An engine with few buckets: each variant compiles all of its own.
pub fn small(model: ResolvedModel) -> EngineConfig {
    let mut config = config(model);
    config.memory.page_size = Some(4);
    config.memory.max_total_tokens = Some(1024);
    config.schedule.chunked_prefill_size = Some(4);
    config.schedule.max_running_requests = Some(4);
    config
}

pub fn equals_the_reference(name: &str, config: EngineConfig, golden: &Value) {
    let engine = ready(config);
    for with_prompt_logprobs in [true, false] {
        let cases = golden["cases"].as_array().unwrap().iter();
        block_on(join_all(cases.map(|case| check(&engine, name, case, with_prompt_logprobs))));
    }
}

fn every_variant_equals_the_reference(family: &str, variants_min: usize) {
    every_variant_equals_the_reference_with(&linked_plugins(), family, variants_min);
}

fn every_variant_equals_the_reference_with(plugins: &Registry, family: &str, variants_min: usize) {
    let variants = variants(family);
    assert!(variants.len() >= variants_min, "{variants:?}");
    for folder in variants {
        let name = folder.file_name().unwrap().to_str().unwrap().to_owned();
        let golden = std::fs::read_to_string(folder.join("golden.json")).unwrap();
        let golden: Value = serde_json::from_str(&golden).unwrap();
        let gguf = folder.join("model.gguf");
        let config = |model| EngineConfig { plugins: plugins.clone(), ..small(model) };
        equals_the_reference(&name, config(ResolvedModel::Folder(folder)), &golden);
        if gguf.exists() {
            equals_the_reference(&format!("{name} in GGUF"), config(ResolvedModel::Gguf(gguf)), &golden);
        }
    }
}

#[test]
fn llama() {
    every_variant_equals_the_reference("llama", 8);
}

#[test]
fn granite_from_outside_of_the_tree() {
    let folder = tempfile::tempdir().unwrap();
    let mut plugins = linked_plugins();
    plugins.load(&example_library("granite_model"), &LibraryCache::new(folder.path())).unwrap();
    every_variant_equals_the_reference_with(&plugins, "granite", 2);
}

#[test]
fn qwen() {
    every_variant_equals_the_reference("qwen", 7);
}

#[test]
fn gemma() {
    every_variant_equals_the_reference("gemma", 5);
}
