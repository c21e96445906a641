//! One sequence on its way from the engine: events become text, ends are found, times are taken.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Instant,
};

use futures::Stream;
use torus_engine::api::{Abort, Event, EventStream, FinishReason, TokenLogprob};
use torus_openai::Matched;

use crate::{models::Lease, text::OutputText};

/// After this many events others have their turn.
const EVENTS_PER_POLL: usize = 64;

/// A stream of [`Update`]s that ends after one with a `finish`. Dropping it aborts the sequence.
pub(crate) struct Sequence {
    model: Arc<Lease>,
    /// `None` once the sequence has ended.
    events: Option<EventStream>,
    text: OutputText,
    /// No token is wanted, only the prompt's logprobs. The engine was asked for one all the same.
    is_prompt_only: bool,
    /// An update has at least this many tokens, but for the first and the last one.
    tokens_per_update: usize,
    clock: Clock,
    pending: Update,
}

/// What is new of a sequence, and how far it is.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Update {
    /// Which sequence of the request.
    pub index: usize,
    pub text: String,
    pub tokens: Vec<OutputToken>,
    /// The prompt has been computed since the last update.
    pub is_prefill: bool,
    pub prompt_logprobs: Vec<TokenLogprob>,
    pub finish: Option<Finish>,
    /// Total so far.
    pub completion_tokens: usize,
    pub cached_tokens: usize,
    /// Since the sequence was submitted.
    pub elapsed_s: f64,
}

/// An update with more tokens takes long to write.
const LARGE_TOKENS: usize = 1024;

impl Update {
    /// Whether writing it might hold up others.
    pub fn is_large(&self) -> bool {
        self.tokens.len() + self.prompt_logprobs.len() > LARGE_TOKENS
    }

    /// Adds what came after it.
    pub fn extend(&mut self, later: Self) {
        self.text.push_str(&later.text);
        self.tokens.extend(later.tokens);
        self.is_prefill |= later.is_prefill;
        self.prompt_logprobs.extend(later.prompt_logprobs);
        self.finish = later.finish;
        self.completion_tokens = later.completion_tokens;
        self.cached_tokens = later.cached_tokens;
        self.elapsed_s = later.elapsed_s;
    }
}

/// A generated token.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct OutputToken {
    pub id: u32,
    /// Where its text begins in the output, in characters.
    pub char_offset: usize,
    /// It ended the sequence and is left out of the output.
    pub is_hidden: bool,
    /// If logprobs were asked for.
    pub logprob: Option<TokenLogprob>,
}

/// How a sequence ended.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Finish {
    Stop(Matched),
    Length,
    Aborted(Abort),
}

impl Finish {
    /// OpenAI's `finish_reason`.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Stop(_) => "stop",
            Self::Length => "length",
            Self::Aborted(_) => "abort",
        }
    }

    pub fn matched(&self) -> Option<&Matched> {
        match self {
            Self::Stop(matched) => Some(matched),
            Self::Length | Self::Aborted(_) => None,
        }
    }
}

/// When things happened.
struct Clock {
    submitted: Instant,
    last_token: Option<Instant>,
}

/// What a [`Sequence`] is made of beside its events.
pub(crate) struct SequenceParts {
    pub index: usize,
    pub model: Arc<Lease>,
    pub text: OutputText,
    pub is_prompt_only: bool,
    pub tokens_per_update: usize,
}

impl Sequence {
    pub fn new(parts: SequenceParts, events: EventStream) -> Self {
        let SequenceParts { index, model, text, is_prompt_only, tokens_per_update } = parts;
        model.metrics.requests.increment(1);
        Self {
            model,
            events: Some(events),
            text,
            is_prompt_only,
            tokens_per_update,
            clock: Clock { submitted: Instant::now(), last_token: None },
            pending: Update { index, ..Update::default() },
        }
    }

    fn take_event(&mut self, event: Event) {
        match event {
            Event::Prefilled { cached_tokens, prompt_logprobs } => {
                self.pending.is_prefill = true;
                self.pending.cached_tokens = cached_tokens;
                self.pending.prompt_logprobs = prompt_logprobs;
                if self.is_prompt_only {
                    self.finish(Finish::Length);
                }
            }
            Event::Tokens { tokens, logprobs } => self.take_tokens(&tokens, logprobs),
            Event::Finished(reason) => {
                self.text.finish(&mut self.pending.text);
                self.finish(match reason {
                    FinishReason::Stop { token } => Finish::Stop(Matched::Token(token)),
                    FinishReason::Length => Finish::Length,
                    FinishReason::Aborted(abort) => Finish::Aborted(abort),
                });
            }
        }
    }

    fn take_tokens(&mut self, tokens: &[u32], logprobs: Vec<TokenLogprob>) {
        let mut logprobs = logprobs.into_iter();
        let before = self.pending.completion_tokens;
        for &id in tokens {
            let placed = self.text.push(id, &mut self.pending.text);
            self.pending.completion_tokens += 1;
            self.pending.tokens.push(OutputToken {
                id,
                char_offset: placed.char_offset,
                is_hidden: placed.is_hidden,
                logprob: logprobs.next(),
            });
            if let Some(stop) = placed.stopped {
                self.finish(Finish::Stop(Matched::Text(stop)));
                break;
            }
        }
        self.observe_tokens(self.pending.completion_tokens - before);
    }

    fn observe_tokens(&mut self, count: usize) {
        if count == 0 {
            return;
        }
        let now = Instant::now();
        let metrics = &self.model.metrics;
        match self.clock.last_token.replace(now) {
            None => metrics.time_to_first_token_s.record(now - self.clock.submitted),
            Some(last) => metrics.inter_token_latency_s.record_many((now - last) / count as u32, count),
        }
    }

    /// Ends the sequence. The engine hears of it by the end of its stream.
    fn finish(&mut self, finish: Finish) {
        let metrics = &self.model.metrics;
        match finish {
            Finish::Aborted(_) => metrics.aborted_requests.increment(1),
            Finish::Stop(_) | Finish::Length => metrics.e2e_latency_s.record(self.clock.submitted.elapsed()),
        }
        self.pending.finish = Some(finish);
        self.events = None;
    }

    /// Whether what is pending is worth sending.
    fn is_due(&self) -> bool {
        let Update { tokens, is_prefill, finish, completion_tokens, .. } = &self.pending;
        let is_first = *completion_tokens == tokens.len();
        let has_enough = !tokens.is_empty() && (is_first || tokens.len() >= self.tokens_per_update);
        *is_prefill || has_enough || finish.is_some()
    }

    fn take_pending(&mut self) -> Update {
        let Update { index, completion_tokens, cached_tokens, .. } = self.pending;
        self.pending.elapsed_s = self.clock.submitted.elapsed().as_secs_f64();
        let rest = Update { index, completion_tokens, cached_tokens, ..Update::default() };
        std::mem::replace(&mut self.pending, rest)
    }
}

impl Stream for Sequence {
    type Item = Update;

    /// What has come since the last update, in one.
    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context) -> Poll<Option<Update>> {
        if self.events.is_none() {
            return Poll::Ready(None);
        }
        for _ in 0..EVENTS_PER_POLL {
            let Some(events) = &mut self.events else { break };
            match events.as_mut().poll_next(context) {
                Poll::Ready(Some(event)) => self.take_event(event),
                Poll::Ready(None) => {
                    tracing::error!("the engine ended a request without a result");
                    let message = "the request ended without a result".to_owned();
                    self.finish(Finish::Aborted(Abort::Failed(message)));
                }
                Poll::Pending if self.is_due() => return Poll::Ready(Some(self.take_pending())),
                Poll::Pending => return Poll::Pending,
            }
        }
        if self.is_due() {
            return Poll::Ready(Some(self.take_pending()));
        }
        context.waker().wake_by_ref();
        Poll::Pending
    }
}

impl Drop for Sequence {
    fn drop(&mut self) {
        if self.events.is_some() {
            self.model.metrics.aborted_requests.increment(1);
        }
    }
}
