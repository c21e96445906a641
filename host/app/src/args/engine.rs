//! Options of everything that runs a model: `serve` and `generate`.

use std::{path::PathBuf, time::Duration};

use super::{
    models::{ModelSpec, model_spec},
    values::{
        ChunkSize, CompileMode, Device, Dtype, KvCacheDtype, Policy, Quantization, Switch, WeightCacheFrom, chunk_size,
        factor, fraction, gib_or_off, positive, seconds,
    },
};

#[derive(Clone, Debug, clap::Args)]
pub struct EngineArgs {
    #[command(flatten)]
    pub model: ModelArgs,
    #[command(flatten)]
    pub device: DeviceArgs,
    #[command(flatten)]
    pub schedule: ScheduleArgs,
    #[command(flatten)]
    pub plugins: PluginArgs,
    #[command(flatten)]
    pub parallel: ParallelArgs,
    #[command(flatten)]
    pub speculative: SpeculativeArgs,
}

#[derive(Clone, Debug, clap::Args)]
#[command(next_help_heading = "Model")]
pub struct ModelArgs {
    /// A folder with a Hugging Face checkpoint, a .gguf file, or the id of a model on the hub
    #[arg(long, value_name = "PATH", required_unless_present = "models")]
    pub model_path: Option<String>,
    /// The same, with the name it is served under and its share of the memory; given several times, several models are
    /// served, each with an equal share of what the others leave
    #[arg(long = "model", value_name = "[NAME=]PATH[,mem=0..1]", value_parser = model_spec, conflicts_with = "model_path")]
    pub models: Vec<ModelSpec>,
    /// Folder or file of the tokenizer, if it is not the model's
    #[arg(long, value_name = "PATH")]
    pub tokenizer_path: Option<PathBuf>,
    /// Longest prompt and output together [default: the model's, as far as memory holds it]
    #[arg(long, value_name = "TOKENS", value_parser = positive)]
    pub context_length: Option<usize>,
    /// Dtype of activations, and of weights that are not kept quantized
    #[arg(long, value_name = "DTYPE", default_value = "auto")]
    pub dtype: Dtype,
    /// Quantize weights on load: int8 in blocks of 32 with a scale each (on a CPU; blocks of a quantized file stay)
    #[arg(long, value_name = "METHOD")]
    pub quantization: Option<Quantization>,
    /// Dtype of the KV cache. With 'fp8_e4m3' numbers are divided by the scales of their layer, which are the checkpoint's
    /// 'k_scale' and 'v_scale', or else 1; the kernels for TPUs keep 0 of what is then below 1/64. 'int8' has a scale for each
    /// token and head on a CPU; on a TPU it has those of the layer, and needs a checkpoint that brings them
    #[arg(long, value_name = "DTYPE", default_value = "auto")]
    pub kv_cache_dtype: KvCacheDtype,
    /// Branch, tag or commit of a model on the hub [default: main]
    #[arg(long, value_name = "NAME")]
    pub revision: Option<String>,
    /// Where models from the hub are kept [default: as HF_HOME says]
    #[arg(long, value_name = "FOLDER")]
    pub download_dir: Option<PathBuf>,
    /// Accepted and without effect: code in a model's folder is never run, whatever this says
    #[arg(long)]
    pub trust_remote_code: bool,
    /// Jinja file with the chat template instead of the model's own, or the name of a built-in one: chatml, plain
    #[arg(long, value_name = "FILE")]
    pub chat_template: Option<String>,
}

#[derive(Clone, Debug, clap::Args)]
#[command(next_help_heading = "Device")]
pub struct DeviceArgs {
    /// What computes
    #[arg(long, value_name = "DEVICE", default_value = "cpu")]
    pub device: Device,
    /// Library that drives the device [default: for a TPU $TPU_LIBRARY_PATH, else that of the installed Python package libtpu,
    /// for a GPU that of jax-cuda13-pjrt or jax-cuda12-pjrt; else the one in the cache folder]
    #[arg(long, value_name = "FILE", env = "TORUS_PJRT_PLUGIN", hide_env_values = true)]
    pub pjrt_plugin: Option<PathBuf>,
    /// Folder for compiled programs, PJRT plugins and copies of plugins [default: 'torus' in the user's cache folder]
    #[arg(long, value_name = "FOLDER", env = "TORUS_CACHE", hide_env_values = true)]
    pub cache_dir: Option<PathBuf>,
    /// GiB of weights from which on a model's matrices, packed for the CPU's kernels, are kept in the cache folder and mapped
    /// at the next start; 'off' keeps none
    #[arg(long, value_name = "GIB", default_value = "0.1", value_parser = gib_or_off)]
    pub weight_cache_from: WeightCacheFrom,
    /// Flags for the compiler of the device, such as '--xla_dump_to=FOLDER'; they follow those of $XLA_FLAGS, for a TPU of
    /// $LIBTPU_INIT_ARGS, which for a GPU follow Torus's own (loops in CUDA graphs, a cache of the autotuner)
    #[arg(long, value_name = "FLAGS", allow_hyphen_values = true)]
    pub xla_flags: Option<String>,
    /// How programs are compiled: for the fastest steps, or for an early start. 'fast' runs layers in loops, so that a program
    /// compiles in a time that hardly depends on how many there are; in exchange a TPU fetches no weights ahead, and a CPU
    /// without the native kernels copies each layer's. Give it to try a large model out, or where nothing stays in the cache
    #[arg(long, value_name = "MODE", default_value = "best")]
    pub compile_mode: CompileMode,
    /// Threads that compute on a CPU [default: as CPU affinity and the cgroup allow]
    #[arg(long, value_name = "N", value_parser = positive)]
    pub threads: Option<usize>,
    /// Whether each thread of the kernels keeps to one CPU, where there are as many; 'off' where others compute on the
    /// same CPUs
    #[arg(long, value_name = "WHEN", default_value = "on")]
    pub pin_threads: Switch,
    /// Whether a CPU computes with the native kernels, or with XLA's code alone
    #[arg(long, value_name = "WHEN", default_value = "on")]
    pub cpu_kernels: Switch,
}

#[derive(Clone, Debug, clap::Args)]
#[command(next_help_heading = "Memory and scheduling")]
pub struct ScheduleArgs {
    /// Share of the device's memory (of a GPU's, of nine tenths of it) for weights and KV [default: 0.88; on a CPU, KV takes
    /// the smaller of 4 GiB and a quarter of what is left]
    #[arg(long, value_name = "0..1", value_parser = fraction)]
    pub mem_fraction_static: Option<f64>,
    /// Tokens whose KV is kept at most [default: as memory allows]
    #[arg(long, value_name = "TOKENS", value_parser = positive)]
    pub max_total_tokens: Option<usize>,
    /// Requests that run at once at most [default: 64 on a CPU, else 256; on a TPU fewer where contexts are longer than
    /// 59904 tokens, so that its kernels have room for their page table]
    #[arg(long, value_name = "N", value_parser = positive)]
    pub max_running_requests: Option<usize>,
    /// Requests that wait at most; more are answered with status 429
    #[arg(long, value_name = "N", default_value_t = 1024)]
    pub max_queued_requests: usize,
    /// Prompt tokens computed in one step at most
    #[arg(long, value_name = "TOKENS", default_value_t = 16384, value_parser = positive)]
    pub max_prefill_tokens: usize,
    /// Tokens computed in one step at most: longer prompts are computed in chunks, and running requests go first. -1
    /// leaves only --max-prefill-tokens [default: 512 on a CPU, else 2048]
    #[arg(long, value_name = "TOKENS", allow_negative_numbers = true, value_parser = chunk_size)]
    pub chunked_prefill_size: Option<ChunkSize>,
    /// How many times as long as a step that only decodes one may take that computes prompts beside: lower for steadier
    /// streams, higher for earlier first tokens. Longer where further prompts wait behind the first. 'inf' leaves only the
    /// chunk size
    #[arg(long, value_name = "FACTOR", default_value_t = 2.0, value_parser = factor)]
    pub prefill_slowdown: f64,
    /// Accepted and always on: a step computes prompts and running requests together
    #[arg(long)]
    pub enable_mixed_chunk: bool,
    /// Tokens in a page of KV [default: 16 on a CPU, else 128]
    #[arg(long, value_name = "TOKENS", value_parser = positive)]
    pub page_size: Option<usize>,
    /// Which waiting request goes first
    #[arg(long, value_name = "POLICY", default_value = "fcfs")]
    pub schedule_policy: Policy,
    /// Prepare a step only when the one before is done
    #[arg(long)]
    pub disable_overlap_schedule: bool,
    /// Do not reuse the KV of prompts that begin alike
    #[arg(long)]
    pub disable_radix_cache: bool,
    /// Seed of requests that bring none
    #[arg(long, value_name = "N", default_value_t = 42)]
    pub random_seed: u64,
    /// Seconds after which a step counts as hung: it is reported, and /health answers 503
    #[arg(long, value_name = "SECONDS", default_value = "300", value_parser = seconds)]
    pub watchdog_timeout: Duration,
}

#[derive(Clone, Debug, clap::Args)]
#[command(next_help_heading = "Plugins")]
pub struct PluginArgs {
    /// Attention plugin: 'fa', 'native', 'auto' for the one that fits best, or the name of another that is loaded
    #[arg(long, value_name = "NAME", default_value = "auto")]
    pub attention_backend: String,
    /// Plugin to load, beside those in the folders of TORUS_PLUGIN_PATH and in 'plugins' beside this program; may be
    /// given several times
    #[arg(long = "plugin", value_name = "FILE")]
    pub files: Vec<PathBuf>,
    /// Folder from which administrators may load plugins while the server runs; nothing of it is loaded at the start. May
    /// be given several times
    #[arg(long = "plugin-dir", value_name = "FOLDER")]
    pub folders: Vec<PathBuf>,
    /// Use only plugins loaded from files, not those built in
    #[arg(long)]
    pub no_linked_plugins: bool,
}

#[derive(Clone, Debug, clap::Args)]
#[command(next_help_heading = "Several devices")]
pub struct ParallelArgs {
    /// Devices that share each model, each with a part of every matrix, of the heads and of the vocabulary (a TPU7x chip
    /// counts as two); on a CPU, parts of it act as devices, which is for trying only
    #[arg(long, alias = "tensor-parallel-size", alias = "tp", value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub tp_size: u32,
    /// Machines that share a model; only 1 for now
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub nnodes: usize,
    /// This machine's number among them; only 0 for now
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub node_rank: usize,
    /// Address at which they meet
    #[arg(long, value_name = "HOST:PORT")]
    pub dist_init_addr: Option<String>,
}

#[derive(Clone, Debug, clap::Args)]
#[command(next_help_heading = "Speculative decoding (not supported yet: refused)")]
pub struct SpeculativeArgs {
    /// How tokens are drafted
    #[arg(long, value_name = "NAME")]
    pub speculative_algorithm: Option<String>,
    /// Model that drafts
    #[arg(long, alias = "speculative-draft-model", value_name = "PATH")]
    pub speculative_draft_model_path: Option<String>,
    /// Its branch, tag or commit
    #[arg(long, value_name = "NAME")]
    pub speculative_draft_model_revision: Option<String>,
    /// Draft steps for each verification
    #[arg(long, value_name = "N")]
    pub speculative_num_steps: Option<String>,
    /// Branches at each draft step
    #[arg(long, value_name = "N")]
    pub speculative_eagle_topk: Option<String>,
    /// Tokens verified at once
    #[arg(long, value_name = "N")]
    pub speculative_num_draft_tokens: Option<String>,
    /// Probability from which a draft is accepted
    #[arg(long, value_name = "P")]
    pub speculative_accept_threshold_single: Option<String>,
    /// Divisor of the accumulated probability
    #[arg(long, value_name = "P")]
    pub speculative_accept_threshold_acc: Option<String>,
}
