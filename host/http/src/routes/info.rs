//! Facts about models and server, and metrics.

use std::sync::Arc;

use axum::{
    Json,
    extract::{Path, State},
    http::{HeaderValue, header},
    response::{IntoResponse, Response},
};
use serde_json::{Map, Value, json};
use torus_openai::model::{Model as WireModel, ModelList};

use crate::{
    app::{App, describe},
    error::ApiError,
    metrics::{count_engine, update_from_engine},
    models::{Entry, Model},
};

fn wire_model(entry: &Entry) -> WireModel<'_> {
    let model = entry.model();
    WireModel {
        id: entry.id(),
        object: "model",
        created: model.map_or(0, |model| model.created_s),
        owned_by: "torus",
        root: entry.id(),
        max_model_len: model.and_then(|model| model.engine.info()).map(|info| info.context_length),
    }
}

pub(crate) async fn list_models(State(app): State<Arc<App>>) -> Response {
    let entries = app.models.entries();
    let data = entries.iter().map(wire_model).collect();
    Json(ModelList { object: "list", data }).into_response()
}

pub(crate) async fn get_model(State(app): State<Arc<App>>, Path(id): Path<String>) -> Result<Response, ApiError> {
    let entries = app.models.entries();
    let entry = entries.iter().find(|entry| entry.names.contains(&id)).ok_or_else(|| ApiError::unknown_model(&id))?;
    let model = WireModel { id: &id, root: &id, ..wire_model(entry) };
    Ok(Json(model).into_response())
}

/// Of the first model, like the reference, which has only one.
pub(crate) async fn model_info(State(app): State<Arc<App>>) -> Result<Json<Value>, ApiError> {
    let model = app.models.lease(None).await?;
    Ok(Json(json!({
        "model_path": model.model_path,
        "tokenizer_path": model.tokenizer_path,
        "is_generation": true,
        "preferred_sampling_params": null,
    })))
}

/// Arguments, facts about the first model, and what each engine is doing.
pub(crate) async fn server_info(State(app): State<Arc<App>>) -> Result<Json<Map<String, Value>>, ApiError> {
    let mut info = app.server_args.clone();
    let first = app.models.serving().first().and_then(|model| model.engine.info());
    let longest = first.as_ref().map(|info| info.context_length.min(info.max_total_tokens).saturating_sub(1));
    info.insert("status".to_owned(), describe(&app.readiness()).into());
    info.insert("max_total_num_tokens".to_owned(), json!(first.as_ref().map(|info| info.max_total_tokens)));
    info.insert("max_req_input_len".to_owned(), json!(longest));
    let entries = app.models.entries();
    let states = entries.iter().filter_map(|entry| Some(internal_state(entry.id(), entry.model()?))).collect();
    info.insert("internal_states".to_owned(), states);
    info.insert("weight_bytes".to_owned(), json!(first.as_ref().map(|info| info.weight_bytes)));
    info.insert("version".to_owned(), env!("CARGO_PKG_VERSION").into());
    Ok(Json(info))
}

/// Keys that the reference has too come first.
fn internal_state(name: &str, model: &Model) -> Value {
    let stats = model.engine.stats();
    let info = model.engine.info();
    let page_size = info.as_ref().map_or(0, |info| info.page_size);
    json!({
        "device": info.as_ref().map(|info| &info.device),
        "last_gen_throughput": stats.generation_throughput,
        "memory_usage": {"token_capacity": stats.pages_total * page_size},
        "waiting_queue_size": stats.queued,
        "running_batch_size": stats.running,
        "tree_cache_size": stats.pages_cached * page_size,
        "available_kv_tokens": stats.pages_free * page_size,
        "num_generated_tokens": stats.generated_tokens,
        "model": name,
        "readiness": describe(&model.engine.readiness()),
        "info": info,
        "stats": stats,
    })
}

pub(crate) async fn metrics(State(app): State<Arc<App>>) -> Response {
    // Those whose names are taken count on, and the present ones are what gauges show.
    app.models.retiring().iter().for_each(|model| count_engine(model));
    app.models.serving().iter().for_each(|model| update_from_engine(model));
    let content_type = HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
    ([(header::CONTENT_TYPE, content_type)], app.metrics.render()).into_response()
}
