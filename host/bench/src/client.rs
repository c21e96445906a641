//! A client of one server.

use std::collections::VecDeque;

use anyhow::{Context, bail};
use reqwest::{RequestBuilder, Response};
use serde_json::Value;

use crate::sse::SseParser;

#[derive(Clone, Debug)]
pub struct Client {
    http: reqwest::Client,
    base_url: String,
    api_key: Option<String>,
}

/// Which server to talk to.
#[derive(Clone, Debug, clap::Args)]
#[command(next_help_heading = "Server")]
pub struct ServerArgs {
    /// Address of the server; instead of --host and --port
    #[arg(long, value_name = "URL")]
    pub base_url: Option<String>,
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1")]
    pub host: String,
    #[arg(long, value_name = "N", default_value_t = 30000)]
    pub port: u16,
    /// Key that the server asks for
    #[arg(long, value_name = "KEY", env = "OPENAI_API_KEY", hide_env_values = true)]
    pub api_key: Option<String>,
}

impl ServerArgs {
    pub fn url(&self) -> String {
        let host = if self.host == "0.0.0.0" { "127.0.0.1" } else { &self.host };
        self.base_url.clone().unwrap_or_else(|| format!("http://{host}:{}", self.port))
    }
}

impl Client {
    pub fn new(base_url: &str, api_key: Option<String>) -> anyhow::Result<Self> {
        if !base_url.starts_with("http://") {
            bail!("--base-url {base_url}: must start with 'http://'; put a proxy in between for TLS");
        }
        // Some servers close a connection after an answer without saying so, and a request that is sent on it is lost: each
        // request has a connection of its own.
        let http = reqwest::Client::builder().no_proxy().pool_max_idle_per_host(0).build()?;
        Ok(Self { http, base_url: base_url.trim_end_matches('/').to_owned(), api_key })
    }

    async fn send(&self, request: RequestBuilder, path: &str) -> anyhow::Result<Response> {
        let request = match &self.api_key {
            Some(key) => request.bearer_auth(key),
            None => request,
        };
        let response = request.send().await.with_context(|| format!("{}{path} does not answer", self.base_url))?;
        let status = response.status();
        if !status.is_success() {
            const LONGEST: usize = 500;
            let body: String = response.text().await.unwrap_or_default().chars().take(LONGEST).collect();
            bail!("{path} answers {status}: {}", body.trim());
        }
        Ok(response)
    }

    pub async fn get(&self, path: &str) -> anyhow::Result<Response> {
        self.send(self.http.get(format!("{}{path}", self.base_url)), path).await
    }

    pub async fn get_json(&self, path: &str) -> anyhow::Result<Value> {
        Ok(self.get(path).await?.json().await?)
    }

    pub async fn post(&self, path: &str, body: &Value) -> anyhow::Result<Response> {
        self.send(self.http.post(format!("{}{path}", self.base_url)).json(body), path).await
    }

    /// Posts a request whose answer is a stream of events.
    pub async fn stream(&self, path: &str, body: &Value) -> anyhow::Result<Events> {
        let response = self.post(path, body).await?;
        Ok(Events { response, parser: SseParser::default(), ready: VecDeque::new() })
    }
}

/// The events of an answer, parsed as they arrive.
pub struct Events {
    response: Response,
    parser: SseParser,
    ready: VecDeque<String>,
}

impl Events {
    /// The next event; `None` once the server says `[DONE]`.
    pub async fn next(&mut self) -> anyhow::Result<Option<Value>> {
        loop {
            if let Some(event) = self.ready.pop_front() {
                if event == "[DONE]" {
                    return Ok(None);
                }
                return Ok(Some(serde_json::from_str(&event).context("an event is no JSON")?));
            }
            match self.response.chunk().await? {
                Some(bytes) => self.ready.extend(self.parser.push(&bytes)),
                None => bail!("the stream ended without [DONE]"),
            }
        }
    }
}

/// The value of a key, wherever it stands in a JSON object.
pub fn find_field<'a>(value: &'a Value, key: &str) -> Option<&'a Value> {
    match value {
        Value::Object(map) => map.get(key).or_else(|| map.values().find_map(|inner| find_field(inner, key))),
        Value::Array(list) => list.iter().find_map(|inner| find_field(inner, key)),
        _ => None,
    }
}
