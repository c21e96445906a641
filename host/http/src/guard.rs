//! What every request passes before its route: identification, faults caught, keys, a place among the others.

use std::{
    panic::AssertUnwindSafe,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Instant,
};

use axum::{
    body::{Body, Bytes, HttpBody},
    extract::{MatchedPath, Request, State},
    http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, header},
    middleware::Next,
    response::{IntoResponse, Response},
};
use futures::FutureExt;
use subtle::ConstantTimeEq;
use tokio::sync::OwnedSemaphorePermit;
use tracing::Instrument;
use uuid::Uuid;

use crate::{app::App, error::ApiError, metrics};

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
const MAX_REQUEST_ID_BYTES: usize = 128;

/// Gives the request an id, logs and counts its response, and answers for a handler that panics.
pub(crate) async fn identify(request: Request, next: Next) -> Response {
    let id = request_id(request.headers());
    let route = request.extensions().get::<MatchedPath>().map_or("none", MatchedPath::as_str).to_owned();
    let method = request.method().clone();
    let span = tracing::info_span!("request", id = id.to_str().unwrap_or_default());
    let started = Instant::now();
    let respond = async {
        let response = AssertUnwindSafe(next.run(request)).catch_unwind().await;
        let mut response = response.unwrap_or_else(|_| {
            tracing::error!("a request handler panicked");
            ApiError::internal().into_response()
        });
        let status = response.status().as_u16();
        let elapsed_ms = started.elapsed().as_secs_f64() * 1e3;
        if status >= 500 && status != StatusCode::SERVICE_UNAVAILABLE {
            tracing::warn!(%method, route, status, elapsed_ms, "answered");
        } else if is_open(&method, &route) {
            // Probes come every few seconds.
            tracing::debug!(%method, route, status, elapsed_ms, "answered");
        } else {
            tracing::info!(%method, route, status, elapsed_ms, "answered");
        }
        metrics::count_response(&route, status);
        response.headers_mut().insert(REQUEST_ID, id);
        response
    };
    respond.instrument(span).await
}

/// The client's own id if it is presentable, else a new one.
fn request_id(headers: &HeaderMap) -> HeaderValue {
    let is_presentable = |value: &&HeaderValue| {
        (1..=MAX_REQUEST_ID_BYTES).contains(&value.len()) && value.as_bytes().iter().all(u8::is_ascii_graphic)
    };
    headers.get(REQUEST_ID).filter(is_presentable).cloned().unwrap_or_else(|| {
        let id = Uuid::new_v4().simple().to_string();
        HeaderValue::from_str(&id).unwrap_or_else(|_| HeaderValue::from_static("unknown"))
    })
}

/// Requires the API key, if there is one, but for probes, metrics and preflight requests.
pub(crate) async fn authorize(State(app): State<Arc<App>>, request: Request, next: Next) -> Result<Response, ApiError> {
    if let Some(key) = &app.api_key
        && !is_open(request.method(), request.uri().path())
        && !is_for_administrators(request.uri().path())
    {
        check_key(&request, key)?;
    }
    Ok(next.run(request).await)
}

/// Requires the administrator's key. Without one set there are no administrators.
pub(crate) async fn administrators(
    State(app): State<Arc<App>>,
    request: Request,
    next: Next,
) -> Result<Response, ApiError> {
    let Some(key) = &app.admin_api_key else {
        let message = "plugins and models can be changed only if the server is started with --admin-api-key KEY";
        return Err(ApiError::new(StatusCode::FORBIDDEN, message));
    };
    check_key(&request, key)?;
    Ok(next.run(request).await)
}

fn check_key(request: &Request, key: &str) -> Result<(), ApiError> {
    let given = request.headers().get(header::AUTHORIZATION).and_then(|value| bearer_token(value.as_bytes()));
    match given {
        None => Err(ApiError::unauthorized("No API key was given; send it as 'Authorization: Bearer KEY'")),
        Some(given) if !bool::from(given.ct_eq(key.as_bytes())) => Err(ApiError::unauthorized("Incorrect API key")),
        Some(_) => Ok(()),
    }
}

fn is_open(method: &Method, path: &str) -> bool {
    const OPEN: [&str; 6] = ["/health", "/health_generate", "/livez", "/readyz", "/metrics", "/ping"];
    *method == Method::OPTIONS || OPEN.contains(&path)
}

/// Paths that take the administrator's key instead ([`administrators`]).
fn is_for_administrators(path: &str) -> bool {
    const PATHS: [&str; 4] = ["/v1/plugins", "/v1/models/load", "/v1/models/swap", "/v1/models/unload"];
    PATHS.contains(&path)
}

fn bearer_token(value: &[u8]) -> Option<&[u8]> {
    const SCHEME: &[u8] = b"bearer ";
    let (scheme, token) = value.split_at_checked(SCHEME.len())?;
    scheme.eq_ignore_ascii_case(SCHEME).then_some(token.trim_ascii())
}

/// Takes a place among the requests to the models until the response has been sent.
pub(crate) async fn limit_concurrency(
    State(app): State<Arc<App>>,
    request: Request,
    next: Next,
) -> Result<Response, ApiError> {
    let place = Arc::clone(&app.places)
        .try_acquire_owned()
        .map_err(|_| ApiError::overloaded("too many requests are in progress; try again later"))?;
    let response = next.run(request).await;
    Ok(response.map(|body| Body::new(GuardedBody { body, _place: place })))
}

/// A body that keeps its request's place.
struct GuardedBody {
    body: Body,
    _place: OwnedSemaphorePermit,
}

impl HttpBody for GuardedBody {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context,
    ) -> Poll<Option<Result<http_body::Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut self.body).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> http_body::SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_bearer_tokens_count() {
        assert_eq!(bearer_token(b"Bearer k"), Some(b"k".as_slice()));
        assert_eq!(bearer_token(b"bearer  k "), Some(b"k".as_slice()));
        assert_eq!(bearer_token(b"Basic k"), None);
        assert_eq!(bearer_token(b"Bearer"), None);
        assert_eq!(bearer_token(b""), None);
    }

    #[test]
    fn probes_and_preflights_are_open() {
        assert!(is_open(&Method::GET, "/health"));
        assert!(is_open(&Method::OPTIONS, "/v1/completions"));
        assert!(!is_open(&Method::GET, "/healthy"));
        assert!(!is_open(&Method::GET, "/get_server_info"));
        assert!(!is_for_administrators("/v1/models") && is_for_administrators("/v1/models/swap"));
    }

    #[test]
    fn request_ids_are_kept_if_presentable() {
        let of = |value: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(REQUEST_ID, HeaderValue::from_str(value).unwrap());
            request_id(&headers).to_str().unwrap().to_owned()
        };
        assert_eq!(of("abc-1"), "abc-1");
        for odd in ["", "a b", &"x".repeat(129)] {
            assert_eq!(of(odd).len(), 32, "{odd}");
        }
    }
}
