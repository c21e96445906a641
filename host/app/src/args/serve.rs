//! Options of `torus serve`.

use std::{net::IpAddr, time::Duration};

use super::{
    engine::EngineArgs,
    values::{LogArgs, positive, seconds, seconds_or_zero},
};

#[derive(Clone, Debug, clap::Args)]
pub struct ServeArgs {
    #[command(flatten)]
    pub engine: EngineArgs,
    #[command(flatten)]
    pub http: HttpArgs,
    #[command(flatten)]
    pub log: LogArgs,
    /// Decode steps between two lines that say how busy the server is
    #[arg(long, value_name = "STEPS", default_value_t = 40, value_parser = positive, help_heading = "Log")]
    pub decode_log_interval: usize,
    /// Accepted and always on: metrics are at /metrics
    #[arg(long, help_heading = "Log")]
    pub enable_metrics: bool,
}

#[derive(Clone, Debug, clap::Args)]
#[command(next_help_heading = "HTTP")]
pub struct HttpArgs {
    /// Address to listen on; 0.0.0.0 for all
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1", value_parser = address)]
    pub host: IpAddr,
    /// Port to listen on; 0 takes a free one
    #[arg(long, value_name = "N", default_value_t = 30000)]
    pub port: u16,
    /// Key that clients must send as 'Authorization: Bearer KEY'
    #[arg(long, value_name = "KEY", env = "TORUS_API_KEY", hide_env_values = true)]
    pub api_key: Option<String>,
    /// Key that administrators must send to load plugins and to load, swap and unload models; without one, nobody can
    #[arg(long, value_name = "KEY", env = "TORUS_ADMIN_API_KEY", hide_env_values = true)]
    pub admin_api_key: Option<String>,
    /// Name of the model for clients; may be given several times, the first is the one in answers [default: the name
    /// in --model-path]
    #[arg(long, value_name = "NAME")]
    pub served_model_name: Vec<String>,
    /// Report the prompt tokens found in the cache in 'usage'
    #[arg(long)]
    pub enable_cache_report: bool,
    /// Tokens between two events of a stream
    #[arg(long, value_name = "TOKENS", default_value_t = 1, value_parser = positive)]
    pub stream_interval: usize,
    /// Streams of /generate send only what is new, not everything so far, unless a request chooses
    #[arg(long)]
    pub stream_output: bool,
    /// Origin whose scripts may use the server from a browser, '*' for all; may be given several times
    #[arg(long = "allowed-origin", value_name = "ORIGIN")]
    pub allowed_origins: Vec<String>,
    /// JSON object with sampling parameters for requests that do not set them
    #[arg(long, value_name = "JSON")]
    pub preferred_sampling_params: Option<String>,
    /// Seconds after which a request is ended, with what it has by then [default: never]
    #[arg(long, value_name = "SECONDS", value_parser = seconds)]
    pub request_timeout: Option<Duration>,
    /// Say that the server is ready without answering a request first
    #[arg(long)]
    pub skip_server_warmup: bool,
    /// Seconds that running requests are given after SIGTERM or SIGINT; a second signal ends the server at once
    #[arg(long, value_name = "SECONDS", default_value = "30", value_parser = seconds_or_zero)]
    pub shutdown_grace_seconds: Duration,
}

/// An IP address, or 'localhost'.
fn address(text: &str) -> Result<IpAddr, String> {
    let text = if text == "localhost" { "127.0.0.1" } else { text };
    text.parse().map_err(|_| "must be an IP address of this machine, 0.0.0.0 or ::".to_owned())
}
