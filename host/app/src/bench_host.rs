//! `torus bench host`: what the host alone costs. The engine is the real one, on a device that answers at once; its
//! trace says what each part of a step took. Streams are real HTTP, beside a bare loop that writes the same bytes.

mod radix;
mod streams;

use std::{collections::BTreeMap, fs, path::Path, process::ExitCode, sync::Arc};

use anyhow::Context;
use futures::{StreamExt, stream::FuturesUnordered};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Value, json};
use torus_engine::{
    NullConfig,
    api::{Engine, Event, EventStream, GenerateRequest, LogprobOptions, SamplingParams},
    config::ScheduleConfig,
};

use crate::{args::HostBenchArgs, serve::wait_until_ready};

/// The vocabulary of the engine without a model.
pub const VOCAB: usize = 49_152;
const PAGE_SIZE: usize = 16;
/// Tokens of a step in which all may decode.
const CHUNK: usize = 8192;

pub fn run(args: &HostBenchArgs) -> anyhow::Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let bar = progress_bar(args);
    let (mut steps, mut served) = (Vec::new(), Vec::new());
    for running in &args.running {
        for shared in [false, true] {
            let case = Case { running: *running, prompt: args.input_len, steps: args.steps, shared };
            bar.set_message(case.name());
            let measured = runtime.block_on(case.measure(args.trace_dir.as_deref(), &bar))?;
            if !args.json {
                bar.suspend(|| measured.print(args.profile));
            }
            steps.push(measured.json());
        }
    }
    bar.set_message("prefix cache");
    let radix = radix::measure(args.cached_tokens);
    if !args.json {
        bar.suspend(|| radix.print());
    }
    for clients in &args.clients {
        bar.set_message(format!("{clients} clients"));
        let tokens = stream_tokens(*clients, args.stream_tokens);
        let streams = runtime.block_on(streams::measure(*clients, tokens, &bar))?;
        if !args.json {
            bar.suspend(|| streams.print());
        }
        served.push(streams.json());
    }
    bar.finish_and_clear();
    if args.json {
        println!("{}", json!({"steps": steps, "radix": radix.json(), "streams": served}));
    }
    Ok(ExitCode::SUCCESS)
}

/// Tokens for each of so many clients: fewer, where all together would be more than this.
fn stream_tokens(clients: usize, wanted: usize) -> usize {
    const ALL_CLIENTS: usize = 256_000;
    wanted.min(ALL_CLIENTS / clients.max(1)).max(1)
}

/// A bar on standard error, where that is a terminal: what is measured now, and how many of its tokens and of those to come
/// one of the sequences has.
fn progress_bar(args: &HostBenchArgs) -> ProgressBar {
    if args.disable_progress {
        return ProgressBar::hidden();
    }
    let streamed: usize = args.clients.iter().map(|clients| stream_tokens(*clients, args.stream_tokens)).sum();
    let bar = ProgressBar::new((2 * args.running.len() * args.steps + streams::ROUNDS * streamed) as u64);
    let style = ProgressStyle::with_template("{msg:34} {bar:40} {percent}%, {elapsed} (about {eta} left)");
    // The template is a constant; a default style would do as well.
    if let Ok(style) = style { bar.with_style(style) } else { bar }
}

/// An engine on the null device; steps with fewer than `full_steps` sequences take a millisecond.
pub fn engine(running: usize, context: usize, full_steps: usize) -> anyhow::Result<Arc<dyn Engine>> {
    let config = NullConfig {
        vocab: VOCAB,
        context_length: context,
        page_size: PAGE_SIZE,
        max_total_tokens: 2 * running * context.next_multiple_of(PAGE_SIZE),
        full_steps,
        schedule: ScheduleConfig {
            max_running_requests: Some(running),
            chunked_prefill_size: Some(CHUNK.max(running)),
            max_prefill_tokens: 16_384,
            max_queued_requests: 2 * running,
            policy: torus_sched::Policy::Fcfs,
            prefix_cache: true,
            overlap: true,
            prefill_slowdown: f64::INFINITY,
        },
    };
    Ok(Arc::new(torus_engine::start_null(config)?))
}

/// Requests that run together.
struct Case {
    running: usize,
    prompt: usize,
    steps: usize,
    /// All prompts begin alike, so that all but the first find most of theirs in the cache.
    shared: bool,
}

struct Measured {
    name: String,
    running: usize,
    shared: bool,
    steps_per_s: f64,
    /// Seconds of a part in each decode step, ascending.
    parts: BTreeMap<String, Vec<f64>>,
    /// Seconds that another thread takes to deliver a step's tokens, meanwhile.
    deliver: f64,
    /// Seconds of all parts that come before the next step can be launched, ascending.
    critical: Vec<f64>,
}

impl Case {
    fn name(&self) -> String {
        format!("{} running, {}", self.running, if self.shared { "shared prefixes" } else { "own prompts" })
    }

    async fn measure(&self, trace_dir: Option<&Path>, bar: &ProgressBar) -> anyhow::Result<Measured> {
        let engine = engine(self.running, self.prompt + self.steps + 1, self.running)?;
        wait_until_ready(&*engine).await.map_err(anyhow::Error::msg)?;
        engine.start_profile(trace_dir.and_then(Path::to_str))?;
        let streams = (0..self.running).map(|index| engine.submit(self.request(index)));
        let streams = streams.collect::<Result<Vec<_>, _>>()?;
        let drained: FuturesUnordered<_> = streams
            .into_iter()
            .enumerate()
            .map(|(index, stream)| tokio::spawn(drain(stream, (index == 0).then(|| bar.clone()))))
            .collect();
        drained.for_each(|_| async {}).await;
        let path = engine.stop_profile()?;
        let trace: Value = serde_json::from_slice(&fs::read(&path)?)?;
        if trace_dir.is_none() {
            fs::remove_file(&path)?;
        }
        self.read(&trace)
    }

    fn request(&self, index: usize) -> GenerateRequest {
        let own = |position: usize| ((index * 7919 + position * 31) % (VOCAB - 16)) as u32 + 16;
        let common = |position: usize| {
            if self.shared && position < self.prompt * 7 / 8 { 16 + position as u32 % 999 } else { own(position) }
        };
        GenerateRequest {
            id: format!("host-{index}"),
            prompt: (0..self.prompt).map(common).collect(),
            sampling: SamplingParams {
                max_new_tokens: u32::try_from(self.steps).ok(),
                temperature: 0.0,
                ignore_eos: true,
                ..SamplingParams::default()
            },
            logprobs: LogprobOptions::default(),
            namespace: None,
            deadline: None,
        }
    }

    /// What the steps cost in which all decode.
    fn read(&self, trace: &Value) -> anyhow::Result<Measured> {
        let events = trace["traceEvents"].as_array().context("the engine's trace has no events")?;
        let mut parts: BTreeMap<String, Vec<f64>> = BTreeMap::new();
        let (mut ends, mut delivered, mut delivering) = (Vec::new(), 0, 0.0);
        for event in events {
            let (Some(name), Some(begin), Some(us), Some(tokens)) =
                (event["name"].as_str(), event["ts"].as_f64(), event["dur"].as_f64(), event["args"]["tokens"].as_u64())
            else {
                continue;
            };
            match name {
                // Several steps at a time, if it lags.
                "deliver" => (delivered, delivering) = (delivered + tokens, delivering + us * 1e-6),
                _ if tokens != self.running as u64 => {}
                "step" => ends.push((begin + us) * 1e-6),
                _ => parts.entry(name.to_owned()).or_default().push(us * 1e-6),
            }
        }
        let count = parts.values().map(Vec::len).min().unwrap_or(0);
        anyhow::ensure!(count > 1, "no step decoded all {} requests: give more --steps", self.running);
        let mut critical: Vec<f64> = (0..count).map(|step| parts.values().map(|times| times[step]).sum()).collect();
        critical.sort_by(f64::total_cmp);
        parts.values_mut().for_each(|times| times.sort_by(f64::total_cmp));
        let span = ends.last().unwrap_or(&0.0) - ends.first().unwrap_or(&0.0);
        let steps_per_s = (ends.len() - 1) as f64 / span;
        let deliver = delivering / delivered.max(1) as f64 * self.running as f64;
        let Self { running, shared, .. } = *self;
        Ok(Measured { name: self.name(), running, shared, steps_per_s, parts, deliver, critical })
    }
}

/// Reads a stream to its end; a bar counts its tokens.
async fn drain(mut stream: EventStream, bar: Option<ProgressBar>) {
    while let Some(event) = stream.next().await {
        if let (Some(bar), Event::Tokens { tokens, .. }) = (&bar, event) {
            bar.inc(tokens.len() as u64);
        }
    }
}

fn quantile(sorted: &[f64], share: f64) -> f64 {
    sorted.get(((sorted.len().max(1) - 1) as f64 * share).round() as usize).copied().unwrap_or(f64::NAN)
}

/// What the issue of a step is held against: a decode step of a fast device.
const STEP_S: f64 = 11e-3;

impl Measured {
    fn print(&self, profile: bool) {
        println!(
            "{}: {:.0} steps/s; between steps p50 {:.0} us, p99 {:.0} us: {:.1}% of a step of 11 ms",
            self.name,
            self.steps_per_s,
            quantile(&self.critical, 0.5) * 1e6,
            quantile(&self.critical, 0.99) * 1e6,
            quantile(&self.critical, 0.5) / STEP_S * 100.0
        );
        if profile {
            for (name, times) in &self.parts {
                println!(
                    "  {name:<10} p50 {:>8.1} us  p99 {:>8.1} us",
                    quantile(times, 0.5) * 1e6,
                    quantile(times, 0.99) * 1e6
                );
            }
            println!("  on another thread meanwhile: deliver, mean {:.1} us", self.deliver * 1e6);
        }
    }

    fn json(&self) -> Value {
        let part = |(name, times): (&String, &Vec<f64>)| {
            (name.clone(), json!({"p50_s": quantile(times, 0.5), "p99_s": quantile(times, 0.99)}))
        };
        json!({
            "running": self.running,
            "shared_prefixes": self.shared,
            "steps_per_s": self.steps_per_s,
            "critical_p50_s": quantile(&self.critical, 0.5),
            "critical_p99_s": quantile(&self.critical, 0.99),
            "deliver_mean_s": self.deliver,
            "parts": self.parts.iter().map(part).collect::<serde_json::Map<_, _>>(),
        })
    }
}
