//! Options of the commands that look ahead: `torus compile` and `torus plan`.

use std::path::PathBuf;

use torus_engine::roofline::Topology;

use super::{EngineArgs, LogArgs, values::positive};

/// Options of `torus compile`. Give the options that the server will have: they decide its programs.
#[derive(Debug, clap::Args)]
pub struct CompileArgs {
    /// Chips to compile for, which need not be there: v6e:2x2, tpu7x:2x2x1
    #[arg(long, value_name = "CHIP:AxB", help_heading = "What to compile")]
    pub topology: Topology,
    /// Steps of these sizes only, in tokens [default: all that a server runs]
    #[arg(long, value_name = "TOKENS", num_args = 1.., value_delimiter = ',', value_parser = positive,
        help_heading = "What to compile")]
    pub steps: Vec<usize>,
    /// Compile also what is compiled already: only then its sizes are known
    #[arg(long, help_heading = "What to compile")]
    pub again: bool,
    /// Programs that are compiled at once [default: as many as there are CPUs]
    #[arg(long, value_name = "N", value_parser = positive, help_heading = "What to compile")]
    pub jobs: Option<usize>,
    /// Print JSON
    #[arg(long, help_heading = "Output")]
    pub json: bool,
    #[command(flatten)]
    pub log: LogArgs,
    #[command(flatten)]
    pub engine: EngineArgs,
}

/// Options of `torus plan`.
#[derive(Debug, clap::Args)]
pub struct PlanArgs {
    /// Chips to plan for: v6e:2x2, tpu7x:2x2x1
    #[arg(long, value_name = "CHIP:AxB", help_heading = "Cases")]
    pub topology: Topology,
    /// Sequences that decode together [default: powers of two up to what runs at once]
    #[arg(long, value_name = "N", num_args = 1.., value_delimiter = ',', value_parser = positive, help_heading = "Cases")]
    pub batch_size: Vec<usize>,
    /// Tokens of each sequence in the cache
    #[arg(long, value_name = "TOKENS", num_args = 1.., value_delimiter = ',', default_values_t = [1024, 8192],
        help_heading = "Cases")]
    pub context: Vec<u64>,
    /// Prompt tokens of a step, computed after as many as each context has [default: powers of two up to the chunk size]
    #[arg(long, value_name = "TOKENS", num_args = 1.., value_delimiter = ',', value_parser = positive,
        help_heading = "Cases")]
    pub prefill: Vec<usize>,
    /// Compile the steps too, and print the compiler's estimates beside
    #[arg(long, help_heading = "Cases")]
    pub compile: bool,
    /// Draw step time and throughput over the batch size into an SVG file
    #[arg(long, value_name = "FILE", help_heading = "Output")]
    pub plot: Option<PathBuf>,
    /// Print JSON
    #[arg(long, help_heading = "Output")]
    pub json: bool,
    #[command(flatten)]
    pub log: LogArgs,
    #[command(flatten)]
    pub engine: EngineArgs,
}
