//! Programs for TPUs that are not there.

use std::{path::PathBuf, process::Command};

use torus_abi::{
    author::Model,
    model::{EmitModel, ModelDescription, ModelOptions},
    step::StepShape,
};
use torus_model_llama::Llama;
use torus_pjrt::{CompileOptions, Plugin};
use torus_testkit::{
    attention::{Checked, InProcess, examine, program, target_cases},
    model::{Opened, hidden_program},
};

use super::*;

struct Tiny(Llama);

impl Opened for Tiny {
    fn describe(&self) -> Result<ModelDescription, String> {
        Ok(self.0.describe())
    }

    fn emit(&self, request: &EmitModel) -> Result<Package, String> {
        self.0.emit(request).map_err(|fault| fault.to_string())
    }
}

fn tiny() -> Tiny {
    let config = serde_json::json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": 2, "hidden_size": 512,
        "intermediate_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 128,
        "hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "vocab_size": 256,
        "max_position_embeddings": 8192, "tie_word_embeddings": true, "dtype": "bfloat16",
    });
    Tiny(Llama::open(&ModelOptions { config, parallel: Default::default() }).unwrap())
}

fn libtpu() -> PathBuf {
    let cache = std::env::var_os("TORUS_CACHE").map(PathBuf::from).unwrap_or_else(|| {
        let home = || PathBuf::from(std::env::var_os("HOME").expect("HOME is set")).join(".cache");
        std::env::var_os("XDG_CACHE_HOME").map_or_else(home, PathBuf::from).join("torus")
    });
    let path = cache.join("pjrt/libtpu-0.0.52/libtpu.so");
    assert!(path.exists(), "{} is missing: run .make/setup.sh test", path.display());
    path
}

/// In a process of its own: libtpu reads its environment when it is loaded.
#[test]
fn programs_compile_for_tpus_and_update_their_pools_in_place() {
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "tests::tpu::compile", "--ignored", "--nocapture", "--test-threads=1"])
        .env("TPU_SKIP_MDS_QUERY", "1")
        .env("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
        .output()
        .unwrap();
    let log = String::from_utf8_lossy(&output.stderr) + String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && log.contains("1 passed"), "{log}");
}

#[test]
#[ignore = "run by programs_compile_for_tpus_and_update_their_pools_in_place"]
fn compile() {
    let compiler = Plugin::load(libtpu()).unwrap();
    let backend = InProcess::<Flash>::default();
    for (topology, kind, tokens) in [("v6e:1x1", "TPU v6 lite", 64), ("tpu7x:1x1x1", "TPU7x", 512)] {
        let target = Target { platform: "tpu".to_owned(), device_kind: kind.to_owned() };
        let topology = compiler.topology(topology, &[]).unwrap();
        // A step of decodes with room for chunks.
        let shape = StepShape { tokens, seqs: 64, page_size: 128, pages: 512, page_table: 4097 };
        let model = hidden_program(&tiny(), &backend, &target, shape, DType::Bf16).unwrap();
        let compiled = topology.compile(&model.text, &CompileOptions::partitioned(1));
        let compiled = compiled.unwrap_or_else(|error| panic!("{kind}: {error}"));
        let pools: u64 = model.pools.iter().filter_map(TensorType::bytes).sum();
        assert_eq!(compiled.memory_stats().unwrap().alias_bytes as u64, pools, "{kind}");
        // Prefill's tiles take most of the time, so other kinds are merely emitted; `torus plugins check` compiles them.
        for case in target_cases() {
            let checked = examine(&backend, &case, &target).unwrap_or_else(|error| panic!("{}: {error}", case.name));
            let Checked::Emitted(answer, fragment) = checked else { panic!("{kind} is not served: {}", case.name) };
            assert!(program(&case, &answer, &fragment).is_ok(), "{kind}, {}", case.name);
        }
    }
}
