//! Whether the server lives, is ready, and computes.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use axum::{
    Json,
    extract::State,
    http::StatusCode,
    response::{IntoResponse, Response},
};
use futures::StreamExt;
use serde::Serialize;
use tokio::time::timeout;
use torus_engine::api::{Event, FinishReason, GenerateRequest, Readiness, SamplingParams, SubmitError};
use uuid::Uuid;

use crate::{
    app::{App, describe},
    error::ApiError,
    models::Model,
};

/// How long `/health_generate` waits for a token.
const GENERATE_TIMEOUT: Duration = Duration::from_secs(20);

/// How often it looks whether the engine does other work meanwhile.
const POLL_INTERVAL: Duration = Duration::from_millis(50);

#[derive(Serialize)]
struct NotReady {
    status: &'static str,
    /// In words, with progress.
    stage: String,
}

/// 200 whenever the process answers.
pub(crate) async fn live() -> StatusCode {
    StatusCode::OK
}

/// 200 once every model serves; until then 503 with the stage of the first that does not.
pub(crate) async fn ready(State(app): State<Arc<App>>) -> Response {
    match app.readiness() {
        Readiness::Ready => StatusCode::OK.into_response(),
        stage => {
            let status = match stage {
                Readiness::Failed { .. } => "failed",
                Readiness::ShuttingDown => "stopping",
                _ => "starting",
            };
            let body = NotReady { status, stage: describe(&stage) };
            (StatusCode::SERVICE_UNAVAILABLE, Json(body)).into_response()
        }
    }
}

/// 200 if every model computes: it generates a token, or does steps of other requests while that one waits.
pub(crate) async fn generate(State(app): State<Arc<App>>) -> Result<StatusCode, ApiError> {
    let deadline = Instant::now() + GENERATE_TIMEOUT;
    // One at a time, so that probes do not pile up behind an engine that hangs.
    let too_late = || ApiError::unavailable("the model did not compute anything in time");
    let wait = deadline.saturating_duration_since(Instant::now());
    let _turn = timeout(wait, app.health_probe.lock()).await.map_err(|_| too_late())?;
    for model in &app.models.serving() {
        model.ready_info()?;
        if !computes(model, deadline).await? {
            return Err(too_late());
        }
    }
    Ok(StatusCode::OK)
}

/// Whether an engine generates a token, or does steps of other requests meanwhile.
pub(crate) async fn computes(model: &Model, deadline: Instant) -> Result<bool, ApiError> {
    let steps = model.engine.stats().steps;
    let mut events = match model.engine.submit(probe(deadline)) {
        Ok(events) => Some(events),
        // Busy is not dead.
        Err(SubmitError::QueueFull { .. }) => None,
        Err(error) => return Err(error.into()),
    };
    while Instant::now() < deadline {
        match &mut events {
            Some(stream) => match timeout(POLL_INTERVAL, stream.next()).await {
                Ok(Some(Event::Tokens { .. } | Event::Finished(FinishReason::Length | FinishReason::Stop { .. }))) => {
                    return Ok(true);
                }
                Ok(Some(Event::Prefilled { .. })) => {}
                Ok(Some(Event::Finished(FinishReason::Aborted(_))) | None) => return Ok(false),
                Err(_) if model.engine.stats().steps > steps => return Ok(true),
                Err(_) => {}
            },
            None if model.engine.stats().steps > steps => return Ok(true),
            None => tokio::time::sleep(POLL_INTERVAL).await,
        }
    }
    Ok(false)
}

fn probe(deadline: Instant) -> GenerateRequest {
    GenerateRequest {
        id: format!("HEALTH_CHECK_{}", Uuid::new_v4().simple()),
        prompt: Arc::from([0]),
        sampling: SamplingParams { max_new_tokens: Some(1), temperature: 0.0, ..SamplingParams::default() },
        logprobs: Default::default(),
        namespace: None,
        deadline: Some(deadline),
    }
}
