//! What responses of all APIs have in common.

use serde::Serialize;

/// Tokens that a request took.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Usage {
    pub prompt_tokens: usize,
    pub total_tokens: usize,
    pub completion_tokens: usize,
    pub prompt_tokens_details: Option<CachedTokens>,
}

/// Prompt tokens that were not computed again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct CachedTokens {
    pub cached_tokens: usize,
}

/// The chunk after the last one of a stream with `stream_options.include_usage`, of chats and of text completions.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct UsageChunk<'a> {
    pub id: &'a str,
    pub object: &'static str,
    pub created: u64,
    pub model: &'a str,
    /// Always empty.
    pub choices: [(); 0],
    pub usage: UsageWithoutNulls,
}

/// [`Usage`] as the reference writes it at the end of a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct UsageWithoutNulls {
    pub prompt_tokens: usize,
    pub total_tokens: usize,
    pub completion_tokens: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prompt_tokens_details: Option<CachedTokens>,
}

impl From<Usage> for UsageWithoutNulls {
    fn from(usage: Usage) -> Self {
        let Usage { prompt_tokens, total_tokens, completion_tokens, prompt_tokens_details } = usage;
        Self { prompt_tokens, total_tokens, completion_tokens, prompt_tokens_details }
    }
}

/// What ended an answer (`matched_stop`).
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub enum Matched {
    Token(u32),
    Text(String),
}
