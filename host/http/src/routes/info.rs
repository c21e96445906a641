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
    app::{App, Model, describe},
    error::ApiError,
    metrics::update_from_engine,
};

fn wire_model(model: &Model) -> WireModel<'_> {
    WireModel {
        id: model.id(),
        object: "model",
        created: model.created_s,
        owned_by: "torus",
        root: model.id(),
        max_model_len: model.engine.info().map(|info| info.context_length),
    }
}

pub(crate) async fn list_models(State(app): State<Arc<App>>) -> Response {
    let data = app.models.iter().map(|model| wire_model(model)).collect();
    Json(ModelList { object: "list", data }).into_response()
}

pub(crate) async fn get_model(State(app): State<Arc<App>>, Path(id): Path<String>) -> Result<Response, ApiError> {
    let mut models = app.models.iter();
    let model = models.find(|model| model.names.contains(&id)).ok_or_else(|| ApiError::unknown_model(&id))?;
    let model = WireModel { id: &id, root: &id, ..wire_model(model) };
    Ok(Json(model).into_response())
}

/// Of the first model, like the reference, which has only one.
pub(crate) async fn model_info(State(app): State<Arc<App>>) -> Result<Json<Value>, ApiError> {
    let model = app.model(None)?;
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
    let first = app.model(None)?.engine.info();
    let longest = first.as_ref().map(|info| info.context_length.min(info.max_total_tokens).saturating_sub(1));
    info.insert("status".to_owned(), describe(&app.readiness()).into());
    info.insert("max_total_num_tokens".to_owned(), json!(first.as_ref().map(|info| info.max_total_tokens)));
    info.insert("max_req_input_len".to_owned(), json!(longest));
    info.insert("internal_states".to_owned(), app.models.iter().map(|model| internal_state(model)).collect());
    info.insert("weight_bytes".to_owned(), json!(first.as_ref().map(|info| info.weight_bytes)));
    info.insert("version".to_owned(), env!("CARGO_PKG_VERSION").into());
    Ok(Json(info))
}

/// Keys that the reference has too come first.
fn internal_state(model: &Model) -> Value {
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
        "model": model.id(),
        "readiness": describe(&model.engine.readiness()),
        "info": info,
        "stats": stats,
    })
}

pub(crate) async fn metrics(State(app): State<Arc<App>>) -> Response {
    app.models.iter().for_each(|model| update_from_engine(model));
    let content_type = HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
    ([(header::CONTENT_TYPE, content_type)], app.metrics.render()).into_response()
}
