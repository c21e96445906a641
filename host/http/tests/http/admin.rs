//! Probes, facts, administration, metrics.

use expect_test::expect;
use serde_json::{Value, json};
use torus_engine::api::{EngineStats, Readiness};

use crate::{
    engine::{MockEngine, Script},
    support::{MODEL, TestServer, served},
};

#[tokio::test]
async fn probes() {
    let server = TestServer::start().await;
    let of = async |path: &str| {
        let response = server.get(path).send().await.unwrap();
        (response.status().as_u16(), response.text().await.unwrap())
    };
    let stages = [
        (Readiness::Loading { done: 1, total: 4 }, "starting", "loading 1 of 4"),
        (Readiness::Compiling { done: 3, total: 12 }, "starting", "compiling 3 of 12"),
        (Readiness::WarmingUp, "starting", "warming up"),
        (Readiness::Failed { message: "/secret/path".into() }, "failed", "failed, see the server's log"),
        (Readiness::ShuttingDown, "stopping", "shutting down"),
    ];
    for (stage, status, words) in stages {
        server.engine.set_readiness(stage);
        for path in ["/health", "/readyz"] {
            let (code, body) = of(path).await;
            assert_eq!(code, 503);
            assert_eq!(serde_json::from_str::<Value>(&body).unwrap(), json!({"status": status, "stage": words}));
        }
        assert_eq!(of("/health_generate").await.0, 503);
        assert_eq!(of("/livez").await.0, 200);
        assert_eq!(of("/ping").await.0, 200);
    }
    server.engine.set_readiness(Readiness::Ready);
    for path in ["/health", "/readyz", "/health_generate", "/health_generate?multimodal=False"] {
        assert_eq!(of(path).await, (200, String::new()), "{path}");
    }
    let probe = &server.engine.submitted()[0];
    assert!(probe.id.starts_with("HEALTH_CHECK_"));
    assert_eq!((probe.prompt.to_vec(), probe.sampling.max_new_tokens), (vec![0], Some(1)));
}

#[tokio::test]
async fn a_busy_engine_is_healthy() {
    let server = TestServer::with(Script { is_gated: true, ..Script::default() }, |_| {}).await;
    let request = server.get("/health_generate");
    let probe = tokio::spawn(async move { request.send().await.unwrap().status() });
    server.engine.wait_for_running(1).await;
    server.engine.set_stats(EngineStats { steps: 1, ..EngineStats::default() });
    assert_eq!(probe.await.unwrap(), 200, "it did steps while the probe waited");
    server.engine.wait_for_running(0).await;
}

#[tokio::test]
async fn models() {
    let second = MockEngine::new(Script { says: vec![98], ..Script::default() });
    let server =
        TestServer::with(Script::default(), |config| config.models.push(served(&second, &["second", "alias"]))).await;
    let list: Value = server.get("/v1/models").send().await.unwrap().json().await.unwrap();
    expect![[r#"{"object":"list","data":[{"id":"org/mock","object":"model","created":1700000000,"owned_by":"torus","root":"org/mock","max_model_len":200},{"id":"second","object":"model","created":1700000000,"owned_by":"torus","root":"second","max_model_len":200}]}"#]].assert_eq(&list.to_string());
    for name in [MODEL, "second", "alias"] {
        let model: Value = server.get(&format!("/v1/models/{name}")).send().await.unwrap().json().await.unwrap();
        assert_eq!((&model["id"], &model["root"]), (&json!(name), &json!(name)));
    }
    let unknown = server.get("/v1/models/x/y").send().await.unwrap();
    assert_eq!(unknown.status(), 404);
    let unknown: Value = unknown.json().await.unwrap();
    assert_eq!(unknown["error"]["code"], "model_not_found");
    assert_eq!(unknown["error"]["message"], "The model 'x/y' does not exist");

    let answer = server.ask("/v1/completions", json!({"model": "alias", "prompt": "a"})).await;
    assert_eq!((&answer["model"], &answer["choices"][0]["text"]), (&json!("alias"), &json!("b")));
    assert_eq!(server.ask("/generate", json!({"model": "second", "text": "a"})).await["text"], "b");
}

#[tokio::test]
async fn facts() {
    let server = TestServer::with(Script::default(), |config| {
        config.server_args.insert("model_path".into(), json!("/models/mock"));
    })
    .await;
    let info: Value = server.get("/get_model_info").send().await.unwrap().json().await.unwrap();
    let expected = json!({"model_path": "/models/mock", "tokenizer_path": "/models/mock", "is_generation": true,
        "preferred_sampling_params": null});
    assert_eq!(info, expected);

    server.engine.set_stats(EngineStats {
        running: 2,
        queued: 3,
        pages_total: 100,
        pages_free: 90,
        pages_cached: 5,
        generation_throughput: 12.5,
        ..EngineStats::default()
    });
    let info: Value = server.get("/get_server_info").send().await.unwrap().json().await.unwrap();
    assert_eq!((&info["model_path"], &info["status"]), (&json!("/models/mock"), &json!("ready")));
    assert_eq!((&info["max_total_num_tokens"], &info["max_req_input_len"]), (&json!(1600), &json!(199)));
    assert!(info["version"].is_string());
    let state = &info["internal_states"][0];
    assert_eq!(state["last_gen_throughput"], 12.5);
    assert_eq!((&state["waiting_queue_size"], &state["running_batch_size"]), (&json!(3), &json!(2)));
    assert_eq!(state["memory_usage"]["token_capacity"], 1600);
    assert_eq!((&state["available_kv_tokens"], &state["tree_cache_size"]), (&json!(1440), &json!(80)));
}

#[tokio::test]
async fn the_cache_is_flushed_only_when_idle() {
    let server = TestServer::with(Script { is_gated: true, ..Script::default() }, |_| {}).await;
    let flush = async || {
        let response = server.client.post(server.url("/flush_cache")).send().await.unwrap();
        (response.status().as_u16(), response.text().await.unwrap())
    };
    let text = "Cache flushed.\nPlease check backend logs for more details. (When there are running or waiting requests, \
                the operation will not be performed.)\n";
    assert_eq!(flush().await, (200, format!("{text}Flushed items: 7\n")));
    let stream = server.post("/generate", &json!({"text": "a", "stream": true})).send().await.unwrap();
    server.engine.wait_for_running(1).await;
    let reason = "Reason: Cache not flushed because there are pending requests. waiting=0, running=1\n";
    assert_eq!(flush().await, (400, format!("{text}{reason}")));
    drop(stream);
    server.engine.wait_for_running(0).await;
    assert_eq!(server.get("/flush_cache").send().await.unwrap().status(), 200);
}

#[tokio::test]
async fn profiles() {
    let server = TestServer::start().await;
    let post = async |path: &str, body: Value| {
        let response = server.post(path, &body).send().await.unwrap();
        (response.status().as_u16(), response.text().await.unwrap())
    };
    for folder in ["/etc", "../x", "a/../../b"] {
        let (status, text) = post("/start_profile", json!({"output_dir": folder})).await;
        assert!(status == 400 && text.contains("output_dir"), "{folder}: {text}");
    }
    let (status, text) = post("/start_profile", json!({"output_dir": "run-1", "num_steps": 5})).await;
    assert!(status == 400 && text.contains("num_steps is not supported"));
    let of_benchmark = json!({"activities": [], "num_steps": null, "profile_by_stage": null, "profile_stages": null,
        "output_dir": "run-1"});
    assert_eq!(post("/start_profile", of_benchmark.clone()).await, (200, "Start profiling.\n".into()));
    assert_eq!(post("/start_profile", of_benchmark).await.0, 400);
    let stop = server.get("/stop_profile").send().await.unwrap().text().await.unwrap();
    assert_eq!(stop, "Stop profiling. This will take some time.\nTrace: trace.json\n");
    assert_eq!(server.get("/stop_profile").send().await.unwrap().status(), 400);
}

#[tokio::test]
async fn metrics() {
    let server =
        TestServer::with(Script::default(), |config| config.models[0].names = vec!["metrics-model".into()]).await;
    server.ask("/generate", json!({"text": "a"})).await;
    server.engine.set_stats(EngineStats {
        running: 2,
        queued: 3,
        pages_total: 100,
        pages_used: 25,
        prompt_tokens: 1000,
        cached_prompt_tokens: 250,
        generated_tokens: 77,
        retractions: 4,
        failed_steps: 1,
        padding_ratio: 0.125,
        generation_throughput: 12.5,
        ..EngineStats::default()
    });
    let response = server.get("/metrics").send().await.unwrap();
    assert_eq!(response.headers()["content-type"], "text/plain; version=0.0.4; charset=utf-8");
    let text = response.text().await.unwrap();
    let model = "model_name=\"metrics-model\"";
    let lines = [
        format!("sglang:num_running_reqs{{{model}}} 2"),
        format!("sglang:num_queue_reqs{{{model}}} 3"),
        format!("sglang:token_usage{{{model}}} 0.25"),
        format!("sglang:cache_hit_rate{{{model}}} 0.25"),
        format!("sglang:gen_throughput{{{model}}} 12.5"),
        format!("sglang:prompt_tokens_total{{{model}}} 1000"),
        format!("sglang:generation_tokens_total{{{model}}} 77"),
        format!("sglang:num_requests_total{{{model}}} 1"),
        format!("torus:padding_ratio{{{model}}} 0.125"),
        format!("torus:retractions_total{{{model}}} 4"),
        format!("torus:failed_steps_total{{{model}}} 1"),
        format!("torus:compiles{{{model},phase=\"serving\"}} 0"),
        format!("sglang:time_to_first_token_seconds_count{{{model}}} 1"),
        format!("sglang:e2e_request_latency_seconds_count{{{model}}} 1"),
        "torus:http_responses_total{route=\"/generate\",status=\"200\"}".to_owned(),
        "# TYPE sglang:inter_token_latency_seconds histogram".to_owned(),
    ];
    for line in lines {
        assert!(text.contains(&line), "{line} is not in\n{text}");
    }
    assert!(text.contains(&format!("sglang:time_to_first_token_seconds_bucket{{{model},le=\"+Inf\"}} 1")), "{text}");
}
