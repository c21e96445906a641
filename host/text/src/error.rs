//! What can go wrong with text, by who can mend it.

use std::path::PathBuf;

/// An error of this crate.
///
/// The variants up to [`InvalidTemplate`](Self::InvalidTemplate) are for the operator: the model's files are at fault.
/// The others are answers to a request; [`is_request_error`](Self::is_request_error) tells them apart.
#[derive(Debug, thiserror::Error)]
pub enum TextError {
    #[error("cannot read {path}: {source}", path = path.display())]
    Read { path: PathBuf, source: std::io::Error },
    /// A tokenizer file (or the tokenizer metadata of a GGUF file) contradicts itself or its format.
    #[error("{file}: {reason}")]
    InvalidTokenizer { file: String, reason: String },
    /// A well-formed tokenizer of a kind that this crate does not implement.
    #[error("unsupported tokenizer: {0}")]
    UnsupportedTokenizer(String),
    /// The chat template cannot be compiled.
    #[error("chat template {name}: {reason}; correct it or choose another one with --chat-template")]
    InvalidTemplate { name: String, reason: String },

    #[error("the text has {bytes} bytes, more than the limit of {limit}")]
    TextTooLong { bytes: usize, limit: usize },
    #[error("the text cannot be tokenized: {0}")]
    Encode(String),
    /// `messages`, `tools` or `chat_template_kwargs` are not what a chat template can be given.
    #[error("{0}")]
    InvalidChat(String),
    /// The template itself refused the conversation, with this message.
    #[error("the chat template refuses these messages: {0}")]
    Refused(String),
    #[error("the chat template failed on these messages: {0}")]
    Render(String),
    #[error("rendering the chat template exceeded its limit of {limit}")]
    TemplateLimit { limit: &'static str },
    #[error("stop strings must not be empty (stop[{index}])")]
    EmptyStopString { index: usize },
}

impl TextError {
    /// Whether the request is at fault (an answer of the 400 kind) rather than the model's files.
    pub fn is_request_error(&self) -> bool {
        match self {
            Self::Read { .. }
            | Self::InvalidTokenizer { .. }
            | Self::UnsupportedTokenizer(_)
            | Self::InvalidTemplate { .. } => false,
            Self::TextTooLong { .. }
            | Self::Encode(_)
            | Self::InvalidChat(_)
            | Self::Refused(_)
            | Self::Render(_)
            | Self::TemplateLimit { .. }
            | Self::EmptyStopString { .. } => true,
        }
    }
}
