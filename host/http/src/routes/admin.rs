//! What operators do: empty the cache, abort requests, record profiles.

use std::{
    path::{Component, Path},
    sync::Arc,
};

use axum::{
    extract::{Request, State},
    http::StatusCode,
    response::{IntoResponse, Response},
};
use serde::Deserialize;
use tokio::task::spawn_blocking;
use torus_engine::api::{FlushRefused, ProfileError};
use torus_openai::{Ignored, Unsupported};

use crate::{app::App, body, error::ApiError};

/// Waits for engines off the asynchronous threads.
pub(crate) async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, ApiError> {
    spawn_blocking(work).await.map_err(|error| {
        tracing::error!(%error, "a task failed");
        ApiError::internal()
    })
}

pub(crate) async fn flush_cache(State(app): State<Arc<App>>) -> Result<Response, ApiError> {
    let flush = move || {
        app.models.serving().iter().map(|model| model.engine.flush_cache()).sum::<Result<usize, FlushRefused>>()
    };
    let (status, result) = match blocking(flush).await? {
        Ok(pages) => (StatusCode::OK, format!("Flushed items: {pages}\n")),
        Err(FlushRefused { waiting, running }) => {
            let counts = format!("waiting={waiting}, running={running}");
            let reason = format!("Cache not flushed because there are pending requests. {counts}");
            (StatusCode::BAD_REQUEST, format!("Reason: {reason}\n"))
        }
    };
    let text = "Cache flushed.\nPlease check backend logs for more details. \
                (When there are running or waiting requests, the operation will not be performed.)\n";
    Ok((status, format!("{text}{result}")).into_response())
}

#[derive(Default, Deserialize)]
#[serde(default, deny_unknown_fields, expecting = "a JSON object")]
struct AbortBody {
    rid: Option<String>,
    abort_all: Option<bool>,
}

pub(crate) async fn abort_request(State(app): State<Arc<App>>, request: Request) -> Result<StatusCode, ApiError> {
    let (body, _permit) = body::read_json::<AbortBody>(&app, request).await?;
    let reached = match (body.rid, body.abort_all) {
        (_, Some(true)) => app.abort_all(),
        (Some(rid), _) if !rid.is_empty() => app.abort(&rid),
        _ => return Err(ApiError::bad_request("rid", "either rid or abort_all must be given")),
    };
    tracing::info!(reached, "requests aborted on demand");
    Ok(StatusCode::OK)
}

#[derive(Default, Deserialize)]
#[serde(default, deny_unknown_fields, expecting = "a JSON object")]
struct ProfileBody {
    output_dir: Option<String>,
    num_steps: Unsupported,
    profile_by_stage: Unsupported,
    profile_stages: Unsupported,
    stage_id: Unsupported,
    start_step: Unsupported,
    /// How much a device's own profiler records; the trace of steps has no levels.
    activities: Ignored,
    host_tracer_level: Ignored,
    python_tracer_level: Ignored,
}

impl ProfileBody {
    fn unsupported(&self) -> Option<&'static str> {
        let fields = [
            ("num_steps", self.num_steps),
            ("profile_by_stage", self.profile_by_stage),
            ("profile_stages", self.profile_stages),
            ("stage_id", self.stage_id),
            ("start_step", self.start_step),
        ];
        fields.into_iter().find_map(|(name, field)| field.is_wanted.then_some(name))
    }
}

pub(crate) async fn start_profile(State(app): State<Arc<App>>, request: Request) -> Result<Response, ApiError> {
    let body: ProfileBody = body::read_optional_json(&app, request).await?;
    if let Some(field) = body.unsupported() {
        return Err(ApiError::unsupported(field));
    }
    let folder = Path::new(body.output_dir.as_deref().unwrap_or(""));
    if !folder.components().all(|component| matches!(component, Component::Normal(_))) {
        let message = "output_dir must be a folder below the server's own profile folder, without '..'";
        return Err(ApiError::bad_request("output_dir", message));
    }
    let folder = app.profile_dir.join(folder);
    let start = move || {
        let folder = folder.to_str();
        app.models.serving().iter().try_for_each(|model| model.engine.start_profile(folder))
    };
    blocking(start).await?.map_err(profile_error)?;
    Ok("Start profiling.\n".into_response())
}

pub(crate) async fn stop_profile(State(app): State<Arc<App>>) -> Result<Response, ApiError> {
    let stop =
        move || app.models.serving().iter().map(|model| model.engine.stop_profile()).collect::<Result<Vec<_>, _>>();
    let files = blocking(stop).await?.map_err(profile_error)?;
    let mut text = "Stop profiling. This will take some time.\n".to_owned();
    for file in files {
        text.push_str(&format!("Trace: {file}\n"));
    }
    Ok(text.into_response())
}

fn profile_error(ProfileError(message): ProfileError) -> ApiError {
    ApiError::new(StatusCode::BAD_REQUEST, message)
}
