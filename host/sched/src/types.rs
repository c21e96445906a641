//! What goes in and out of the scheduler.

use std::sync::Arc;

use torus_cache::PageId;

use crate::Policy;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RequestId(pub u64);

/// A row of the arrays on the device; a running sequence has one of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SlotId(pub u32);

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BatchId(pub u64);

/// Limits that do not change.
#[derive(Clone, Debug)]
pub struct Config {
    /// Sequences that run at once.
    pub max_running: usize,
    /// Tokens of a step at most.
    pub token_budget: usize,
    /// Prompt tokens of a step at most.
    pub max_prefill_tokens: usize,
    /// Requests that wait at most.
    pub max_queued: usize,
    pub page_size: usize,
    /// Pages of the pool, the trash page included.
    pub pages: usize,
    /// Whether prefill and decode share steps. If not, they take turns.
    pub mixed: bool,
    /// Steps in flight at most: 1, or 2 to prepare one while another runs.
    pub in_flight_max: usize,
    pub policy: Policy,
    /// Share the KV of common prefixes.
    pub prefix_cache: bool,
}

/// What a step may compute of prompts in which others decode.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PrefillLimit {
    /// Tokens, if they had nothing before them to attend to.
    pub tokens: f64,
    /// How much more a token counts for each one before it.
    pub per_context: f64,
}

impl PrefillLimit {
    pub const NONE: Self = Self { tokens: f64::INFINITY, per_context: 0.0 };

    /// What `len` tokens from position `start` on count.
    pub(crate) fn count(&self, start: usize, len: usize) -> f64 {
        len as f64 * (1.0 + self.per_context * (start as f64 + len as f64 / 2.0))
    }

    /// How many tokens from position `start` on count about as many as `left`.
    pub(crate) fn fitting(&self, start: usize, left: f64) -> usize {
        // The positive root of k/2 * n^2 + (1 + k * start) * n = left, in a form that holds for k = 0.
        let (k, first) = (self.per_context, 1.0 + self.per_context * start as f64);
        let n = 2.0 * left / (first + (first * first + 2.0 * k * left).sqrt());
        if left.is_finite() { n.round().max(0.0) as usize } else { usize::MAX }
    }
}

/// A sequence to continue.
#[derive(Clone, Debug)]
pub struct Request {
    pub id: RequestId,
    /// At least one token.
    pub prompt: Arc<[u32]>,
    pub max_new_tokens: usize,
    pub namespace: Option<Arc<str>>,
    /// Prefix hits cover at most this many tokens.
    pub reuse_max_tokens: usize,
    /// While this request computes its prompt, steps with it have at most this many tokens in all.
    pub step_tokens_max: Option<usize>,
}

/// Why a request is not taken.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AdmitError {
    #[error("{queued} requests are waiting, and no more may")]
    QueueFull { queued: usize },
    #[error("the prompt has {tokens} tokens and the KV pool holds {capacity}")]
    TooLong { tokens: usize, capacity: usize },
    #[error("the prompt is empty")]
    EmptyPrompt,
    #[error("request {0:?} is known already")]
    DuplicateId(RequestId),
}

/// How a request ended that the caller did not end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// The pool is too small even for this sequence alone.
    OutOfPages,
    /// Steps with this sequence failed, and so did one with it alone.
    Failed,
}

/// What the next step computes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Batch {
    pub id: BatchId,
    /// Decode rows first.
    pub rows: Vec<Row>,
}

/// The part of one sequence in a step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Row {
    pub request: RequestId,
    pub slot: SlotId,
    /// Set in the first row after the sequence got its slot: prompt tokens found in the cache. All its pages are new.
    pub admitted: Option<usize>,
    /// Positions `start..start + len` are computed.
    pub start: usize,
    pub len: usize,
    /// Their tokens; empty if it is one token, the last sampled in this slot, which only the device knows.
    pub tokens: Vec<u32>,
    /// Whether the last of them gives a new token, and the how manieth of the request that is, from 0.
    pub samples: Option<usize>,
    /// Pages that came to the sequence since its last row, with their index among the sequence's pages: replaced ones
    /// first, then those at the end.
    pub new_pages: Vec<(usize, PageId)>,
}

impl Batch {
    pub fn tokens(&self) -> usize {
        self.rows.iter().map(|row| row.len).sum()
    }
}

/// What a row of a finished step gave.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The row sampled nothing, or the request has been ended meanwhile.
    Nothing,
    Token(u32),
    /// This token, and the request is done with it.
    Finished(u32),
    /// What the step computed for this request is wrong (not numbers). The request ends and none of its KV is shared.
    Discarded,
}

/// A snapshot for operators.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    pub running: usize,
    pub queued: usize,
    pub pages: torus_cache::PageStats,
    /// Prompt tokens of admitted requests, and how many of them were cached.
    pub prompt_tokens: u64,
    pub cached_tokens: u64,
    pub retractions: u64,
}
