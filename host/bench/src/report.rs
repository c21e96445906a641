//! What a run of many requests amounts to.

use std::{fmt::Write as _, fs::OpenOptions, io::Write as _, path::Path, time::Duration};

use anyhow::Context;
use serde_json::{Map, Value, json};

use crate::{
    backend::{Outcome, Sample},
    goodput::Limit,
    stats::Summary,
};

/// Numbers over all requests that were answered.
pub struct Report {
    pub completed: usize,
    /// Those of them that kept to every limit; absent without limits.
    good: Option<usize>,
    duration: Duration,
    pub input_tokens: usize,
    pub output_tokens: usize,
    pub cached_tokens: usize,
    /// All in milliseconds.
    pub latency: Summary,
    pub first_token: Summary,
    pub per_token: Summary,
    pub token_gap: Summary,
    /// Sum of all latencies over the duration: requests under way on average.
    concurrency: f64,
    peak_tokens_per_second: usize,
    peak_concurrency: usize,
}

pub fn milliseconds(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

impl Report {
    pub fn new(duration: Duration, outcomes: &[Outcome], limits: &[Limit]) -> Self {
        let samples: Vec<&Sample> = outcomes.iter().filter_map(|outcome| outcome.as_ref().ok()).collect();
        let total = |of: fn(&Sample) -> usize| samples.iter().map(|sample| of(sample)).sum();
        let latencies: f64 = samples.iter().map(|sample| sample.latency.as_secs_f64()).sum();
        let good = samples.iter().filter(|sample| limits.iter().all(|limit| limit.holds(sample))).count();
        Self {
            completed: samples.len(),
            good: (!limits.is_empty()).then_some(good),
            duration,
            input_tokens: total(|sample| sample.prompt_tokens),
            output_tokens: total(|sample| sample.output_tokens),
            cached_tokens: total(|sample| sample.cached_tokens),
            latency: Summary::new(samples.iter().map(|sample| milliseconds(sample.latency))),
            first_token: Summary::new(
                samples.iter().filter_map(|sample| sample.time_to_first_token()).map(milliseconds),
            ),
            per_token: Summary::new(samples.iter().filter_map(|sample| sample.time_per_token()).map(milliseconds)),
            token_gap: Summary::new(samples.iter().flat_map(|sample| sample.token_gaps()).map(milliseconds)),
            concurrency: latencies / duration.as_secs_f64(),
            peak_tokens_per_second: peak_tokens_per_second(&samples),
            peak_concurrency: peak_concurrency(&samples),
        }
    }

    pub fn output_throughput(&self) -> f64 {
        self.per_second(self.output_tokens)
    }

    pub fn total_throughput(&self) -> f64 {
        self.per_second(self.input_tokens + self.output_tokens)
    }

    fn per_second(&self, count: usize) -> f64 {
        count as f64 / self.duration.as_secs_f64()
    }

    /// The table for the terminal.
    pub fn table(&self, backend: &str, request_rate: f64, max_concurrency: Option<usize>) -> String {
        let mut table = Table::new("Serving Benchmark Result");
        table.row("Backend:", backend);
        table.row("Traffic request rate:", request_rate);
        table.row("Max request concurrency:", max_concurrency.map_or("not set".into(), |limit| limit.to_string()));
        table.row("Successful requests:", self.completed);
        table.number("Benchmark duration (s):", self.duration.as_secs_f64());
        table.row("Total input tokens:", self.input_tokens);
        table.row("Total cached input tokens:", self.cached_tokens);
        table.row("Total generated tokens:", self.output_tokens);
        table.number("Request throughput (req/s):", self.per_second(self.completed));
        if let Some(good) = self.good {
            table.number("Request goodput (req/s):", self.per_second(good));
        }
        table.number("Input token throughput (tok/s):", self.per_second(self.input_tokens));
        table.number("Output token throughput (tok/s):", self.per_second(self.output_tokens));
        table.row("Peak output token throughput (tok/s):", self.peak_tokens_per_second);
        table.row("Peak concurrent requests:", self.peak_concurrency);
        table.number("Total token throughput (tok/s):", self.total_throughput());
        table.number("Concurrency:", self.concurrency);
        table.section("End-to-End Latency");
        table.summary("E2E Latency", &self.latency, &[90.0, 99.0]);
        table.section("Time to First Token");
        table.summary("TTFT", &self.first_token, &[99.0]);
        table.section("Time per Output Token (excl. 1st token)");
        table.summary("TPOT", &self.per_token, &[99.0]);
        table.section("Inter-Token Latency");
        table.summary("ITL", &self.token_gap, &[95.0, 99.0]);
        table.end()
    }

    /// The same as JSON fields, under the names that tools know. Lengths are what the server counted.
    pub fn json(&self) -> Map<String, Value> {
        let mut fields = Map::new();
        let mut field = |name: &str, value: Value| drop(fields.insert(name.to_owned(), value));
        field("duration", json!(self.duration.as_secs_f64()));
        field("completed", json!(self.completed));
        field("total_input_tokens", json!(self.input_tokens));
        field("total_input_text_tokens", json!(self.input_tokens));
        field("total_input_vision_tokens", json!(0));
        field("total_output_tokens", json!(self.output_tokens));
        field("total_output_tokens_retokenized", Value::Null);
        field("total_cached_tokens", json!(self.cached_tokens));
        field("cache_hit_rate", json!(self.cached_tokens as f64 / self.input_tokens.max(1) as f64));
        field("request_throughput", json!(self.per_second(self.completed)));
        if let Some(good) = self.good {
            field("request_goodput", json!(self.per_second(good)));
        }
        field("input_throughput", json!(self.per_second(self.input_tokens)));
        field("output_throughput", json!(self.per_second(self.output_tokens)));
        field("total_throughput", json!(self.total_throughput()));
        let summaries: [(&str, &Summary, &[u32]); 4] = [
            ("e2e_latency_ms", &self.latency, &[90, 99]),
            ("ttft_ms", &self.first_token, &[99]),
            ("tpot_ms", &self.per_token, &[99]),
            ("itl_ms", &self.token_gap, &[95, 99]),
        ];
        for (name, summary, percentiles) in summaries {
            field(&format!("mean_{name}"), json!(summary.mean()));
            field(&format!("median_{name}"), json!(summary.median()));
            field(&format!("std_{name}"), json!(summary.deviation()));
            for percent in percentiles {
                field(&format!("p{percent}_{name}"), json!(summary.percentile(f64::from(*percent))));
            }
        }
        field("concurrency", json!(self.concurrency));
        field("accept_length", Value::Null);
        field("max_output_tokens_per_s", json!(self.peak_tokens_per_second));
        field("max_concurrent_requests", json!(self.peak_concurrency));
        fields
    }

    /// The numbers of each request, in the order of sending; of a failed one its error.
    pub fn details(outcomes: &[Outcome]) -> Map<String, Value> {
        let nothing = Sample::default();
        let sample = |outcome: &Outcome| outcome.as_ref().unwrap_or(&nothing).clone();
        let list = |of: &dyn Fn(Sample) -> Value| outcomes.iter().map(|outcome| of(sample(outcome))).collect::<Value>();
        let seconds = |duration: Duration| json!(duration.as_secs_f64());
        let errors = outcomes.iter().map(|outcome| json!(outcome.as_ref().err().map_or("", String::as_str)));
        [
            ("input_lens", list(&|sample| json!(sample.prompt_tokens))),
            ("output_lens", list(&|sample| json!(sample.output_tokens))),
            ("cached_tokens", list(&|sample| json!(sample.cached_tokens))),
            ("start_times", list(&|sample| seconds(sample.sent))),
            ("latencies", list(&|sample| seconds(sample.latency))),
            ("ttfts", list(&|sample| seconds(sample.time_to_first_token().unwrap_or_default()))),
            ("itls", list(&|sample| sample.token_gaps().map(seconds).collect())),
            ("generated_texts", list(&|sample| json!(sample.text))),
            ("errors", errors.collect()),
        ]
        .into_iter()
        .map(|(name, value)| (name.to_owned(), value))
        .collect()
    }
}

/// Most tokens that arrived within one second of the run, counted by whole seconds.
fn peak_tokens_per_second(samples: &[&Sample]) -> usize {
    let mut seconds: Vec<usize> = Vec::new();
    for sample in samples {
        for (at, tokens) in &sample.arrivals {
            let second = (sample.sent + *at).as_secs() as usize;
            if seconds.len() <= second {
                seconds.resize(second + 1, 0);
            }
            seconds[second] += tokens;
        }
    }
    seconds.into_iter().max().unwrap_or(0)
}

/// Most requests that were under way at one moment.
fn peak_concurrency(samples: &[&Sample]) -> usize {
    let mut changes: Vec<(Duration, i64)> = Vec::with_capacity(2 * samples.len());
    for sample in samples {
        changes.push((sample.sent, 1));
        changes.push((sample.sent + sample.latency, -1));
    }
    // At the same moment ends come first: one that ends when another begins was not under way with it.
    changes.sort_unstable();
    let mut under_way = 0;
    changes.into_iter().fold(0, |peak, (_, change)| {
        under_way += change;
        peak.max(under_way)
    }) as usize
}

/// Adds a line of JSON to a file.
pub fn append_line(path: &Path, record: &Value) -> anyhow::Result<()> {
    let open = OpenOptions::new().create(true).append(true).open(path);
    let written = open.and_then(|mut file| writeln!(file, "{record}"));
    written.with_context(|| format!("{}: the results cannot be written", path.display()))
}

/// A table of labels and values, 50 characters wide.
struct Table(String);

impl Table {
    const WIDTH: usize = 50;

    fn new(title: &str) -> Self {
        Self(format!("{:=^1$}\n", format!(" {title} "), Self::WIDTH))
    }

    fn row(&mut self, label: &str, value: impl std::fmt::Display) {
        // Writing to a string never fails.
        let _ = writeln!(self.0, "{label:<40} {value}");
    }

    fn number(&mut self, label: &str, value: f64) {
        self.row(label, format_args!("{value:.2}"));
    }

    fn section(&mut self, title: &str) {
        let _ = writeln!(self.0, "{title:-^0$}", Self::WIDTH);
    }

    fn summary(&mut self, name: &str, summary: &Summary, percentiles: &[f64]) {
        self.number(&format!("Mean {name} (ms):"), summary.mean());
        self.number(&format!("Median {name} (ms):"), summary.median());
        for percent in percentiles {
            self.number(&format!("P{percent} {name} (ms):"), summary.percentile(*percent));
        }
    }

    fn end(mut self) -> String {
        self.0.push_str(&"=".repeat(Self::WIDTH));
        self.0
    }
}

#[cfg(test)]
mod tests {
    use expect_test::expect;

    use super::*;

    fn ms(milliseconds: u64) -> Duration {
        Duration::from_millis(milliseconds)
    }

    /// Two requests, 400 ms apart, of 3 and 1 tokens, and one that failed.
    fn outcomes() -> Vec<Outcome> {
        let first = Sample {
            sent: ms(0),
            latency: ms(500),
            arrivals: vec![(ms(100), 1), (ms(300), 2)],
            prompt_tokens: 10,
            output_tokens: 3,
            cached_tokens: 4,
            text: "abc".into(),
        };
        let second = Sample {
            sent: ms(400),
            latency: ms(600),
            arrivals: vec![(ms(600), 1)],
            prompt_tokens: 6,
            output_tokens: 1,
            ..Sample::default()
        };
        [Ok(first), Ok(second), Err("refused".to_owned())].into()
    }

    #[test]
    fn the_table() {
        let table = Report::new(ms(1_000), &outcomes(), &[]).table("sglang", f64::INFINITY, Some(2));
        expect![[r#"
            ============ Serving Benchmark Result ============
            Backend:                                 sglang
            Traffic request rate:                    inf
            Max request concurrency:                 2
            Successful requests:                     2
            Benchmark duration (s):                  1.00
            Total input tokens:                      16
            Total cached input tokens:               4
            Total generated tokens:                  4
            Request throughput (req/s):              2.00
            Input token throughput (tok/s):          16.00
            Output token throughput (tok/s):         4.00
            Peak output token throughput (tok/s):    3
            Peak concurrent requests:                2
            Total token throughput (tok/s):          20.00
            Concurrency:                             1.10
            ----------------End-to-End Latency----------------
            Mean E2E Latency (ms):                   550.00
            Median E2E Latency (ms):                 550.00
            P90 E2E Latency (ms):                    590.00
            P99 E2E Latency (ms):                    599.00
            ---------------Time to First Token----------------
            Mean TTFT (ms):                          350.00
            Median TTFT (ms):                        350.00
            P99 TTFT (ms):                           595.00
            -----Time per Output Token (excl. 1st token)------
            Mean TPOT (ms):                          200.00
            Median TPOT (ms):                        200.00
            P99 TPOT (ms):                           200.00
            ---------------Inter-Token Latency----------------
            Mean ITL (ms):                           100.00
            Median ITL (ms):                         100.00
            P95 ITL (ms):                            100.00
            P99 ITL (ms):                            100.00
            =================================================="#]]
        .assert_eq(&table);
    }

    #[test]
    fn the_json_fields() {
        let fields = Report::new(ms(1_000), &outcomes(), &[]).json();
        let names: Vec<_> = fields.keys().map(String::as_str).collect();
        expect![[r#"
            duration completed total_input_tokens total_input_text_tokens total_input_vision_tokens total_output_tokens total_output_tokens_retokenized total_cached_tokens cache_hit_rate request_throughput input_throughput output_throughput total_throughput mean_e2e_latency_ms median_e2e_latency_ms std_e2e_latency_ms p90_e2e_latency_ms p99_e2e_latency_ms mean_ttft_ms median_ttft_ms std_ttft_ms p99_ttft_ms mean_tpot_ms median_tpot_ms std_tpot_ms p99_tpot_ms mean_itl_ms median_itl_ms std_itl_ms p95_itl_ms p99_itl_ms concurrency accept_length max_output_tokens_per_s max_concurrent_requests"#]]
        .assert_eq(&names.join(" "));
        assert_eq!(fields["cache_hit_rate"], 0.25);
        assert_eq!(fields["median_e2e_latency_ms"], 550.0);
    }

    #[test]
    fn details_keep_failed_requests_in_their_place() {
        let details = Report::details(&outcomes());
        assert_eq!(details["input_lens"], json!([10, 6, 0]));
        assert_eq!(details["itls"], json!([[0.1, 0.1], [], []]));
        assert_eq!(details["errors"], json!(["", "", "refused"]));
    }

    #[test]
    fn a_run_without_answers_has_zeros() {
        let report = Report::new(ms(10), &[Err("refused".into())], &[]);
        assert_eq!((report.completed, report.peak_concurrency, report.peak_tokens_per_second), (0, 0, 0));
        let mut fields = report.json();
        fields.remove("duration");
        assert!(fields.values().all(|value| value.is_null() || value.as_f64() == Some(0.0)), "{fields:?}");
    }

    #[test]
    fn requests_that_follow_one_another_do_not_overlap() {
        let sample = |sent, latency| Sample { sent: ms(sent), latency: ms(latency), ..Sample::default() };
        let (first, second) = (sample(0, 5), sample(5, 5));
        assert_eq!(peak_concurrency(&[&first, &second]), 1);
    }
}
