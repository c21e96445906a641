//! All sequences of one request: submitted together, followed together, ended together.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Instant,
};

use futures::{
    Stream, StreamExt,
    stream::{SelectAll, select_all},
};
use torus_engine::api::{GenerateRequest, LogprobOptions, ModelInfo};
use torus_openai::{CachedTokens, Usage};
use torus_text::DetokenizeOptions;

use crate::{
    app::{ActiveGuard, App, in_place},
    error::ApiError,
    models::Lease,
    sampling::Sampling,
    sequence::{Finish, Sequence, SequenceParts, Update},
    text::{OutputText, TextOptions},
};

const MAX_NAMESPACE_BYTES: usize = 1024;

/// What is to be generated for one prompt.
#[derive(Clone)]
pub(crate) struct PromptPlan {
    /// Ids of its `n` sequences.
    pub sequence_ids: Vec<String>,
    pub tokens: Arc<[u32]>,
    pub max_new_tokens: u32,
    pub sampling: Arc<Sampling>,
    pub text: Arc<TextOptions>,
    pub logprobs: LogprobOptions,
    pub namespace: Option<Arc<str>>,
}

/// A checked request.
pub(crate) struct Plan {
    /// Ids under which the client can abort it, with the sequences they stand for.
    pub request_ids: Vec<(String, Vec<String>)>,
    pub prompts: Vec<PromptPlan>,
    /// Updates have at least this many tokens.
    pub tokens_per_update: usize,
}

impl TextOptions {
    /// For the sequences of a prompt. `continues_text`: the output goes on where the prompt ends.
    pub fn new(sampling: &Sampling, info: &ModelInfo, continues_text: bool) -> Self {
        Self {
            detokenize: DetokenizeOptions { skip_special_tokens: sampling.skip_special_tokens, continues_text },
            stop: sampling.stop.clone(),
            include_stop: sampling.include_stop,
            min_tokens: sampling.min_new_tokens() as usize,
            end_tokens: sampling.end_tokens(info),
        }
    }
}

/// The namespace of the prefix cache that a request wants. Where both keys are given, both must be shared.
pub(crate) fn namespace(extra_key: Option<&str>, cache_salt: Option<&str>) -> Result<Option<Arc<str>>, ApiError> {
    for (name, key) in [("extra_key", extra_key), ("cache_salt", cache_salt)] {
        if key.is_some_and(|key| key.len() > MAX_NAMESPACE_BYTES) {
            let message = format!("{name} may have at most {MAX_NAMESPACE_BYTES} bytes");
            return Err(ApiError::bad_request(name, message));
        }
    }
    let (key, salt) = (extra_key.unwrap_or_default(), cache_salt.unwrap_or_default());
    // The length keeps one pair from looking like another.
    Ok((!key.is_empty() || !salt.is_empty()).then(|| format!("{}:{key}{salt}", key.len()).into()))
}

/// Refuses more sequences than one request may have.
pub(crate) fn check_sequences(app: &App, prompts: usize, n: usize) -> Result<(), ApiError> {
    let limit = app.limits.sequences_per_request;
    if prompts * n > limit {
        let message = format!("{prompts} prompts with n={n} are more than the {limit} sequences of one request");
        return Err(ApiError::bad_request("n", message));
    }
    Ok(())
}

/// The sequences of a request, as a stream of their updates. Dropping it aborts those that have not finished.
pub(crate) struct Generation {
    sequences: Sequences,
    _active: ActiveGuard,
    progress: Progress,
}

enum Sequences {
    /// Most requests have one; what follows many costs as much as writing an event.
    One(Box<Sequence>),
    Many(SelectAll<Sequence>),
}

impl Sequences {
    fn new(mut sequences: Vec<Sequence>) -> Self {
        match (sequences.len(), sequences.pop()) {
            (1, Some(sequence)) => Self::One(Box::new(sequence)),
            (_, last) => Self::Many(select_all(sequences.into_iter().chain(last))),
        }
    }
}

impl Generation {
    /// Hands all sequences to the engine, or none.
    pub fn submit(app: &App, model: &Arc<Lease>, plan: Plan) -> Result<Self, ApiError> {
        if app.is_shutting_down() {
            return Err(ApiError::unavailable("the server is shutting down"));
        }
        let active = app.active.register(plan.request_ids)?;
        let deadline = app.request_timeout.map(|timeout| Instant::now() + timeout);
        let mut sequences = Vec::new();
        let mut progress = Progress::default();
        for prompt in plan.prompts {
            for (copy, id) in prompt.sequence_ids.iter().enumerate() {
                let index = progress.sequences.len();
                progress.sequences.push(SequenceProgress::default());
                if copy == 0 {
                    progress.first_copies.push((index, prompt.tokens.len()));
                }
                let text = OutputText::new(Arc::clone(&model.tokenizer), Arc::clone(&prompt.text))
                    .map_err(|error| ApiError::from_text("stop", &error))?;
                let is_prompt_only = prompt.max_new_tokens == 0;
                let events = model.engine.submit(GenerateRequest {
                    id: id.clone(),
                    prompt: Arc::clone(&prompt.tokens),
                    sampling: prompt.sampling.for_engine(copy, prompt.max_new_tokens.max(1)),
                    logprobs: prompt.logprobs.clone(),
                    namespace: prompt.namespace.clone(),
                    deadline,
                })?;
                let tokens_per_update = plan.tokens_per_update;
                let model = Arc::clone(model);
                let parts = SequenceParts { index, model, text, is_prompt_only, tokens_per_update };
                sequences.push(Sequence::new(parts, events));
            }
        }
        Ok(Self { sequences: Sequences::new(sequences), _active: active, progress })
    }

    /// Whether there may be another update at once. A sequence gives all that it has in one.
    pub fn may_have_more(&self) -> bool {
        matches!(self.sequences, Sequences::Many(_))
    }

    /// Follows all sequences to their ends. Each result is everything of one sequence. The first error among them ends
    /// all, unless `with_failed`.
    pub async fn collect(&mut self, with_failed: bool) -> Result<Vec<Update>, ApiError> {
        let mut results: Vec<Update> = vec![Update::default(); self.progress.sequences.len()];
        while let Some(update) = self.next().await {
            if let Some(error) = update.error().filter(|_| !with_failed) {
                return Err(error);
            }
            if let Some(result) = results.get_mut(update.index) {
                result.index = update.index;
                result.extend(update);
            }
        }
        Ok(results)
    }

    /// Writes the response to results of [`collect`](Self::collect).
    pub fn respond<T>(&self, results: Vec<Update>, write: impl FnOnce(Vec<Update>) -> T) -> T {
        in_place(results.iter().any(Update::is_large), || write(results))
    }

    pub fn usage(&self, with_cached: bool) -> Usage {
        self.progress.usage(with_cached)
    }
}

impl Update {
    /// The error that takes the place of an answer.
    pub fn error(&self) -> Option<ApiError> {
        match &self.finish {
            Some(Finish::Aborted(abort)) => ApiError::from_abort(abort, self.completion_tokens > 0),
            _ => None,
        }
    }
}

impl Stream for Generation {
    type Item = Update;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context) -> Poll<Option<Update>> {
        let update = match &mut self.sequences {
            Sequences::One(sequence) => sequence.poll_next_unpin(context),
            Sequences::Many(sequences) => sequences.poll_next_unpin(context),
        };
        if let Poll::Ready(Some(update)) = &update {
            self.progress.take(update);
        }
        update
    }
}

/// How far the sequences are.
#[derive(Default)]
struct Progress {
    sequences: Vec<SequenceProgress>,
    /// Index of the first sequence of each prompt, and the prompt's length. The others share its prompt.
    first_copies: Vec<(usize, usize)>,
}

#[derive(Clone, Copy, Default)]
struct SequenceProgress {
    completion_tokens: usize,
    cached_tokens: usize,
}

impl Progress {
    fn take(&mut self, update: &Update) {
        if let Some(sequence) = self.sequences.get_mut(update.index) {
            sequence.completion_tokens = update.completion_tokens;
            sequence.cached_tokens = update.cached_tokens;
        }
    }

    /// As the reference counts: prompts once, however many sequences continue them.
    fn usage(&self, with_cached: bool) -> Usage {
        let prompt_tokens = self.first_copies.iter().map(|(_, tokens)| tokens).sum();
        let completion_tokens = self.sequences.iter().map(|sequence| sequence.completion_tokens).sum();
        let first_copies = self.first_copies.iter().filter_map(|(index, _)| self.sequences.get(*index));
        let cached_tokens: usize = first_copies.map(|sequence| sequence.cached_tokens).sum();
        Usage {
            prompt_tokens,
            total_tokens: prompt_tokens + completion_tokens,
            completion_tokens,
            prompt_tokens_details: (with_cached && cached_tokens > 0).then_some(CachedTokens { cached_tokens }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn namespaces_keep_tenants_apart() {
        let of = |key, salt| namespace(key, salt).unwrap();
        assert_eq!(of(None, None), None);
        assert_eq!(of(Some(""), Some("")), None);
        assert_eq!(of(Some("a"), Some("b")).as_deref(), Some("1:ab"));
        let all = [
            of(Some("a"), None),
            of(None, Some("a")),
            of(Some("a"), Some("b")),
            of(Some("ab"), Some("")),
            of(None, Some("ab")),
        ];
        for (index, namespace) in all.iter().enumerate() {
            assert!(!all[..index].contains(namespace), "{namespace:?}");
        }
        assert!(namespace(Some(&"x".repeat(1025)), None).is_err());
    }
}
