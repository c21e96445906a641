//! `torus ctl`: changes what a running server serves, through its administrators' endpoints.

use std::process::ExitCode;

use anyhow::{Context, bail};
use clap::ValueEnum;
use futures::StreamExt;
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Value, json};

use crate::args::{CtlArgs, CtlCommand, ModelChanges, SwapMode};

pub fn run(args: &CtlArgs) -> anyhow::Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(command(args))?;
    Ok(ExitCode::SUCCESS)
}

async fn command(args: &CtlArgs) -> anyhow::Result<()> {
    let server = Server::new(args)?;
    let answer = match &args.command {
        CtlCommand::Ls => {
            let listed = server.get("/v1/plugins").await?;
            if !args.json {
                print_list(&listed);
                return Ok(());
            }
            listed
        }
        CtlCommand::LoadPlugin { file, sha256 } => {
            server.post("/v1/plugins", &without_nulls(json!({"file": file, "sha256": sha256}))).await?
        }
        CtlCommand::Load { name, changes } => {
            server.change("/v1/models/load", with(json!({"model": name}), changes)).await?
        }
        CtlCommand::Swap { name, with: taker, swap_mode, drain_timeout, changes } => {
            let mode = swap_mode.map(|mode| match mode {
                SwapMode::Overlap => "overlap",
                SwapMode::Drain => "drain",
            });
            let timeout_s = drain_timeout.map(|timeout| timeout.as_secs_f64());
            let body = json!({"model": name, "with": taker, "swap_mode": mode, "drain_timeout_s": timeout_s});
            server.change("/v1/models/swap", with(body, changes)).await?
        }
        CtlCommand::Unload { name } => server.post("/v1/models/unload", &json!({"model": name})).await?,
    };
    println!("{}", if args.json { serde_json::to_string_pretty(&answer)? } else { sentence(&answer) });
    Ok(())
}

/// The body of a request with what is to be changed of a model.
fn with(mut body: Value, changes: &ModelChanges) -> Value {
    let dtype = changes.dtype.and_then(|dtype| Some(dtype.to_possible_value()?.get_name().to_owned()));
    let changes = json!({
        "model_path": changes.model_path,
        "tokenizer_path": changes.tokenizer_path,
        "chat_template": changes.chat_template,
        "dtype": dtype,
        "attention_backend": changes.attention_backend,
        "context_length": changes.context_length,
        "mem": changes.mem,
        "max_total_tokens": changes.max_total_tokens,
        "max_running_requests": changes.max_running_requests,
        "chunked_prefill_size": changes.chunked_prefill_size,
        "page_size": changes.page_size,
    });
    if let (Value::Object(body), Value::Object(changes)) = (&mut body, changes) {
        body.extend(changes);
    }
    without_nulls(body)
}

fn without_nulls(mut body: Value) -> Value {
    if let Value::Object(fields) = &mut body {
        fields.retain(|_, value| !value.is_null());
    }
    body
}

/// What came of a change, for people.
fn sentence(answer: &Value) -> String {
    let status = answer["status"].as_str().unwrap_or("done");
    let mut line = match (answer["plugin"].as_object(), answer["model"].as_object()) {
        (Some(plugin), _) => {
            let text = |key: &str| plugin.get(key).and_then(Value::as_str).unwrap_or_default();
            let kinds: Vec<_> = plugin["kinds"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
            format!("{status}: plugin {} {} ({})", text("name"), text("version"), kinds.join(", "))
        }
        (_, Some(model)) => {
            let text = |key: &str| model.get(key).and_then(Value::as_str).unwrap_or_default();
            let (plugin, attention) = (text("model_plugin"), text("attention_backend"));
            format!("{status}: {} (model plugin {plugin}, attention {attention})", text("model_path"))
        }
        _ => status.to_owned(),
    };
    let requests: u64 =
        answer["retiring"].as_array().into_iter().flatten().filter_map(|m| m["requests"].as_u64()).sum();
    if requests > 0 {
        line.push_str(&format!("; {requests} requests still run on what it replaces"));
    }
    line
}

fn print_list(listed: &Value) {
    let list = |key: &str| listed[key].as_array().cloned().unwrap_or_default();
    let text = |value: &Value, key: &str| value[key].as_str().unwrap_or("-").to_owned();
    for plugin in list("plugins") {
        let kinds: Vec<_> = plugin["kinds"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
        let origin = plugin["path"].as_str().unwrap_or("built in");
        println!("plugin {} {} ({}; {origin})", text(&plugin, "name"), text(&plugin, "version"), kinds.join(", "));
    }
    for (key, models) in [("model", list("models")), ("retiring", list("retiring"))] {
        for model in models {
            let names: Vec<_> = model["names"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
            let name = if names.is_empty() { text(&model, "model_path") } else { names.join(", ") };
            let mib = model["reserved_bytes"].as_u64().map_or("?".to_owned(), |bytes| (bytes >> 20).to_string());
            println!(
                "{key} {name}: {}, {}, model plugin {}, attention {}, {mib} MiB, {} requests",
                text(&model, "status"),
                text(&model, "model_path"),
                text(&model, "model_plugin"),
                text(&model, "attention_backend"),
                model["requests"].as_u64().unwrap_or_default(),
            );
        }
    }
}

struct Server {
    http: reqwest::Client,
    base_url: String,
    key: String,
    shows_progress: bool,
}

impl Server {
    fn new(args: &CtlArgs) -> anyhow::Result<Self> {
        let key = args.admin_api_key.clone();
        let key =
            key.context("--admin-api-key (TORUS_ADMIN_API_KEY): give the key that the server was started with")?;
        let base_url = args.base_url.trim_end_matches('/').to_owned();
        Ok(Self { http: reqwest::Client::builder().no_proxy().build()?, base_url, key, shows_progress: !args.json })
    }

    async fn send(&self, request: reqwest::RequestBuilder, path: &str) -> anyhow::Result<reqwest::Response> {
        let answered = request.bearer_auth(&self.key).send().await;
        let response = answered.with_context(|| format!("{}{path} does not answer; see --base-url", self.base_url))?;
        if response.status().is_success() {
            return Ok(response);
        }
        let status = response.status();
        let body: Value = response.json().await.unwrap_or_default();
        bail!("{} ({status})", body["message"].as_str().unwrap_or("the server refuses"));
    }

    async fn get(&self, path: &str) -> anyhow::Result<Value> {
        Ok(self.send(self.http.get(format!("{}{path}", self.base_url)), path).await?.json().await?)
    }

    async fn post(&self, path: &str, body: &Value) -> anyhow::Result<Value> {
        let request = self.http.post(format!("{}{path}", self.base_url)).json(body);
        Ok(self.send(request, path).await?.json().await?)
    }

    /// A change that takes long: shows how far it is.
    async fn change(&self, path: &str, mut body: Value) -> anyhow::Result<Value> {
        body["stream"] = true.into();
        let request = self.http.post(format!("{}{path}", self.base_url)).json(&body);
        let mut chunks = self.send(request, path).await?.bytes_stream();
        let bar = self.shows_progress.then(progress_bar);
        let (mut pending, mut last) = (String::new(), Value::Null);
        while let Some(chunk) = chunks.next().await {
            // Events are ASCII but for names, and a chunk ends between events.
            pending.push_str(&String::from_utf8_lossy(&chunk?));
            while let Some((event, rest)) = pending.split_once("\n\n") {
                let data = event.strip_prefix("data: ").unwrap_or_default();
                if data != "[DONE]" {
                    last = serde_json::from_str(data).context("the server's answer cannot be read")?;
                    bar.iter().for_each(|bar| show(bar, &last));
                }
                pending = rest.to_owned();
            }
        }
        bar.iter().for_each(ProgressBar::finish_and_clear);
        if let Some(message) = last["error"]["message"].as_str() {
            bail!("{message}");
        }
        if last["status"].is_null() {
            bail!("the server ended the stream before the change was done; 'torus ctl ls' tells what is served");
        }
        Ok(last)
    }
}

fn progress_bar() -> ProgressBar {
    let bar = ProgressBar::new(1);
    // The template is a constant; a default style would do as well.
    if let Ok(style) = ProgressStyle::with_template("{msg:20} {bar:40} {elapsed}") {
        bar.set_style(style);
    }
    bar
}

fn show(bar: &ProgressBar, event: &Value) {
    let stage = event["stage"].as_str().unwrap_or_default().replace('_', " ");
    bar.set_message(match event["requests"].as_u64() {
        Some(requests) => format!("{stage} ({requests} requests)"),
        None => stage,
    });
    if let (Some(done), Some(total)) = (event["done"].as_u64(), event["total"].as_u64()) {
        bar.set_length(total.max(1));
        bar.set_position(done);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_was_given_is_sent() {
        let changes = ModelChanges { attention_backend: Some("paged".into()), ..ModelChanges::default() };
        let body = with(json!({"model": "m", "with": null}), &changes);
        assert_eq!(body, json!({"model": "m", "attention_backend": "paged"}));
    }

    #[test]
    fn what_came_of_it_is_said_in_a_sentence() {
        let answer = json!({
            "status": "swapped",
            "model": {"model_path": "p", "model_plugin": "llama 0.1.0", "attention_backend": "native"},
            "retiring": [{"requests": 3}],
        });
        assert_eq!(
            sentence(&answer),
            "swapped: p (model plugin llama 0.1.0, attention native); 3 requests still run on what it replaces"
        );
        assert_eq!(sentence(&json!({"status": "unloaded", "retiring": []})), "unloaded");
    }
}
