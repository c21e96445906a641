//! `torus serve`.

mod report;
mod signals;
mod warm_up;

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    process::ExitCode,
    sync::Arc,
    time::Duration,
};

use anyhow::{Context, ensure};
use serde_json::{Map, Value, json};
use tokio::sync::oneshot;
use torus_engine::api::{Engine, Readiness};
use torus_http::{ModelRequest, Recipe, ServedModel, ServerConfig};

use crate::{
    args::{ChunkSize, LogLevel, ModelSpec, ServeArgs},
    engine::Machine,
    limits::Limits,
    logging, model,
    operate::Workshop,
};

/// How often the engine is asked how far it is.
const READINESS_POLL: Duration = Duration::from_millis(5);

pub fn run(args: &ServeArgs, limits: &Limits) -> anyhow::Result<ExitCode> {
    logging::init(&args.log, LogLevel::Info)?;
    // Before the engine, whose first measurements would be lost otherwise.
    let metrics = torus_http::install_metrics()?;
    check_address(SocketAddr::new(args.http.host, args.http.port))?;
    let machine = Machine::new(&args.engine, limits)?;
    let workshop = Workshop::new(args.engine.clone(), args.http.preferred_sampling_params.clone(), machine)?;
    let served = open_models(args, &workshop)?;
    let first = served.first().context("--model-path: no model is given")?;
    let (name, has_chat) = (first.names[0].clone(), first.chat_template.is_some());
    let starting = served.iter().map(|model| Starting::new(model, args.http.skip_server_warmup)).collect();
    let mut config = server_config(args, served, metrics);
    config.operator = Some(Arc::new(workshop));
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(http_threads(limits)).enable_all().build()?;
    runtime.block_on(async {
        let signals = signals::Signals::new()?;
        let server = torus_http::bind(config).await?;
        let address = server.local_addr();
        tracing::info!(%address, "listening; requests are answered once the model is ready");
        let hint = curl(address, &name, has_chat, args.http.api_key.is_some());
        let (failed, failure) = oneshot::channel();
        let announcement = tokio::spawn(announce(starting, hint, failed));
        let reports = tokio::spawn(report::run(server.models(), args.decode_log_interval as u64));
        let mut failure_message = None;
        let end = async {
            tokio::select! {
                () = signals.first() => {}
                Ok(message) = failure => failure_message = Some(message),
            }
        };
        // Returns when the engines have ended, each with the step or compilation under way.
        server.serve(end).await;
        for task in [announcement, reports] {
            task.abort();
            // That it was aborted is no news.
            let _ = task.await;
        }
        match failure_message {
            // The engine cannot serve: that is no orderly end.
            Some(message) => Err(anyhow::Error::msg(message)),
            None => {
                tracing::info!("shut down");
                Ok(ExitCode::SUCCESS)
            }
        }
    })
}

/// Finds out that the address is taken before a model is loaded for nothing.
fn check_address(address: SocketAddr) -> anyhow::Result<()> {
    std::net::TcpListener::bind(address).map(drop).with_context(|| {
        format!("cannot listen on {address}; give another --port, or --port 0 for any that is free, or another --host")
    })
}

/// Threads for HTTP and text: on a small machine they must not crowd out the ones that compute.
fn http_threads(limits: &Limits) -> usize {
    limits.cpus().clamp(1, 4)
}

/// Starts all models of the command line. They load while the server already listens.
fn open_models(args: &ServeArgs, workshop: &Workshop) -> anyhow::Result<Vec<ServedModel>> {
    let specs = args.engine.model.specs().map_err(anyhow::Error::msg)?;
    ensure!(
        specs.len() == 1 || args.http.served_model_name.is_empty(),
        "--served-model-name: with several models, give each its name as '--model NAME=PATH'"
    );
    let open = |spec: ModelSpec| {
        let request = ModelRequest {
            model_path: Some(spec.path.clone()),
            tokenizer_path: args.engine.model.tokenizer_path.as_ref().map(|path| path.display().to_string()),
            chat_template: args.engine.model.chat_template.clone(),
            context_length: args.engine.model.context_length,
            mem: spec.mem,
            ..ModelRequest::default()
        };
        let recipe = Arc::new(workshop.open(&request)?);
        let own_name = || vec![model::default_name(&spec.path, &recipe.model().files)];
        let names = match (spec.name, args.http.served_model_name.as_slice()) {
            (Some(name), _) => vec![name],
            (None, []) => own_name(),
            (None, names) => names.to_vec(),
        };
        let mut served = recipe.start(names, 0)?;
        served.origin = Some((request, recipe));
        Ok(served)
    };
    specs.into_iter().map(open).collect()
}

fn server_config(
    args: &ServeArgs,
    models: Vec<ServedModel>,
    metrics: metrics_exporter_prometheus::PrometheusHandle,
) -> ServerConfig {
    let mut config = ServerConfig::new(models, metrics);
    config.host = args.http.host.to_string();
    config.port = args.http.port;
    config.api_key.clone_from(&args.http.api_key);
    config.admin_api_key.clone_from(&args.http.admin_api_key);
    config.server_args = server_args(args);
    config.enable_cache_report = args.http.enable_cache_report;
    config.stream_interval = u32::try_from(args.http.stream_interval).unwrap_or(u32::MAX);
    config.stream_output = args.http.stream_output;
    config.request_timeout = args.http.request_timeout;
    config.allowed_origins.clone_from(&args.http.allowed_origins);
    config.limits.shutdown_grace = args.http.shutdown_grace_seconds;
    config
}

/// What `/get_server_info` tells of the options, under the names of the reference. No secrets.
fn server_args(args: &ServeArgs) -> Map<String, Value> {
    let (model, schedule) = (&args.engine.model, &args.engine.schedule);
    let value = json!({
        "model_path": model.specs().ok().and_then(|specs| Some(specs.first()?.path.clone())),
        "tokenizer_path": model.tokenizer_path,
        "served_model_name": args.http.served_model_name,
        "context_length": model.context_length,
        "dtype": clap::ValueEnum::to_possible_value(&model.dtype).map(|name| name.get_name().to_owned()),
        "revision": model.revision,
        "device": args.engine.device.device.name(),
        "host": args.http.host,
        "port": args.http.port,
        "mem_fraction_static": schedule.mem_fraction_static,
        "max_running_requests": schedule.max_running_requests,
        "max_total_tokens": schedule.max_total_tokens,
        "max_queued_requests": schedule.max_queued_requests,
        "max_prefill_tokens": schedule.max_prefill_tokens,
        "chunked_prefill_size": schedule.chunked_prefill_size.map(ChunkSize::option),
        "page_size": schedule.page_size,
        "attention_backend": args.engine.plugins.attention_backend,
        "schedule_policy": clap::ValueEnum::to_possible_value(&schedule.schedule_policy)
            .map(|name| name.get_name().to_owned()),
        "disable_overlap_schedule": schedule.disable_overlap_schedule,
        "disable_radix_cache": schedule.disable_radix_cache,
        "random_seed": schedule.random_seed,
        "watchdog_timeout": schedule.watchdog_timeout.as_secs_f64(),
        "stream_interval": args.http.stream_interval,
        "enable_cache_report": args.http.enable_cache_report,
        "tp_size": args.engine.parallel.tp_size,
    });
    match value {
        Value::Object(map) => map,
        _ => Map::new(),
    }
}

/// A model that is not ready yet, and what it is tried with then.
struct Starting {
    engine: Arc<dyn Engine>,
    warm_up: Option<Vec<u32>>,
}

impl Starting {
    fn new(model: &ServedModel, skip_warm_up: bool) -> Self {
        Self { engine: model.engine.clone(), warm_up: warm_up::prompt(skip_warm_up, &model.tokenizer) }
    }

    async fn finish(self) -> Result<(), String> {
        wait_until_ready(&*self.engine).await?;
        crate::release_freed_memory();
        let Some(prompt) = self.warm_up else { return Ok(()) };
        warm_up::run(&*self.engine, prompt).await.map_err(|error| format!("the warm-up failed: {error}"))
    }
}

/// Waits until all models serve, tries each, and says so; or reports why one does not.
async fn announce(models: Vec<Starting>, hint: String, failed: oneshot::Sender<String>) {
    for model in models {
        if let Err(message) = model.finish().await {
            // The server has ended meanwhile, if nobody listens.
            return drop(failed.send(message));
        }
    }
    tracing::info!("ready");
    println!("Ready. Try it:\n{hint}");
}

/// Waits until an engine is ready. The error is why it will not be.
pub async fn wait_until_ready(engine: &dyn Engine) -> Result<(), String> {
    loop {
        match engine.readiness() {
            Readiness::Ready => return Ok(()),
            Readiness::Failed { message } => return Err(message),
            Readiness::ShuttingDown => return Err("the engine is shutting down".to_owned()),
            _ => tokio::time::sleep(READINESS_POLL).await,
        }
    }
}

/// A command to paste into a shell.
fn curl(address: SocketAddr, model: &str, has_chat: bool, has_key: bool) -> String {
    let ip = match address.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(ip) if ip.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
        ip => ip,
    };
    let url = SocketAddr::new(ip, address.port());
    let (path, body) = if has_chat {
        let messages = json!([{"role": "user", "content": "Why is the sky blue?"}]);
        ("chat/completions", json!({"model": model, "messages": messages}))
    } else {
        ("completions", json!({"model": model, "prompt": "The capital of France is", "max_tokens": 16}))
    };
    let key = if has_key { " -H \"Authorization: Bearer $TORUS_API_KEY\"" } else { "" };
    // A name may hold an apostrophe, which would end the quoted text.
    let body = body.to_string().replace('\'', "'\\''");
    format!("curl http://{url}/v1/{path} -H 'Content-Type: application/json'{key} -d '{body}'")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hint_can_be_pasted() {
        let address = "0.0.0.0:30000".parse().unwrap();
        assert_eq!(
            curl(address, "it's", true, false),
            "curl http://127.0.0.1:30000/v1/chat/completions -H 'Content-Type: application/json' -d \
             '{\"model\":\"it'\\''s\",\"messages\":[{\"role\":\"user\",\"content\":\"Why is the sky blue?\"}]}'"
        );
        let keyed = curl("[::]:1".parse().unwrap(), "m", false, true);
        assert!(keyed.starts_with("curl http://[::1]:1/v1/completions "), "{keyed}");
        assert!(keyed.contains("\"Authorization: Bearer $TORUS_API_KEY\""), "{keyed}");
    }
}
