//! Layers in loops (`--compile-mode fast`): the tokens of `transformers` for every family, with the CPU's kernels and without,
//! on one device and on several; pools updated where they are; and what is refused.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use torus_abi::attention::Target;
use torus_engine::{Blueprint, EngineConfig, config::CompileMode};
use torus_plugins::LibraryCache;
use torus_weights::ResolvedModel;

use crate::{
    families::{equals_the_reference, small},
    golden::{TOKENS, assert_golden, cases},
    parallel::failure,
    server::example_library,
    support::{answer, block_on, config, devices, greedy, linked_plugins, ready, request, smollm2},
};

fn data(case: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("data").join(case)
}

fn in_loops(config: EngineConfig) -> EngineConfig {
    EngineConfig { compile_mode: CompileMode::Fast, ..config }
}

/// Without native kernels.
fn plain(config: EngineConfig) -> EngineConfig {
    EngineConfig { cpu_kernels: false, attention_backend: Some("native".into()), ..config }
}

fn check(case: &str, config: EngineConfig) {
    let golden = std::fs::read_to_string(data(case).join("golden.json")).unwrap();
    let golden: Value = serde_json::from_str(&golden).unwrap();
    equals_the_reference(case, config, &golden);
}

/// Biases, normalized heads, odd sizes, two kinds of layers in turns and in runs.
#[test]
fn every_family_gives_the_tokens_of_the_reference() {
    let config = |case| in_loops(small(ResolvedModel::Folder(data(case))));
    for case in ["llama/biases", "gemma/odd-sizes-untied"] {
        check(case, config(case));
    }
    for case in ["qwen/qwen2-odd-sizes", "gemma/grouped"] {
        check(case, plain(config(case)));
    }
}

#[test]
fn devices_that_share_a_model_give_the_tokens_of_the_reference() {
    let case = "qwen/qwen3-biases";
    let config = small(ResolvedModel::Folder(data(case)));
    check(case, in_loops(EngineConfig { device: devices(2), ..config }));
}

#[test]
fn smollm2_gives_the_tokens_of_the_reference() {
    for of in [|config| config, plain] {
        let engine = ready(of(in_loops(config(ResolvedModel::Gguf(smollm2())))));
        for golden in cases(include_str!("data/smollm2-135m.json")).iter().take(2) {
            let found = block_on(answer(&engine, request("loops", &golden.prompt, greedy(TOKENS))));
            assert_golden(golden, &found);
        }
    }
}

/// The text of the largest step of a Gemma of so many layers, every sixth of which is global.
fn text(layers: u64) -> String {
    let model = json!({
        "architectures": ["Gemma3ForCausalLM"], "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": layers,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "vocab_size": 50, "sliding_window": 8,
        "sliding_window_pattern": 6, "max_position_embeddings": 128,
    });
    let device = Target { platform: "cpu".into(), device_kind: "cpu".into() };
    let config = plain(in_loops(small(ResolvedModel::Folder(data("gemma")))));
    let blueprint = Blueprint::of_config(&config, model, &device).unwrap();
    blueprint.text(blueprint.steps()[2]).unwrap()
}

#[test]
fn a_program_has_one_layer_of_each_run_however_many_there_are() {
    let calls = |text: &str| text.matches("callee = @gemma_hidden.layer").count();
    let loops = |text: &str| text.matches("\"stablehlo.while\"").count();
    let (two, many) = (text(12), text(48));
    // Five local layers and a global one, again and again.
    assert_eq!((calls(&two), calls(&many)), (2, 2));
    assert_eq!(loops(&two), loops(&many));
    // Two local layers are left over.
    assert_eq!((calls(&text(50)), loops(&text(50))), (3, loops(&many) + 1));
}

#[test]
fn a_plugin_without_loops_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let mut plugins = linked_plugins();
    plugins.load(&example_library("granite_model"), &LibraryCache::new(folder.path())).unwrap();
    let config = small(ResolvedModel::Folder(data("granite/grouped-untied")));
    let message = failure(in_loops(EngineConfig { plugins, ..config }));
    assert!(message.contains("granite_model' does not run layers in loops"), "{message}");
    assert!(message.contains("--compile-mode fast"), "{message}");
}
