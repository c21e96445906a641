//! What the system tests share: the fetched files and engines over them.

use std::{
    path::PathBuf,
    sync::{Arc, OnceLock},
    time::{Duration, Instant},
};

use futures::StreamExt;
use torus_engine::{
    Device, EngineConfig, EngineHandle, MemoryBudget,
    api::{Engine, Event, FinishReason, GenerateRequest, LogprobOptions, Readiness, SamplingParams, TokenLogprob},
    config::{CompileMode, DeviceConfig, DtypeChoice, KvCacheDtype, MemoryConfig, Platform, ScheduleConfig},
};
use torus_plugins::Registry;
use torus_weights::ResolvedModel;

/// A file that the setup script fetches.
pub fn fetched(name: &str) -> PathBuf {
    let home = || PathBuf::from(std::env::var_os("HOME").unwrap_or_default()).join(".cache");
    let base = || std::env::var_os("XDG_CACHE_HOME").map_or_else(home, PathBuf::from).join("torus");
    let path = std::env::var_os("TORUS_CACHE").map_or_else(base, PathBuf::from).join(name);
    assert!(path.exists(), "{} is missing: run .make/setup.sh test", path.display());
    path
}

pub fn pjrt_plugin() -> PathBuf {
    fetched("pjrt/lammps-jax-pjrt-cpu-0.11.2/pjrt_c_api_cpu_plugin.so")
}

pub fn smollm2() -> PathBuf {
    fetched("models/SmolLM2-135M-Instruct.Q4_1.gguf")
}

pub fn gemma3() -> PathBuf {
    fetched("models/gemma-3-270m-q4_k_m.gguf")
}

/// All stock plugins, linked in.
pub fn linked_plugins() -> Registry {
    // Naming them makes the linker keep them.
    let models = (torus_model_gemma::PLUGIN, torus_model_llama::PLUGIN, torus_model_qwen::PLUGIN);
    let _ = (models, torus_attention_native::PLUGIN, torus_attention_flash::PLUGIN);
    Registry::linked().unwrap()
}

/// One device for all engines of this process, as in a server.
fn device() -> Device {
    static DEVICE: OnceLock<Device> = OnceLock::new();
    DEVICE.get_or_init(|| devices(1)).clone()
}

/// A CPU that acts as so many devices, which share each model.
pub fn devices(tensor_parallel: u32) -> Device {
    let pjrt_plugin = pjrt_plugin();
    Device::new(DeviceConfig { platform: Platform::Cpu, pjrt_plugin, cpu_threads: None, tensor_parallel })
}

/// A small engine in float32: steps of 16 tokens, so that every prompt is chunked.
pub fn config(model: ResolvedModel) -> EngineConfig {
    EngineConfig {
        name: "test".into(),
        model,
        plugins: linked_plugins(),
        end_token_ids: vec![2],
        device: device(),
        dtype: DtypeChoice::Float32,
        kv_cache_dtype: KvCacheDtype::Auto,
        quantize_int8: false,
        cpu_kernels: true,
        compile_mode: CompileMode::Best,
        attention_backend: None,
        context_length: None,
        memory: MemoryConfig { max_total_tokens: Some(16 * 1024), ..MemoryConfig::new(MemoryBudget::new(None)) },
        schedule: ScheduleConfig {
            max_running_requests: Some(16),
            chunked_prefill_size: Some(16),
            max_prefill_tokens: 16_384,
            max_queued_requests: 256,
            policy: torus_sched::Policy::Fcfs,
            prefix_cache: true,
            overlap: true,
            prefill_slowdown: 2.0,
        },
        random_seed: 1,
        cache_dir: Some(fetched("models").with_file_name("compiled")),
        weight_cache: None,
        watchdog_timeout: Duration::from_secs(300),
        progress: false,
        fail_on_token: None,
    }
}

/// Starts an engine and waits until it is ready.
pub fn ready(config: EngineConfig) -> Arc<EngineHandle> {
    let engine = torus_engine::start(config).unwrap();
    let started = Instant::now();
    loop {
        match engine.readiness() {
            Readiness::Ready => return Arc::new(engine),
            Readiness::Failed { message } => panic!("the engine does not start: {message}"),
            stage => assert!(started.elapsed() < Duration::from_secs(900), "the engine is still {stage:?}"),
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// All that came of a request.
#[derive(Debug)]
pub struct Answer {
    pub cached_tokens: usize,
    pub prompt_logprobs: Vec<TokenLogprob>,
    pub tokens: Vec<u32>,
    pub logprobs: Vec<TokenLogprob>,
    pub reason: FinishReason,
}

pub fn request(id: &str, prompt: &[u32], sampling: SamplingParams) -> GenerateRequest {
    GenerateRequest {
        id: id.to_owned(),
        prompt: prompt.into(),
        sampling,
        logprobs: LogprobOptions::default(),
        namespace: None,
        deadline: None,
    }
}

/// Greedy, to the end of `tokens`, whatever they are.
pub fn greedy(tokens: u32) -> SamplingParams {
    SamplingParams { temperature: 0.0, ignore_eos: true, max_new_tokens: Some(tokens), ..SamplingParams::default() }
}

/// Submits a request and gathers its events.
pub async fn answer(engine: &EngineHandle, request: GenerateRequest) -> Answer {
    let mut events = engine.submit(request).unwrap();
    let mut answer = Answer {
        cached_tokens: 0,
        prompt_logprobs: Vec::new(),
        tokens: Vec::new(),
        logprobs: Vec::new(),
        reason: FinishReason::Length,
    };
    while let Some(event) = events.next().await {
        match event {
            Event::Prefilled { cached_tokens, prompt_logprobs } => {
                (answer.cached_tokens, answer.prompt_logprobs) = (cached_tokens, prompt_logprobs);
            }
            Event::Tokens { tokens, logprobs } => {
                answer.tokens.extend(tokens);
                answer.logprobs.extend(logprobs);
            }
            Event::Finished(reason) => answer.reason = reason,
        }
    }
    answer
}

/// Runs something asynchronous to its end.
pub fn block_on<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(future)
}
