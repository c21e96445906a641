//! What callers ask of an engine and what they are told.
//!
//! Everything here is about token ids; text lives in `torus-text`. A request is submitted once and answered with a
//! stream of [`Event`]s that ends with [`Event::Finished`]; dropping the stream aborts the request, and its pages are
//! free within a step.

use std::{pin::Pin, sync::Arc, time::Instant};

use serde::{Deserialize, Serialize};

/// One sequence to continue.
#[derive(Clone, Debug)]
pub struct GenerateRequest {
    /// The id under which it can be aborted and is logged.
    pub id: String,
    /// Token ids, at least one, all below the vocabulary size.
    pub prompt: Arc<[u32]>,
    pub sampling: SamplingParams,
    pub logprobs: LogprobOptions,
    /// Prefixes are shared only among requests of the same namespace (`extra_key`, `cache_salt`).
    pub namespace: Option<Arc<str>>,
    /// When it is ended as timed out, whatever it has by then.
    pub deadline: Option<Instant>,
}

/// How tokens are chosen. Defaults are neutral; merging `generation_config.json` is the caller's.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct SamplingParams {
    /// Tokens to generate at most; `None` = up to the context length.
    pub max_new_tokens: Option<u32>,
    /// End tokens cannot be sampled before this many tokens were.
    pub min_new_tokens: u32,
    /// 0 = greedy.
    pub temperature: f32,
    /// Only the `top_k` likeliest tokens; 0 = all.
    pub top_k: u32,
    /// Only the likeliest tokens that together reach this probability.
    pub top_p: f32,
    /// Only tokens at least this likely relative to the likeliest.
    pub min_p: f32,
    /// Divides (positive) or multiplies (negative) the logits of tokens in prompt or output; 1 = off.
    pub repetition_penalty: f32,
    /// Subtracted once per occurrence in the output.
    pub frequency_penalty: f32,
    /// Subtracted once if it occurs in the output.
    pub presence_penalty: f32,
    /// Added to the logits of these tokens.
    pub logit_bias: Vec<(u32, f32)>,
    /// Token ids that end the sequence, beside the model's end tokens.
    pub stop_token_ids: Vec<u32>,
    /// Do not stop at the model's end tokens (`stop_token_ids` still apply).
    pub ignore_eos: bool,
    /// Makes the result reproducible; `None` = drawn by the engine.
    pub seed: Option<u64>,
}

impl Default for SamplingParams {
    fn default() -> Self {
        Self {
            max_new_tokens: None,
            min_new_tokens: 0,
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            frequency_penalty: 0.0,
            presence_penalty: 0.0,
            logit_bias: Vec::new(),
            stop_token_ids: Vec::new(),
            ignore_eos: false,
            seed: None,
        }
    }
}

/// Which logprobs are wanted. They are taken from the logits after penalties, bias and temperature and before top-k,
/// top-p and min-p (of greedy requests: at temperature 1).
#[derive(Clone, Debug, Default, PartialEq)]
pub struct LogprobOptions {
    /// Of each sampled token.
    pub output: bool,
    /// Also of the `top_n` likeliest tokens at each step, at most [`TOP_LOGPROBS_MAX`].
    pub top_n: u32,
    /// Of prompt tokens too, from this position on (`logprob_start_len`; the token at position 0 has none).
    pub prompt_from: Option<usize>,
}

/// Most alternatives per token for which logprobs can be asked.
pub const TOP_LOGPROBS_MAX: u32 = 20;

/// A token with its logprob and the likeliest alternatives.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenLogprob {
    pub token: u32,
    /// `None` for the first token of the prompt.
    pub logprob: Option<f32>,
    /// Likeliest first.
    pub top: Vec<(u32, f32)>,
}

/// What happens to a request.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// The prompt has been computed. Comes once, before any token.
    Prefilled {
        /// Prompt tokens whose KV was found in the cache.
        cached_tokens: usize,
        /// For positions from [`LogprobOptions::prompt_from`] on.
        prompt_logprobs: Vec<TokenLogprob>,
    },
    /// New tokens, with logprobs for each if asked for (else empty).
    Tokens { tokens: Vec<u32>, logprobs: Vec<TokenLogprob> },
    /// The end. A stop token is among the tokens sent before.
    Finished(FinishReason),
}

#[derive(Clone, Debug, PartialEq)]
pub enum FinishReason {
    /// This token ended it: an end token of the model or one of `stop_token_ids`.
    Stop { token: u32 },
    /// `max_new_tokens` or the context length is reached.
    Length,
    /// Ended from outside or by a failure.
    Aborted(Abort),
}

/// Why a request was ended before its time.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum Abort {
    #[error("the request was aborted")]
    ByUser,
    #[error("the request exceeded its time limit")]
    TimedOut,
    #[error("the client reads too slowly")]
    SlowClient,
    #[error("the server is shutting down")]
    ShuttingDown,
    #[error("the KV cache is too small for this request")]
    OutOfPages,
    /// The step that computed it failed; the text is safe to show.
    #[error("{0}")]
    Failed(String),
}

/// Why a request was not taken.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum SubmitError {
    #[error("the queue is full ({queued} requests are waiting); try again later")]
    QueueFull { queued: usize },
    /// The request itself cannot be served.
    #[error("{field}: {message}")]
    Invalid { field: &'static str, message: String },
    #[error("the server is shutting down")]
    ShuttingDown,
    #[error("the model is not ready: {stage}")]
    NotReady { stage: String },
}

/// Events of one request, in order. Dropping it aborts the request.
pub type EventStream = Pin<Box<dyn futures_core::Stream<Item = Event> + Send>>;

/// How far an engine is from serving.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "stage", rename_all = "snake_case")]
pub enum Readiness {
    /// Reading weights.
    Loading {
        done: u64,
        total: u64,
    },
    Compiling {
        done: usize,
        total: usize,
    },
    /// Programs are ready; another engine must release memory before weights are read.
    WaitingForMemory {
        bytes: u64,
    },
    WarmingUp,
    Ready,
    /// It will not become ready, or stopped being so (a hung step).
    Failed {
        message: String,
    },
    ShuttingDown,
}

/// What does not change while an engine runs.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ModelInfo {
    pub architecture: String,
    pub vocab_size: usize,
    pub context_length: usize,
    /// Longest prompt plus output that fits the pool.
    pub max_total_tokens: usize,
    pub max_running_requests: usize,
    pub page_size: usize,
    pub dtype: String,
    /// Bytes of weights that a step reads from memory, whatever its size: all but an embedding that is only looked up.
    pub weight_bytes: u64,
    pub attention_backend: String,
    /// Name and version of the plugin that the model comes from.
    pub model_plugin: String,
    /// Memory held for weights and KV.
    pub reserved_bytes: u64,
    pub device: String,
    pub end_token_ids: Vec<u32>,
}

/// A snapshot for `/get_server_info`, `/metrics` and the periodic log line.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct EngineStats {
    pub running: usize,
    pub queued: usize,
    pub pages_total: usize,
    pub pages_free: usize,
    /// Held by the prefix cache and evictable.
    pub pages_cached: usize,
    pub pages_used: usize,
    pub prompt_tokens: u64,
    pub cached_prompt_tokens: u64,
    pub generated_tokens: u64,
    pub retractions: u64,
    pub steps: u64,
    pub failed_steps: u64,
    /// Compilations while serving; stays 0.
    pub serving_compiles: u64,
    /// Tokens per second over the last seconds.
    pub generation_throughput: f64,
    /// Padding tokens over all tokens computed.
    pub padding_ratio: f64,
}

/// Which requests to abort.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AbortTarget {
    /// The request of exactly this id.
    Id(String),
    All,
}

/// The cache was not flushed because requests run or wait.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("there are pending requests: waiting={waiting}, running={running}")]
pub struct FlushRefused {
    pub waiting: usize,
    pub running: usize,
}

/// A profile could not be started or stopped.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct ProfileError(pub String);

/// An engine as callers see it. All methods return at once but [`Engine::flush_cache`], which waits for the engine's
/// thread (at most the rest of a step); call it off the async runtime.
pub trait Engine: Send + Sync {
    fn submit(&self, request: GenerateRequest) -> Result<EventStream, SubmitError>;

    /// Aborts requests, queued or running. Returns how many it reached.
    fn abort(&self, target: &AbortTarget) -> usize;

    /// Empties the prefix cache. Returns the pages freed.
    fn flush_cache(&self) -> Result<usize, FlushRefused>;

    fn readiness(&self) -> Readiness;

    /// `None` until the model is loaded.
    fn info(&self) -> Option<ModelInfo>;

    fn stats(&self) -> EngineStats;

    /// Starts recording steps; the trace is written to `output_dir` on stop.
    fn start_profile(&self, output_dir: Option<&str>) -> Result<(), ProfileError>;

    /// Stops recording and returns the path of the Chrome trace file.
    fn stop_profile(&self) -> Result<String, ProfileError>;
}
