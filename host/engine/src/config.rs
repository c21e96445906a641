//! How an engine is set up.

use std::path::PathBuf;

use torus_plugins::Registry;

use crate::{Device, MemoryBudget};

/// Everything an engine is made from. Fields left `None` are decided from the model, the device and its memory.
#[derive(Clone, Debug)]
pub struct EngineConfig {
    /// The name in log lines and metrics.
    pub name: String,
    /// Folder or `.gguf` file, already on this machine.
    pub model: torus_weights::ResolvedModel,
    pub plugins: Registry,
    /// Tokens that end a sequence, from everywhere the checkpoint names them: config, generation config, tokenizer,
    /// GGUF metadata.
    pub end_token_ids: Vec<u32>,
    /// Shared by all engines of the process.
    pub device: Device,
    pub dtype: DtypeChoice,
    /// Dtype of the KV cache.
    pub kv_cache_dtype: KvCacheDtype,
    /// Weights that are no quantized blocks become int8 blocks on load.
    pub quantize_int8: bool,
    /// Use the native kernels, where the device is this machine's CPU.
    pub cpu_kernels: bool,
    pub compile_mode: CompileMode,
    /// Name of an attention plugin; `None` = the one that scores highest.
    pub attention_backend: Option<String>,
    /// Longest prompt plus output, at most what the model allows; `None` = the model's, as far as the pool holds it.
    pub context_length: Option<usize>,
    pub memory: MemoryConfig,
    pub schedule: ScheduleConfig,
    /// Seed of requests that bring none.
    pub random_seed: u64,
    /// Folder of compiled executables; `None` = nothing is kept.
    pub cache_dir: Option<PathBuf>,
    /// Where packed weights are kept for the next start; `None` = nowhere.
    pub weight_cache: Option<WeightCacheConfig>,
    /// A step that takes longer than this is reported, and the engine is no longer healthy.
    pub watchdog_timeout: std::time::Duration,
    /// Show progress bars on the terminal while loading and compiling.
    pub progress: bool,
    /// Steps that fail on purpose, for tests of recovery (`TORUS_TEST_FAIL_STEP`): the step that first computes a
    /// request whose prompt holds this token fails.
    pub fail_on_token: Option<u32>,
}

/// Packed weights on disk, for models whose weights are packed.
#[derive(Clone, Debug)]
pub struct WeightCacheConfig {
    pub folder: PathBuf,
    /// Weights of fewer bytes are packed faster than it is worth keeping them.
    pub from_bytes: u64,
}

/// What the step loop is told, whatever it runs on.
#[derive(Clone, Debug)]
pub(crate) struct LoopConfig {
    pub schedule: ScheduleConfig,
    pub random_seed: u64,
    pub watchdog_timeout: std::time::Duration,
    pub fail_on_token: Option<u32>,
}

impl From<&EngineConfig> for LoopConfig {
    fn from(config: &EngineConfig) -> Self {
        Self {
            schedule: config.schedule.clone(),
            random_seed: config.random_seed,
            watchdog_timeout: config.watchdog_timeout,
            fail_on_token: config.fail_on_token,
        }
    }
}

/// An engine without a model, on a device that answers at once with tokens that mean nothing: for measuring the host.
#[derive(Clone, Debug)]
pub struct NullConfig {
    pub vocab: usize,
    /// Longest prompt plus output.
    pub context_length: usize,
    pub page_size: usize,
    /// Tokens that the pool of pages holds.
    pub max_total_tokens: usize,
    /// Steps with fewer sequences take a millisecond, so that those who submit get ahead of those who run.
    pub full_steps: usize,
    /// As for a model; `None` = 256 requests, 2,048 tokens a step.
    pub schedule: ScheduleConfig,
}

/// The device and the library that drives it.
#[derive(Clone, Debug)]
pub struct DeviceConfig {
    pub platform: Platform,
    /// The PJRT plugin.
    pub pjrt_plugin: PathBuf,
    /// Threads of the CPU client; `None` = as affinity and cgroup allow.
    pub cpu_threads: Option<usize>,
    /// Devices that share each model; a CPU pretends to have as many.
    pub tensor_parallel: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Platform {
    Cpu,
    Tpu,
    Cuda,
}

/// `--dtype`: of activations; weights follow it unless the checkpoint is quantized.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DtypeChoice {
    /// The checkpoint's.
    #[default]
    Auto,
    Float32,
    Bfloat16,
}

/// `--compile-mode`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CompileMode {
    /// Layer after layer: for the fastest steps.
    #[default]
    Best,
    /// Layers in loops: programs compile in a time that hardly depends on how many there are.
    Fast,
}

/// `--kv-cache-dtype`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum KvCacheDtype {
    /// That of activations.
    #[default]
    Auto,
    Float32,
    Bfloat16,
    /// `f8e4m3fn`, with the scales of each layer that the checkpoint brings, or 1.
    Fp8E4m3,
    /// With a scale for each token and head; on a TPU for each layer, as the checkpoint brings them.
    Int8,
}

#[derive(Clone, Debug)]
pub struct MemoryConfig {
    /// What all engines together may take.
    pub budget: MemoryBudget,
    /// Share of the whole budget for this engine, its weights included; `None` = what is free.
    pub share: Option<f64>,
    /// Bytes that another engine will release before this one allocates: it plans with them, and once its programs are
    /// compiled it waits for them ([`Readiness::WaitingForMemory`](crate::api::Readiness::WaitingForMemory)). 0 = it
    /// reserves at once what is free.
    pub released_bytes: u64,
    /// Tokens in a page; `None` = 16 on CPU, 128 on TPU.
    pub page_size: Option<usize>,
    /// Tokens the KV pool holds; `None` = as memory allows.
    pub max_total_tokens: Option<usize>,
    /// Share of the device's memory for weights and KV; `None` on a CPU = the smaller of 4 GiB and a quarter of what
    /// the cgroup leaves for KV.
    pub mem_fraction_static: Option<f64>,
}

impl MemoryConfig {
    /// Everything decided from the model and what is free in `budget`.
    pub fn new(budget: MemoryBudget) -> Self {
        Self {
            budget,
            share: None,
            released_bytes: 0,
            page_size: None,
            max_total_tokens: None,
            mem_fraction_static: None,
        }
    }
}

#[derive(Clone, Debug)]
pub struct ScheduleConfig {
    /// Requests that run at once; `None` = 64 on CPU, 256 elsewhere, fewer where a TPU's page table would be too long.
    pub max_running_requests: Option<usize>,
    /// Tokens a step computes at most (`--chunked-prefill-size`); `None` = 512 on CPU, 2,048 elsewhere.
    pub chunked_prefill_size: Option<usize>,
    /// Prompt tokens of one step at most, beside the chunk size (`--max-prefill-tokens`).
    pub max_prefill_tokens: usize,
    /// Requests that wait at most; more are refused.
    pub max_queued_requests: usize,
    pub policy: torus_sched::Policy,
    /// Reuse the KV of shared prefixes.
    pub prefix_cache: bool,
    /// Prepare step N+1 while step N runs.
    pub overlap: bool,
    /// How many times as long as a step that only decodes one may take that computes prompts as well; infinite = as long as
    /// the chunk size makes it.
    pub prefill_slowdown: f64,
}
