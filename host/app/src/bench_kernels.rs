//! `torus bench kernels`: the CPU's kernels alone, each beside what bounds it, at the sizes of a model; with a topology
//! the TPU's ([`topology`]).

mod topology;

use std::process::ExitCode;

use anyhow::ensure;
use indicatif::ProgressBar;
use serde_json::{Value, json};
use torus_cpu::{
    attention::Params,
    bench::{AttentionCase, Timing, attention_layers, linear_layers},
    level,
    packed::Format,
};
use torus_plugins::Registry;

use crate::{
    args::{KernelBenchArgs, KernelFormat},
    limits::Limits,
};

pub fn run(args: &KernelBenchArgs, limits: &Limits) -> anyhow::Result<ExitCode> {
    if let Some(name) = &args.topology {
        return topology::run(args, name);
    }
    torus_plugins::limit_kernel_threads(args.threads.unwrap_or(limits.cpus()));
    // Linked plugins and kernels share the threads that the registry hands to them.
    let _threads = Registry::linked()?;
    let cases = cases(args)?;
    let bar = ProgressBar::new(cases.len() as u64);
    let mut lines = Vec::new();
    for case in &cases {
        bar.set_message(case.name.clone());
        lines.push((case, case.measure(args)?));
        bar.inc(1);
    }
    bar.finish_and_clear();
    if args.json {
        let cases: Vec<Value> = lines.iter().map(|(case, timing)| case.json(timing)).collect();
        println!("{}", json!({"level": level().to_string(), "cases": cases}));
        return Ok(ExitCode::SUCCESS);
    }
    println!("{} layers with {} instructions, each case beside its limit in the same rounds", args.layers, level());
    println!("{:<28} {:>10} {:>10} {:>10}  {:<11} {:>8}", "case", "ms", "GB/s", "GOP/s", "bound by", "of limit");
    for (case, timing) in &lines {
        println!(
            "{:<28} {:>10.3} {:>10.1} {:>10.0}  {:<11} {:>7.1}%",
            case.name,
            timing.median * 1e3,
            timing.bytes as f64 / timing.median / 1e9,
            timing.operations / timing.median / 1e9,
            bound(timing),
            timing.limit() / timing.median * 100.0
        );
    }
    Ok(ExitCode::SUCCESS)
}

fn bound(timing: &Timing) -> &'static str {
    if timing.is_bound_by_memory() { "memory" } else { "arithmetic" }
}

struct Case {
    name: String,
    kernel: Kernel,
}

enum Kernel {
    /// So many rows times every matrix of a layer.
    Linear(Format, usize),
    Attention(AttentionCase),
}

/// Tokens of a piece of a prompt, and how many sequences of how many tokens decode beside.
const MIXED: (usize, (usize, usize)) = (8, (8, 256));

fn cases(args: &KernelBenchArgs) -> anyhow::Result<Vec<Case>> {
    let sizes = [args.hidden, args.intermediate, args.layers, args.rounds];
    ensure!(sizes.iter().all(|size| *size > 0), "--hidden, --intermediate, --layers and --rounds must be at least 1");
    ensure!(args.rows.iter().all(|rows| *rows > 0), "--rows must be at least 1");
    params(args).supports().map_err(anyhow::Error::msg)?;
    let mut cases = Vec::new();
    for format in &args.formats {
        for rows in &args.rows {
            let name = format!("linear {} x{rows}", format.name());
            cases.push(Case { name, kernel: Kernel::Linear(format.packed(), *rows) });
        }
    }
    for context in &args.context {
        ensure!(*context > 0, "--context must be at least 1");
        for (sequences, new) in [(1, 1), (8, 1), (32, 1), (1, 16), (1, 512)] {
            if new <= *context {
                let name = format!("attention {sequences}x{new} at {context}");
                let case = AttentionCase { sequences, new, len: *context, beside: (0, 0) };
                cases.push(Case { name, kernel: Kernel::Attention(case) });
            }
        }
        // A piece of a prompt beside sequences that decode, as the pace of prompts makes them.
        if *context >= MIXED.0 {
            let name = format!("attention {}x1, 1x{} at {context}", MIXED.1.0, MIXED.0);
            let case = AttentionCase { sequences: 1, new: MIXED.0, len: *context, beside: MIXED.1 };
            cases.push(Case { name, kernel: Kernel::Attention(case) });
        }
    }
    Ok(cases)
}

fn params(args: &KernelBenchArgs) -> Params {
    Params {
        q_heads: args.q_heads,
        kv_heads: args.kv_heads,
        head_dim: args.head_dim,
        page_size: args.page_size,
        scale: 1.0 / (args.head_dim as f32).sqrt(),
        window: None,
        soft_cap: None,
    }
}

impl Case {
    fn measure(&self, args: &KernelBenchArgs) -> anyhow::Result<Timing> {
        match self.kernel {
            Kernel::Linear(format, rows) => {
                let (queries, keys) = (args.q_heads * args.head_dim, args.kv_heads * args.head_dim);
                let layer = [
                    (args.hidden, queries + 2 * keys),
                    (queries, args.hidden),
                    (args.hidden, 2 * args.intermediate),
                    (args.intermediate, args.hidden),
                ];
                let shapes: Vec<_> = std::iter::repeat_n(layer, args.layers).flatten().collect();
                linear_layers(format, &shapes, rows, args.rounds)
                    .map_err(|error| anyhow::anyhow!("{}: {error}", self.name))
            }
            Kernel::Attention(case) => {
                attention_layers(&params(args), args.layers, case, args.rounds).map_err(anyhow::Error::msg)
            }
        }
    }

    fn json(&self, timing: &Timing) -> Value {
        json!({
            "case": self.name,
            "median_s": timing.median,
            "best_s": timing.best,
            "bytes": timing.bytes,
            "operations": timing.operations,
            "sum_s": timing.sum,
            "arithmetic_s": timing.arithmetic,
            "bound": bound(timing),
            "share_of_limit": timing.limit() / timing.median,
        })
    }
}

impl KernelFormat {
    fn packed(self) -> Format {
        match self {
            Self::F32 => Format::F32,
            Self::Bf16 => Format::Bf16,
            Self::F16 => Format::F16,
            Self::Q8 => Format::Q8,
            Self::Q4 => Format::Q4,
            Self::Q4min => Format::Q4Min,
            Self::Q5 => Format::Q5,
            Self::Q5min => Format::Q5Min,
            Self::Q6 => Format::Q6,
        }
    }

    fn name(self) -> String {
        clap::ValueEnum::to_possible_value(&self).map_or_else(String::new, |value| value.get_name().to_owned())
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::args::{BenchCommand, Cli, Command};

    fn parse(line: &str) -> KernelBenchArgs {
        let cli =
            Cli::try_parse_from(["torus", "bench", "kernels"].into_iter().chain(line.split_whitespace())).unwrap();
        match cli.command {
            Command::Bench(BenchCommand::Kernels(args)) => args,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn every_format_and_context_is_measured() {
        let sizes = "--hidden 256 --intermediate 256 --layers 1 --q-heads 2 --kv-heads 1 --head-dim 128 --rounds 1";
        let formats = "--formats f32 bf16 f16 q8 q4 q4min q5 q5min q6 --rows 1 3 --context 20";
        let args = parse(&format!("{sizes} {formats}"));
        let cases = cases(&args).unwrap();
        assert_eq!(cases.len(), 9 * 2 + 5);
        for case in &cases {
            let timing = case.measure(&args).unwrap();
            assert!(timing.operations > 0.0 && case.json(&timing)["median_s"].as_f64().unwrap() > 0.0, "{}", case.name);
        }
        let refused = super::cases(&parse("--head-dim 20")).err().unwrap().to_string();
        assert!(refused.contains("20"), "{refused}");
    }
}
