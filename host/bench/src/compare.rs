//! `torus bench compare`: the same requests to two servers in alternating rounds.
//!
//! One server works at a time; the order turns around from round to round (A B, B A, …), so that a machine which grows
//! slower or faster favours neither. Each round has a seed of its own, the same for both servers: no round finds the
//! prompts of an earlier one cached, and both answer the same prompts.

use std::{fmt::Write as _, path::PathBuf};

use anyhow::{Context, bail, ensure};
use indicatif::ProgressBar;
use serde_json::{Map, Value, json};

use crate::{
    backend::{Backend, RequestOptions},
    client::{Client, find_field},
    figures::{Comparison, FIGURES},
    load::{Load, model_name, progress_bar, warm_up},
    plot::{self, Chart, Series},
    report::{Report, append_line},
    scenario::Scenario,
    stats::Summary,
    workload::{self, WorkloadArgs},
};

/// Options of `torus bench compare`.
#[derive(Clone, Debug, clap::Args)]
pub struct CompareArgs {
    /// Address of a server; given twice. Ratios are the first over the second
    #[arg(long, value_name = "URL", required = true, help_heading = "Servers")]
    base_url: Vec<String>,
    /// Name of a server in the results, in the order of --base-url [default: A, B]
    #[arg(long, value_name = "NAME", help_heading = "Servers")]
    name: Vec<String>,
    /// Which endpoint to use: one for both, or given twice
    #[arg(long, value_name = "NAME", default_value = "vllm", help_heading = "Servers")]
    backend: Vec<Backend>,
    /// Name of the model: one for both, or given twice; asked of each server if not given
    #[arg(long, value_name = "NAME", help_heading = "Servers")]
    model: Vec<String>,
    /// Key that the servers ask for
    #[arg(long, value_name = "KEY", env = "OPENAI_API_KEY", hide_env_values = true, help_heading = "Servers")]
    api_key: Option<String>,

    /// Rounds that count; in each, every server answers all requests once
    #[arg(long, value_name = "N", default_value_t = 5, help_heading = "Load")]
    rounds: usize,
    /// A load, as in 'in=512,out=128,clients=8,requests=32,prefix=1024', in place of --max-concurrency and the workload
    /// options; may be given several times. 'prefix' tokens come first and are the same in all prompts of a round
    #[arg(long, value_name = "LOAD", help_heading = "Load")]
    scenario: Vec<Scenario>,
    /// Requests a second, as a Poisson process; 'inf' sends all at once
    #[arg(long, value_name = "RATE", default_value_t = f64::INFINITY, help_heading = "Load")]
    request_rate: f64,
    /// Requests under way at most
    #[arg(long, value_name = "N", conflicts_with = "scenario", help_heading = "Load")]
    max_concurrency: Option<usize>,
    /// Requests sent to each server before the rounds of a load
    #[arg(long, value_name = "N", default_value_t = 2, help_heading = "Load")]
    warmup_requests: usize,
    /// Let answers end where the model ends them; the servers may then do different amounts of work
    #[arg(long, help_heading = "Load")]
    disable_ignore_eos: bool,
    /// JSON object whose fields are added to every request
    #[arg(long, value_name = "JSON", help_heading = "Load")]
    extra_request_body: Option<String>,

    #[command(flatten)]
    workload: WorkloadArgs,

    /// File to which the results are appended, a line of JSON for each load
    #[arg(long, value_name = "FILE", help_heading = "Output")]
    output_file: Option<PathBuf>,
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

struct Server {
    name: String,
    client: Client,
    backend: Backend,
    options: RequestOptions,
}

/// What is sent in each round.
struct Case {
    name: String,
    workload: WorkloadArgs,
    max_concurrency: Option<usize>,
}

/// The rounds of a case: a report for each, of either server.
struct Rounds {
    case: Case,
    reports: [Vec<Report>; 2],
}

pub async fn run(args: &CompareArgs) -> anyhow::Result<()> {
    ensure!(args.rounds > 0, "--rounds must be at least 1");
    ensure!(args.request_rate > 0.0, "--request-rate must be above 0");
    ensure!(args.max_concurrency != Some(0), "--max-concurrency must be at least 1");
    let servers = servers(args).await?;
    let tokens = token_range(&servers).await;
    let mut measured = Vec::new();
    for case in cases(args) {
        let rounds = measure(args, case, &servers, tokens.clone()).await?;
        publish(args, &servers, &rounds)?;
        measured.push(rounds);
    }
    if let Some(path) = &args.plot {
        plot::write(path, &charts(&servers, &measured))?;
    }
    Ok(())
}

async fn servers(args: &CompareArgs) -> anyhow::Result<[Server; 2]> {
    let [first, second] = args.base_url.as_slice() else {
        bail!("--base-url must be given twice, once for each server; here are {}", args.base_url.len())
    };
    ensure!(args.name.is_empty() || args.name.len() == 2, "--name must be given twice or not at all");
    ensure!(args.model.len() <= 2, "--model may be given twice at most");
    ensure!(args.backend.len() <= 2, "--backend may be given twice at most");
    let extra: Map<String, Value> = match &args.extra_request_body {
        Some(text) => serde_json::from_str(text).context("--extra-request-body is no JSON object")?,
        None => Map::new(),
    };
    let server = async |index: usize, url: &str| -> anyhow::Result<Server> {
        let client = Client::new(url, args.api_key.clone())?;
        let model = args.model.get(index).or(args.model.first());
        let options = RequestOptions {
            model: model_name(&client, model.map(String::as_str)).await?,
            stream: true,
            ignore_eos: !args.disable_ignore_eos,
            logprobs: false,
            extra: extra.clone(),
        };
        let name = args.name.get(index).cloned().unwrap_or_else(|| ["A", "B"][index].to_owned());
        let backend = args.backend.get(index).or(args.backend.first()).copied().unwrap_or(Backend::Vllm);
        Ok(Server { name, client, backend, options })
    };
    Ok([server(0, first).await?, server(1, second).await?])
}

/// Tokens that both servers know, as far as they say.
async fn token_range(servers: &[Server; 2]) -> std::ops::Range<u32> {
    let mut smallest = None;
    for server in servers {
        let info = server.client.get_json("/get_server_info").await.unwrap_or_default();
        let size = find_field(&info, "vocab_size").and_then(Value::as_u64);
        smallest = [smallest, size].into_iter().flatten().min();
    }
    workload::token_range(smallest)
}

fn cases(args: &CompareArgs) -> Vec<Case> {
    if args.scenario.is_empty() {
        let name = match args.max_concurrency {
            Some(limit) => format!("at most {limit} requests"),
            None => "all requests".to_owned(),
        };
        return vec![Case { name, workload: args.workload.clone(), max_concurrency: args.max_concurrency }];
    }
    let case = |scenario: &Scenario| Case {
        name: scenario.name.clone(),
        workload: scenario.workload(&args.workload),
        max_concurrency: Some(scenario.clients),
    };
    args.scenario.iter().map(case).collect()
}

async fn measure(
    args: &CompareArgs,
    case: Case,
    servers: &[Server; 2],
    tokens: std::ops::Range<u32>,
) -> anyhow::Result<Rounds> {
    let prompts = |seed: u64| workload::generate(&WorkloadArgs { seed, ..case.workload.clone() }, tokens.clone());
    // Round 0 is the warm-up: prompts that no other round has.
    let seed = case.workload.seed.wrapping_mul(1_000_003);
    let first = prompts(seed)?;
    for server in servers {
        let warm = warm_up(args.warmup_requests, server.backend, &server.client, &first[0], &server.options).await;
        warm.with_context(|| server.name.clone())?;
    }
    let progress = progress_bar(2 * args.rounds * first.len(), args.disable_progress);
    let mut reports = [Vec::new(), Vec::new()];
    for round in 0..args.rounds {
        let order = if round % 2 == 0 { [0, 1] } else { [1, 0] };
        for index in order {
            let (server, seed) = (&servers[index], seed.wrapping_add(round as u64 + 1));
            progress.set_message(format!("{}, round {}, {} ", case.name, round + 1, server.name));
            let load = Load {
                backend: server.backend,
                request_rate: args.request_rate,
                max_concurrency: case.max_concurrency,
                seed,
            };
            reports[index].push(answer(server, &load, prompts(seed)?, &progress).await?);
        }
    }
    progress.finish_and_clear();
    Ok(Rounds { case, reports })
}

/// One round of one server. A failed request ends the comparison: what is left would not be the same load.
async fn answer(
    server: &Server,
    load: &Load,
    prompts: Vec<workload::Prompt>,
    progress: &ProgressBar,
) -> anyhow::Result<Report> {
    let measured = load.send(&server.client, prompts, &server.options, progress).await;
    let failed: Vec<_> = measured.outcomes.iter().filter_map(|outcome| outcome.as_ref().err()).collect();
    if let Some(first) = failed.first() {
        let count = measured.outcomes.len();
        bail!("{}: {} of {count} requests failed, the first of them: {first}", server.name, failed.len());
    }
    Ok(Report::new(measured.duration, &measured.outcomes, &[]))
}

fn publish(args: &CompareArgs, servers: &[Server; 2], rounds: &Rounds) -> anyhow::Result<()> {
    let [first, second] = &rounds.reports;
    let compared: Vec<_> = FIGURES.iter().filter_map(|figure| Comparison::of(figure, first, second)).collect();
    let names = [servers[0].name.as_str(), servers[1].name.as_str()];
    let record = record(args, names, rounds, &compared);
    if let Some(path) = &args.output_file {
        append_line(path, &record)?;
    }
    if args.json {
        println!("{record}");
    } else {
        println!("{}", table(&rounds.case.name, names, first.len(), &compared));
    }
    let tokens = rounds.reports.each_ref().map(|reports| totals(reports, |report| report.output_tokens));
    if tokens[0] != tokens[1] {
        eprintln!(
            "{}: the servers generated different numbers of tokens ({}: {}, {}: {}); compare tokens a second, not times",
            rounds.case.name, names[0], tokens[0], names[1], tokens[1]
        );
    }
    Ok(())
}

fn totals(reports: &[Report], of: fn(&Report) -> usize) -> usize {
    reports.iter().map(of).sum()
}

fn table(case: &str, names: [&str; 2], rounds: usize, compared: &[Comparison]) -> String {
    let mut table = format!("{case}: medians of {rounds} rounds, ratios from least to most\n");
    let width = names.map(|name| name.chars().count().max(10));
    // Writing to a string never fails.
    let _ = writeln!(
        table,
        "{:<16}{:>first$}  {:>second$}  {:>8}   spread",
        "",
        names[0],
        names[1],
        "ratio",
        first = width[0],
        second = width[1]
    );
    for comparison in compared {
        let ratio = &comparison.ratio;
        let _ = writeln!(
            table,
            "{:<16}{:>first$.2}  {:>second$.2}  {:>8.3}   {:.3} .. {:.3}",
            comparison.title,
            comparison.first.median(),
            comparison.second.median(),
            ratio.median(),
            ratio.percentile(0.0),
            ratio.percentile(100.0),
            first = width[0],
            second = width[1]
        );
    }
    table
}

/// The line of results of a load: its figures over all rounds, and each round as `torus bench serving` reports it.
fn record(args: &CompareArgs, names: [&str; 2], rounds: &Rounds, compared: &[Comparison]) -> Value {
    let server = |index: usize| {
        let reports = &rounds.reports[index];
        json!({
            "name": names[index],
            "base_url": args.base_url[index],
            "total_input_tokens": totals(reports, |report| report.input_tokens),
            "total_output_tokens": totals(reports, |report| report.output_tokens),
            "total_cached_tokens": totals(reports, |report| report.cached_tokens),
            "rounds": reports.iter().map(Report::json).collect::<Vec<_>>(),
        })
    };
    let figures: Map<String, Value> =
        compared.iter().map(|comparison| (comparison.key.to_owned(), comparison.json())).collect();
    json!({
        "scenario": rounds.case.name,
        "seed": rounds.case.workload.seed,
        "max_concurrency": rounds.case.max_concurrency,
        "rounds": args.rounds,
        "figures": figures,
        "servers": [server(0), server(1)],
    })
}

/// Throughput against latency, a line for each server; then the time between tokens of each load.
fn charts(servers: &[Server; 2], measured: &[Rounds]) -> Vec<Chart> {
    let median = |reports: &[Report], of: fn(&Report) -> f64| Summary::new(reports.iter().map(of)).median();
    let lines = servers.iter().enumerate().map(|(index, server)| {
        let mut line = Series::line(&server.name);
        for rounds in measured {
            let reports = &rounds.reports[index];
            let latency = median(reports, |report| report.latency.median());
            line.push(latency, median(reports, Report::output_throughput), rounds.case.name.clone());
        }
        line
    });
    let mut charts = vec![plot::throughput_against_latency("Throughput against latency", lines.collect())];
    for rounds in measured {
        let gaps =
            rounds.reports.each_ref().map(|reports| Summary::pooled(reports.iter().map(|report| &report.token_gap)));
        let named = servers.iter().zip(&gaps).map(|(server, gaps)| (server.name.clone(), gaps));
        charts.push(plot::token_gaps(&format!("Time between tokens: {}", rounds.case.name), named));
    }
    charts
}

#[cfg(test)]
mod tests {
    use clap::Parser;
    use expect_test::expect;

    use super::*;
    use crate::testing::FakeServer;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        compare: CompareArgs,
    }

    #[tokio::test]
    async fn both_servers_answer_the_same_prompts_and_no_round_repeats_one() {
        let (first, second) = (FakeServer::start().await, FakeServer::start().await);
        let folder = tempfile::tempdir().unwrap();
        let (results, drawing) = (folder.path().join("out.jsonl"), folder.path().join("out.svg"));
        let line = format!(
            "bench --base-url {} --base-url {} --name one --name two --rounds 3 --warmup-requests 1 --json \
             --scenario in=5,out=4,clients=1,requests=2 --scenario in=3,out=2,clients=2,requests=2,prefix=4 \
             --output-file {} --plot {}",
            first.url,
            second.url,
            results.display(),
            drawing.display()
        );
        run(&Cli::parse_from(line.split_whitespace()).compare).await.unwrap();

        let mut prompts = first.prompts();
        // For each load a warm-up and three rounds of two.
        assert_eq!(prompts.len(), 2 * (1 + 3 * 2));
        // Clients that run beside each other arrive in any order.
        prompts.sort();
        let mut others = second.prompts();
        others.sort();
        assert_eq!(prompts, others);
        prompts.dedup();
        assert_eq!(prompts.len(), others.len(), "a prompt was sent twice");

        let lines = std::fs::read_to_string(results).unwrap();
        let records: Vec<Value> = lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!(records.len(), 2);
        assert_eq!(records[0]["scenario"], "in=5,out=4,clients=1,requests=2");
        assert_eq!(records[0]["servers"][1]["total_output_tokens"], 3 * 2 * 4);
        assert_eq!(records[1]["servers"][0]["total_input_tokens"], 3 * 2 * 7);
        assert_eq!(records[0]["servers"][0]["rounds"].as_array().unwrap().len(), 3);
        assert!(records[0]["figures"]["output_throughput"]["ratio"]["median"].as_f64().unwrap() > 0.0);
        // A point for each load and server.
        assert_eq!(std::fs::read_to_string(drawing).unwrap().matches("<circle").count(), 4);
    }

    #[tokio::test]
    async fn one_server_is_not_enough() {
        let args = Cli::parse_from(["bench", "--base-url", "http://127.0.0.1:1"]).compare;
        assert!(run(&args).await.unwrap_err().to_string().contains("given twice"));
    }

    #[test]
    fn the_table() {
        let comparison = Comparison {
            key: "output_throughput",
            title: "output tok/s",
            first: Summary::new([100.0, 120.0, 140.0]),
            second: Summary::new([50.0, 60.0, 80.0]),
            ratio: Summary::new([2.0, 2.0, 1.75]),
        };
        expect![[r#"
            in=1: medians of 3 rounds, ratios from least to most
                                 torus   llama.cpp     ratio   spread
            output tok/s        120.00       60.00     2.000   1.750 .. 2.000
        "#]]
        .assert_eq(&table("in=1", ["torus", "llama.cpp"], 3, &[comparison]));
    }
}
