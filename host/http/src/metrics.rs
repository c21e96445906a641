//! Prometheus metrics, under the names that SGLang gave them; what SGLang does not have begins with `torus:`.
//!
//! Latencies are recorded as requests go by. What the engine counts is read from it when `/metrics` is asked for.

use std::sync::{Mutex, PoisonError};

use metrics::{Counter, Histogram, counter, describe_counter, describe_gauge, describe_histogram, gauge, histogram};
use metrics_exporter_prometheus::{BuildError, Matcher, PrometheusBuilder, PrometheusHandle};

use crate::models::Model;

const TIME_TO_FIRST_TOKEN: &str = "sglang:time_to_first_token_seconds";
const INTER_TOKEN_LATENCY: &str = "sglang:inter_token_latency_seconds";
const E2E_LATENCY: &str = "sglang:e2e_request_latency_seconds";
const REQUESTS: &str = "sglang:num_requests_total";
const ABORTED_REQUESTS: &str = "sglang:num_aborted_requests_total";
const RESPONSES: &str = "torus:http_responses_total";

const LATENCY_BUCKETS_S: [f64; 17] =
    [0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0];
const TOKEN_BUCKETS_S: [f64; 16] =
    [0.001, 0.002, 0.003, 0.004, 0.006, 0.008, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0];

/// Why the recorder of metrics could not be installed.
#[derive(Debug, thiserror::Error)]
pub enum MetricsError {
    #[error("the buckets of the latency histograms are not valid: {0}")]
    Buckets(#[from] BuildError),
    #[error("another recorder of metrics is already installed in this process")]
    OtherRecorder,
}

/// Installs the process's recorder of metrics and returns what renders it. A second call returns the same one.
///
/// Call it before any engine or server is made: what was recorded earlier is lost.
pub fn install_metrics() -> Result<PrometheusHandle, MetricsError> {
    static INSTALLED: Mutex<Option<PrometheusHandle>> = Mutex::new(None);
    let mut installed = INSTALLED.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(handle) = &*installed {
        return Ok(handle.clone());
    }
    let recorder = PrometheusBuilder::new()
        .set_buckets_for_metric(Matcher::Full(TIME_TO_FIRST_TOKEN.to_owned()), &LATENCY_BUCKETS_S)?
        .set_buckets_for_metric(Matcher::Full(E2E_LATENCY.to_owned()), &LATENCY_BUCKETS_S)?
        .set_buckets_for_metric(Matcher::Full(INTER_TOKEN_LATENCY.to_owned()), &TOKEN_BUCKETS_S)?
        .build_recorder();
    let handle = recorder.handle();
    metrics::set_global_recorder(recorder).map_err(|_| MetricsError::OtherRecorder)?;
    describe();
    Ok(installed.insert(handle).clone())
}

fn describe() {
    describe_histogram!(TIME_TO_FIRST_TOKEN, "Seconds from the submission of a sequence to its first token");
    describe_histogram!(INTER_TOKEN_LATENCY, "Seconds between two tokens of a sequence");
    describe_histogram!(E2E_LATENCY, "Seconds from the submission of a sequence to its end");
    describe_counter!(REQUESTS, "Sequences submitted");
    describe_counter!(ABORTED_REQUESTS, "Sequences whose client left or that were aborted");
    describe_counter!(RESPONSES, "HTTP responses by route and status");
    describe_gauge!("sglang:num_running_reqs", "Sequences being computed");
    describe_gauge!("sglang:num_queue_reqs", "Sequences waiting");
    describe_gauge!("sglang:num_used_tokens", "Tokens of KV held by running sequences");
    describe_gauge!("sglang:token_usage", "Share of the KV pages that running sequences hold");
    describe_gauge!("sglang:cache_hit_rate", "Share of all prompt tokens that were found in the prefix cache");
    describe_gauge!("sglang:gen_throughput", "Tokens generated per second");
    describe_counter!("sglang:prompt_tokens_total", "Prompt tokens");
    describe_counter!("sglang:cached_tokens_total", "Prompt tokens found in the prefix cache");
    describe_counter!("sglang:generation_tokens_total", "Tokens generated");
    describe_gauge!("torus:padding_ratio", "Padding tokens over all tokens computed");
    describe_counter!("torus:steps_total", "Steps of the engine");
    describe_counter!("torus:failed_steps_total", "Steps that failed");
    describe_counter!("torus:retractions_total", "Times a sequence lost its pages and was put back into the queue");
    describe_counter!("torus:compiles", "Programs compiled, before and after the model was ready");
}

/// The metrics of one model's sequences.
pub(crate) struct ModelMetrics {
    pub time_to_first_token_s: Histogram,
    pub inter_token_latency_s: Histogram,
    pub e2e_latency_s: Histogram,
    pub requests: Counter,
    pub aborted_requests: Counter,
}

impl ModelMetrics {
    pub fn new(model_name: &str) -> Self {
        let name = || model_name.to_owned();
        Self {
            time_to_first_token_s: histogram!(TIME_TO_FIRST_TOKEN, "model_name" => name()),
            inter_token_latency_s: histogram!(INTER_TOKEN_LATENCY, "model_name" => name()),
            e2e_latency_s: histogram!(E2E_LATENCY, "model_name" => name()),
            requests: counter!(REQUESTS, "model_name" => name()),
            aborted_requests: counter!(ABORTED_REQUESTS, "model_name" => name()),
        }
    }
}

/// Counts an HTTP response. `route` is a pattern, so that clients cannot make new time series.
pub(crate) fn count_response(route: &str, status: u16) {
    counter!(RESPONSES, "route" => route.to_owned(), "status" => status.to_string()).increment(1);
}

/// Takes over what the engine of the model behind a name counts.
pub(crate) fn update_from_engine(model: &Model) {
    let stats = model.engine.stats();
    let ratio = |part: u64, whole: u64| if whole == 0 { 0.0 } else { part as f64 / whole as f64 };
    let page_size = model.engine.info().map_or(0, |info| info.page_size);
    let gauges = [
        ("sglang:num_running_reqs", stats.running as f64),
        ("sglang:num_queue_reqs", stats.queued as f64),
        ("sglang:num_used_tokens", (stats.pages_used * page_size) as f64),
        ("sglang:token_usage", ratio(stats.pages_used as u64, stats.pages_total as u64)),
        ("sglang:cache_hit_rate", ratio(stats.cached_prompt_tokens, stats.prompt_tokens)),
        ("sglang:gen_throughput", stats.generation_throughput),
        ("torus:padding_ratio", stats.padding_ratio),
    ];
    for (metric, value) in gauges {
        gauge!(metric, "model_name" => model.label.clone()).set(value);
    }
    count_engine(model);
}

/// Adds what an engine has counted since the last time. Generations of one name share its counters.
pub(crate) fn count_engine(model: &Model) {
    let now = model.engine.stats();
    let mut counted = model.counted.lock().unwrap_or_else(PoisonError::into_inner);
    let counters = [
        ("sglang:prompt_tokens_total", counted.prompt_tokens, now.prompt_tokens),
        ("sglang:cached_tokens_total", counted.cached_prompt_tokens, now.cached_prompt_tokens),
        ("sglang:generation_tokens_total", counted.generated_tokens, now.generated_tokens),
        ("torus:steps_total", counted.steps, now.steps),
        ("torus:failed_steps_total", counted.failed_steps, now.failed_steps),
        ("torus:retractions_total", counted.retractions, now.retractions),
    ];
    for (metric, before, now) in counters {
        counter!(metric, "model_name" => model.label.clone()).increment(now.saturating_sub(before));
    }
    let compiles = now.serving_compiles.saturating_sub(counted.serving_compiles);
    counter!("torus:compiles", "model_name" => model.label.clone(), "phase" => "serving").increment(compiles);
    *counted = now;
}
