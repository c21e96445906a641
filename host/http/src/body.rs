//! Request bodies: received within limits, then parsed with errors that name the field.

use std::{borrow::Cow, sync::Arc};

use axum::{
    extract::Request,
    http::{HeaderMap, StatusCode, header},
};
use bytes::{Bytes, BytesMut};
use futures::StreamExt;
use serde::de::DeserializeOwned;
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::timeout,
};

use crate::{app::App, config::Limits, error::ApiError};

/// Memory of bodies is counted in units of this.
const UNIT_BYTES: usize = 16 << 10;

/// A larger body is parsed on a blocking thread.
const INLINE_BYTES: usize = 128 << 10;

/// Memory for the bodies of all requests.
pub(crate) struct BodyBudget(Arc<Semaphore>);

/// The share of one request. Keep it as long as the body or what was read from it is large.
pub(crate) struct BodyPermit(Vec<OwnedSemaphorePermit>);

impl BodyBudget {
    pub fn new(limits: &Limits) -> Self {
        Self(Arc::new(Semaphore::new(limits.bodies_total_bytes.div_ceil(UNIT_BYTES))))
    }
}

/// Reads and parses the JSON body of `request`.
pub(crate) async fn read_json<T: DeserializeOwned + Send + 'static>(
    app: &Arc<App>,
    request: Request,
) -> Result<(T, BodyPermit), ApiError> {
    check_content_type(request.headers())?;
    let (body, permit) = receive(app, request).await?;
    let value = app.compute(body.len() > INLINE_BYTES, move || parse(&body)).await??;
    Ok((value, permit))
}

/// Like [`read_json`], but no body at all is as good as `{}`.
pub(crate) async fn read_optional_json<T: DeserializeOwned + Default>(
    app: &Arc<App>,
    request: Request,
) -> Result<T, ApiError> {
    let content_type = check_content_type(request.headers());
    let (body, _permit) = receive(app, request).await?;
    if body.is_empty() {
        return Ok(T::default());
    }
    content_type?;
    parse(&body)
}

fn check_content_type(headers: &HeaderMap) -> Result<(), ApiError> {
    let content_type = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let media_type = content_type.split(';').next().unwrap_or_default().trim();
    if media_type.eq_ignore_ascii_case("application/json") {
        return Ok(());
    }
    Err(ApiError::new(StatusCode::BAD_REQUEST, "Unsupported Media Type: Only 'application/json' is allowed"))
}

async fn receive(app: &App, request: Request) -> Result<(Bytes, BodyPermit), ApiError> {
    let limits = &app.limits;
    let too_large = || {
        let message = format!("the body is larger than {} bytes", limits.body_bytes);
        ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, message)
    };
    let announced = request.headers().get(header::CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse().ok());
    if announced.is_some_and(|bytes: u64| bytes > limits.body_bytes as u64) {
        return Err(too_large());
    }
    let mut body = BytesMut::new();
    let mut permit = BodyPermit(Vec::new());
    let mut chunks = request.into_body().into_data_stream();
    loop {
        let chunk = timeout(limits.body_idle_timeout, chunks.next())
            .await
            .map_err(|_| ApiError::new(StatusCode::REQUEST_TIMEOUT, "the body did not arrive in time"))?;
        let Some(chunk) = chunk else { return Ok((body.freeze(), permit)) };
        let chunk = chunk.map_err(|_| ApiError::new(StatusCode::BAD_REQUEST, "the body ended early"))?;
        if chunk.len() > limits.body_bytes - body.len() {
            return Err(too_large());
        }
        body.extend_from_slice(&chunk);
        permit.grow_to(body.len(), &app.body_budget)?;
    }
}

impl BodyPermit {
    fn grow_to(&mut self, bytes: usize, budget: &BodyBudget) -> Result<(), ApiError> {
        let held: usize = self.0.iter().map(OwnedSemaphorePermit::num_permits).sum();
        // Grow like the buffer does, so that few permits are held.
        let wanted = bytes.div_ceil(UNIT_BYTES);
        if wanted <= held {
            return Ok(());
        }
        let missing = u32::try_from(wanted.next_power_of_two() - held).unwrap_or(u32::MAX);
        let permit = Arc::clone(&budget.0)
            .try_acquire_many_owned(missing)
            .map_err(|_| ApiError::unavailable("too much request data is being received; try again later"))?;
        self.0.push(permit);
        Ok(())
    }
}

/// Parses a body; errors name the field.
fn parse<T: DeserializeOwned>(body: &[u8]) -> Result<T, ApiError> {
    let mut deserializer = serde_json::Deserializer::from_slice(body);
    let value = serde_path_to_error::deserialize(&mut deserializer).map_err(|error| {
        let path = error.path().to_string();
        json_error(&path, error.inner())
    })?;
    deserializer.end().map_err(|error| json_error(".", &error))?;
    Ok(value)
}

fn json_error(path: &str, error: &serde_json::Error) -> ApiError {
    let text = error.to_string();
    if !error.is_data() {
        return ApiError::new(StatusCode::BAD_REQUEST, format!("The body is not valid JSON: {text}"));
    }
    // The position in the body is of no use to people.
    let text = text.rsplit_once(" at line ").map_or(text.as_str(), |(text, _)| text);
    let quoted = |start: &str| text.strip_prefix(start)?.split('`').next();
    if let Some(name) = quoted("unknown field `") {
        let prefix = path.strip_suffix(name).unwrap_or_default();
        let message = format!("Unrecognized request argument supplied: {prefix}{name}");
        return ApiError::bad_request(Cow::Owned(format!("{prefix}{name}")), message);
    }
    if let Some(name) = quoted("duplicate field `") {
        return ApiError::bad_request(Cow::Owned(name.to_owned()), format!("{name} is given twice"));
    }
    if path == "." {
        return ApiError::new(StatusCode::BAD_REQUEST, text);
    }
    ApiError::bad_request(Cow::Owned(path.to_owned()), format!("{path}: {text}"))
}

#[cfg(test)]
mod tests {
    use torus_openai::{completion::CompletionRequest, generate::GenerateRequest};

    use super::*;

    fn error_of<T: DeserializeOwned + std::fmt::Debug>(body: &str) -> (String, Option<String>) {
        let error = parse::<T>(body.as_bytes()).unwrap_err();
        assert_eq!(error.status, StatusCode::BAD_REQUEST);
        (error.message, error.param.map(Cow::into_owned))
    }

    #[test]
    fn errors_name_the_field() {
        let cases = [
            (
                r#"{"temperature":"hot"}"#,
                r#"temperature: invalid type: string "hot", expected a number"#,
                "temperature",
            ),
            (r#"{"prompt":[1,-1]}"#, "invalid type: integer `-1`, expected a token id", "prompt[1]"),
            (r#"{"stop":[1]}"#, "stop[0]: invalid type", "stop[0]"),
            (r#"{"foo":1}"#, "Unrecognized request argument supplied: foo", "foo"),
            (r#"{"stream_options":{"x":1}}"#, "argument supplied: stream_options.x", "stream_options.x"),
            (r#"{"n":1,"n":2}"#, "n is given twice", "n"),
            (r#"{"max_tokens":1e999}"#, "number out of range", ""),
        ];
        for (body, message, param) in cases {
            let (found, found_param) = error_of::<CompletionRequest>(body);
            assert!(found.contains(message), "{body}: {found}");
            assert_eq!(found_param.unwrap_or_default(), param, "{body}");
        }
        let (message, param) = error_of::<GenerateRequest>(r#"{"sampling_params":{"max_tokens":1}}"#);
        assert!(message.contains("supplied: ") && message.contains("max_tokens"), "{message}");
        assert!(param.unwrap().ends_with("max_tokens"));
    }

    #[test]
    fn malformed_and_hostile_json_is_refused() {
        let deep = "[".repeat(1_000_000);
        let deep_field = format!("{{\"messages\":{deep}");
        for body in ["", "{", r#"{"prompt": "a""#, "{}x", "nul", "\u{0}", "[1]", "7", &deep, &deep_field] {
            let (message, _) = error_of::<CompletionRequest>(body);
            assert!(!message.contains("struct") && message.len() < 200, "{message}");
        }
    }
}
