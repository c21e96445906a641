//! What each path answers.

mod admin;
mod chat;
mod completions;
mod generate;
mod health;
mod info;
mod operate;

use std::{
    ops::Range,
    sync::Arc,
    time::{SystemTime, UNIX_EPOCH},
};

use axum::{
    Router,
    http::{Method, StatusCode, Uri},
    middleware,
    routing::{any, get, post},
};
use uuid::Uuid;

pub(crate) use admin::blocking;
pub(crate) use health::computes;

use crate::{app::App, error::ApiError, guard, models::Lease};

/// Longest id that a client may give a request.
const MAX_RID_BYTES: usize = 128;

/// All routes, without what guards them.
pub(crate) fn router(app: &Arc<App>) -> Router<Arc<App>> {
    let for_models = Router::new()
        .route("/v1/chat/completions", post(chat::create))
        .route("/invocations", post(chat::create))
        .route("/v1/completions", post(completions::create))
        .route("/generate", post(generate::create).put(generate::create))
        .route_layer(middleware::from_fn_with_state(Arc::clone(app), guard::limit_concurrency));
    Router::new()
        .merge(for_models)
        .route("/v1/models", get(info::list_models))
        .merge(operate::router(app))
        .route("/v1/models/{*id}", get(info::get_model))
        .route("/get_model_info", get(info::model_info))
        .route("/get_server_info", get(info::server_info))
        .route("/metrics", get(info::metrics))
        .route("/health", get(health::ready))
        .route("/readyz", get(health::ready))
        .route("/livez", get(health::live))
        .route("/ping", get(health::live))
        .route("/health_generate", get(health::generate))
        .route("/flush_cache", get(admin::flush_cache).post(admin::flush_cache))
        .route("/abort_request", post(admin::abort_request))
        .route("/start_profile", get(admin::start_profile).post(admin::start_profile))
        .route("/stop_profile", get(admin::stop_profile).post(admin::stop_profile))
        .fallback(any(not_found))
        .method_not_allowed_fallback(method_not_allowed)
}

async fn not_found(uri: Uri) -> ApiError {
    ApiError::new(StatusCode::NOT_FOUND, format!("There is nothing at {}", uri.path()))
}

async fn method_not_allowed(method: Method, uri: Uri) -> ApiError {
    let message = format!("{method} is not allowed at {}", uri.path());
    ApiError::new(StatusCode::METHOD_NOT_ALLOWED, message)
}

/// What every answer of OpenAI's APIs begins with.
struct AnswerHead {
    id: String,
    object: &'static str,
    created_s: u64,
    /// As the client called it.
    model: String,
}

impl AnswerHead {
    fn new(
        prefix: &str,
        object: &'static str,
        rid: Option<&str>,
        requested_model: Option<String>,
        model: &Lease,
    ) -> Result<Self, ApiError> {
        let id = match rid {
            None => format!("{prefix}{}", Uuid::new_v4().simple()),
            Some(rid) => validate_rid(rid)?.to_owned(),
        };
        let created_s = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs());
        Ok(Self { id, object, created_s, model: requested_model.unwrap_or_else(|| model.id().to_owned()) })
    }

    /// Ids in the engine of some of the `total` sequences.
    fn sequence_ids(&self, indices: Range<usize>, total: usize) -> Vec<String> {
        if total == 1 { vec![self.id.clone()] } else { indices.map(|index| format!("{}-{index}", self.id)).collect() }
    }
}

fn validate_rid(rid: &str) -> Result<&str, ApiError> {
    let is_valid = (1..=MAX_RID_BYTES).contains(&rid.len()) && rid.bytes().all(|byte| byte.is_ascii_graphic());
    if is_valid {
        return Ok(rid);
    }
    let message = format!("rid must have 1 to {MAX_RID_BYTES} printable ASCII characters and no spaces");
    Err(ApiError::bad_request("rid", message))
}

/// How many tokens make an update worth its while. A complete answer needs no updates before the last.
fn tokens_per_update(app: &App, is_stream: bool, wanted: Option<u32>) -> usize {
    if is_stream { wanted.unwrap_or(app.stream_interval) as usize } else { usize::MAX }
}
