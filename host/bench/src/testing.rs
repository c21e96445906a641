//! Servers for tests: one that answers a single request with what it was told to, one that answers them all.

use std::sync::{Arc, Mutex};

use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    task::JoinHandle,
};

/// What the server answers.
pub struct Answer {
    status: u16,
    content_type: &'static str,
    body: String,
}

/// What it was asked.
pub struct Request {
    pub head: String,
    pub body: Value,
}

impl Answer {
    pub fn json(body: &Value) -> Self {
        Self { status: 200, content_type: "application/json", body: body.to_string() }
    }

    pub fn status(status: u16, body: &str) -> Self {
        Self { status, content_type: "text/plain", body: body.to_owned() }
    }

    /// Events, ended as they should be.
    pub fn events(events: &[Value]) -> Self {
        let mut body: String = events.iter().map(|event| format!("data: {event}\n\n")).collect();
        body.push_str("data: [DONE]\n\n");
        Self::raw_events(&body)
    }

    pub fn raw_events(body: &str) -> Self {
        Self { status: 200, content_type: "text/event-stream", body: body.to_owned() }
    }

    /// Serves on a free port: the URL, and the request once it was answered.
    pub async fn serve(self) -> (String, JoinHandle<Request>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let served = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let request = read_request(&mut stream).await;
            let head = format!(
                "HTTP/1.1 {} X\r\ncontent-type: {}\r\ncontent-length: {}\r\nconnection: close\r\n\r\n",
                self.status,
                self.content_type,
                self.body.len()
            );
            stream.write_all(head.as_bytes()).await.unwrap();
            // In small portions, so that events arrive cut.
            for portion in self.body.as_bytes().chunks(7) {
                stream.write_all(portion).await.unwrap();
            }
            stream.shutdown().await.unwrap();
            request
        });
        (url, served)
    }
}

async fn read_request(stream: &mut TcpStream) -> Request {
    let mut bytes = Vec::new();
    let mut portion = [0; 4096];
    loop {
        let count = stream.read(&mut portion).await.unwrap();
        assert!(count > 0, "the request is cut off");
        bytes.extend_from_slice(&portion[..count]);
        let text = String::from_utf8_lossy(&bytes);
        let Some((head, body)) = text.split_once("\r\n\r\n") else { continue };
        let length =
            head.lines().find_map(|line| line.to_ascii_lowercase().strip_prefix("content-length: ")?.parse().ok());
        if body.len() >= length.unwrap_or(0) {
            return Request { head: head.to_owned(), body: serde_json::from_str(body).unwrap_or_default() };
        }
    }
}

/// A server with OpenAI's completions that answers every request with as many tokens as it asks for.
pub struct FakeServer {
    pub url: String,
    requests: Arc<Mutex<Vec<Request>>>,
}

impl FakeServer {
    /// Serves on a free port until the test ends.
    pub async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let requests = Arc::new(Mutex::new(Vec::new()));
        let log = requests.clone();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(answer(stream, log.clone()));
            }
        });
        Self { url, requests }
    }

    /// The prompts it was sent, in the order in which they came.
    pub fn prompts(&self) -> Vec<String> {
        let requests = self.requests.lock().unwrap();
        requests
            .iter()
            .map(|request| &request.body["prompt"])
            .filter(|prompt| !prompt.is_null())
            .map(Value::to_string)
            .collect()
    }
}

async fn answer(mut stream: TcpStream, log: Arc<Mutex<Vec<Request>>>) {
    let request = read_request(&mut stream).await;
    let path = request.head.split(' ').nth(1).unwrap_or_default().to_owned();
    let prompt_tokens = request.body["prompt"].as_array().map_or(0, Vec::len);
    let tokens = request.body["max_tokens"].as_u64().unwrap_or(0);
    log.lock().unwrap().push(request);
    let head =
        |status: &str, kind: &str| format!("HTTP/1.1 {status}\r\ncontent-type: {kind}\r\nconnection: close\r\n\r\n");
    // The client may have hung up, which ends the answer early.
    let _ = match path.as_str() {
        "/v1/models" => {
            let models = json!({"data": [{"id": "fake"}]});
            stream.write_all(format!("{}{models}", head("200 OK", "application/json")).as_bytes()).await
        }
        "/v1/completions" => {
            stream_tokens(&mut stream, &head("200 OK", "text/event-stream"), tokens, prompt_tokens).await
        }
        _ => stream.write_all(head("404 Not Found", "text/plain").as_bytes()).await,
    };
}

async fn stream_tokens(stream: &mut TcpStream, head: &str, tokens: u64, prompt_tokens: usize) -> std::io::Result<()> {
    stream.write_all(head.as_bytes()).await?;
    for _ in 0..tokens {
        let piece = json!({"choices": [{"index": 0, "text": " a"}]});
        stream.write_all(format!("data: {piece}\n\n").as_bytes()).await?;
        tokio::task::yield_now().await;
    }
    let usage = json!({"choices": [], "usage": {"prompt_tokens": prompt_tokens, "completion_tokens": tokens}});
    stream.write_all(format!("data: {usage}\n\ndata: [DONE]\n\n").as_bytes()).await
}
