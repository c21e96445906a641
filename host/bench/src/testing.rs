//! A server for tests that answers one request with what it was told to.

use serde_json::Value;
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
