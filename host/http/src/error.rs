//! Answers that say what went wrong, in a shape that clients of both families understand.

use std::borrow::Cow;

use axum::{
    http::{HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use torus_engine::api::{Abort, SubmitError};
use torus_openai::error::{ErrorBody, ErrorCode, ErrorDetail, StreamError, StreamErrorDetail};
use torus_text::TextError;

/// Clients' values that messages quote are cut at this many bytes.
const MAX_MESSAGE_BYTES: usize = 512;

/// Why a request was not answered. Everything in it is sent to the client.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct ApiError {
    pub status: StatusCode,
    pub message: String,
    /// The field at fault.
    pub param: Option<Cow<'static, str>>,
    /// OpenAI's word for it, if there is one.
    pub code: Option<&'static str>,
    pub retry_after_s: Option<u32>,
}

impl ApiError {
    pub fn new(status: StatusCode, message: impl Into<String>) -> Self {
        let mut message = message.into();
        if message.len() > MAX_MESSAGE_BYTES {
            message.truncate(message.floor_char_boundary(MAX_MESSAGE_BYTES));
            message.push('…');
        }
        Self { status, message, param: None, code: None, retry_after_s: None }
    }

    /// A request that cannot be served as it is.
    pub fn bad_request(param: impl Into<Cow<'static, str>>, message: impl Into<String>) -> Self {
        Self { param: Some(param.into()), ..Self::new(StatusCode::BAD_REQUEST, message) }
    }

    /// A field that asks for what does not exist here.
    pub fn unsupported(param: &'static str) -> Self {
        Self::bad_request(param, format!("{param} is not supported by this server; remove it from the request"))
    }

    pub fn unauthorized(message: &str) -> Self {
        Self { code: Some("invalid_api_key"), ..Self::new(StatusCode::UNAUTHORIZED, message) }
    }

    pub fn unknown_model(name: &str) -> Self {
        Self {
            param: Some("model".into()),
            code: Some("model_not_found"),
            ..Self::new(StatusCode::NOT_FOUND, format!("The model '{name}' does not exist"))
        }
    }

    /// A change that does not fit the server's present state.
    pub fn conflict(message: impl Into<String>) -> Self {
        Self::new(StatusCode::CONFLICT, message)
    }

    /// A well-formed change that cannot be made.
    pub fn unprocessable(message: impl Into<String>) -> Self {
        Self::new(StatusCode::UNPROCESSABLE_ENTITY, message)
    }

    pub fn overloaded(message: impl Into<String>) -> Self {
        Self {
            code: Some("rate_limit_exceeded"),
            retry_after_s: Some(1),
            ..Self::new(StatusCode::TOO_MANY_REQUESTS, message)
        }
    }

    pub fn unavailable(message: impl Into<String>) -> Self {
        Self { retry_after_s: Some(5), ..Self::new(StatusCode::SERVICE_UNAVAILABLE, message) }
    }

    /// A fault of the server. The cause belongs in the log, not here.
    pub fn internal() -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "Internal server error")
    }

    /// The error that an aborted request is answered with, unless it is answered with what it has so far.
    pub fn from_abort(abort: &Abort, has_output: bool) -> Option<Self> {
        match abort {
            Abort::ByUser | Abort::SlowClient => None,
            Abort::TimedOut | Abort::OutOfPages if has_output => None,
            Abort::TimedOut => Some(Self::new(StatusCode::GATEWAY_TIMEOUT, abort.to_string())),
            Abort::OutOfPages | Abort::ShuttingDown => Some(Self::unavailable(abort.to_string())),
            Abort::Failed(message) => Some(Self::new(StatusCode::INTERNAL_SERVER_ERROR, message.clone())),
        }
    }

    /// The name of the error in the reference's shape.
    pub fn type_name(&self) -> &'static str {
        match self.status {
            StatusCode::UNAUTHORIZED => "AuthenticationError",
            StatusCode::NOT_FOUND => "NotFoundError",
            StatusCode::METHOD_NOT_ALLOWED => "MethodNotAllowedError",
            StatusCode::CONFLICT => "ConflictError",
            StatusCode::PAYLOAD_TOO_LARGE => "RequestTooLargeError",
            StatusCode::TOO_MANY_REQUESTS => "RateLimitError",
            StatusCode::SERVICE_UNAVAILABLE => "ServiceUnavailableError",
            StatusCode::GATEWAY_TIMEOUT | StatusCode::REQUEST_TIMEOUT => "TimeoutError",
            status if status.is_client_error() => "BadRequestError",
            _ => "InternalServerError",
        }
    }

    fn openai_type(&self) -> &'static str {
        match self.status {
            StatusCode::TOO_MANY_REQUESTS => "rate_limit_error",
            status if status.is_client_error() => "invalid_request_error",
            _ => "server_error",
        }
    }

    /// The body of a response.
    pub fn body(&self) -> ErrorBody<'_> {
        let status = self.status.as_u16();
        let code = self.code.map_or(ErrorCode::Status(status), ErrorCode::Word);
        let (message, param) = (self.message.as_str(), self.param.as_deref());
        ErrorBody {
            object: "error",
            message,
            r#type: self.type_name(),
            param,
            code: status,
            error: ErrorDetail { message, r#type: self.openai_type(), param, code },
        }
    }

    /// The data of an event in a stream that has already begun.
    pub fn stream_body(&self) -> StreamError<'_> {
        StreamError {
            error: StreamErrorDetail {
                object: "error",
                message: &self.message,
                r#type: self.type_name(),
                param: self.param.as_deref(),
                code: self.status.as_u16(),
            },
        }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, axum::Json(self.body())).into_response();
        let headers = response.headers_mut();
        if let Some(seconds) = self.retry_after_s {
            headers.insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        if self.status == StatusCode::UNAUTHORIZED {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}

impl From<SubmitError> for ApiError {
    fn from(error: SubmitError) -> Self {
        match error {
            SubmitError::QueueFull { .. } => Self::overloaded(error.to_string()),
            SubmitError::Invalid { field, message } => Self::bad_request(field, message),
            SubmitError::ShuttingDown | SubmitError::NotReady { .. } => Self::unavailable(error.to_string()),
        }
    }
}

impl ApiError {
    /// What a text error about `param` tells the client.
    pub fn from_text(param: &'static str, error: &TextError) -> Self {
        if error.is_request_error() {
            Self::bad_request(param, error.to_string())
        } else {
            tracing::error!(%error, "the tokenizer or chat template failed");
            Self::internal()
        }
    }
}

impl From<serde_json::Error> for ApiError {
    /// Of a response that could not be written.
    fn from(error: serde_json::Error) -> Self {
        tracing::error!(%error, "a response could not be serialized");
        Self::internal()
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{json, to_value};

    use super::*;

    #[test]
    fn bodies_serve_both_families_of_clients() {
        let error = ApiError::bad_request("top_p", "top_p must be in (0, 1], got 2.");
        let body = json!({
            "object": "error", "message": "top_p must be in (0, 1], got 2.", "type": "BadRequestError",
            "param": "top_p", "code": 400,
            "error": {"message": "top_p must be in (0, 1], got 2.", "type": "invalid_request_error",
                "param": "top_p", "code": 400},
        });
        assert_eq!(to_value(error.body()).unwrap(), body);
        let unknown = to_value(ApiError::unknown_model("x").body()).unwrap();
        let detail = json!({"message": "The model 'x' does not exist", "type": "invalid_request_error",
            "param": "model", "code": "model_not_found"});
        assert_eq!(unknown["error"], detail);
    }

    #[test]
    fn long_messages_are_cut_between_characters() {
        let error = ApiError::bad_request("x", "é".repeat(10_000));
        assert_eq!(error.message.len(), MAX_MESSAGE_BYTES + '…'.len_utf8());
    }

    #[test]
    fn aborts_with_output_are_answers() {
        let status = |abort, has_output| ApiError::from_abort(&abort, has_output).map(|error| error.status.as_u16());
        assert_eq!(status(Abort::ByUser, false), None);
        assert_eq!(status(Abort::TimedOut, true), None);
        assert_eq!(status(Abort::TimedOut, false), Some(504));
        assert_eq!(status(Abort::OutOfPages, false), Some(503));
        assert_eq!(status(Abort::ShuttingDown, true), Some(503));
        assert_eq!(status(Abort::Failed("a step failed".into()), true), Some(500));
    }
}
