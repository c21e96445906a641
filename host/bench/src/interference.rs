//! `torus bench interference`: what a long prompt does to streams that decode, and they to it.
//!
//! A round has three parts: the long prompt alone; streams that decode undisturbed; the long prompt again (another of
//! the same length) while they decode. It ends with that prompt's first token.

use std::{
    path::PathBuf,
    time::{Duration, Instant},
};

use anyhow::{Context, bail, ensure};
use indicatif::ProgressBar;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use serde_json::{Value, json};
use tokio::{
    sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel},
    task::JoinSet,
};

use crate::{
    backend::{Backend, RequestOptions, Sample},
    client::{Client, ServerArgs, find_field},
    load::{model_name, progress_bar},
    plot,
    report::{append_line, milliseconds},
    stats::Summary,
    workload::{Content, Prompt, random_tokens, token_range},
};

/// Options of `torus bench interference`.
#[derive(Clone, Debug, clap::Args)]
pub struct InterferenceArgs {
    #[command(flatten)]
    server: ServerArgs,
    /// Which endpoint to use
    #[arg(long, value_name = "NAME", default_value = "vllm", help_heading = "Server")]
    backend: Backend,
    /// Name of the model; asked of the server if not given
    #[arg(long, value_name = "NAME", help_heading = "Server")]
    model: Option<String>,

    /// Streams that decode
    #[arg(long, value_name = "N", default_value_t = 8, help_heading = "Load")]
    decode_streams: usize,
    /// Tokens of the prompt of each of them
    #[arg(long, value_name = "TOKENS", default_value_t = 128, help_heading = "Load")]
    input_len: usize,
    /// Tokens that each may generate; they are cut off at the end of a round, so that this only has to be enough
    #[arg(long, value_name = "TOKENS", default_value_t = 2048, help_heading = "Load")]
    output_len: usize,
    /// Tokens of the long prompt
    #[arg(long, value_name = "TOKENS", default_value_t = 4096, help_heading = "Load")]
    long_input_len: usize,
    /// Tokens that each stream generates undisturbed before the long prompt is sent
    #[arg(long, value_name = "TOKENS", default_value_t = 64, help_heading = "Load")]
    quiet_tokens: usize,
    #[arg(long, value_name = "N", default_value_t = 3, help_heading = "Load")]
    rounds: usize,
    /// Seed of the prompts
    #[arg(long, value_name = "N", default_value_t = 1, help_heading = "Load")]
    seed: u64,

    /// File to which the results are appended as one line of JSON
    #[arg(long, value_name = "FILE", help_heading = "Output")]
    output_file: Option<PathBuf>,
    /// Print the results as a line of JSON instead of a table
    #[arg(long, help_heading = "Output")]
    json: bool,
    /// File for a drawing (SVG) of the time between tokens without and with the long prompt
    #[arg(long, value_name = "FILE", help_heading = "Output")]
    plot: Option<PathBuf>,
    /// No progress bar
    #[arg(long, alias = "disable-tqdm", help_heading = "Output")]
    disable_progress: bool,
}

/// What one round measured.
#[derive(Debug, Default)]
struct Round {
    /// Until the first token of the long prompt, alone and beside the streams.
    alone: Duration,
    beside: Duration,
    gaps: Gaps,
}

/// Times between tokens of the streams, in milliseconds.
#[derive(Debug, Default, PartialEq)]
struct Gaps {
    /// Before the long prompt was sent, and after every stream had begun.
    quiet: Vec<f64>,
    /// Between its sending and its first token, at least in part.
    disturbed: Vec<f64>,
}

/// All rounds together.
struct Findings {
    quiet: Summary,
    disturbed: Summary,
    /// In milliseconds, a sample for each round.
    alone: Summary,
    beside: Summary,
}

/// News of a stream: its place, when it was (from the start of the round), and the tokens that it has so far.
type Arrival = (usize, Duration, usize);

pub async fn run(args: &InterferenceArgs) -> anyhow::Result<()> {
    ensure!(args.decode_streams > 0, "--decode-streams must be at least 1");
    ensure!(args.rounds > 0, "--rounds must be at least 1");
    ensure!(args.quiet_tokens > 0, "--quiet-tokens must be at least 1");
    ensure!(args.output_len > args.quiet_tokens + 1, "--output-len must be above --quiet-tokens by 2 at least");
    let client = Client::new(&args.server.url(), args.server.api_key.clone())?;
    let options = RequestOptions {
        model: model_name(&client, args.model.as_deref()).await?,
        stream: true,
        ignore_eos: true,
        logprobs: false,
        extra: serde_json::Map::new(),
    };
    let info = client.get_json("/get_server_info").await.unwrap_or_default();
    let tokens = token_range(find_field(&info, "vocab_size").and_then(Value::as_u64));
    let mut rng = ChaCha8Rng::seed_from_u64(args.seed);
    let mut prompt = |length, output_len| Prompt {
        content: Content::Tokens(random_tokens(length, tokens.clone(), &mut rng)),
        output_len,
    };
    let bench = Interference { args, client, options };
    bench.first_token(prompt(args.long_input_len, 2)).await.context("the warm-up request failed")?;
    let mut rounds = Vec::new();
    let progress = progress_bar(args.rounds * (2 + args.decode_streams), args.disable_progress);
    for _ in 0..args.rounds {
        let long = [prompt(args.long_input_len, 2), prompt(args.long_input_len, 2)];
        let streams = (0..args.decode_streams).map(|_| prompt(args.input_len, args.output_len)).collect();
        rounds.push(bench.round(long, streams, &progress).await?);
    }
    progress.finish_and_clear();
    publish(args, &Findings::of(&rounds))
}

struct Interference<'a> {
    args: &'a InterferenceArgs,
    client: Client,
    options: RequestOptions,
}

impl Interference<'_> {
    async fn round(&self, long: [Prompt; 2], streams: Vec<Prompt>, progress: &ProgressBar) -> anyhow::Result<Round> {
        let [first, second] = long;
        let alone = self.first_token(first).await.context("the long prompt alone failed")?;
        progress.inc(1);
        let start = Instant::now();
        let (sender, arrivals) = unbounded_channel();
        // Dropped at the end of the round, which cuts the streams off.
        let mut tasks = JoinSet::new();
        for (index, prompt) in streams.into_iter().enumerate() {
            self.spawn_stream(&mut tasks, prompt, start, index, sender.clone());
        }
        drop(sender);
        let mut watched = Watched { arrivals, streams: vec![Vec::new(); self.args.decode_streams] };
        // The first event of a stream and as many gaps after it as are asked for, of each stream while all run.
        watched.until(&mut tasks, |streams| streams.iter().all(|stream| !stream.is_empty())).await?;
        let began = watched.latest();
        let wanted: Vec<_> = watched.tokens().iter().map(|tokens| tokens + self.args.quiet_tokens).collect();
        let reached = |streams: &[Vec<(Duration, usize)>]| {
            streams.iter().zip(&wanted).all(|(stream, wanted)| stream.last().is_some_and(|last| last.1 >= *wanted))
        };
        watched.until(&mut tasks, reached).await?;
        let sent = start.elapsed();
        let beside = self.first_token(second).await.context("the long prompt beside the streams failed")?;
        let answered = sent + beside;
        // A gap that began before the long prompt's first token ends with the next token of its stream.
        let after = |streams: &[Vec<(Duration, usize)>]| {
            streams.iter().all(|stream| stream.last().is_some_and(|last| last.0 >= answered))
        };
        watched.until(&mut tasks, after).await?;
        progress.inc(1 + self.args.decode_streams as u64);
        Ok(Round { alone, beside, gaps: Gaps::of(&watched.streams, began, sent, answered) })
    }

    fn spawn_stream(
        &self,
        tasks: &mut JoinSet<anyhow::Result<()>>,
        prompt: Prompt,
        start: Instant,
        index: usize,
        sender: UnboundedSender<Arrival>,
    ) {
        let (backend, client, options) = (self.args.backend, self.client.clone(), self.options.clone());
        tasks.spawn(async move {
            let mut seen = 0;
            let watch = |sample: &Sample| {
                if sample.arrivals.len() > seen {
                    seen = sample.arrivals.len();
                    // Nobody listens once the round is over.
                    let _ = sender.send((index, start.elapsed(), sample.output_tokens));
                }
            };
            backend.measure_watched(&client, &prompt, &options, start, watch).await.map(drop)
        });
    }

    async fn first_token(&self, prompt: Prompt) -> anyhow::Result<Duration> {
        let sample = self.args.backend.measure(&self.client, &prompt, &self.options, Instant::now()).await?;
        sample.time_to_first_token().context("the answer has no token")
    }
}

/// The streams as they go on.
struct Watched {
    arrivals: UnboundedReceiver<Arrival>,
    /// Of each stream when tokens arrived, and how many there were then.
    streams: Vec<Vec<(Duration, usize)>>,
}

impl Watched {
    /// Takes arrivals until `done`. A stream that ends before is an error.
    async fn until(
        &mut self,
        tasks: &mut JoinSet<anyhow::Result<()>>,
        done: impl Fn(&[Vec<(Duration, usize)>]) -> bool,
    ) -> anyhow::Result<()> {
        while !done(&self.streams) {
            tokio::select! {
                // What has arrived counts before the end of the stream that it came from.
                biased;
                Some((index, at, tokens)) = self.arrivals.recv() => self.streams[index].push((at, tokens)),
                Some(ended) = tasks.join_next() => {
                    ended?.context("a stream failed")?;
                    bail!("a stream ended before the long prompt was answered; raise --output-len, as far as the \
                           model's context allows");
                }
                else => bail!("all streams ended before the long prompt was answered; raise --output-len"),
            }
        }
        Ok(())
    }

    fn latest(&self) -> Duration {
        self.streams.iter().filter_map(|stream| stream.last()).map(|(at, _)| *at).max().unwrap_or_default()
    }

    fn tokens(&self) -> Vec<usize> {
        self.streams.iter().map(|stream| stream.last().map_or(0, |(_, tokens)| *tokens)).collect()
    }
}

impl Gaps {
    /// Sorts the gaps of streams, given when tokens arrived and how many there were then: all had begun at `began`, the
    /// long prompt was sent at `sent` and had its first token at `answered`. A gap is shared by the tokens that end it.
    fn of(streams: &[Vec<(Duration, usize)>], began: Duration, sent: Duration, answered: Duration) -> Self {
        let mut gaps = Self::default();
        for pair in streams.iter().flat_map(|stream| stream.windows(2)) {
            let [(from, before), (to, after)] = [pair[0], pair[1]];
            let tokens = after.saturating_sub(before).max(1);
            let each = std::iter::repeat_n(milliseconds(to.saturating_sub(from)) / tokens as f64, tokens);
            if from >= began && to <= sent {
                gaps.quiet.extend(each);
            } else if from < answered && to > sent {
                gaps.disturbed.extend(each);
            }
        }
        gaps
    }
}

impl Findings {
    fn of(rounds: &[Round]) -> Self {
        Self {
            quiet: Summary::new(rounds.iter().flat_map(|round| round.gaps.quiet.iter().copied())),
            disturbed: Summary::new(rounds.iter().flat_map(|round| round.gaps.disturbed.iter().copied())),
            alone: Summary::new(rounds.iter().map(|round| milliseconds(round.alone))),
            beside: Summary::new(rounds.iter().map(|round| milliseconds(round.beside))),
        }
    }

    /// The 99th percentile beside the long prompt over the median without it.
    fn gap_ratio(&self) -> f64 {
        self.disturbed.percentile(99.0) / self.quiet.median()
    }

    fn first_token_ratio(&self) -> f64 {
        self.beside.median() / self.alone.median()
    }

    fn json(&self) -> Value {
        let gaps =
            |gaps: &Summary| json!({"p50": gaps.median(), "p99": gaps.percentile(99.0), "max": gaps.percentile(100.0)});
        let spread = |times: &Summary| json!({"median": times.median(), "min": times.percentile(0.0), "max": times.percentile(100.0)});
        json!({
            "itl_ms": {"without": gaps(&self.quiet), "with": gaps(&self.disturbed)},
            "long_ttft_ms": {"alone": spread(&self.alone), "under_load": spread(&self.beside)},
            "p99_itl_with_over_p50_without": self.gap_ratio(),
            "long_ttft_ratio": self.first_token_ratio(),
        })
    }

    fn table(&self, streams: usize, long_input_len: usize) -> String {
        let gaps = |gaps: &Summary| {
            format!("{:>10.2}{:>10.2}{:>10.2}", gaps.median(), gaps.percentile(99.0), gaps.percentile(100.0))
        };
        let times = |times: &Summary| {
            format!("{:>10.2}{:>10.2}{:>10.2}", times.median(), times.percentile(0.0), times.percentile(100.0))
        };
        format!(
            "Time between tokens of {streams} streams (ms)      p50       p99       max\n\
             {:<36}{}\n{:<36}{}\n{:<36}{:>10.2}\n\n\
             Time to first token of {long_input_len} tokens (ms)   median       min       max\n\
             {:<36}{}\n{:<36}{}\n{:<36}{:>10.2}",
            "without the long prompt",
            gaps(&self.quiet),
            "while it is read",
            gaps(&self.disturbed),
            "p99 with over p50 without",
            self.gap_ratio(),
            "alone",
            times(&self.alone),
            "beside the streams",
            times(&self.beside),
            "ratio",
            self.first_token_ratio(),
        )
    }
}

fn publish(args: &InterferenceArgs, findings: &Findings) -> anyhow::Result<()> {
    let mut record = json!({
        "decode_streams": args.decode_streams,
        "input_len": args.input_len,
        "long_input_len": args.long_input_len,
        "rounds": args.rounds,
        "seed": args.seed,
    });
    if let (Some(record), Value::Object(found)) = (record.as_object_mut(), findings.json()) {
        record.extend(found);
    }
    if let Some(path) = &args.output_file {
        append_line(path, &record)?;
    }
    if args.json {
        println!("{record}");
    } else {
        println!("{}", findings.table(args.decode_streams, args.long_input_len));
    }
    if let Some(path) = &args.plot {
        let title = format!("Time between tokens of {} streams", args.decode_streams);
        let long = format!("while {} tokens are read", args.long_input_len);
        let gaps = [("without a long prompt".to_owned(), &findings.quiet), (long, &findings.disturbed)];
        plot::write(path, &[plot::token_gaps(&title, gaps)])?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::testing::FakeServer;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        interference: InterferenceArgs,
    }

    #[test]
    fn gaps_are_told_apart_by_the_long_prompt() {
        let ms = Duration::from_millis;
        let stream = |arrivals: &[(u64, usize)]| arrivals.iter().map(|(at, tokens)| (ms(*at), *tokens)).collect();
        let streams: Vec<Vec<_>> = vec![
            // Before the other began; quiet; quiet, two tokens at once; across the sending; across the answer; after it.
            stream(&[(0, 1), (10, 2), (20, 3), (40, 5), (70, 6), (110, 7), (120, 8)]),
            stream(&[(10, 1), (25, 2), (50, 3), (130, 4)]),
        ];
        let gaps = Gaps::of(&streams, ms(10), ms(50), ms(100));
        assert_eq!(gaps, Gaps { quiet: vec![10.0, 10.0, 10.0, 15.0, 25.0], disturbed: vec![30.0, 40.0, 80.0] });
    }

    #[test]
    fn ratios_are_of_what_is_with_over_what_is_without() {
        let gaps = Gaps { quiet: vec![10.0, 20.0, 30.0], disturbed: vec![40.0, 40.0] };
        let ms = Duration::from_millis;
        let findings = Findings::of(&[Round { alone: ms(200), beside: ms(300), gaps }]);
        assert_eq!((findings.gap_ratio(), findings.first_token_ratio()), (2.0, 1.5));
        assert_eq!(findings.json()["itl_ms"]["without"], json!({"p50": 20.0, "p99": 29.8, "max": 30.0}));
    }

    #[tokio::test]
    async fn streams_are_cut_off_once_the_long_prompt_is_answered() {
        let server = FakeServer::start().await;
        let file = tempfile::NamedTempFile::new().unwrap();
        let line = format!(
            "bench --base-url {} --decode-streams 2 --input-len 3 --long-input-len 20 --output-len 100000000 \
             --quiet-tokens 5 --rounds 2 --json --output-file {}",
            server.url,
            file.path().display()
        );
        run(&Cli::parse_from(line.split_whitespace()).interference).await.unwrap();
        let record: Value = serde_json::from_str(&std::fs::read_to_string(file.path()).unwrap()).unwrap();
        assert!(record["long_ttft_ms"]["under_load"]["min"].as_f64().unwrap() > 0.0, "{record}");
        assert!(record["itl_ms"]["without"]["p50"].as_f64().unwrap() > 0.0, "{record}");
        // A warm-up, and in each round the long prompt twice and two streams.
        assert_eq!(server.prompts().len(), 1 + 2 * (2 + 2));
    }

    #[tokio::test]
    async fn streams_that_are_too_short_are_an_error() {
        let server = FakeServer::start().await;
        let line =
            format!("bench --base-url {} --decode-streams 1 --output-len 7 --quiet-tokens 5 --rounds 1", server.url);
        let error = run(&Cli::parse_from(line.split_whitespace()).interference).await.unwrap_err();
        assert!(error.to_string().contains("--output-len"), "{error}");
    }
}
