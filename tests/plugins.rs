//! The stock plugins as shared libraries, loaded as a plugin of anyone would be.

use std::path::PathBuf;

use serde_json::json;
use torus_abi::model::ModelOptions;
use torus_plugins::{LibraryCache, Registry};

/// A library that cargo leaves beside the test binaries.
pub fn library(name: &str) -> PathBuf {
    let test = std::env::current_exe().unwrap();
    let path = test.ancestors().nth(2).unwrap().join(format!("examples/lib{name}.so"));
    let build = "cargo build --release --workspace --examples";
    assert!(path.exists(), "{} is missing: run {build}", path.display());
    path
}

#[test]
fn stock_plugins_load_from_shared_libraries_and_answer() {
    let folder = tempfile::tempdir().unwrap();
    let cache = LibraryCache::new(folder.path());
    let mut registry = Registry::default();
    for name in [
        "torus_model_llama",
        "torus_model_qwen",
        "torus_model_gemma",
        "torus_attention_native",
        "torus_attention_flash",
    ] {
        registry.load(&library(name), &cache).unwrap();
    }
    // The same file twice is one plugin.
    registry.load(&library("torus_model_llama"), &cache).unwrap();
    let names: Vec<_> = registry.plugins().iter().map(|plugin| plugin.name()).collect();
    assert_eq!(names, ["llama", "qwen", "gemma", "native", "fa"]);
    assert!(registry.plugins()[3].attention().is_some());

    let config = json!({
        "architectures": ["LlamaForCausalLM"], "hidden_size": 12, "intermediate_size": 20, "vocab_size": 31,
        "num_hidden_layers": 2, "num_attention_heads": 3,
    });
    let plugin = registry.model("LlamaForCausalLM").unwrap();
    let model = plugin.model().unwrap().open(&ModelOptions { config, parallel: Default::default() }).unwrap();
    let description = model.describe().unwrap();
    assert_eq!((description.hidden, description.layers.len()), (12, 2));
}
