//! What is decided of an engine without its weights, against what an engine that has them turns out to be.

use std::path::{Path, PathBuf};

use serde_json::Value;
use torus_abi::attention::Target;
use torus_engine::{
    Blueprint, Device, EngineConfig, Rows,
    api::Engine,
    config::{DeviceConfig, DtypeChoice, Platform},
};
use torus_weights::ResolvedModel;

use crate::support::{config, ready};

fn folder(case: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("data").join(case)
}

/// Without the kernels, whose weights are packed as only a checkpoint says.
fn plain_config(case: &str) -> EngineConfig {
    let mut config = config(ResolvedModel::Folder(folder(case)));
    config.cpu_kernels = false;
    config.memory.page_size = Some(4);
    config.memory.max_total_tokens = Some(256);
    config.schedule.chunked_prefill_size = Some(2);
    config.schedule.max_running_requests = Some(2);
    config
}

fn blueprint(config: &EngineConfig, case: &str) -> Result<Blueprint, torus_engine::StartError> {
    blueprint_for("cpu", config, case)
}

fn blueprint_for(platform: &str, config: &EngineConfig, case: &str) -> Result<Blueprint, torus_engine::StartError> {
    let hf_config = std::fs::read(folder(case).join("config.json")).unwrap();
    let hf_config: Value = serde_json::from_slice(&hf_config).unwrap();
    let device = Target { platform: platform.into(), device_kind: platform.into() };
    Blueprint::of_config(config, hf_config, &device)
}

#[test]
fn a_config_says_what_the_engine_will_be() {
    let case = "llama/odd-sizes";
    let config = plain_config(case);
    let blueprint = blueprint(&config, case).unwrap();
    let steps: Vec<_> = blueprint.steps().iter().map(|step| (step.tokens, step.rows)).collect();
    assert_eq!(steps, [(1, Rows::Sampled), (2, Rows::Sampled), (2, Rows::All)]);
    let text = blueprint.text(blueprint.steps()[0]).unwrap();
    assert!(text.contains("func.func public @main") && text.contains("tf.aliasing_output"), "{text}");

    let info = ready(config).info().unwrap();
    assert_eq!((blueprint.kv_tokens(), blueprint.bytes()), (info.max_total_tokens, info.reserved_bytes));
    assert!(blueprint.weight_bytes() >= info.weight_bytes && info.weight_bytes > 0);
}

#[test]
fn packed_weights_need_the_checkpoint() {
    let case = "llama/odd-sizes";
    let mut config = plain_config(case);
    config.cpu_kernels = true;
    let error = blueprint(&config, case).err().unwrap().to_string();
    assert!(error.contains("a config.json is not enough"), "{error}");
}

#[test]
fn a_gpu_multiplies_float32_without_rounding_it() {
    let case = "llama/odd-sizes";
    let products = |platform: Platform, name: &str, dtype| {
        let (pjrt_plugin, cpu_threads) = (PathBuf::new(), None);
        let device = Device::new(DeviceConfig { platform, pjrt_plugin, cpu_threads, tensor_parallel: 1 });
        let config = EngineConfig { device, dtype, ..plain_config(case) };
        let blueprint = blueprint_for(name, &config, case).unwrap();
        let text = blueprint.text(blueprint.steps()[1]).unwrap();
        let products: Vec<_> = text.lines().filter(|line| line.contains("stablehlo.dot_general")).collect();
        (products.iter().filter(|line| line.contains("precision HIGHEST")).count(), products.len())
    };
    let (exact, all) = products(Platform::Cuda, "cuda", DtypeChoice::Float32);
    assert!(exact == all && all > 2, "{exact} of {all}");
    // The bits of bf16 survive the rounding, and a CPU rounds nothing.
    assert_eq!(products(Platform::Cuda, "cuda", DtypeChoice::Bfloat16).0, 0);
    assert_eq!(products(Platform::Cpu, "cpu", DtypeChoice::Float32).0, 0);
}
