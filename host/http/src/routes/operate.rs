//! What administrators do: load plugins, load, swap and unload models. Behind a key of its own; off without one.

use std::{convert::Infallible, sync::Arc, time::Duration};

use axum::{
    Json, Router,
    body::Body,
    extract::{Request, State},
    http::{HeaderValue, StatusCode, header},
    middleware,
    response::{IntoResponse, Response},
    routing::{get, post},
};
use bytes::Bytes;
use futures::{StreamExt, stream};
use serde::{Serialize, de::DeserializeOwned};
use serde_json::{Map, Value, json};
use tokio::sync::{
    OwnedMutexGuard,
    mpsc::{self, UnboundedReceiver},
};
use tokio_stream::wrappers::UnboundedReceiverStream;
use tracing::Instrument;

use super::blocking;
use crate::{
    app::{App, describe},
    body,
    error::ApiError,
    exchange::{Exchange, Progress, Stage, SwapMode},
    guard,
    models::{Entry, Model, Serving},
    operate::{LoadPlugin, ModelRequest, Operator},
    sse::write_event,
};

/// How long a swap in mode `drain` waits for requests unless told otherwise.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(600);

/// The routes, behind the administrator's key.
pub(super) fn router(app: &Arc<App>) -> Router<Arc<App>> {
    Router::new()
        .route("/v1/plugins", get(list).post(load_plugin))
        .route("/v1/models/load", post(load))
        .route("/v1/models/swap", post(swap))
        .route("/v1/models/unload", post(unload))
        .route_layer(middleware::from_fn_with_state(Arc::clone(app), guard::administrators))
}

fn operator(app: &App) -> Result<Arc<dyn Operator>, ApiError> {
    app.operator.clone().ok_or_else(|| ApiError::new(StatusCode::NOT_FOUND, "this server cannot change its models"))
}

/// All plugins and all models, those that still serve their last requests included.
async fn list(State(app): State<Arc<App>>) -> Result<Json<Value>, ApiError> {
    let operator = operator(&app)?;
    let plugins = blocking(move || operator.plugins()).await?;
    let models: Vec<_> = app.models.entries().iter().map(describe_entry).collect();
    Ok(Json(json!({"object": "list", "plugins": plugins, "models": models, "retiring": retiring(&app)})))
}

fn describe_entry(entry: &Entry) -> Value {
    let mut value = match &entry.serving {
        Serving::Model(model) => describe_model(model),
        Serving::Paused => json!({"status": "draining"}),
        Serving::Lost(reason) => json!({"status": "lost", "reason": reason}),
    };
    value["names"] = json!(entry.names);
    value
}

fn describe_model(model: &Model) -> Value {
    let info = model.engine.info();
    let info = info.as_ref();
    json!({
        "generation": model.generation,
        "status": describe(&model.engine.readiness()),
        "model_path": model.model_path,
        "architecture": info.map(|info| &info.architecture),
        "model_plugin": info.map(|info| &info.model_plugin),
        "attention_backend": info.map(|info| &info.attention_backend),
        "reserved_bytes": info.map(|info| info.reserved_bytes),
        "requests": *model.in_flight().borrow(),
    })
}

async fn load_plugin(State(app): State<Arc<App>>, request: Request) -> Result<Response, ApiError> {
    let operator = operator(&app)?;
    let (body, _permit) = body::read_json::<LoadPlugin>(&app, request).await?;
    let turn = turn(&app)?;
    let load = move || {
        // Held by the work, which goes on when the client leaves.
        let _turn = turn;
        operator.load_plugin(&body)
    };
    let loaded = blocking(load).await??;
    Ok(Json(json!({"status": "loaded", "plugin": loaded})).into_response())
}

async fn load(State(app): State<Arc<App>>, request: Request) -> Result<Response, ApiError> {
    let (body, _permit) = body::read_json::<Map<String, Value>>(&app, request).await?;
    let mut body = Fields(body);
    let (name, is_stream) = (body.required::<String>("model")?, body.optional("stream")?.unwrap_or(false));
    let request: ModelRequest = body.rest()?;
    let (exchange, stages) = begin(&app)?;
    let work = async move {
        let loaded = exchange.load(name, request).await?;
        Ok(json!({"status": "loaded", "model": describe_model(&loaded)}))
    };
    respond(is_stream, stages, work).await
}

async fn swap(State(app): State<Arc<App>>, request: Request) -> Result<Response, ApiError> {
    let (body, _permit) = body::read_json::<Map<String, Value>>(&app, request).await?;
    let mut body = Fields(body);
    let (name, is_stream) = (body.required::<String>("model")?, body.optional("stream")?.unwrap_or(false));
    let taker: Option<String> = body.optional("with")?;
    let mode: Option<SwapMode> = body.optional("swap_mode")?;
    let drain_timeout = match body.optional::<f64>("drain_timeout_s")?.map(Duration::try_from_secs_f64) {
        None => DRAIN_TIMEOUT,
        Some(Ok(timeout)) => timeout,
        Some(Err(_)) => return Err(ApiError::bad_request("drain_timeout_s", "must be a number of seconds")),
    };
    let request: ModelRequest = body.rest()?;
    if taker.is_some() && (request != ModelRequest::default() || mode.is_some()) {
        let message = "with names a model that is loaded already; leave out swap_mode and how to load another";
        return Err(ApiError::bad_request("with", message));
    }
    let (exchange, stages) = begin(&app)?;
    let work = async move {
        let new = match taker {
            Some(taker) => exchange.take_over(&name, &taker)?,
            None => exchange.swap(&name, request, mode.unwrap_or_default(), drain_timeout).await?,
        };
        Ok(json!({"status": "swapped", "model": describe_model(&new), "retiring": retiring(exchange.app())}))
    };
    respond(is_stream, stages, work).await
}

async fn unload(State(app): State<Arc<App>>, request: Request) -> Result<Response, ApiError> {
    let (body, _permit) = body::read_json::<Map<String, Value>>(&app, request).await?;
    let mut body = Fields(body);
    let name = body.required::<String>("model")?;
    body.end()?;
    let (exchange, stages) = begin(&app)?;
    let work = async move {
        exchange.unload(&name)?;
        Ok(json!({"status": "unloaded", "retiring": retiring(exchange.app())}))
    };
    respond(false, stages, work).await
}

/// The fields of a body, taken out one by one; none may be left.
struct Fields(Map<String, Value>);

impl Fields {
    fn optional<T: DeserializeOwned>(&mut self, name: &'static str) -> Result<Option<T>, ApiError> {
        let value = self.0.remove(name).filter(|value| !value.is_null());
        let parse = |value| serde_json::from_value(value);
        value.map(parse).transpose().map_err(|error| ApiError::bad_request(name, format!("{name}: {error}")))
    }

    fn required<T: DeserializeOwned>(&mut self, name: &'static str) -> Result<T, ApiError> {
        self.optional(name)?.ok_or_else(|| ApiError::bad_request(name, format!("{name} is required")))
    }

    /// What is left, as a whole.
    fn rest<T: DeserializeOwned>(self) -> Result<T, ApiError> {
        serde_path_to_error::deserialize(Value::Object(self.0)).map_err(|error| {
            let (field, message) = (error.path().to_string(), error.inner().to_string());
            let message = if field == "." { message } else { format!("{field}: {message}") };
            ApiError::bad_request(field, message)
        })
    }

    fn end(self) -> Result<(), ApiError> {
        match self.0.keys().next() {
            None => Ok(()),
            Some(field) => Err(ApiError::bad_request(field.clone(), format!("unknown field '{field}'"))),
        }
    }
}

fn retiring(app: &App) -> Vec<Value> {
    app.models.retiring().iter().map(|model| describe_model(model)).collect()
}

/// Begins a change, if no other is being made; and what it will tell.
fn begin(app: &Arc<App>) -> Result<(Exchange, UnboundedReceiver<Stage>), ApiError> {
    let (progress, stages) = mpsc::unbounded_channel();
    let exchange = Exchange::new(Arc::clone(app), operator(app)?, turn(app)?, Progress(progress));
    Ok((exchange, stages))
}

fn turn(app: &App) -> Result<OwnedMutexGuard<()>, ApiError> {
    let busy = |_| ApiError::conflict("another change is being made; try again when it is done");
    Arc::clone(&app.change).try_lock_owned().map_err(busy)
}

/// Makes a change in a task of its own, which goes on when the client leaves, and answers with its result, or with
/// events that end with it.
async fn respond(
    is_stream: bool,
    stages: UnboundedReceiver<Stage>,
    work: impl Future<Output = Result<Value, ApiError>> + Send + 'static,
) -> Result<Response, ApiError> {
    let task = tokio::spawn(work.in_current_span());
    let end = async move {
        task.await.unwrap_or_else(|error| {
            tracing::error!(%error, "a change of the models failed");
            Err(ApiError::internal())
        })
    };
    if !is_stream {
        return end.await.map(|value| Json(value).into_response());
    }
    let stages = UnboundedReceiverStream::new(stages).map(|stage| event(&stage));
    // The status line is long gone; an error is the last event.
    let end = stream::once(async move {
        let last = end.await;
        last.map_or_else(|error| event(&error.stream_body()), |value| event(&value))
    });
    let done = stream::once(std::future::ready(Bytes::from_static(b"data: [DONE]\n\n")));
    let body = Body::from_stream(stages.chain(end).chain(done).map(Ok::<_, Infallible>));
    let headers = [
        (header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream; charset=utf-8")),
        (header::CACHE_CONTROL, HeaderValue::from_static("no-cache")),
    ];
    Ok((headers, body).into_response())
}

fn event<T: Serialize>(data: &T) -> Bytes {
    let mut event = Vec::new();
    // What is sent here has string keys and finite numbers only.
    if let Err(error) = write_event(data, &mut event) {
        tracing::error!(%error, "an event could not be written");
    }
    event.into()
}
