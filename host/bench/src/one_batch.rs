//! `torus bench one-batch`: one batch of equal requests at a time, next to what the memory of this machine allows.

use std::{
    path::PathBuf,
    time::{Duration, Instant},
};

use anyhow::{Context, bail, ensure};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use serde_json::{Value, json};

use crate::{
    bandwidth::measure_read_bandwidth,
    client::{Client, find_field},
    report::append_line,
    server::SpawnedServer,
    workload::{random_tokens, token_range},
};

/// Options of `torus bench one-batch`.
#[derive(Clone, Debug, clap::Args)]
pub struct OneBatchArgs {
    /// Sequences in a batch
    #[arg(long, value_name = "N", num_args = 1.., value_delimiter = ',', default_value = "1", help_heading = "Cases")]
    batch_size: Vec<usize>,
    /// Tokens of each prompt
    #[arg(long, value_name = "TOKENS", num_args = 1.., value_delimiter = ',', default_value = "1024",
        help_heading = "Cases")]
    input_len: Vec<usize>,
    /// Tokens to generate for each
    #[arg(long, value_name = "TOKENS", num_args = 1.., value_delimiter = ',', default_value = "16",
        help_heading = "Cases")]
    output_len: Vec<usize>,
    #[arg(long, value_name = "T", default_value_t = 0.0, help_heading = "Cases")]
    temperature: f64,
    /// Ask for logprobs
    #[arg(long, help_heading = "Cases")]
    return_logprob: bool,
    /// Do not run a small batch first
    #[arg(long, help_heading = "Cases")]
    skip_warmup: bool,
    /// Seed of the prompts
    #[arg(long, value_name = "N", default_value_t = 1, help_heading = "Cases")]
    seed: u64,

    /// Address of a running server; without it one is started with the options after '--' and stopped at the end
    #[arg(long, value_name = "URL", conflicts_with = "serve_options", help_heading = "Server")]
    base_url: Option<String>,
    /// Key that the server asks for
    #[arg(long, value_name = "KEY", env = "OPENAI_API_KEY", hide_env_values = true, help_heading = "Server")]
    api_key: Option<String>,
    /// Bytes of weights that one token reads; asked of the server if not given
    #[arg(long, value_name = "BYTES", help_heading = "Server")]
    weight_bytes: Option<u64>,

    /// Name for this run in the results
    #[arg(long, value_name = "NAME", default_value = "default", help_heading = "Output")]
    run_name: String,
    /// File to which each case is appended as a line of JSON
    #[arg(long, value_name = "FILE", help_heading = "Output")]
    result_filename: Option<PathBuf>,

    /// Options of 'torus serve' for the server that is started: -- --model-path FOLDER …
    #[arg(last = true, value_name = "SERVE OPTIONS")]
    serve_options: Vec<String>,
}

#[derive(Clone, Copy, Debug)]
struct Case {
    batch_size: usize,
    input_len: usize,
    output_len: usize,
}

/// What one batch measured.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Timing {
    /// Until every sequence had its first token.
    first_tokens: Duration,
    /// Until all were done.
    latency: Duration,
}

/// What decoding is held against.
#[derive(Clone, Copy, Debug)]
struct Machine {
    /// Bytes a second.
    read_bandwidth: f64,
    weight_bytes: Option<u64>,
}

pub async fn run(args: &OneBatchArgs) -> anyhow::Result<()> {
    let cases = cases(args);
    ensure!(
        cases.iter().all(|case| case.batch_size > 0 && case.input_len > 0 && case.output_len > 0),
        "--batch-size, --input-len and --output-len must be at least 1"
    );
    let Some(url) = &args.base_url else {
        let named = |option: &String| option.starts_with("--model");
        ensure!(
            args.serve_options.iter().any(named),
            "give --base-url, or the model after '--': -- --model-path FOLDER"
        );
        let server = SpawnedServer::start(&args.serve_options).await?;
        let measured = measure_cases(args, &cases, &Client::new(server.url(), args.api_key.clone())?).await;
        server.stop().await?;
        return measured;
    };
    measure_cases(args, &cases, &Client::new(url, args.api_key.clone())?).await
}

fn cases(args: &OneBatchArgs) -> Vec<Case> {
    let mut cases = Vec::new();
    for &batch_size in &args.batch_size {
        for &input_len in &args.input_len {
            cases.extend(args.output_len.iter().map(|&output_len| Case { batch_size, input_len, output_len }));
        }
    }
    cases
}

async fn measure_cases(args: &OneBatchArgs, cases: &[Case], client: &Client) -> anyhow::Result<()> {
    let info = client.get_json("/get_server_info").await.unwrap_or_default();
    let number = |key| find_field(&info, key).and_then(Value::as_u64);
    let tokens = token_range(number("vocab_size"));
    let read_bandwidth = tokio::task::spawn_blocking(measure_read_bandwidth).await?;
    let machine = Machine { read_bandwidth, weight_bytes: args.weight_bytes.or_else(|| number("weight_bytes")) };
    println!("{}", machine.describe());

    let mut rng = ChaCha8Rng::seed_from_u64(args.seed);
    let mut prompts = |case: &Case| -> Vec<Vec<u32>> {
        (0..case.batch_size).map(|_| random_tokens(case.input_len, tokens.clone(), &mut rng)).collect()
    };
    if !args.skip_warmup {
        let warm_up = Case { batch_size: 1, input_len: 16, output_len: 8 };
        run_case(args, client, &warm_up, prompts(&warm_up)).await.context("the warm-up batch failed")?;
    }
    for case in cases {
        client.post("/flush_cache", &Value::Null).await.context("the prefix cache cannot be emptied")?;
        let timing = run_case(args, client, case, prompts(case)).await?;
        let info = client.get_json("/get_server_info").await.unwrap_or_default();
        let server_throughput = find_field(&info, "last_gen_throughput").and_then(Value::as_f64);
        let record = record(args, case, &timing, server_throughput, &machine);
        println!("{}", describe(&record));
        if let Some(path) = &args.result_filename {
            append_line(path, &record)?;
        }
    }
    Ok(())
}

async fn run_case(args: &OneBatchArgs, client: &Client, case: &Case, prompts: Vec<Vec<u32>>) -> anyhow::Result<Timing> {
    let body = json!({
        "input_ids": prompts,
        "sampling_params": {
            "temperature": args.temperature,
            "max_new_tokens": case.output_len,
            "ignore_eos": true,
        },
        "return_logprob": args.return_logprob,
        "stream": true,
    });
    let start = Instant::now();
    let mut events = client.stream("/generate", &body).await?;
    let mut progress = BatchProgress::new(case.batch_size);
    while let Some(event) = events.next().await? {
        progress.read(&event, start.elapsed())?;
    }
    progress.finish(case.output_len, start.elapsed())
}

/// Which sequences of a batch have how many tokens.
struct BatchProgress {
    tokens: Vec<usize>,
    first_tokens: Duration,
}

impl BatchProgress {
    fn new(batch_size: usize) -> Self {
        Self { tokens: vec![0; batch_size], first_tokens: Duration::ZERO }
    }

    fn read(&mut self, event: &Value, at: Duration) -> anyhow::Result<()> {
        if let Some(error) = event.get("error") {
            bail!("{}", error["message"].as_str().map_or_else(|| error.to_string(), str::to_owned));
        }
        let index = event["index"].as_u64().unwrap_or(0) as usize;
        let count = event["meta_info"]["completion_tokens"].as_u64().unwrap_or(0) as usize;
        let Some(tokens) = self.tokens.get_mut(index) else { bail!("the server answers for a sequence {index}") };
        if *tokens == 0 && count > 0 {
            self.first_tokens = at;
        }
        *tokens = count;
        Ok(())
    }

    fn finish(self, output_len: usize, latency: Duration) -> anyhow::Result<Timing> {
        let short = self.tokens.iter().position(|tokens| *tokens != output_len);
        if let Some(index) = short {
            bail!("sequence {index} has {} tokens instead of {output_len}", self.tokens[index]);
        }
        Ok(Timing { first_tokens: self.first_tokens, latency })
    }
}

impl Machine {
    /// Tokens a second that a batch could decode if nothing but reading the weights took time.
    fn decode_limit(&self, batch_size: usize) -> Option<f64> {
        self.weight_bytes.map(|bytes| batch_size as f64 * self.read_bandwidth / bytes as f64)
    }

    fn describe(&self) -> String {
        let bandwidth = format!("memory read bandwidth of this machine: {:.1} GB/s", self.read_bandwidth / 1e9);
        match self.weight_bytes {
            Some(bytes) => format!("{bandwidth}; weights read per step: {:.1} MB", bytes as f64 / 1e6),
            None => format!("{bandwidth}; weights read per step: unknown (give --weight-bytes)"),
        }
    }
}

fn record(
    args: &OneBatchArgs,
    case: &Case,
    timing: &Timing,
    server_throughput: Option<f64>,
    machine: &Machine,
) -> Value {
    let Case { batch_size, input_len, output_len } = *case;
    let (first, latency) = (timing.first_tokens.as_secs_f64(), timing.latency.as_secs_f64());
    let decoded = batch_size * (output_len - 1);
    let decode = (decoded > 0).then(|| decoded as f64 / (latency - first));
    let limit = machine.decode_limit(batch_size);
    json!({
        "run_name": args.run_name,
        "batch_size": batch_size,
        "input_len": input_len,
        "output_len": output_len,
        "latency": latency,
        "ttft": first,
        "input_throughput": (batch_size * input_len) as f64 / first,
        "output_throughput": decode,
        "overall_throughput": (batch_size * (input_len + output_len)) as f64 / latency,
        "last_gen_throughput": server_throughput,
        "read_bandwidth_bytes_per_s": machine.read_bandwidth,
        "weight_bytes": machine.weight_bytes,
        "output_throughput_limit": limit,
        "output_throughput_of_limit": decode.zip(limit).map(|(decode, limit)| decode / limit),
    })
}

fn describe(record: &Value) -> String {
    let number = |key: &str, unit: &str| match record[key].as_f64() {
        Some(number) => format!("{number:.2} {unit}"),
        None => "not measured".to_owned(),
    };
    let limit = match (record["output_throughput_limit"].as_f64(), record["output_throughput_of_limit"].as_f64()) {
        (Some(limit), Some(share)) => format!(" ({:.0}% of the bandwidth limit, {limit:.0} tok/s)", share * 100.0),
        _ => String::new(),
    };
    format!(
        "batch size: {}\ninput_len: {}\noutput_len: {}\nlatency: {}\nttft: {}\nlast generation throughput: {}\n\
         input throughput: {}\noutput throughput: {}{limit}\n",
        record["batch_size"],
        record["input_len"],
        record["output_len"],
        number("latency", "s"),
        number("ttft", "s"),
        number("last_gen_throughput", "tok/s"),
        number("input_throughput", "tok/s"),
        number("output_throughput", "tok/s"),
    )
}

#[cfg(test)]
mod tests {
    use clap::Parser;
    use expect_test::expect;

    use super::*;
    use crate::testing::Answer;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        args: OneBatchArgs,
    }

    fn args(line: &str) -> OneBatchArgs {
        Cli::parse_from(["bench"].into_iter().chain(line.split_whitespace())).args
    }

    #[test]
    fn cases_are_all_combinations() {
        let cases = cases(&args("--batch-size 1 4 --input-len 8,16 --output-len 2 -- --model-path m --dtype float32"));
        let lengths: Vec<_> = cases.iter().map(|case| (case.batch_size, case.input_len, case.output_len)).collect();
        assert_eq!(lengths, [(1, 8, 2), (1, 16, 2), (4, 8, 2), (4, 16, 2)]);
    }

    fn event(index: usize, tokens: usize) -> Value {
        json!({"index": index, "text": "", "meta_info": {"completion_tokens": tokens}})
    }

    #[tokio::test]
    async fn a_batch_is_sent_as_one_request() {
        let (url, request) = Answer::events(&[event(0, 1), event(1, 1), event(0, 2), event(1, 2)]).serve().await;
        let client = Client::new(&url, None).unwrap();
        let case = Case { batch_size: 2, input_len: 1, output_len: 2 };
        let timing = run_case(&args(""), &client, &case, vec![vec![7], vec![8]]).await.unwrap();
        assert!(timing.first_tokens <= timing.latency);
        assert_eq!(request.await.unwrap().body["input_ids"], json!([[7], [8]]));
    }

    #[test]
    fn the_first_tokens_are_there_when_the_last_sequence_has_one() {
        let mut progress = BatchProgress::new(2);
        for (event, at) in [(event(0, 1), 1), (event(0, 2), 2), (event(1, 1), 3), (event(1, 2), 4)] {
            progress.read(&event, Duration::from_secs(at)).unwrap();
        }
        let timing = progress.finish(2, Duration::from_secs(5)).unwrap();
        assert_eq!(timing, Timing { first_tokens: Duration::from_secs(3), latency: Duration::from_secs(5) });
    }

    #[test]
    fn a_sequence_that_is_short_is_an_error() {
        let mut progress = BatchProgress::new(2);
        progress.read(&event(0, 2), Duration::ZERO).unwrap();
        let error = progress.finish(2, Duration::ZERO).unwrap_err();
        assert_eq!(error.to_string(), "sequence 1 has 0 tokens instead of 2");
        assert!(BatchProgress::new(2).read(&event(2, 1), Duration::ZERO).is_err());
    }

    #[test]
    fn decoding_is_held_against_the_bandwidth() {
        let machine = Machine { read_bandwidth: 20e9, weight_bytes: Some(100_000_000) };
        let timing = Timing { first_tokens: Duration::from_millis(500), latency: Duration::from_millis(1_500) };
        let case = Case { batch_size: 2, input_len: 100, output_len: 51 };
        let record = record(&args(""), &case, &timing, Some(99.0), &machine);
        expect![[r#"
            batch size: 2
            input_len: 100
            output_len: 51
            latency: 1.50 s
            ttft: 0.50 s
            last generation throughput: 99.00 tok/s
            input throughput: 400.00 tok/s
            output throughput: 100.00 tok/s (25% of the bandwidth limit, 400 tok/s)
        "#]]
        .assert_eq(&describe(&record));
    }
}
