//! What the server is told when it starts.

use std::{path::PathBuf, sync::Arc, time::Duration};

use metrics_exporter_prometheus::PrometheusHandle;
use serde_json::{Map, Value};
use torus_engine::api::Engine;
use torus_text::{ChatTemplate, Tokenizer};

use crate::operate::{ModelRequest, Operator, Recipe};

/// Everything the server needs. Make it with [`ServerConfig::new`] and change what should differ.
pub struct ServerConfig {
    pub host: String,
    /// 0 = any free port, see [`BoundServer::local_addr`](crate::BoundServer::local_addr).
    pub port: u16,
    /// Clients must send `Authorization: Bearer KEY`.
    pub api_key: Option<String>,
    /// Loads plugins and models while the server runs, for clients that send [`ServerConfig::admin_api_key`].
    pub operator: Option<Arc<dyn Operator>>,
    /// The operator's key, which no other request takes. Without one, plugins and models cannot be changed.
    pub admin_api_key: Option<String>,
    /// At least one; requests that name no model get the first.
    pub models: Vec<ServedModel>,
    /// The arguments that `/get_server_info` reports. Must not contain secrets.
    pub server_args: Map<String, Value>,
    /// Renders `/metrics`; from [`install_metrics`](crate::install_metrics).
    pub metrics: PrometheusHandle,
    /// `usage` tells how many prompt tokens were found in the cache.
    pub enable_cache_report: bool,
    /// Streams send every this many tokens; requests to `/generate` may choose for themselves.
    pub stream_interval: u32,
    /// Streams of `/generate` send only what is new instead of everything so far, unless a request chooses.
    pub stream_output: bool,
    /// A request that is not finished by then is ended with what it has.
    pub request_timeout: Option<Duration>,
    /// Origins whose scripts may use the server from a browser; `*` = all. Empty: none but its own.
    pub allowed_origins: Vec<String>,
    /// Where `/start_profile` writes. A client can only choose a folder below it.
    pub profile_dir: PathBuf,
    pub limits: Limits,
}

impl ServerConfig {
    /// A server on 127.0.0.1:30000 with defaults for everything else.
    pub fn new(models: Vec<ServedModel>, metrics: PrometheusHandle) -> Self {
        Self {
            host: "127.0.0.1".to_owned(),
            port: 30000,
            api_key: None,
            operator: None,
            admin_api_key: None,
            models,
            server_args: Map::new(),
            metrics,
            enable_cache_report: false,
            stream_interval: 1,
            stream_output: false,
            request_timeout: None,
            allowed_origins: Vec::new(),
            profile_dir: std::env::temp_dir(),
            limits: Limits::default(),
        }
    }
}

/// A model and the names under which it is served.
pub struct ServedModel {
    /// The first is the one in `/v1/models`; the others are accepted too. At least one.
    pub names: Vec<String>,
    pub engine: Arc<dyn Engine>,
    pub tokenizer: Arc<Tokenizer>,
    /// Without one, `/v1/chat/completions` is refused.
    pub chat_template: Option<Arc<ChatTemplate>>,
    pub defaults: GenerationDefaults,
    /// For `/get_model_info`.
    pub model_path: String,
    /// For `/get_model_info`.
    pub tokenizer_path: String,
    /// Seconds since 1970.
    pub created_s: u64,
    /// What it was loaded with and how to load it again; `None` for one that the server can only serve.
    pub origin: Option<(ModelRequest, Arc<dyn Recipe>)>,
}

/// Sampling parameters that hold where a request says nothing, from the model's `generation_config.json`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct GenerationDefaults {
    pub temperature: Option<f64>,
    pub top_p: Option<f64>,
    /// 0 = all tokens.
    pub top_k: Option<u32>,
    pub min_p: Option<f64>,
    pub repetition_penalty: Option<f64>,
    pub max_new_tokens: Option<u32>,
}

/// Bounds that keep the server's memory and work finite whatever clients do.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Of one request's body. More: 413.
    pub body_bytes: usize,
    /// Of all bodies that are being received, parsed or tokenized at the same time. More: 503.
    pub bodies_total_bytes: usize,
    /// Of a request's line and headers. More: 431, or 414 for an URI of 64 KiB.
    pub header_bytes: usize,
    /// Number of headers. More: 431.
    pub headers: usize,
    /// Connections at the same time; further ones wait to be accepted.
    pub connections: usize,
    /// Requests for the model at the same time. More: 429.
    pub concurrent_requests: usize,
    /// Prompts times `n` of one request. More: 400.
    pub sequences_per_request: usize,
    /// Texts that are tokenized, and large bodies that are parsed, at the same time; others wait.
    pub blocking_tasks: usize,
    /// Chunks that wait for a slow client. What comes while it is full is joined into the next.
    pub stream_queue_chunks: usize,
    /// How long that queue may be full before the request is aborted.
    pub slow_client_timeout: Duration,
    /// How long a client may pause within a body.
    pub body_idle_timeout: Duration,
    /// How long a client may take for its headers, and how long an unused connection is kept.
    pub header_timeout: Duration,
    /// How long requests may go on after shutdown has begun before they are aborted.
    pub shutdown_grace: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        let cores = std::thread::available_parallelism().map_or(1, |count| count.get());
        Self {
            body_bytes: 32 << 20,
            bodies_total_bytes: 256 << 20,
            header_bytes: 64 << 10,
            headers: 100,
            connections: 8192,
            concurrent_requests: 4096,
            sequences_per_request: 2048,
            blocking_tasks: cores.clamp(1, 8),
            stream_queue_chunks: 8,
            slow_client_timeout: Duration::from_secs(30),
            body_idle_timeout: Duration::from_secs(30),
            header_timeout: Duration::from_secs(75),
            shutdown_grace: Duration::from_secs(30),
        }
    }
}
