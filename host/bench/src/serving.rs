//! `torus bench serving`: many requests against one server.

use std::{
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, bail, ensure};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Map, Value, json};
use tokio::{sync::Semaphore, task::JoinSet};

use crate::{
    arrivals,
    backend::{Backend, Outcome, RequestOptions},
    client::{Client, ServerArgs, find_field},
    report::{Report, append_line},
    workload::{self, Prompt, WorkloadArgs},
};

/// Options of `torus bench serving`.
#[derive(Clone, Debug, clap::Args)]
pub struct ServingArgs {
    #[command(flatten)]
    server: ServerArgs,
    /// Which endpoint to use
    #[arg(long, value_name = "NAME", default_value = "sglang", help_heading = "Server")]
    backend: Backend,
    /// Name of the model; asked of the server if not given
    #[arg(long, value_name = "NAME", help_heading = "Server")]
    model: Option<String>,

    #[command(flatten)]
    workload: WorkloadArgs,

    /// Requests a second, as a Poisson process; 'inf' sends all at once
    #[arg(long, value_name = "RATE", default_value_t = f64::INFINITY, help_heading = "Load")]
    request_rate: f64,
    /// Requests under way at most
    #[arg(long, value_name = "N", help_heading = "Load")]
    max_concurrency: Option<usize>,
    /// Requests sent before the measurement
    #[arg(long, value_name = "N", default_value_t = 1, help_heading = "Load")]
    warmup_requests: usize,
    /// Empty the prefix cache before the measurement
    #[arg(long, help_heading = "Load")]
    flush_cache: bool,
    /// Ask for whole answers; times to tokens are then not measured
    #[arg(long, help_heading = "Load")]
    disable_stream: bool,
    /// Let answers end where the model ends them
    #[arg(long, help_heading = "Load")]
    disable_ignore_eos: bool,
    /// Ask for logprobs
    #[arg(long, help_heading = "Load")]
    return_logprob: bool,
    /// JSON object whose fields are added to every request
    #[arg(long, value_name = "JSON", help_heading = "Load")]
    extra_request_body: Option<String>,
    /// Record a profile of the measurement on the server
    #[arg(long, help_heading = "Load")]
    profile: bool,

    /// File to which the results are appended as one line of JSON
    #[arg(long, value_name = "FILE", help_heading = "Output")]
    output_file: Option<PathBuf>,
    /// Add the numbers of each request to that line
    #[arg(long, help_heading = "Output")]
    output_details: bool,
    /// Name for this run in the results
    #[arg(long, value_name = "NAME", help_heading = "Output")]
    tag: Option<String>,
    /// No progress bar
    #[arg(long, alias = "disable-tqdm", help_heading = "Output")]
    disable_progress: bool,
}

pub async fn run(args: &ServingArgs) -> anyhow::Result<()> {
    ensure!(args.request_rate > 0.0, "--request-rate must be above 0");
    ensure!(args.max_concurrency != Some(0), "--max-concurrency must be at least 1");
    let client = Client::new(&args.server.url(), args.server.api_key.clone())?;
    let options = request_options(args, &client).await?;
    let info = client.get_json("/get_server_info").await.unwrap_or_default();
    let vocab_size = find_field(&info, "vocab_size").and_then(Value::as_u64);
    let prompts = workload::generate(&args.workload, workload::token_range(vocab_size))?;

    warm_up(args, &client, &prompts[0], &options).await?;
    if args.flush_cache {
        client.post("/flush_cache", &Value::Null).await?;
    }
    if args.profile {
        client.post("/start_profile", &json!({})).await?;
    }
    let count = prompts.len();
    let (duration, outcomes) = send_all(args, &client, prompts, &options).await;
    if args.profile {
        client.post("/stop_profile", &json!({})).await?;
    }

    let report = Report::new(duration, &outcomes);
    println!("{}", report.table(args.backend.name(), args.request_rate, args.max_concurrency));
    let first_error = outcomes.iter().find_map(|outcome| outcome.as_ref().err());
    if let Some(error) = first_error {
        eprintln!("{} of {count} requests failed, the first of them: {error}", count - report.completed);
    }
    if let Some(path) = &args.output_file {
        let info = client.get_json("/get_server_info").await.unwrap_or_default();
        append_line(path, &record(args, info, &report, &outcomes))?;
    }
    if report.completed == 0 {
        bail!("no request was answered");
    }
    Ok(())
}

async fn request_options(args: &ServingArgs, client: &Client) -> anyhow::Result<RequestOptions> {
    let extra: Map<String, Value> = match &args.extra_request_body {
        Some(text) => serde_json::from_str(text).context("--extra-request-body is no JSON object")?,
        None => Map::new(),
    };
    let model = match &args.model {
        Some(name) => name.clone(),
        None => {
            let models = client.get_json("/v1/models").await?;
            models["data"][0]["id"].as_str().context("the server names no model; give --model")?.to_owned()
        }
    };
    Ok(RequestOptions {
        model,
        stream: !args.disable_stream,
        ignore_eos: !args.disable_ignore_eos,
        logprobs: args.return_logprob,
        extra,
    })
}

async fn warm_up(args: &ServingArgs, client: &Client, first: &Prompt, options: &RequestOptions) -> anyhow::Result<()> {
    const LONGEST_OUTPUT: usize = 32;
    let prompt = Prompt { content: first.content.clone(), output_len: first.output_len.min(LONGEST_OUTPUT) };
    for _ in 0..args.warmup_requests {
        let measured = args.backend.measure(client, &prompt, options, Instant::now()).await;
        measured.context("the warm-up request failed; see the other options of this bench and of the server")?;
    }
    Ok(())
}

/// Sends every prompt at its time. Returns how long it took until the last answer, and the outcomes in order.
async fn send_all(
    args: &ServingArgs,
    client: &Client,
    prompts: Vec<Prompt>,
    options: &RequestOptions,
) -> (Duration, Vec<Outcome>) {
    let offsets = arrivals::schedule(prompts.len(), args.request_rate, args.workload.seed);
    let under_way = Arc::new(Semaphore::new(args.max_concurrency.unwrap_or(Semaphore::MAX_PERMITS)));
    let options = Arc::new(options.clone());
    let progress = progress_bar(prompts.len(), args.disable_progress);
    let start = Instant::now();
    let mut tasks = JoinSet::new();
    for (index, (prompt, offset)) in prompts.into_iter().zip(offsets).enumerate() {
        tokio::time::sleep_until((start + offset).into()).await;
        let (client, options, under_way) = (client.clone(), options.clone(), under_way.clone());
        let (backend, progress) = (args.backend, progress.clone());
        tasks.spawn(async move {
            // Never closed, so there is always a permit in the end.
            let _permit = under_way.acquire_owned().await;
            let result = backend.measure(&client, &prompt, &options, start).await;
            progress.inc(1);
            (index, result.map_err(|error| format!("{error:#}")))
        });
    }
    let mut outcomes = tasks.join_all().await;
    let duration = start.elapsed();
    progress.finish_and_clear();
    outcomes.sort_by_key(|(index, _)| *index);
    (duration, outcomes.into_iter().map(|(_, outcome)| outcome).collect())
}

fn progress_bar(count: usize, hidden: bool) -> ProgressBar {
    if hidden {
        return ProgressBar::hidden();
    }
    let bar = ProgressBar::new(count as u64);
    if let Ok(style) = ProgressStyle::with_template("{bar:40} {pos}/{len} requests, {elapsed} (about {eta} left)") {
        bar.set_style(style);
    }
    bar
}

/// The line of results: the run's options, the report, and what the server says of itself.
fn record(args: &ServingArgs, server_info: Value, report: &Report, outcomes: &[Outcome]) -> Value {
    let workload = &args.workload;
    let dataset = clap::ValueEnum::to_possible_value(&workload.dataset_name);
    let mut record = json!({
        "tag": args.tag,
        "backend": args.backend.name(),
        "dataset_name": dataset.map(|name| name.get_name().to_owned()),
        "request_rate": if args.request_rate.is_finite() { json!(args.request_rate) } else { json!("inf") },
        "max_concurrency": args.max_concurrency,
        "sharegpt_output_len": workload.sharegpt_output_len,
        "random_input_len": workload.random_input_len,
        "random_output_len": workload.random_output_len,
        "random_range_ratio": workload.random_range_ratio,
        "seed": workload.seed,
        "server_info": server_info,
    });
    if let Some(record) = record.as_object_mut() {
        record.extend(report.json());
        if args.output_details {
            record.extend(Report::details(outcomes));
        }
    }
    record
}
