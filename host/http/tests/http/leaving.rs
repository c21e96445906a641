//! Requests that end before their time: clients leave or lag, time runs out, steps fail, operators abort.

use std::time::Duration;

use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};
use torus_engine::api::Abort;

use crate::{
    engine::Script,
    support::{TestServer, chunk, user},
};

fn gated() -> Script {
    Script { is_gated: true, ..Script::default() }
}

#[tokio::test]
async fn a_client_that_leaves_a_stream_takes_its_sequences_with_it() {
    let server = TestServer::with(gated(), |_| {}).await;
    for path in ["/v1/chat/completions", "/v1/completions", "/generate"] {
        let body = match path {
            "/v1/chat/completions" => json!({"messages": user("Hi"), "stream": true, "n": 3}),
            "/v1/completions" => json!({"prompt": ["a", "b", "c"], "stream": true}),
            _ => json!({"text": ["a", "b", "c"], "stream": true}),
        };
        server.engine.gate.add_permits(1);
        let mut response = server.post(path, &body).send().await.unwrap();
        chunk(&mut response).await.unwrap();
        server.engine.wait_for_running(3).await;
        drop(response);
        server.engine.wait_for_running(0).await;
    }
    assert_eq!(server.engine.dropped().len(), 9);
}

#[tokio::test]
async fn a_client_that_leaves_before_its_answer_does_too() {
    let server = TestServer::with(gated(), |_| {}).await;
    let body = json!({"text": "Hi", "rid": "r"}).to_string();
    let mut stream = TcpStream::connect(server.address).await.unwrap();
    let head = format!(
        "POST /generate HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    stream.write_all((head + &body).as_bytes()).await.unwrap();
    server.engine.wait_for_running(1).await;
    drop(stream);
    server.engine.wait_for_running(0).await;
    assert_eq!(server.engine.dropped(), ["r"]);
    // Its id is free again.
    server.engine.gate.add_permits(100);
    server.ask("/generate", json!({"text": "Hi", "rid": "r"})).await;
}

#[tokio::test]
async fn a_client_that_does_not_read_is_cut_off() {
    let script = Script { says: vec![120; 4], portion: 10, ..Script::default() };
    let server = TestServer::with(script, |config| {
        config.limits.stream_queue_chunks = 1;
        config.limits.slow_client_timeout = Duration::from_millis(100);
    })
    .await;
    // More than the buffers of the connection take: each event of this stream repeats the logprobs of all before it.
    server.engine.set_info(|info| {
        info.context_length = 1 << 20;
        info.max_total_tokens = 1 << 20;
    });
    let body = json!({"text": "Hi", "rid": "r", "stream": true, "return_logprob": true, "top_logprobs_num": 20,
        "sampling_params": {"max_new_tokens": 1_000_000, "ignore_eos": true}});
    let body = body.to_string();
    let mut stream = TcpStream::connect(server.address).await.unwrap();
    let head = format!(
        "POST /generate HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    stream.write_all((head + &body).as_bytes()).await.unwrap();
    server.engine.wait_for_running(1).await;
    server.engine.wait_for_running(0).await;
    assert_eq!(server.engine.dropped(), ["r"]);
    // What was sent does not look complete.
    let mut received = Vec::new();
    let _ = stream.read_to_end(&mut received).await;
    assert!(received.starts_with(b"HTTP/1.1 200") && !received.ends_with(b"0\r\n\r\n"));
}

#[tokio::test]
async fn time_runs_out() {
    let limited = |config: &mut torus_http::ServerConfig| config.request_timeout = Some(Duration::from_millis(500));
    let server = TestServer::with(gated(), limited).await;
    let (status, error) = server.refused("/v1/completions", &json!({"prompt": "Hi"})).await;
    assert_eq!((status, &error["type"]), (504, &json!("TimeoutError")));
    server.engine.gate.add_permits(2);
    let answer = server.ask("/v1/completions", json!({"prompt": "Hi"})).await;
    let choice = &answer["choices"][0];
    assert_eq!((&choice["text"], &choice["finish_reason"]), (&json!("He"), &json!("abort")), "what there is by then");
}

#[tokio::test]
async fn steps_fail() {
    let script = Script { fails_after: Some((2, Abort::Failed("a step failed".into()))), ..Script::default() };
    let server = TestServer::with(script, |_| {}).await;
    let (status, error) = server.refused("/v1/chat/completions", &json!({"messages": user("Hi")})).await;
    assert_eq!(status, 500);
    assert_eq!((&error["type"], &error["message"]), (&json!("InternalServerError"), &json!("a step failed")));
    let mut events = server.stream("/v1/chat/completions", json!({"messages": user("Hi"), "stream": true})).await;
    let error = json!({"error": {"object": "error", "message": "a step failed", "type": "InternalServerError",
        "param": null, "code": 500}});
    assert_eq!(events.pop(), Some(error));
    let text: String = events.iter().filter_map(|event| event["choices"][0]["delta"]["content"].as_str()).collect();
    assert_eq!(text, "He");
    assert!(events.iter().all(|event| event["choices"][0]["finish_reason"].is_null()));
}

#[tokio::test]
async fn requests_are_aborted_by_id() {
    let server = TestServer::with(gated(), |_| {}).await;
    let ask = |rid: &str, n: usize| {
        let request = server.post("/v1/completions", &json!({"prompt": "Hi", "rid": rid, "n": n}));
        tokio::spawn(async move { request.send().await.unwrap().json::<Value>().await.unwrap() })
    };
    let (first, tenth) = (ask("1", 2), ask("10", 1));
    server.engine.wait_for_running(3).await;
    let (status, error) = server.refused("/v1/completions", &json!({"prompt": "Hi", "rid": "10"})).await;
    assert_eq!((status, &error["param"]), (400, &json!("rid")), "two requests of one id");

    let aborted = server.post("/abort_request", &json!({"rid": "1"})).send().await.unwrap();
    assert_eq!(aborted.status(), 200);
    let answer = first.await.unwrap();
    let reasons = answer["choices"].as_array().unwrap().iter().map(|choice| choice["finish_reason"].clone());
    assert_eq!(reasons.collect::<Vec<_>>(), ["abort", "abort"]);
    server.engine.wait_for_running(1).await;

    server.engine.gate.add_permits(100);
    assert_eq!(tenth.await.unwrap()["choices"][0]["finish_reason"], "stop", "an id is not a prefix");
    let unknown = server.post("/abort_request", &json!({"rid": "nobody"})).send().await.unwrap();
    assert_eq!(unknown.status(), 200);
    let (status, _) = server.refused("/abort_request", &json!({})).await;
    assert_eq!(status, 400);
}

#[tokio::test]
async fn all_requests_are_aborted() {
    let server = TestServer::with(gated(), |_| {}).await;
    let request = server.post("/generate", &json!({"text": ["a", "b"]}));
    let answer = tokio::spawn(async move { request.send().await.unwrap().json::<Value>().await.unwrap() });
    server.engine.wait_for_running(2).await;
    server.post("/abort_request", &json!({"abort_all": true})).send().await.unwrap();
    let reason = json!({"type": "abort", "message": "the request was aborted", "status_code": null, "err_type": null});
    for output in answer.await.unwrap().as_array().unwrap() {
        assert_eq!(output["meta_info"]["finish_reason"], reason);
    }
}
