//! `torus bench serving`: many requests against one server.

use std::path::PathBuf;

use anyhow::{Context, bail, ensure};
use serde_json::{Map, Value, json};

use crate::{
    backend::{Backend, RequestOptions},
    client::{Client, ServerArgs, find_field},
    goodput::Limit,
    load::{Load, Measured, model_name, progress_bar, warm_up},
    plot::{self, Chart, Series},
    report::{Report, append_line},
    workload::{self, WorkloadArgs},
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

    /// Requests a second, as a Poisson process; 'inf' sends all at once. Of several, each is measured in turn
    #[arg(long, value_name = "RATE", num_args = 1.., value_delimiter = ',', default_value = "inf",
        help_heading = "Load")]
    request_rate: Vec<f64>,
    /// Requests under way at most. Of several, each is measured in turn, with prompts of its own
    #[arg(long, value_name = "N", num_args = 1.., value_delimiter = ',', help_heading = "Load")]
    max_concurrency: Vec<usize>,
    /// Count the requests that keep to limits in milliseconds: ttft, tpot, itl (the longest time between two tokens of
    /// a request) and e2el, as in 'ttft:500 tpot:50'
    #[arg(long, value_name = "NAME:MS", num_args = 1.., value_delimiter = ',', help_heading = "Load")]
    goodput: Vec<Limit>,
    /// Requests sent before the measurement
    #[arg(long, value_name = "N", default_value_t = 1, help_heading = "Load")]
    warmup_requests: usize,
    /// Empty the prefix cache before each measurement
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
    /// Print the results as lines of JSON instead of tables
    #[arg(long, help_heading = "Output")]
    json: bool,
    /// File for a drawing (SVG) of throughput against latency and of the time between tokens
    #[arg(long, value_name = "FILE", help_heading = "Output")]
    plot: Option<PathBuf>,
    /// No progress bar
    #[arg(long, alias = "disable-tqdm", help_heading = "Output")]
    disable_progress: bool,
}

/// One measurement of a run that may have several.
struct Point {
    load: Load,
    measured: Measured,
    report: Report,
}

pub async fn run(args: &ServingArgs) -> anyhow::Result<()> {
    ensure!(args.request_rate.iter().all(|rate| *rate > 0.0), "--request-rate must be above 0");
    ensure!(!args.max_concurrency.contains(&0), "--max-concurrency must be at least 1");
    let client = Client::new(&args.server.url(), args.server.api_key.clone())?;
    let options = request_options(args, &client).await?;
    let info = client.get_json("/get_server_info").await.unwrap_or_default();
    let tokens = workload::token_range(find_field(&info, "vocab_size").and_then(Value::as_u64));

    let loads = loads(args);
    let mut points = Vec::with_capacity(loads.len());
    for (index, load) in loads.into_iter().enumerate() {
        let workload = WorkloadArgs { seed: load.seed, ..args.workload.clone() };
        let prompts = workload::generate(&workload, tokens.clone())?;
        if index == 0 {
            warm_up(args.warmup_requests, args.backend, &client, &prompts[0], &options).await?;
        }
        let measured = measure(args, &load, &client, prompts, &options).await?;
        let report = Report::new(measured.duration, &measured.outcomes, &args.goodput);
        let point = Point { load, measured, report };
        publish(args, &client, &point).await?;
        points.push(point);
    }
    if let Some(path) = &args.plot {
        plot::write(path, &charts(&points))?;
    }
    Ok(())
}

/// Every rate with every concurrency. Each has a seed of its own, so that none finds the prompts of another cached.
fn loads(args: &ServingArgs) -> Vec<Load> {
    let concurrencies: Vec<_> = match args.max_concurrency.as_slice() {
        [] => vec![None],
        limits => limits.iter().copied().map(Some).collect(),
    };
    let pairs = args.request_rate.iter().flat_map(|rate| concurrencies.iter().map(move |limit| (*rate, *limit)));
    let with_seed = pairs.zip(args.workload.seed..);
    with_seed
        .map(|((request_rate, max_concurrency), seed)| Load {
            backend: args.backend,
            request_rate,
            max_concurrency,
            seed,
        })
        .collect()
}

async fn request_options(args: &ServingArgs, client: &Client) -> anyhow::Result<RequestOptions> {
    let extra: Map<String, Value> = match &args.extra_request_body {
        Some(text) => serde_json::from_str(text).context("--extra-request-body is no JSON object")?,
        None => Map::new(),
    };
    Ok(RequestOptions {
        model: model_name(client, args.model.as_deref()).await?,
        stream: !args.disable_stream,
        ignore_eos: !args.disable_ignore_eos,
        logprobs: args.return_logprob,
        extra,
    })
}

async fn measure(
    args: &ServingArgs,
    load: &Load,
    client: &Client,
    prompts: Vec<workload::Prompt>,
    options: &RequestOptions,
) -> anyhow::Result<Measured> {
    if args.flush_cache {
        client.post("/flush_cache", &Value::Null).await?;
    }
    if args.profile {
        client.post("/start_profile", &json!({})).await?;
    }
    let progress = progress_bar(prompts.len(), args.disable_progress);
    let measured = load.send(client, prompts, options, &progress).await;
    progress.finish_and_clear();
    if args.profile {
        client.post("/stop_profile", &json!({})).await?;
    }
    Ok(measured)
}

/// Prints and stores what one measurement found.
async fn publish(args: &ServingArgs, client: &Client, point: &Point) -> anyhow::Result<()> {
    let Point { load, measured, report } = point;
    let failed: Vec<_> = measured.outcomes.iter().filter_map(|outcome| outcome.as_ref().err()).collect();
    if let Some(first) = failed.first() {
        eprintln!("{} of {} requests failed, the first of them: {first}", failed.len(), measured.outcomes.len());
    }
    if args.json || args.output_file.is_some() {
        let info = client.get_json("/get_server_info").await.unwrap_or_default();
        let record = record(args, info, point);
        if let Some(path) = &args.output_file {
            append_line(path, &record)?;
        }
        if args.json {
            println!("{record}");
        }
    }
    if !args.json {
        println!("{}", report.table(load.backend.name(), load.request_rate, load.max_concurrency));
    }
    if report.completed == 0 {
        bail!("no request was answered");
    }
    Ok(())
}

/// The line of results: the run's options, the report, and what the server says of itself.
fn record(args: &ServingArgs, server_info: Value, point: &Point) -> Value {
    let (workload, load) = (&args.workload, &point.load);
    let dataset = clap::ValueEnum::to_possible_value(&workload.dataset_name);
    let mut record = json!({
        "tag": args.tag,
        "backend": args.backend.name(),
        "dataset_name": dataset.map(|name| name.get_name().to_owned()),
        "request_rate": if load.request_rate.is_finite() { json!(load.request_rate) } else { json!("inf") },
        "max_concurrency": load.max_concurrency,
        "sharegpt_output_len": workload.sharegpt_output_len,
        "random_input_len": workload.random_input_len,
        "random_output_len": workload.random_output_len,
        "random_range_ratio": workload.random_range_ratio,
        "seed": load.seed,
        "server_info": server_info,
    });
    if let Some(record) = record.as_object_mut() {
        record.extend(point.report.json());
        if args.output_details {
            record.extend(Report::details(&point.measured.outcomes));
        }
    }
    record
}

fn charts(points: &[Point]) -> [Chart; 2] {
    let name = |load: &Load| match load.max_concurrency {
        Some(limit) if load.request_rate.is_finite() => format!("{} req/s, at most {limit}", load.request_rate),
        Some(limit) => format!("at most {limit}"),
        None if load.request_rate.is_finite() => format!("{} req/s", load.request_rate),
        None => "all at once".to_owned(),
    };
    let mut throughput = Series::line("measured");
    for point in points {
        throughput.push(point.report.latency.median(), point.report.output_throughput(), name(&point.load));
    }
    let gaps = points.iter().map(|point| (name(&point.load), &point.report.token_gap));
    [
        plot::throughput_against_latency("Throughput against latency", vec![throughput]),
        plot::token_gaps("Time between tokens", gaps),
    ]
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::testing::FakeServer;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        serving: ServingArgs,
    }

    #[tokio::test]
    async fn a_sweep_measures_every_pair_with_prompts_of_its_own() {
        let server = FakeServer::start().await;
        let folder = tempfile::tempdir().unwrap();
        let (results, drawing) = (folder.path().join("out.jsonl"), folder.path().join("out.svg"));
        let line = format!(
            "bench --base-url {} --backend openai --num-prompts 3 --random-input 4 --random-output 5 \
             --random-range-ratio 1 --max-concurrency 1 2 --request-rate 1000,inf --goodput ttft:60000 itl:60000 \
             --warmup-requests 0 --output-file {} --output-details --json --plot {}",
            server.url,
            results.display(),
            drawing.display()
        );
        run(&Cli::parse_from(line.split_whitespace()).serving).await.unwrap();

        let lines = std::fs::read_to_string(results).unwrap();
        let records: Vec<Value> = lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        let loads: Vec<_> = records.iter().map(|r| (&r["request_rate"], &r["max_concurrency"], &r["seed"])).collect();
        let (thousand, all) = (json!(1000.0), json!("inf"));
        let expected = [(&thousand, 1, 1), (&thousand, 2, 2), (&all, 1, 3), (&all, 2, 4)];
        assert_eq!(loads.len(), expected.len());
        for ((rate, limit, seed), expected) in loads.into_iter().zip(expected) {
            assert_eq!((rate, limit.as_u64(), seed.as_u64()), (expected.0, Some(expected.1), Some(expected.2)));
        }
        for record in &records {
            assert_eq!((&record["completed"], &record["total_output_tokens"]), (&json!(3), &json!(15)));
            assert_eq!(record["request_goodput"], record["request_throughput"]);
            assert_eq!(record["itls"][0].as_array().unwrap().len(), 4);
        }
        let mut prompts = server.prompts();
        assert_eq!(prompts.len(), 12);
        prompts.sort();
        prompts.dedup();
        assert_eq!(prompts.len(), 12, "a prompt was sent twice");
        // A point of throughput for each of the four.
        assert_eq!(std::fs::read_to_string(drawing).unwrap().matches("<circle").count(), 4);
    }
}
