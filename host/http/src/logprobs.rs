//! Logprobs in the shapes of the three APIs.

use std::sync::Arc;

use torus_engine::api::{LogprobOptions, TOP_LOGPROBS_MAX, TokenLogprob};
use torus_openai::{
    Int,
    chat::{ChatLogprob, ChatLogprobs, ChatTopLogprob},
    completion::{CompletionLogprobs, TopLogprobs},
    generate::GenerateLogprob,
};
use torus_text::{DetokenizeOptions, Detokenizer, Tokenizer};

use crate::{error::ApiError, sampling::integer, sequence::OutputToken};

/// JSON has no infinity; a token that cannot be sampled has this logprob.
const LOWEST: f32 = -9999.0;

/// A wanted number of alternatives.
pub(crate) fn top_n(name: &'static str, wanted: Int) -> Result<u32, ApiError> {
    integer(name, Some(wanted), 0, 0..=i64::from(TOP_LOGPROBS_MAX)).map(|count| count as u32)
}

/// Logprobs of the output with `top_n` alternatives each.
pub(crate) fn of_output(top_n: u32) -> LogprobOptions {
    LogprobOptions { output: true, top_n, prompt_from: None }
}

fn finite(logprob: f32) -> f32 {
    if logprob.is_finite() { logprob } else { LOWEST }
}

/// Of a chat's tokens.
pub(crate) fn chat(tokenizer: &Tokenizer, tokens: &[OutputToken]) -> ChatLogprobs {
    let name = |id| (tokenizer.token_to_string(id), tokenizer.token_bytes(id).to_vec());
    let content = tokens.iter().filter_map(|token| {
        let found = token.logprob.as_ref()?;
        let top_logprobs = found.top.iter().map(|&(id, logprob)| {
            let (token, bytes) = name(id);
            ChatTopLogprob { token, bytes, logprob: finite(logprob) }
        });
        let (name, bytes) = name(token.id);
        let logprob = finite(found.logprob.unwrap_or(LOWEST));
        Some(ChatLogprob { token: name, bytes, logprob, top_logprobs: top_logprobs.collect() })
    });
    ChatLogprobs { content: content.collect() }
}

/// Of a completion's tokens, which begin `text_offset` characters into the text.
pub(crate) fn completion(tokenizer: &Tokenizer, tokens: &[OutputToken], text_offset: usize) -> CompletionLogprobs {
    let mut logprobs = CompletionLogprobs::default();
    for token in tokens {
        if let Some(found) = &token.logprob {
            push_completion(tokenizer, found, text_offset + token.char_offset, &mut logprobs);
        }
    }
    logprobs
}

/// Of an echoed prompt. Offsets are those in its text.
pub(crate) fn echo(tokenizer: &Arc<Tokenizer>, prompt: &[TokenLogprob]) -> CompletionLogprobs {
    let mut logprobs = CompletionLogprobs::default();
    let mut detokenizer = Detokenizer::new(Arc::clone(tokenizer), DetokenizeOptions::default());
    let mut chars = 0;
    for token in prompt {
        push_completion(tokenizer, token, chars, &mut logprobs);
        chars += detokenizer.push(&[token.token]).chars().count();
    }
    logprobs
}

fn push_completion(tokenizer: &Tokenizer, found: &TokenLogprob, offset: usize, logprobs: &mut CompletionLogprobs) {
    logprobs.text_offset.push(offset);
    logprobs.tokens.push(tokenizer.token_to_string(found.token));
    logprobs.token_logprobs.push(found.logprob.map(finite));
    logprobs.top_logprobs.push(found.logprob.map(|logprob| {
        let mut top = found.top.clone();
        // OpenAI's API always tells the sampled token's too.
        if !top.iter().any(|(id, _)| *id == found.token) {
            top.push((found.token, logprob));
        }
        TopLogprobs(top.into_iter().map(|(id, logprob)| (tokenizer.token_to_string(id), finite(logprob))).collect())
    }));
}

/// A token's logprob in the native shape, and those of its alternatives. `with_text`: write the tokens' text.
pub(crate) fn native(
    tokenizer: &Tokenizer,
    found: &TokenLogprob,
    with_text: bool,
) -> (GenerateLogprob, Option<Vec<GenerateLogprob>>) {
    let text = |id| with_text.then(|| tokenizer.token_to_string(id));
    let token = (found.logprob.map(finite), found.token, text(found.token));
    let top =
        found.logprob.map(|_| found.top.iter().map(|&(id, logprob)| (Some(finite(logprob)), id, text(id))).collect());
    (token, top)
}
