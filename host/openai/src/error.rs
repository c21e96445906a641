//! Error bodies.

use serde::Serialize;

/// An error, for clients of both families at once: SGLang's read the outer fields, OpenAI's the inner ones.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ErrorBody<'a> {
    /// Always `error`.
    pub object: &'static str,
    pub message: &'a str,
    /// By status: `BadRequestError`, `NotFoundError`, …
    pub r#type: &'static str,
    /// The field of the request that is at fault.
    pub param: Option<&'a str>,
    /// The HTTP status.
    pub code: u16,
    pub error: ErrorDetail<'a>,
}

/// What OpenAI's clients raise.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ErrorDetail<'a> {
    pub message: &'a str,
    pub r#type: &'static str,
    pub param: Option<&'a str>,
    pub code: ErrorCode,
}

/// A word where OpenAI has one for the case, otherwise the HTTP status.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub enum ErrorCode {
    Word(&'static str),
    Status(u16),
}

/// An error in a stream that has begun, after which only `[DONE]` follows.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct StreamError<'a> {
    pub error: StreamErrorDetail<'a>,
}

/// The content of a [`StreamError`].
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct StreamErrorDetail<'a> {
    /// Always `error`.
    pub object: &'static str,
    pub message: &'a str,
    pub r#type: &'static str,
    pub param: Option<&'a str>,
    pub code: u16,
}
