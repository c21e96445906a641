//! What an administrator changes while the server runs, and who does it.
//!
//! The server knows names, requests and generations; what a plugin or a checkpoint is, an [`Operator`] knows.

use std::{path::PathBuf, sync::Arc};

use serde::{Deserialize, Serialize};

use crate::config::ServedModel;

/// Loads plugins and makes models. All methods may take long; the server calls them on blocking threads, those that
/// change something one at a time.
pub trait Operator: Send + Sync {
    fn plugins(&self) -> Vec<PluginInfo>;

    /// Loads a plugin file. It takes the place of a plugin of its name for models loaded from now on.
    fn load_plugin(&self, request: &LoadPlugin) -> Result<PluginInfo, OperateError>;

    /// Reads and checks everything that is needed to make a model but its weights, with the plugins of this moment.
    fn recipe(&self, request: &ModelRequest) -> Result<Arc<dyn Recipe>, OperateError>;
}

/// Makes one model, as often as it is asked to, always from the same plugins.
pub trait Recipe: Send + Sync {
    /// Starts an engine and returns while it loads. `released_bytes`: memory that another engine is going to release,
    /// for which this one waits when its programs are ready.
    fn start(&self, names: Vec<String>, released_bytes: u64) -> Result<ServedModel, OperateError>;
}

/// A plugin of the server.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct PluginInfo {
    pub name: String,
    pub version: String,
    pub description: String,
    /// `model`, `attention`, `speculative`.
    pub kinds: Vec<String>,
    pub architectures: Vec<String>,
    /// `None` of one that is built into the server.
    pub path: Option<String>,
    pub sha256: Option<String>,
    /// The version of the plugin of this name whose place it took when it was loaded.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub replaced: Option<String>,
}

/// The body of `POST /v1/plugins`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, expecting = "a JSON object")]
pub struct LoadPlugin {
    /// A file in a folder that the server loads plugins from, by name or path.
    pub file: PathBuf,
    /// What the file must hash to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sha256: Option<String>,
}

/// How a model is to be loaded. What is left out is as the server was started, or, in a swap, as the present
/// generation has it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, expecting = "a JSON object")]
pub struct ModelRequest {
    pub model_path: Option<String>,
    pub tokenizer_path: Option<String>,
    pub chat_template: Option<String>,
    /// `auto`, `float32` or `bfloat16`.
    pub dtype: Option<String>,
    /// Name of an attention plugin, or `auto`.
    pub attention_backend: Option<String>,
    pub context_length: Option<usize>,
    /// Share of the server's memory for weights and KV together.
    pub mem: Option<f64>,
    pub max_total_tokens: Option<usize>,
    pub max_running_requests: Option<usize>,
    pub chunked_prefill_size: Option<usize>,
    pub page_size: Option<usize>,
}

impl ModelRequest {
    /// What `self` says, and `base` where it says nothing. Of another checkpoint nothing is taken over that belongs to
    /// the one in `base`: its tokenizer and template.
    pub fn over(self, base: &Self) -> Self {
        let base = base.clone();
        let is_same = self.model_path.is_none() || self.model_path == base.model_path;
        let of_checkpoint = |own: Option<String>, base: Option<String>| own.or(base.filter(|_| is_same));
        Self {
            tokenizer_path: of_checkpoint(self.tokenizer_path, base.tokenizer_path),
            chat_template: of_checkpoint(self.chat_template, base.chat_template),
            model_path: self.model_path.or(base.model_path),
            dtype: self.dtype.or(base.dtype),
            attention_backend: self.attention_backend.or(base.attention_backend),
            context_length: self.context_length.or(base.context_length.filter(|_| is_same)),
            mem: self.mem.or(base.mem),
            max_total_tokens: self.max_total_tokens.or(base.max_total_tokens),
            max_running_requests: self.max_running_requests.or(base.max_running_requests),
            chunked_prefill_size: self.chunked_prefill_size.or(base.chunked_prefill_size),
            page_size: self.page_size.or(base.page_size),
        }
    }
}

/// Why a change was not made. The text is shown to the administrator.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum OperateError {
    /// The request cannot be served; the field at fault, if it is one.
    #[error("{message}")]
    Invalid { field: Option<&'static str>, message: String },
    /// It does not fit what the server does at the moment.
    #[error("{0}")]
    Conflict(String),
}

impl OperateError {
    pub fn invalid(field: &'static str, message: impl Into<String>) -> Self {
        Self::Invalid { field: Some(field), message: message.into() }
    }

    pub fn other(message: impl Into<String>) -> Self {
        Self::Invalid { field: None, message: message.into() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_checkpoint_brings_its_own_tokenizer() {
        let base = ModelRequest {
            model_path: Some("a".into()),
            chat_template: Some("chatml".into()),
            dtype: Some("float32".into()),
            context_length: Some(64),
            ..ModelRequest::default()
        };
        let backend = ModelRequest { attention_backend: Some("paged".into()), ..ModelRequest::default() };
        let same = backend.over(&base);
        assert_eq!((same.model_path.as_deref(), same.attention_backend.as_deref()), (Some("a"), Some("paged")));
        assert_eq!((same.chat_template.as_deref(), same.context_length), (Some("chatml"), Some(64)));
        let other = ModelRequest { model_path: Some("b".into()), ..ModelRequest::default() }.over(&base);
        assert_eq!((other.model_path.as_deref(), other.dtype.as_deref()), (Some("b"), Some("float32")));
        assert_eq!((other.chat_template, other.context_length), (None, None));
    }
}
