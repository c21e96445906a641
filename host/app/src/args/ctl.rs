//! Options of `torus ctl`.

use std::path::PathBuf;

use super::values::{Dtype, fraction, positive, seconds};

#[derive(Clone, Debug, clap::Args)]
pub struct CtlArgs {
    /// Address of the server
    #[arg(long, value_name = "URL", default_value = "http://127.0.0.1:30000", global = true)]
    pub base_url: String,
    /// The key that the server was given with --admin-api-key
    #[arg(long, value_name = "KEY", env = "TORUS_ADMIN_API_KEY", hide_env_values = true, global = true)]
    pub admin_api_key: Option<String>,
    /// Print JSON, and no progress
    #[arg(long, global = true)]
    pub json: bool,
    #[command(subcommand)]
    pub command: CtlCommand,
}

#[derive(Clone, Debug, clap::Subcommand)]
pub enum CtlCommand {
    /// List plugins and models, those that only finish their last requests included
    Ls,
    /// Load a plugin, or a new version of one; models loaded from then on use it
    LoadPlugin {
        /// A file in a folder that the server loads plugins from (see 'torus serve --plugin-dir'), by name or path
        #[arg(value_name = "FILE")]
        file: PathBuf,
        /// What the file must hash to
        #[arg(long, value_name = "HEX")]
        sha256: Option<String>,
    },
    /// Load a model beside those that are served
    Load {
        /// The name under which it is to be served
        #[arg(value_name = "NAME")]
        name: String,
        #[command(flatten)]
        changes: ModelChanges,
    },
    /// Replace a model while it serves: by a loaded one, or by a new generation with the newest plugins and these options
    Swap {
        #[arg(value_name = "NAME")]
        name: String,
        /// A model that is loaded already and takes over the name
        #[arg(long, value_name = "NAME")]
        with: Option<String>,
        /// Keep both in memory for a while, or finish the old one's requests first
        #[arg(long, value_name = "MODE")]
        swap_mode: Option<SwapMode>,
        /// How long mode 'drain' waits for requests [default: 600]
        #[arg(long, value_name = "SECONDS", value_parser = seconds)]
        drain_timeout: Option<std::time::Duration>,
        #[command(flatten)]
        changes: ModelChanges,
    },
    /// Take a model out of service; its requests end as they would have
    Unload {
        #[arg(value_name = "NAME")]
        name: String,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum SwapMode {
    Overlap,
    Drain,
}

/// How a model is loaded. What is left out is as the server was started, or as the replaced generation has it.
#[derive(Clone, Debug, Default, clap::Args)]
#[command(next_help_heading = "Model")]
pub struct ModelChanges {
    /// A folder with a Hugging Face checkpoint, a .gguf file, or the id of a model on the hub; as the server sees it
    #[arg(long, value_name = "PATH")]
    pub model_path: Option<String>,
    #[arg(long, value_name = "PATH")]
    pub tokenizer_path: Option<String>,
    #[arg(long, value_name = "FILE")]
    pub chat_template: Option<String>,
    #[arg(long, value_name = "DTYPE")]
    pub dtype: Option<Dtype>,
    /// Attention plugin
    #[arg(long, value_name = "NAME")]
    pub attention_backend: Option<String>,
    #[arg(long, value_name = "TOKENS", value_parser = positive)]
    pub context_length: Option<usize>,
    /// Share of the server's memory
    #[arg(long, value_name = "0..1", value_parser = fraction)]
    pub mem: Option<f64>,
    #[arg(long, value_name = "TOKENS", value_parser = positive)]
    pub max_total_tokens: Option<usize>,
    #[arg(long, value_name = "N", value_parser = positive)]
    pub max_running_requests: Option<usize>,
    #[arg(long, value_name = "TOKENS", value_parser = positive)]
    pub chunked_prefill_size: Option<usize>,
    #[arg(long, value_name = "TOKENS", value_parser = positive)]
    pub page_size: Option<usize>,
}
