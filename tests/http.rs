//! The whole server over HTTP, with the real model.

use std::time::{Duration, Instant};

use futures::{StreamExt, future::join_all, stream};
use serde_json::{Value, json};

use crate::{
    server::{MODEL, Server, stock_library},
    support::block_on,
};

fn goldens() -> Vec<Value> {
    let golden: Value = serde_json::from_str(include_str!("data/smollm2-135m.json")).unwrap();
    golden["cases"].as_array().unwrap().clone()
}

/// Asserts that a continuation is the reference's, up to the first step at which two tokens are nearly as likely.
fn assert_golden(case: &Value, output: &Value) {
    let clear = case["top1_minus_top2"].as_array().unwrap().iter().take_while(|m| m.as_f64().unwrap() >= 0.01).count();
    let (expected, output) = (case["greedy_ids"].as_array().unwrap(), output["output_ids"].as_array().unwrap());
    assert_eq!(output[..clear], expected[..clear]);
}

fn greedy(case: &Value) -> Value {
    json!({"input_ids": case["input_ids"], "sampling_params": {"temperature": 0, "max_new_tokens": 32, "ignore_eos": true}})
}

#[test]
fn the_same_tokens_come_from_plugins_that_are_shared_libraries() {
    block_on(async {
        let llama = stock_library("torus_model_llama");
        let native = stock_library("torus_attention_native");
        let files = ["--no-linked-plugins", "--plugin", llama.to_str().unwrap(), "--plugin", native.to_str().unwrap()];
        let server = Server::start(&files).await;
        for case in goldens() {
            assert_golden(&case, &server.post_json("/generate", &greedy(&case)).await);
        }
        assert_eq!(server.terminate(), Some(0), "SIGTERM ends the server cleanly");
    });
}

#[test]
fn a_plugin_from_outside_of_the_tree_is_checked_and_serves() {
    checked_and_serving("paged_attention", "paged_attention");
}

#[test]
fn a_plugin_with_native_code_is_checked_and_serves() {
    checked_and_serving("native_loop", "native-loop");
}

fn checked_and_serving(library: &str, backend: &str) {
    // Built by `make test` in a workspace of its own, against the plugin API alone.
    let library = crate::server::example_library(library);
    let library = library.to_str().unwrap();
    let check =
        std::process::Command::new(crate::server::torus()).args(["plugins", "check", library]).output().unwrap();
    let report = String::from_utf8_lossy(&check.stdout);
    assert!(check.status.success() && report.contains("ok   prefill, f32: score "), "{report}");
    block_on(async {
        let server = Server::start(&["--plugin", library, "--attention-backend", backend]).await;
        for case in &goldens()[..4] {
            assert_golden(case, &server.post_json("/generate", &greedy(case)).await);
        }
    });
}

#[test]
fn a_server_does_what_its_users_rely_on() {
    block_on(async {
        let server = Server::start(&["--enable-cache-report"]).await;
        golden_text(&server).await;
        shared_prefixes(&server).await;
        random_load(&server).await;
        leaving_clients(&server).await;
        let metrics = server.get_text("/metrics").await;
        let compiles = metrics.lines().find(|line| line.contains("compiles") && line.contains("serving"));
        assert!(compiles.is_some_and(|line| line.ends_with(" 0")), "{compiles:?}");
    });
}

async fn golden_text(server: &Server) {
    let goldens = goldens();
    let answers =
        join_all(goldens.iter().map(|case| async { server.post_json("/generate", &greedy(case)).await })).await;
    goldens.iter().zip(&answers).for_each(|(case, answer)| assert_golden(case, answer));
    let chat = json!({
        "model": MODEL, "temperature": 0, "max_tokens": 16,
        "messages": [{"role": "user", "content": "What is the tallest mountain in the world?"}],
    });
    let answer = server.post_json("/v1/chat/completions", &chat).await;
    let expected = goldens[3]["greedy_text"].as_str().unwrap();
    let content = answer["choices"][0]["message"]["content"].as_str().unwrap();
    assert!(content.len() > 20 && expected.starts_with(content), "{content}");
    assert_eq!(answer["usage"]["prompt_tokens"], goldens[3]["input_ids"].as_array().unwrap().len());
}

/// 64 requests that share a prefix of 1,024 tokens: the first computes it, the others only their own end.
async fn shared_prefixes(server: &Server) {
    server.post("/flush_cache", &json!({})).await;
    let prefix: Vec<u32> = (0..1024).map(|i| 300 + i * 37 % 40_000).collect();
    let request = |i: u32| {
        let mut ids = prefix.clone();
        ids.extend([1000 + i, 2000 + i, 3000 + i]);
        json!({"input_ids": ids, "sampling_params": {"temperature": 0, "max_new_tokens": 4, "ignore_eos": true}})
    };
    let first = server.post_json("/generate", &request(0)).await;
    assert_eq!(first["meta_info"]["cached_tokens"], 0);
    let answers: Vec<Value> = stream::iter(1..65)
        .map(|i| async move { server.post_json("/generate", &request(i)).await })
        .buffer_unordered(16)
        .collect()
        .await;
    for answer in &answers {
        assert_eq!(answer["meta_info"]["cached_tokens"], 1024);
        assert_eq!(answer["meta_info"]["completion_tokens"], 4);
    }
    assert_nothing_is_held(server).await;
}

/// Sampling of every kind at once; all must end as asked.
async fn random_load(server: &Server) {
    let request = |i: u64| {
        json!({
            "input_ids": (0..(i * 13 % 90 + 1)).map(|k| (i * 31 + k * 7) % 49_000).collect::<Vec<_>>(),
            "return_logprob": i.is_multiple_of(4), "top_logprobs_num": i % 3, "logprob_start_len": if i.is_multiple_of(5) { 0 } else { -1 },
            "sampling_params": {
                "max_new_tokens": i % 11 + 1, "ignore_eos": true, "temperature": i % 3, "sampling_seed": i,
                "top_p": if i.is_multiple_of(2) { 0.9 } else { 1.0 }, "top_k": if i % 4 == 1 { 20 } else { -1 },
                "min_p": if i % 6 == 1 { 0.05 } else { 0.0 }, "frequency_penalty": (i % 3) as f64 * 0.5,
                "repetition_penalty": if i.is_multiple_of(7) { 1.3 } else { 1.0 },
            },
        })
    };
    let answers: Vec<(u64, Value)> = stream::iter(0..60)
        .map(|i| async move { (i, server.post_json("/generate", &request(i)).await) })
        .buffer_unordered(24)
        .collect()
        .await;
    for (i, answer) in answers {
        assert_eq!(answer["meta_info"]["completion_tokens"], i % 11 + 1);
        assert_eq!(answer["meta_info"]["output_token_logprobs"].is_array(), i % 4 == 0, "{answer}");
    }
}

/// 100 streaming clients leave in the middle of their answers. Headers come with the first token, for which most wait until
/// others end.
async fn leaving_clients(server: &Server) {
    let request = json!({"text": "Once upon a time", "stream": true, "sampling_params": {"max_new_tokens": 400, "ignore_eos": true}});
    let streams = join_all((0..100).map(|_| server.post("/generate", &request))).await;
    let mut first = streams.into_iter().map(reqwest::Response::bytes_stream).collect::<Vec<_>>();
    let chunk = first[0].next().await.unwrap().unwrap();
    assert!(chunk.starts_with(b"data: {"), "{chunk:?}");
    drop(first);
    assert_nothing_is_held(server).await;
}

/// Within a second nothing runs, and after a flush every page is free.
async fn assert_nothing_is_held(server: &Server) {
    let started = Instant::now();
    loop {
        let flushed = server.post("/flush_cache", &json!({})).await;
        if flushed.status().is_success() {
            break;
        }
        assert!(started.elapsed() < Duration::from_secs(5), "{}", flushed.text().await.unwrap());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let state = server.state().await;
    assert_eq!((&state["running_batch_size"], &state["waiting_queue_size"]), (&json!(0), &json!(0)), "{state}");
}

#[test]
fn an_unknown_attention_backend_is_refused_with_the_known_ones() {
    // A backend that does not exist: the server must say which there are, and end.
    let output = std::process::Command::new(crate::server::torus())
        .args(["serve", "--port", "0", "--attention-backend", "nonsense", "--model-path"])
        .arg(crate::support::smollm2())
        .output()
        .unwrap();
    let log = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success());
    assert!(log.contains("nonsense") && log.contains("native"), "{log}");
}
