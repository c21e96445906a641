//! Values that options take.

use torus_engine::config::Platform;

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Device {
    Cpu,
    Tpu,
    Cuda,
}

impl Device {
    pub fn name(self) -> &'static str {
        match self {
            Device::Cpu => "cpu",
            Device::Tpu => "tpu",
            Device::Cuda => "cuda",
        }
    }

    pub fn platform(self) -> Platform {
        match self {
            Device::Cpu => Platform::Cpu,
            Device::Tpu => Platform::Tpu,
            Device::Cuda => Platform::Cuda,
        }
    }
}

/// `--compile-mode`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum CompileMode {
    /// Layer after layer: the next one's weights are fetched meanwhile.
    Best,
    /// Layers in loops: to try a model out, or where nothing stays in the cache.
    Fast,
}

/// `--dtype`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Dtype {
    /// As the checkpoint says; quantized blocks stay quantized.
    Auto,
    /// Quantized blocks are dequantized.
    #[value(alias = "float")]
    Float32,
    Bfloat16,
    /// Not supported yet: refused.
    #[value(alias = "half")]
    Float16,
}

/// `--kv-cache-dtype`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum KvCacheDtype {
    /// That of activations.
    Auto,
    #[value(alias = "fp32", alias = "float")]
    Float32,
    #[value(alias = "bf16")]
    Bfloat16,
    /// `f8e4m3fn`, with the checkpoint's scales or 1.
    #[value(name = "fp8_e4m3")]
    Fp8E4m3,
    /// Whole numbers with scales.
    Int8,
}

/// `--quantization`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Quantization {
    Int8,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Switch {
    On,
    Off,
}

/// `--schedule-policy`: in which order waiting requests are admitted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Policy {
    /// First come, first served.
    Fcfs,
    /// Longest prefix in the cache first.
    Lpm,
    /// Requests that share a prefix together, the largest group first.
    DfsWeight,
    /// Any.
    Random,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum LogLevel {
    Trace,
    Debug,
    Info,
    #[value(alias = "warning")]
    Warn,
    #[value(alias = "critical")]
    Error,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum LogFormat {
    Plain,
    Json,
}

#[derive(Clone, Debug, clap::Args)]
#[command(next_help_heading = "Log")]
pub struct LogArgs {
    /// Least severe messages to print ('info' for serve, else 'warn'); RUST_LOG, if set, decides instead
    #[arg(long, value_name = "LEVEL")]
    pub log_level: Option<LogLevel>,
    /// Lines for people, or one JSON object a line
    #[arg(long, value_name = "FORMAT", default_value = "plain")]
    pub log_format: LogFormat,
}

/// `--chunked-prefill-size`: tokens of a step, or no limit of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChunkSize {
    Tokens(usize),
    Disabled,
}

impl ChunkSize {
    /// As the option is written.
    pub fn option(self) -> i64 {
        match self {
            ChunkSize::Tokens(tokens) => i64::try_from(tokens).unwrap_or(i64::MAX),
            ChunkSize::Disabled => -1,
        }
    }
}

pub fn chunk_size(text: &str) -> Result<ChunkSize, String> {
    match text.parse::<i64>() {
        Ok(-1) => Ok(ChunkSize::Disabled),
        Ok(tokens) if tokens > 0 => usize::try_from(tokens).map(ChunkSize::Tokens).map_err(|error| error.to_string()),
        _ => Err("must be a number of tokens above 0, or -1 for no chunks".to_owned()),
    }
}

/// `--weight-cache-from`: the least size, or never.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum WeightCacheFrom {
    Gib(f64),
    Off,
}

impl WeightCacheFrom {
    pub fn bytes(self) -> Option<u64> {
        match self {
            WeightCacheFrom::Gib(gib) => Some((gib * f64::from(1 << 30)) as u64),
            WeightCacheFrom::Off => None,
        }
    }
}

pub fn gib_or_off(text: &str) -> Result<WeightCacheFrom, String> {
    if text == "off" {
        return Ok(WeightCacheFrom::Off);
    }
    let gib = text.parse::<f64>().ok().filter(|gib| *gib >= 0.0 && gib.is_finite());
    gib.map(WeightCacheFrom::Gib).ok_or_else(|| "must be a number of GiB, 0 or above, or 'off'".to_owned())
}

/// A share of a whole.
pub fn fraction(text: &str) -> Result<f64, String> {
    let value = text.parse::<f64>().ok().filter(|value| *value > 0.0 && *value < 1.0);
    value.ok_or_else(|| "must be a number between 0 and 1".to_owned())
}

/// A factor above 1, or 'inf'.
pub fn factor(text: &str) -> Result<f64, String> {
    let value = text.parse::<f64>().ok().filter(|value| *value > 1.0);
    value.ok_or_else(|| "must be a number above 1, or 'inf'".to_owned())
}

pub fn positive(text: &str) -> Result<usize, String> {
    let value = text.parse::<usize>().ok().filter(|value| *value > 0);
    value.ok_or_else(|| "must be a whole number above 0".to_owned())
}

/// A duration in seconds.
pub fn seconds(text: &str) -> Result<std::time::Duration, String> {
    let value = text.parse::<f64>().ok().filter(|value| *value > 0.0);
    let duration = value.and_then(|value| std::time::Duration::try_from_secs_f64(value).ok());
    duration.ok_or_else(|| "must be a number of seconds above 0".to_owned())
}

/// A duration in seconds, or none at all.
pub fn seconds_or_zero(text: &str) -> Result<std::time::Duration, String> {
    let duration = text.parse::<f64>().ok().and_then(|value| std::time::Duration::try_from_secs_f64(value).ok());
    duration.ok_or_else(|| "must be a number of seconds, 0 or above".to_owned())
}
