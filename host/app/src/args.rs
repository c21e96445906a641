//! The command line.
//!
//! Options have the names that operators of SGLang know. One whose feature does not exist yet is refused with a
//! sentence that says so ([`refuse`]), never ignored.

mod ahead;
mod ctl;
mod engine;
mod generate;
mod models;
pub mod refuse;
mod serve;
mod values;

pub use ahead::{CompileArgs, PlanArgs};
pub use ctl::{CtlArgs, CtlCommand, ModelChanges, SwapMode};
pub use engine::{DeviceArgs, EngineArgs, ModelArgs, PluginArgs, ScheduleArgs};
pub use generate::GenerateArgs;
pub use models::ModelSpec;
pub use serve::ServeArgs;
pub use values::{
    ChunkSize, CompileMode, Device, Dtype, KvCacheDtype, LogArgs, LogFormat, LogLevel, Policy, Quantization, Switch,
    fraction,
};

use std::path::PathBuf;

/// Serves large language models on TPUs, CPUs and GPUs
#[derive(Debug, clap::Parser)]
#[command(name = "torus", version, max_term_width = 120, disable_help_subcommand = true)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, clap::Subcommand)]
pub enum Command {
    /// Serve a model over HTTP
    Serve(Box<ServeArgs>),
    /// Load a model and continue one prompt
    Generate(Box<GenerateArgs>),
    /// Compile what a server runs, for a TPU that need not be there, from a config.json
    Compile(Box<CompileArgs>),
    /// Say whether a model fits a TPU, and what its steps cost there at least
    Plan(Box<PlanArgs>),
    /// List plugins, check one, or begin one
    #[command(subcommand, visible_alias = "plugin")]
    Plugins(PluginsCommand),
    /// Change what a running server serves: load plugins, load, swap and unload models
    Ctl(Box<CtlArgs>),
    /// Say what this machine offers, and what to do where something is missing
    CheckEnv(CheckEnvArgs),
    /// Measure a server, or its parts
    #[command(subcommand)]
    Bench(BenchCommand),
    /// Open a device and print what it is, as JSON; for this program's own use
    #[command(hide = true)]
    ProbeDevice(ProbeArgs),
    /// Print versions
    Version,
}

/// Options of `torus probe-device`.
#[derive(Debug, clap::Args)]
pub struct ProbeArgs {
    #[arg(long, value_name = "DEVICE", default_value = "tpu")]
    pub device: Device,
    #[arg(long, value_name = "FILE")]
    pub pjrt_plugin: PathBuf,
}

#[derive(Debug, clap::Subcommand)]
pub enum BenchCommand {
    #[command(flatten)]
    OverHttp(torus_bench::Bench),
    /// Time an engine's steps in this process, beside a sum over the bytes of weights that a step reads
    Step(Box<StepBenchArgs>),
    /// Measure what the host alone costs: scheduling, packing, streaming, the prefix cache
    Host(HostBenchArgs),
    /// Time the CPU's kernels alone, each beside what bounds it: a plain sum over the same bytes, or arithmetic. With
    /// --topology, count the cycles of the TPU's attention kernels instead
    Kernels(KernelBenchArgs),
}

/// Options of `torus bench kernels`. The sizes are SmolLM2-135M's where none are given.
#[derive(Debug, clap::Args)]
pub struct KernelBenchArgs {
    /// How weights are stored
    #[arg(long, value_name = "FORMAT", num_args = 1.., value_delimiter = ',', default_values = ["bf16", "q8", "q4min"],
        help_heading = "Cases")]
    pub formats: Vec<KernelFormat>,
    /// Rows of activations
    #[arg(long, value_name = "N", num_args = 1.., value_delimiter = ',', default_values_t = [1, 8, 32, 512],
        help_heading = "Cases")]
    pub rows: Vec<usize>,
    /// Tokens of each sequence that attends
    #[arg(long, value_name = "TOKENS", num_args = 1.., value_delimiter = ',', default_values_t = [128, 576, 4096],
        help_heading = "Cases")]
    pub context: Vec<usize>,
    /// Rounds; the middle one counts
    #[arg(long, value_name = "N", default_value_t = 9, help_heading = "Cases")]
    pub rounds: usize,
    #[arg(long, value_name = "N", default_value_t = 576, help_heading = "Model")]
    pub hidden: usize,
    #[arg(long, value_name = "N", default_value_t = 1536, help_heading = "Model")]
    pub intermediate: usize,
    #[arg(long, value_name = "N", default_value_t = 30, help_heading = "Model")]
    pub layers: usize,
    #[arg(long, value_name = "N", default_value_t = 9, help_heading = "Model")]
    pub q_heads: usize,
    #[arg(long, value_name = "N", default_value_t = 3, help_heading = "Model")]
    pub kv_heads: usize,
    #[arg(long, value_name = "N", default_value_t = 64, help_heading = "Model")]
    pub head_dim: usize,
    /// Tokens in a page of KV
    #[arg(long, value_name = "TOKENS", default_value_t = 16, help_heading = "Model")]
    pub page_size: usize,
    /// Threads [default: as many as affinity and cgroup allow]
    #[arg(long, value_name = "N", value_parser = values::positive, help_heading = "Device")]
    pub threads: Option<usize>,
    /// Compile the TPU's attention kernels for this topology (v5e:1x1, v6e:1x1, tpu7x:1x1x1), which need not be there,
    /// and count the cycles of their schedules
    #[arg(long, value_name = "NAME", help_heading = "TPU")]
    pub topology: Option<String>,
    /// Only the cases whose names contain one of these
    #[arg(long, value_name = "TEXT", num_args = 1.., requires = "topology", help_heading = "TPU")]
    pub case: Vec<String>,
    /// Library that compiles [default: $TPU_LIBRARY_PATH, else the one in the cache folder]
    #[arg(long, value_name = "FILE", requires = "topology", help_heading = "TPU")]
    pub pjrt_plugin: Option<PathBuf>,
    /// Folder where that library is looked for
    #[arg(long, value_name = "FOLDER", env = "TORUS_CACHE", hide_env_values = true, help_heading = "TPU")]
    pub cache_dir: Option<PathBuf>,
    /// Only compile this program; what the command runs in a process of its own
    #[arg(long, value_name = "FILE", requires = "topology", hide = true)]
    pub compile_only: Option<PathBuf>,
    /// Print JSON
    #[arg(long, help_heading = "Output")]
    pub json: bool,
}

/// `torus bench kernels --formats`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum KernelFormat {
    F32,
    Bf16,
    F16,
    /// Bytes in blocks of 32 (GGUF Q8_0)
    Q8,
    /// Half bytes (Q4_0)
    Q4,
    /// Half bytes with a minimum (Q4_1, Q4_K)
    Q4min,
    /// Five bits (Q5_0)
    Q5,
    /// Five bits with a minimum (Q5_1, Q5_K)
    Q5min,
    /// Six bits in blocks of 256 (Q6_K)
    Q6,
}

/// Options of `torus bench host`.
#[derive(Debug, clap::Args)]
pub struct HostBenchArgs {
    /// Requests that run at once
    #[arg(long, value_name = "N", num_args = 1.., value_delimiter = ',', default_values_t = [32, 256, 1024, 4096],
        help_heading = "Cases")]
    pub running: Vec<usize>,
    /// Tokens of each prompt
    #[arg(long, value_name = "TOKENS", default_value_t = 64, help_heading = "Cases")]
    pub input_len: usize,
    /// Tokens that each generates
    #[arg(long, value_name = "N", default_value_t = 200, help_heading = "Cases")]
    pub steps: usize,
    /// Tokens in the prefix cache that is measured by itself
    #[arg(long, value_name = "TOKENS", default_value_t = 1_000_000, help_heading = "Cases")]
    pub cached_tokens: usize,
    /// HTTP clients that are streamed to; a step takes a millisecond then, so that few of them are not kept busy
    #[arg(long, value_name = "N", num_args = 1.., value_delimiter = ',', default_values_t = [256, 1024, 4096],
        help_heading = "Cases")]
    pub clients: Vec<usize>,
    /// Tokens streamed to each, at most 256,000 to all
    #[arg(long, value_name = "TOKENS", default_value_t = 1000, help_heading = "Cases")]
    pub stream_tokens: usize,
    /// Print what each part of a step takes
    #[arg(long, help_heading = "Output")]
    pub profile: bool,
    /// Folder for Chrome traces of the steps
    #[arg(long, value_name = "FOLDER", help_heading = "Output")]
    pub trace_dir: Option<PathBuf>,
    /// Print JSON
    #[arg(long, help_heading = "Output")]
    pub json: bool,
    /// No progress bar
    #[arg(long, alias = "disable-tqdm", help_heading = "Output")]
    pub disable_progress: bool,
}

/// Options of `torus bench step`.
#[derive(Debug, clap::Args)]
pub struct StepBenchArgs {
    /// Sequences that decode together
    #[arg(long, value_name = "N", num_args = 1.., value_delimiter = ',', default_value = "1", help_heading = "Cases")]
    pub batch_size: Vec<usize>,
    /// Tokens that each has in the cache at first
    #[arg(long, value_name = "TOKENS", default_value_t = 128, help_heading = "Cases")]
    pub context: usize,
    /// Tokens that each generates in a round
    #[arg(long, value_name = "N", default_value_t = 32, help_heading = "Cases")]
    pub steps: usize,
    /// Rounds, each followed by sums
    #[arg(long, value_name = "N", default_value_t = 8, help_heading = "Cases")]
    pub rounds: usize,
    /// Seed of the prompts
    #[arg(long, value_name = "N", default_value_t = 1, help_heading = "Cases")]
    pub seed: u64,
    /// Print where a decode step's time goes: kernels, the rest of XLA, the host
    #[arg(long, help_heading = "Output")]
    pub profile: bool,
    /// Folder for Chrome traces of the rounds
    #[arg(long, value_name = "FOLDER", help_heading = "Output")]
    pub trace_dir: Option<PathBuf>,
    /// Print a line of JSON for each batch size
    #[arg(long, help_heading = "Output")]
    pub json: bool,
    #[command(flatten)]
    pub log: LogArgs,
    #[command(flatten)]
    pub engine: EngineArgs,
}

#[derive(Debug, clap::Subcommand)]
pub enum PluginsCommand {
    /// List the plugins a server would have, and where each comes from
    Ls(PluginsLsArgs),
    /// Load a plugin file, ask it what the server would ask, and say what does not fit
    Check(PluginsCheckArgs),
    /// Write a new plugin project, ready to build, test and load
    New(PluginsNewArgs),
}

#[derive(Debug, clap::Args)]
pub struct PluginsLsArgs {
    #[command(flatten)]
    pub plugins: PluginArgs,
    /// Folder for copies of plugins
    #[arg(long, value_name = "FOLDER", env = "TORUS_CACHE", hide_env_values = true)]
    pub cache_dir: Option<PathBuf>,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, clap::Args)]
pub struct PluginsCheckArgs {
    /// The plugin's shared library
    #[arg(value_name = "FILE")]
    pub file: PathBuf,
    /// What to compile for. On a CPU it is run too; for a TPU, which need not be there, memory and the compiler's estimates
    /// are reported
    #[arg(long, value_name = "TARGET", default_value = "cpu")]
    pub target: CheckTarget,
    /// The config.json of a checkpoint, best a small one, to check a model plugin's weights, fragments and numbers with
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Library that drives the target
    #[arg(long, value_name = "FILE", env = "TORUS_PJRT_PLUGIN", hide_env_values = true)]
    pub pjrt_plugin: Option<PathBuf>,
    /// Folder for copies of plugins
    #[arg(long, value_name = "FOLDER", env = "TORUS_CACHE", hide_env_values = true)]
    pub cache_dir: Option<PathBuf>,
    /// Print JSON: a list of findings with check, outcome (passed, failed, declined, skipped), detail, and what was
    /// measured
    #[arg(long)]
    pub json: bool,
}

/// `torus plugins check --target`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum CheckTarget {
    Cpu,
    V6e,
    Tpu7x,
}

impl CheckTarget {
    /// The smallest topology of a TPU, as libtpu names it.
    pub fn topology(self) -> Option<&'static str> {
        match self {
            CheckTarget::Cpu => None,
            CheckTarget::V6e => Some("v6e:1x1"),
            CheckTarget::Tpu7x => Some("tpu7x:1x1x1"),
        }
    }
}

#[derive(Debug, clap::Args)]
pub struct PluginsNewArgs {
    /// Name of the plugin: lower-case letters, digits and '-'
    #[arg(value_name = "NAME")]
    pub name: String,
    /// What the plugin is for
    #[arg(long)]
    pub kind: PluginKind,
    /// Folder of the project; it must be empty or not exist [default: NAME in the current folder]
    #[arg(long, value_name = "FOLDER")]
    pub path: Option<PathBuf>,
    /// Copy of the plugin API to build with, instead of one that is written into the project
    #[arg(long, value_name = "FOLDER")]
    pub api: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum PluginKind {
    Model,
    Attention,
    Speculative,
}

#[derive(Debug, clap::Args)]
pub struct CheckEnvArgs {
    /// Library that drives the CPU
    #[arg(long, value_name = "FILE", env = "TORUS_PJRT_PLUGIN", hide_env_values = true)]
    pub pjrt_plugin: Option<PathBuf>,
    /// Folder for everything that Torus keeps
    #[arg(long, value_name = "FOLDER", env = "TORUS_CACHE", hide_env_values = true)]
    pub cache_dir: Option<PathBuf>,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

#[cfg(test)]
mod tests;
