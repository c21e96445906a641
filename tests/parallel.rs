//! Models that several devices share: a CPU that acts as two or four gives the tokens of one, and of `transformers`; what does
//! not divide is refused with its numbers; and the shard of a TPU compiles.

use std::{
    path::{Path, PathBuf},
    process::Command,
    sync::Arc,
    time::Duration,
};

use futures::future::join_all;
use serde_json::{Value, json};
use torus_abi::attention::Target;
use torus_engine::{
    Blueprint, Device, EngineConfig, EngineHandle, MemoryBudget,
    api::{Engine, LogprobOptions, Readiness, SamplingParams},
    config::{DeviceConfig, MemoryConfig, Platform},
};
use torus_weights::ResolvedModel;

use crate::{
    families::{equals_the_reference, small},
    golden::{self, TOKENS, assert_first_top, assert_golden},
    support::{Answer, answer, block_on, config, devices, fetched, gemma3, greedy, ready, request, smollm2},
};

fn data(case: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("data").join(case)
}

/// Four query heads and one KV head, which each device has; 262,144 tokens.
#[test]
fn gemma_gives_the_tokens_of_the_reference_on_two_and_four_devices() {
    let goldens = golden::cases(include_str!("data/gemma3-270m.json"));
    for count in [2, 4] {
        let mut config = config(ResolvedModel::Gguf(gemma3()));
        config.device = devices(count);
        config.end_token_ids = vec![1];
        config.memory.max_total_tokens = Some(256);
        config.schedule.max_running_requests = Some(4);
        config.schedule.chunked_prefill_size = Some(4);
        let engine = ready(config);
        let short = goldens.iter().filter(|golden| golden.prompt.len() < 100);
        let requests = short.map(|golden| async {
            let mut request = request(&golden.prompt.len().to_string(), &golden.prompt, greedy(TOKENS));
            request.logprobs = LogprobOptions { output: true, top_n: 5, prompt_from: None };
            let answer = answer(&engine, request).await;
            assert_golden(golden, &answer);
            assert_first_top(golden, &answer);
        });
        assert_eq!(block_on(join_all(requests)).len(), 4);
    }
}

/// Of each family: biases and KV heads that several devices have, tied and separate heads, windows, normalized heads.
#[test]
fn every_family_gives_the_tokens_of_the_reference_on_several_devices() {
    let cases = [("llama/biases", 4), ("qwen/qwen2-grouped-untied", 2), ("qwen/qwen3-biases", 2), ("gemma/grouped", 4)];
    for (case, count) in cases {
        let folder = data(case);
        let golden = std::fs::read_to_string(folder.join("golden.json")).unwrap();
        let golden: Value = serde_json::from_str(&golden).unwrap();
        let name = format!("{case} on {count} devices");
        let gguf = folder.join("model.gguf");
        let model = if gguf.exists() { ResolvedModel::Gguf(gguf) } else { ResolvedModel::Folder(folder) };
        equals_the_reference(&name, EngineConfig { device: devices(count), ..small(model) }, &golden);
    }
}

/// A model of random weights whose 50 tokens do not divide by four.
fn random_model(tied: bool) -> tempfile::TempDir {
    let (hidden, intermediate, vocab, heads, kv_heads, head_dim) = (16, 24, 50, 4, 2, 4);
    let mut tensors: Vec<(String, Vec<usize>)> =
        vec![("model.embed_tokens.weight".into(), vec![vocab, hidden]), ("model.norm.weight".into(), vec![hidden])];
    let layer = [
        ("input_layernorm", vec![hidden]),
        ("post_attention_layernorm", vec![hidden]),
        ("self_attn.q_proj", vec![heads * head_dim, hidden]),
        ("self_attn.k_proj", vec![kv_heads * head_dim, hidden]),
        ("self_attn.v_proj", vec![kv_heads * head_dim, hidden]),
        ("self_attn.o_proj", vec![hidden, heads * head_dim]),
        ("mlp.gate_proj", vec![intermediate, hidden]),
        ("mlp.up_proj", vec![intermediate, hidden]),
        ("mlp.down_proj", vec![hidden, intermediate]),
    ];
    tensors.extend(layer.map(|(name, shape)| (format!("model.layers.0.{name}.weight"), shape)));
    if !tied {
        tensors.push(("lm_head.weight".into(), vec![vocab, hidden]));
    }
    let config = json!({
        "architectures": ["LlamaForCausalLM"], "hidden_size": hidden, "intermediate_size": intermediate,
        "num_hidden_layers": 1, "num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": head_dim,
        "vocab_size": vocab, "max_position_embeddings": 128, "tie_word_embeddings": tied,
    });
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
    std::fs::write(folder.path().join("model.safetensors"), safetensors(&tensors)).unwrap();
    folder
}

/// Tensors of numbers between -1 and 1 from a multiplicative generator.
fn safetensors(tensors: &[(String, Vec<usize>)]) -> Vec<u8> {
    let (mut header, mut data, mut state) = (serde_json::Map::new(), Vec::new(), 1u64);
    for (name, shape) in tensors {
        let start = data.len();
        for _ in 0..shape.iter().product() {
            state = state * 48_271 % 0x7fff_ffff;
            data.extend((state as f32 / 0x3fff_ffff as f32 - 1.0).to_le_bytes());
        }
        header.insert(name.clone(), json!({"dtype": "F32", "shape": shape, "data_offsets": [start, data.len()]}));
    }
    let header = serde_json::to_vec(&header).unwrap();
    [&(header.len() as u64).to_le_bytes()[..], &header, &data].concat()
}

/// Requests that use everything which has a column for each token.
async fn sampled(engine: &EngineHandle) -> Vec<Answer> {
    let drawn = |seed| SamplingParams { temperature: 1.2, seed: Some(seed), ..greedy(12) };
    let cases = [
        greedy(12),
        drawn(1),
        SamplingParams { top_k: 7, ..drawn(2) },
        SamplingParams { top_p: 0.8, min_p: 0.01, ..drawn(3) },
        SamplingParams { repetition_penalty: 1.5, frequency_penalty: 0.7, presence_penalty: 0.3, ..greedy(12) },
        SamplingParams { logit_bias: vec![(3, 4.0), (49, 5.0), (20, -9.0)], ..drawn(4) },
    ];
    let answers = cases.into_iter().enumerate().map(|(i, sampling)| {
        let prompt: Vec<u32> = (0..9).map(|token| (token * 11 + i as u32 * 7) % 50).collect();
        let mut asked = request(&i.to_string(), &prompt, sampling);
        asked.logprobs = LogprobOptions { output: true, top_n: 20, prompt_from: (i == 0).then_some(0) };
        answer(engine, asked)
    });
    join_all(answers).await
}

fn assert_same(one: &Answer, other: &Answer) {
    assert_eq!(one.tokens, other.tokens);
    let logprobs = |answer: &Answer| [answer.prompt_logprobs.clone(), answer.logprobs.clone()].concat();
    let (one, other) = (logprobs(one), logprobs(other));
    assert_eq!(one.len(), other.len());
    for (one, other) in one.iter().zip(&other) {
        assert_eq!(one.token, other.token);
        let close = |a: f32, b: f32| (a - b).abs() < 1e-4;
        assert!(one.logprob.zip(other.logprob).is_none_or(|(a, b)| close(a, b)), "{one:?} and {other:?}");
        assert_eq!(one.top.len(), other.top.len());
        for ((token, logprob), (other_token, other_logprob)) in one.top.iter().zip(&other.top) {
            assert!(token == other_token && close(*logprob, *other_logprob), "{one:?} and {other:?}");
        }
    }
}

#[test]
fn sampling_and_logprobs_are_those_of_one_device() {
    for (tied, count) in [(true, 4), (false, 2)] {
        let folder = random_model(tied);
        let run = |count| {
            let model = ResolvedModel::Folder(folder.path().to_owned());
            let mut config = EngineConfig { device: devices(count), ..small(model) };
            config.schedule.chunked_prefill_size = Some(2);
            config.schedule.max_running_requests = Some(2);
            let engine = ready(config);
            let answers = block_on(sampled(&engine));
            assert_eq!(engine.stats().serving_compiles, 0);
            answers
        };
        let (one, shared) = (run(1), run(count));
        shared.iter().zip(&one).for_each(|(shared, one)| assert_same(shared, one));
    }
}

/// Why an engine does not start.
pub fn failure(config: EngineConfig) -> String {
    let engine: Arc<EngineHandle> = Arc::new(torus_engine::start(config).unwrap());
    loop {
        match engine.readiness() {
            Readiness::Failed { message } => return message,
            Readiness::Ready => panic!("it starts"),
            _ => std::thread::sleep(Duration::from_millis(10)),
        }
    }
}

#[test]
fn heads_that_do_not_divide_are_refused_with_both_numbers() {
    let on = |model, count| failure(EngineConfig { device: devices(count), ..config(model) });
    let message = on(ResolvedModel::Gguf(smollm2()), 2);
    assert!(message.contains("num_attention_heads 9 does not divide over 2 devices"), "{message}");
    assert!(message.contains("give a --tp-size of 1, 3, 9"), "{message}");
    let message = on(ResolvedModel::Folder(data("llama/odd-sizes")), 3);
    assert!(message.contains("intermediate_size 23 does not divide over 3 devices"), "{message}");
}

/// In a process of its own: libtpu reads the environment, which must not change while other tests run.
#[test]
fn a_shard_compiles_for_a_tpu_that_is_not_there_and_updates_its_pool_in_place() {
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "parallel::libtpu_alone_in_its_process", "--ignored", "--nocapture", "--test-threads=1"])
        .envs([("TPU_SKIP_MDS_QUERY", "1"), ("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")])
        .output()
        .unwrap();
    let log = String::from_utf8_lossy(&output.stderr) + String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && log.contains("1 passed"), "{log}");
}

#[test]
#[ignore = "run by a_shard_compiles_for_a_tpu_that_is_not_there_and_updates_its_pool_in_place"]
fn libtpu_alone_in_its_process() {
    const DEVICES: u32 = 4;
    let pjrt_plugin = fetched("pjrt/libtpu-0.0.52/libtpu.so");
    let topology = torus_pjrt::Plugin::load(&pjrt_plugin).unwrap().topology("v6e:2x2", &[]).unwrap();
    let device = &topology.devices()[0];
    let mut config = config(ResolvedModel::Folder(data("qwen")));
    config.device =
        Device::new(DeviceConfig { platform: Platform::Tpu, pjrt_plugin, cpu_threads: None, tensor_parallel: DEVICES });
    config.attention_backend = Some("native".into());
    config.dtype = torus_engine::config::DtypeChoice::Bfloat16;
    config.memory = MemoryConfig {
        max_total_tokens: Some(64 * 128),
        ..MemoryConfig::new(MemoryBudget::new(device.memory_limit()))
    };
    config.schedule.max_running_requests = Some(16);
    // The heads and sizes of Qwen3-8B, in two layers and with a vocabulary that does not divide.
    let model = json!({
        "architectures": ["Qwen3ForCausalLM"], "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 2,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 1001, "torch_dtype": "bfloat16",
    });
    let target = Target { platform: topology.platform_name().to_owned(), device_kind: device.kind.clone() };
    let blueprint = Blueprint::of_config(&config, model, &target).unwrap();
    let step = *blueprint.steps().iter().rev().nth(1).unwrap();
    let text = blueprint.text(step).unwrap();
    let gathers = text.lines().filter(|line| line.contains("stablehlo.all_gather"));
    // Facts and candidates of rows, never logits: 251 tokens of each device.
    assert!(gathers.clone().count() > 0 && gathers.clone().all(|line| !line.contains("251x")), "{text}");
    let ids = topology.devices().iter().map(|device| i64::from(device.id)).collect();
    let options = torus_engine::compile_options(Platform::Tpu, ids);
    let executable = topology.compile(&text, &options).unwrap();
    assert_eq!(executable.num_partitions().unwrap(), DEVICES as usize);
    let memory = executable.memory_stats().unwrap();
    // Two KV heads of each layer's pool in bf16; beside it the rows of slots, which are padded to the TPU's tiles.
    let pool = (64 + 1) * 128 * 2 * 2 * 128 * 2 * 2;
    let rows = memory.alias_bytes - pool;
    assert!((0..1 << 20).contains(&rows), "{} bytes are updated in place, {pool} of them KV", memory.alias_bytes);
}
