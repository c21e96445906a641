#![forbid(unsafe_code)]
//! The benches behind `torus bench`: load generators that talk HTTP, so that they measure what a client sees, of this
//! server and of any other with the same endpoints.
//!
//! - `serving`: one load, or a sweep of rates and concurrencies, against one server:
//!   `torus bench serving --backend openai --num-prompts 64 --max-concurrency 1,8,32 --goodput ttft:500 tpot:50
//!   --plot out.svg`.
//! - `compare`: the same prompts to two servers in alternating rounds, and the ratios with their spread:
//!   `torus bench compare --base-url A --base-url B --name torus --name llama.cpp
//!   --scenario in=512,out=128,clients=8,requests=32`.
//! - `interference`: time between tokens of decoding streams while a long prompt arrives:
//!   `torus bench interference --decode-streams 8 --input-len 128 --long-input-len 4096`.
//! - `one-batch`: one batch of equal requests, next to what the memory of the machine allows.
//!
//! Deliberately absent: a tokenizer. Random prompts are token ids; where a prompt is text, lengths are what the server
//! reports.
//!
//! Invariants:
//! - A workload is a function of its options and its seed: the same prompts, lengths and order on every run.
//! - Every number printed was measured in this run; what was not measured is left out, not estimated.

mod arrivals;
mod backend;
mod bandwidth;
mod client;
mod compare;
mod figures;
mod goodput;
mod interference;
mod load;
mod one_batch;
pub mod plot;
mod report;
mod scenario;
mod server;
mod serving;
mod sse;
mod stats;
#[cfg(test)]
mod testing;
mod workload;

pub use compare::CompareArgs;
pub use interference::InterferenceArgs;
pub use one_batch::OneBatchArgs;
pub use serving::ServingArgs;

/// What `torus bench` measures.
#[derive(Debug, clap::Subcommand)]
pub enum Bench {
    /// Send many requests to a running server and report throughput and latencies.
    Serving(Box<ServingArgs>),
    /// Time one batch of equal requests at a time, against a running server or one started for it.
    OneBatch(Box<OneBatchArgs>),
    /// Send the same requests to two servers in alternating rounds and report the ratio of their figures.
    Compare(Box<CompareArgs>),
    /// Send a long prompt to a server that decodes, and report how much one slows the other down.
    Interference(Box<InterferenceArgs>),
}

/// Runs a bench to its end.
pub fn run(bench: Bench) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(async {
        match bench {
            Bench::Serving(args) => serving::run(&args).await,
            Bench::OneBatch(args) => one_batch::run(&args).await,
            Bench::Compare(args) => compare::run(&args).await,
            Bench::Interference(args) => interference::run(&args).await,
        }
    })
}
