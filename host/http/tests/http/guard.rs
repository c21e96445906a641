//! Keys, ids, origins, limits of connections and headers, shutdown.

use std::time::Duration;

use reqwest::Client;
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};
use torus_http::{ServeError, ServerConfig, bind, install_metrics};

use crate::{
    engine::{MockEngine, Script},
    support::{TestServer, chunk, served},
};

#[tokio::test]
async fn keys() {
    let server = TestServer::with(Script::default(), |config| config.api_key = Some("secret".into())).await;
    let body = json!({"prompt": "Hi"});
    for (header, status) in [
        (None, 401),
        (Some("Bearer wrong!"), 401),
        (Some("Bearer secre"), 401),
        (Some("Bearer secrets"), 401),
        (Some("Basic secret"), 401),
        (Some("Bearer secret"), 200),
        (Some("bearer secret"), 200),
    ] {
        let mut request = server.post("/v1/completions", &body);
        if let Some(header) = header {
            request = request.header("authorization", header);
        }
        let response = request.send().await.unwrap();
        assert_eq!(response.status(), status, "{header:?}");
        if status == 401 {
            assert_eq!(response.headers()["www-authenticate"], "Bearer");
            let error: Value = response.json().await.unwrap();
            assert_eq!(
                (&error["type"], &error["error"]["code"]),
                (&json!("AuthenticationError"), &json!("invalid_api_key"))
            );
            assert!(!error.to_string().contains("secret"));
        }
    }
    for path in ["/health", "/readyz", "/livez", "/health_generate", "/metrics", "/ping"] {
        assert_eq!(server.get(path).send().await.unwrap().status(), 200, "{path}");
    }
    for path in ["/v1/models", "/get_server_info", "/flush_cache", "/healthz", "/nothing"] {
        assert_eq!(server.get(path).send().await.unwrap().status(), 401, "{path}");
    }
}

#[tokio::test]
async fn request_ids_are_echoed_or_made() {
    let server = TestServer::start().await;
    let id = async |wanted: Option<&str>| {
        let request = server.get("/v1/models");
        let request = if let Some(wanted) = wanted { request.header("x-request-id", wanted) } else { request };
        request.send().await.unwrap().headers()["x-request-id"].to_str().unwrap().to_owned()
    };
    assert_eq!(id(Some("my-id.1")).await, "my-id.1");
    assert_eq!(id(Some("with space")).await.len(), 32);
    assert_ne!(id(None).await, id(None).await);
    assert!(server.get("/nothing").send().await.unwrap().headers().contains_key("x-request-id"));
}

#[tokio::test]
async fn origins() {
    let preflight = async |server: &TestServer| {
        let request = server.client.request(reqwest::Method::OPTIONS, server.url("/v1/completions"));
        let request = request.header("origin", "http://a.example").header("access-control-request-method", "POST");
        let response = request.send().await.unwrap();
        response.headers().get("access-control-allow-origin").map(|value| value.to_str().unwrap().to_owned())
    };
    let closed = TestServer::start().await;
    assert_eq!(preflight(&closed).await, None);
    let open = TestServer::with(Script::default(), |config| {
        config.allowed_origins = vec!["*".into()];
        config.api_key = Some("k".into());
    })
    .await;
    assert_eq!(preflight(&open).await.as_deref(), Some("*"));
    let error =
        open.post("/generate", &json!({"text": "a"})).header("origin", "http://a.example").send().await.unwrap();
    assert_eq!(error.status(), 401);
    assert!(error.headers().contains_key("access-control-allow-origin"), "scripts can read errors too");
}

/// What the server answers to raw bytes, until it closes the connection.
async fn raw(server: &TestServer, bytes: &[u8]) -> String {
    let mut stream = TcpStream::connect(server.address).await.unwrap();
    // The server may close before everything is written.
    let _ = stream.write_all(bytes).await;
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer).await;
    String::from_utf8_lossy(&answer).into_owned()
}

#[tokio::test]
async fn heads_are_limited() {
    let server = TestServer::start().await;
    let long = format!("GET /health HTTP/1.1\r\nhost: x\r\nx-long: {}", "a".repeat(1 << 20));
    assert!(raw(&server, long.as_bytes()).await.starts_with("HTTP/1.1 431"));
    let many: String = (0..200).map(|index| format!("x-{index}: a\r\n")).collect();
    let many = format!("GET /health HTTP/1.1\r\nhost: x\r\n{many}\r\n");
    assert!(raw(&server, many.as_bytes()).await.starts_with("HTTP/1.1 431"));
    let uri = format!("GET /{} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n", "a".repeat(30_000));
    let answer = raw(&server, uri.as_bytes()).await;
    assert!(answer.starts_with("HTTP/1.1 404") && answer.len() < 2_000, "the path is not repeated at length");
    assert!(raw(&server, b"\x16\x03\x01\x02\x00").await.starts_with("HTTP/1.1 400"));
}

#[tokio::test]
async fn concurrent_requests_are_limited_until_their_last_byte() {
    let script = Script { is_gated: true, ..Script::default() };
    let server = TestServer::with(script, |config| config.limits.concurrent_requests = 1).await;
    let mut first = server.post("/generate", &json!({"text": "a", "stream": true})).send().await.unwrap();
    let second = server.post("/generate", &json!({"text": "a"})).send().await.unwrap();
    assert_eq!(second.status(), 429);
    assert_eq!(server.get("/health").send().await.unwrap().status(), 200, "probes need no place");
    server.engine.gate.add_permits(100);
    while chunk(&mut first).await.is_some() {}
    drop(first);
    // The place is given back when the body is dropped, which the client cannot see.
    while server.post("/generate", &json!({"text": "a"})).send().await.unwrap().status() == 429 {
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn http2_without_negotiation() {
    let server = TestServer::saying("Hey").await;
    let client = Client::builder().http2_prior_knowledge().build().unwrap();
    let response = client.post(server.url("/generate")).json(&json!({"text": "a"})).send().await.unwrap();
    assert_eq!(response.version(), reqwest::Version::HTTP_2);
    assert_eq!(response.json::<Value>().await.unwrap()["text"], "Hey");
}

#[tokio::test]
async fn shutdown_lets_requests_finish() {
    let mut server = TestServer::with(Script { is_gated: true, ..Script::default() }, |_| {}).await;
    let mut stream = server.post("/generate", &json!({"text": "a", "stream": true})).send().await.unwrap();
    server.engine.wait_for_running(1).await;
    server.begin_shutdown();
    while TcpStream::connect(server.address).await.is_ok() {
        tokio::task::yield_now().await;
    }
    server.engine.gate.add_permits(100);
    let mut text = String::new();
    while let Some(chunk) = chunk(&mut stream).await {
        text.push_str(&chunk);
    }
    assert!(text.contains("wörld!") && text.ends_with("data: [DONE]\n\n"));
    server.wait_for_end().await;
}

#[tokio::test]
async fn shutdown_does_not_wait_for_ever() {
    let script = Script { is_gated: true, ..Script::default() };
    let grace = |config: &mut ServerConfig| config.limits.shutdown_grace = Duration::from_millis(50);
    let mut server = TestServer::with(script, grace).await;
    let stream = server.post("/generate", &json!({"text": "a", "stream": true})).send().await.unwrap();
    server.engine.wait_for_running(1).await;
    server.begin_shutdown();
    let text = stream.text().await.unwrap();
    assert!(text.contains("\"type\":\"abort\"") && text.ends_with("data: [DONE]\n\n"), "{text}");
    server.wait_for_end().await;
}

#[tokio::test]
async fn configurations_that_cannot_work() {
    let engine = MockEngine::new(Script::default());
    let config = |names: &[&[&str]]| {
        let models = names.iter().map(|names| served(&engine, names)).collect();
        let mut config = ServerConfig::new(models, install_metrics().unwrap());
        config.port = 0;
        config
    };
    let error = async |config: ServerConfig| bind(config).await.err().unwrap();
    assert!(matches!(error(config(&[])).await, ServeError::NoModel));
    assert!(matches!(error(config(&[&[]])).await, ServeError::NoModelName));
    assert!(matches!(error(config(&[&["a"], &["b", "a"]])).await, ServeError::DuplicateModelName(name) if name == "a"));
    let mut empty_key = config(&[&["a"]]);
    empty_key.api_key = Some(String::new());
    assert!(matches!(error(empty_key).await, ServeError::EmptyApiKey));
    let mut no_host = config(&[&["a"]]);
    no_host.host = "256.0.0.1".into();
    assert!(matches!(error(no_host).await, ServeError::Bind { .. }));
}
