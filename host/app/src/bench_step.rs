//! `torus bench step`: the steps of an engine in this process. On a CPU, beside a plain sum over as many bytes as a step
//! reads of weights: both are timed in turns, because the memory of a machine with neighbours is fast now and slow then.

use std::{collections::BTreeMap, fs, hint::black_box, path::Path, process::ExitCode, sync::Arc, time::Instant};

use anyhow::{Context, ensure};
use futures::StreamExt;
use indicatif::ProgressBar;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::{Value, json};
use torus_cpu::bench::{Memory, sum};
use torus_engine::api::{Engine, Event, EventStream, FinishReason, GenerateRequest, LogprobOptions, SamplingParams};

use crate::{
    args::{Device, LogLevel, StepBenchArgs},
    engine::{Machine, MemoryClaim},
    limits::Limits,
    logging,
    model::{self, Model},
    plugins,
    serve::wait_until_ready,
};

/// Sums over the weights' bytes in each round, where the device reads the memory that they lie in.
const SUMS_PER_ROUND: usize = 4;

pub fn run(args: &StepBenchArgs, limits: &Limits) -> anyhow::Result<ExitCode> {
    logging::init(&args.log, LogLevel::Warn)?;
    ensure!(args.steps > 1 && args.context > 0, "--steps must be at least 2 and --context at least 1");
    let path = args.engine.model.only().map_err(anyhow::Error::msg)?;
    let model = Model::open(&path, &args.engine.model)?;
    let name = model::default_name(&path, &model.files);
    let machine = Machine::new(&args.engine, limits)?;
    let plugins = plugins::registry(&args.engine.plugins, machine.cache())?;
    let engine = machine.start(&args.engine, plugins, MemoryClaim::default(), name, &model)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let measured = runtime.block_on(async {
        wait_until_ready(&*engine).await.map_err(anyhow::Error::msg)?;
        let mut measured = Vec::new();
        for batch_size in &args.batch_size {
            measured.push(measure(args, &*engine, *batch_size).await?);
        }
        anyhow::Ok(measured)
    })?;
    for case in &measured {
        if args.json {
            println!("{}", case.json());
        } else {
            case.print(args);
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// What was measured of one batch size.
struct Measured {
    batch_size: usize,
    weight_bytes: u64,
    /// Times of decode steps, ascending, in seconds.
    steps: Vec<f64>,
    /// Times of sums over the weights' bytes, ascending, in seconds; none but on a CPU.
    sums: Vec<f64>,
    /// Tokens of a step that computes prompts, to its times in seconds.
    prefill: BTreeMap<u64, Vec<f64>>,
    /// Name of a kernel or of a part of the host's work, to calls and seconds in a decode step.
    parts: BTreeMap<String, Part>,
    trace: String,
}

#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Part {
    calls: f64,
    seconds: f64,
    is_kernel: bool,
}

async fn measure(args: &StepBenchArgs, engine: &dyn Engine, batch_size: usize) -> anyhow::Result<Measured> {
    let info = engine.info().context("the engine is not ready")?;
    let running = info.max_running_requests;
    ensure!(batch_size <= running, "--batch-size {batch_size}: at most {running} requests run at once");
    let on_cpu = args.engine.device.device == Device::Cpu;
    // In large pages and on the kernels' own threads, as weights are read.
    let memory = on_cpu.then(|| Memory::zeroed(info.weight_bytes as usize));
    let mut random = ChaCha8Rng::seed_from_u64(args.seed);
    let mut trace = Trace::default();
    let mut sums = Vec::new();
    let mut path = String::new();
    let bar = ProgressBar::new(args.rounds as u64);
    for round in 0..=args.rounds {
        let prompts = (0..batch_size)
            .map(|_| (0..args.context).map(|_| random.random_range(0..info.vocab_size as u32)).collect::<Vec<_>>());
        let prompts: Vec<_> = prompts.collect();
        engine.start_profile(args.trace_dir.as_deref().and_then(Path::to_str))?;
        decode(engine, prompts, args.steps).await?;
        path = engine.stop_profile()?;
        // The first round warms up.
        if round > 0 {
            trace.read(Path::new(&path), batch_size as u64)?;
            for memory in memory.iter().flat_map(|memory| std::iter::repeat_n(memory, SUMS_PER_ROUND)) {
                let start = Instant::now();
                black_box(sum(black_box(memory)));
                sums.push(start.elapsed().as_secs_f64());
            }
            bar.inc(1);
        }
        if args.trace_dir.is_none() {
            fs::remove_file(&path)?;
        }
    }
    bar.finish_and_clear();
    let Trace { mut steps, prefill, parts } = trace;
    ensure!(!steps.is_empty(), "no step decoded {batch_size} tokens: give more --steps, or --prefill-slowdown inf");
    steps.sort_by(f64::total_cmp);
    sums.sort_by(f64::total_cmp);
    let count = steps.len() as f64;
    let per_step = |(name, part): (String, Part)| {
        (name, Part { calls: part.calls / count, seconds: part.seconds / count, ..part })
    };
    let parts = parts.into_iter().map(per_step).collect();
    Ok(Measured { batch_size, weight_bytes: info.weight_bytes, steps, sums, prefill, parts, trace: path })
}

/// Continues all prompts by so many tokens, together.
async fn decode(engine: &dyn Engine, prompts: Vec<Vec<u32>>, steps: usize) -> anyhow::Result<()> {
    let submit = |(index, prompt): (usize, Vec<u32>)| {
        engine.submit(GenerateRequest {
            id: format!("step-{index}"),
            prompt: Arc::from(prompt),
            sampling: SamplingParams {
                max_new_tokens: u32::try_from(steps).ok(),
                temperature: 0.0,
                ignore_eos: true,
                ..SamplingParams::default()
            },
            logprobs: LogprobOptions::default(),
            namespace: None,
            deadline: None,
        })
    };
    let streams: Vec<EventStream> = prompts.into_iter().enumerate().map(submit).collect::<Result<_, _>>()?;
    for mut stream in streams {
        while let Some(event) = stream.next().await {
            if let Event::Finished(reason) = event {
                ensure!(reason == FinishReason::Length, "a sequence ended early: {reason:?}");
            }
        }
    }
    Ok(())
}

/// What the engine's traces say of its steps.
#[derive(Default)]
struct Trace {
    steps: Vec<f64>,
    prefill: BTreeMap<u64, Vec<f64>>,
    parts: BTreeMap<String, Part>,
}

impl Trace {
    /// Adds what a trace file says. A step takes from the end of the one before to its own end, for two may be in flight.
    fn read(&mut self, path: &Path, batch_size: u64) -> anyhow::Result<()> {
        const MICROSECOND: f64 = 1e-6;
        let trace: Value = serde_json::from_slice(&fs::read(path)?)?;
        let events = trace["traceEvents"].as_array().context("the engine's trace has no events")?;
        let span = |event: &Value| Some((event["ts"].as_f64()?, event["dur"].as_f64()?));
        let mut decoding: Vec<(f64, f64)> = Vec::new();
        let mut before: Option<f64> = None;
        for event in events.iter().filter(|event| event["name"] == "step") {
            let (Some((begin, duration)), Some(tokens)) = (span(event), event["args"]["tokens"].as_u64()) else {
                continue;
            };
            let end = begin + duration;
            let begin = before.replace(end).map_or(begin, |before| before.max(begin));
            if tokens == batch_size && tokens > 0 {
                decoding.push((begin, end));
            } else {
                self.prefill.entry(tokens).or_default().push((end - begin) * MICROSECOND);
            }
        }
        self.steps.extend(decoding.iter().map(|(begin, end)| (end - begin) * MICROSECOND));
        for event in events.iter().filter(|event| event["name"] != "step") {
            let (Some(name), Some((begin, duration))) = (event["name"].as_str(), span(event)) else { continue };
            // Steps follow each other, so the first that ends later is the one it falls into.
            let index = decoding.partition_point(|(_, end)| *end < begin);
            if decoding.get(index).is_some_and(|(first, _)| *first <= begin) {
                let part = self.parts.entry(name.to_owned()).or_default();
                part.is_kernel = event["cat"] == "kernel";
                part.calls += 1.0;
                part.seconds += duration * MICROSECOND;
            }
        }
        Ok(())
    }
}

/// The value below which so many of a hundred lie. There is no use for the least: a step whose end is noticed late makes
/// the next look short.
fn percentile(sorted: &[f64], percent: usize) -> f64 {
    sorted.get(sorted.len() * percent / 100).copied().unwrap_or(f64::NAN)
}

fn median(sorted: &[f64]) -> f64 {
    percentile(sorted, 50)
}

/// What steps with prompts took, by tokens: those within a power of two in one line.
fn prefill_lines(prefill: &BTreeMap<u64, Vec<f64>>) -> Vec<String> {
    let mut groups: BTreeMap<u64, Vec<(u64, f64)>> = BTreeMap::new();
    for (tokens, times) in prefill {
        let steps = times.iter().map(|time| (*tokens, *time));
        groups.entry(tokens.next_power_of_two()).or_default().extend(steps);
    }
    let line = |steps: &Vec<(u64, f64)>| {
        let (least, most) = (steps.first()?.0, steps.last()?.0);
        let sizes = if least == most { most.to_string() } else { format!("{least} to {most}") };
        // Of the largest, as long as its tokens take at the median speed.
        let mut each: Vec<_> = steps.iter().map(|(tokens, time)| time / *tokens as f64).collect();
        each.sort_by(f64::total_cmp);
        let each = median(&each);
        Some(format!("steps of {sizes} tokens: {:.1} ms, {:.0} tokens/s", each * most as f64 * 1e3, 1.0 / each))
    };
    groups.values().filter_map(line).collect()
}

impl Measured {
    /// What the decode steps reach of the bandwidth of a plain sum.
    fn share(&self) -> f64 {
        median(&self.sums) / median(&self.steps)
    }

    /// The time of a decode step in which no kernel runs.
    fn outside_kernels(&self) -> f64 {
        let kernels: f64 = self.parts.values().filter(|part| part.is_kernel).map(|part| part.seconds).sum();
        median(&self.steps) - kernels
    }

    fn print(&self, args: &StepBenchArgs) {
        let (step, sum) = (median(&self.steps), median(&self.sums));
        println!(
            "{} sequences at {} tokens: {:.3} ms a step (p10 {:.3}, p90 {:.3}), {:.1} tokens/s",
            self.batch_size,
            args.context,
            step * 1e3,
            percentile(&self.steps, 10) * 1e3,
            percentile(&self.steps, 90) * 1e3,
            self.batch_size as f64 / step
        );
        if self.sums.is_empty() {
            let (megabytes, rate) = (self.weight_bytes as f64 / 1e6, self.weight_bytes as f64 / step / 1e9);
            println!("  it reads {megabytes:.0} MB of weights ({rate:.1} GB/s)");
        } else {
            println!(
                "  a sum over the same {:.0} MB takes {:.3} ms ({:.1} GB/s): the step reaches {:.1}% of it",
                self.weight_bytes as f64 / 1e6,
                sum * 1e3,
                self.weight_bytes as f64 / sum / 1e9,
                self.share() * 100.0
            );
        }
        prefill_lines(&self.prefill).iter().for_each(|line| println!("  {line}"));
        if args.profile {
            println!("  {:<28} {:>8} {:>10} {:>7}", "in a decode step", "calls", "us", "share");
            let line = |name: &str, calls: f64, seconds: f64| {
                println!("  {name:<28} {calls:>8.1} {:>10.1} {:>6.1}%", seconds * 1e6, seconds / step * 100.0);
            };
            for (name, part) in self.parts.iter().filter(|(_, part)| part.is_kernel) {
                line(name, part.calls, part.seconds);
            }
            line("XLA and waiting", 1.0, self.outside_kernels());
            println!("  beside it, on the host's thread:");
            for (name, part) in self.parts.iter().filter(|(_, part)| !part.is_kernel) {
                line(name, part.calls, part.seconds);
            }
        }
        if args.trace_dir.is_some() {
            println!("  trace: {}", self.trace);
        }
    }

    fn json(&self) -> Value {
        let parts = self.parts.iter().map(|(name, part)| {
            json!({"name": name, "kernel": part.is_kernel, "calls": part.calls, "seconds": part.seconds})
        });
        let prefill = self.prefill.iter().map(|(tokens, times)| {
            let mut times = times.clone();
            times.sort_by(f64::total_cmp);
            json!({"tokens": tokens, "median_s": median(&times), "steps": times.len()})
        });
        json!({
            "batch_size": self.batch_size,
            "weight_bytes": self.weight_bytes,
            "step_median_s": median(&self.steps),
            "step_p10_s": percentile(&self.steps, 10),
            "step_p90_s": percentile(&self.steps, 90),
            "sum_median_s": median(&self.sums),
            "share_of_sum": self.share(),
            "prefill": prefill.collect::<Vec<_>>(),
            "parts": parts.collect::<Vec<_>>(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_are_told_apart_and_kernels_fall_into_theirs() {
        let event = |name: &str, cat: &str, ts: f64, dur: f64, tokens: u64| json!({"name": name, "cat": cat, "ph": "X", "ts": ts, "dur": dur, "args": {"tokens": tokens}});
        let events = [
            event("step", "engine", 0.0, 100.0, 128),
            event("linear", "kernel", 10.0, 50.0, 0),
            // Launched while the one before ran.
            event("step", "engine", 50.0, 70.0, 1),
            event("linear", "kernel", 105.0, 10.0, 0),
            event("pack", "engine", 110.0, 2.0, 1),
        ];
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("trace.json");
        fs::write(&path, json!({"traceEvents": events}).to_string()).unwrap();
        let mut trace = Trace::default();
        trace.read(&path, 1).unwrap();
        let close = |found: f64, expected: f64| (found - expected).abs() < 1e-12;
        assert!(trace.steps.len() == 1 && close(trace.steps[0], 20e-6));
        assert!(close(trace.prefill[&128][0], 100e-6));
        assert!(close(trace.parts["linear"].seconds, 10e-6) && trace.parts["linear"].is_kernel);
        assert!(close(trace.parts["pack"].seconds, 2e-6) && !trace.parts["pack"].is_kernel);
    }

    #[test]
    fn steps_of_about_one_size_are_told_in_one_line() {
        let prefill = [(512, vec![0.5, 0.25, 1.0]), (17, vec![0.017]), (30, vec![0.06, 0.09])];
        let lines = prefill_lines(&prefill.into_iter().collect());
        let expected =
            ["steps of 17 to 30 tokens: 60.0 ms, 500 tokens/s", "steps of 512 tokens: 500.0 ms, 1024 tokens/s"];
        assert_eq!(lines, expected);
        assert!(prefill_lines(&BTreeMap::new()).is_empty());
    }
}
