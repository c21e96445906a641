//! Options of `torus generate`.

use super::{
    engine::EngineArgs,
    values::{LogArgs, positive},
};

#[derive(Clone, Debug, clap::Args)]
pub struct GenerateArgs {
    /// Text to continue
    #[arg(value_name = "PROMPT", required_unless_present = "input_ids", conflicts_with = "input_ids")]
    pub prompt: Option<String>,
    #[command(flatten)]
    pub sampling: SamplingArgs,
    #[command(flatten)]
    pub engine: EngineArgs,
    #[command(flatten)]
    pub log: LogArgs,
}

#[derive(Clone, Debug, clap::Args)]
#[command(next_help_heading = "Generation")]
pub struct SamplingArgs {
    /// Token ids to continue, instead of a text
    #[arg(long, value_name = "ID", value_delimiter = ',', num_args = 1..)]
    pub input_ids: Vec<u32>,
    /// Take the prompt for a message of a user, and apply the chat template
    #[arg(long, conflicts_with = "input_ids")]
    pub chat: bool,
    #[arg(long, value_name = "TOKENS", default_value_t = 128, value_parser = positive)]
    pub max_new_tokens: usize,
    /// 0 takes the likeliest token each time
    #[arg(long, value_name = "T", default_value_t = 0.0)]
    pub temperature: f32,
    /// Sample among this many likeliest tokens; 0 for all
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub top_k: u32,
    /// Sample among the likeliest tokens that together reach this probability
    #[arg(long, value_name = "P", default_value_t = 1.0)]
    pub top_p: f32,
    /// Seed of the sampling
    #[arg(long, value_name = "N")]
    pub seed: Option<u64>,
    /// Do not stop where the model ends its text
    #[arg(long)]
    pub ignore_eos: bool,
    /// Print the logprob of each token and of the N likeliest
    #[arg(long, value_name = "N")]
    pub logprobs: Option<u32>,
    /// Print one JSON object when all is done
    #[arg(long)]
    pub json: bool,
}
