//! Choosing what a step computes.

use std::collections::VecDeque;

use torus_cache::PrefixCache;

use crate::{
    AdmitError, Batch, BatchId, Config, Ended, PrefillLimit, Request, RequestId, Row, Stats,
    sequence::{Leaving, Sequence},
    sequences::{SequenceKey, Sequences},
};

/// A step that has been scheduled and is not complete.
#[derive(Debug)]
pub(crate) struct Flight {
    pub id: BatchId,
    pub rows: Vec<FlightRow>,
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct FlightRow {
    pub key: SequenceKey,
    pub request: RequestId,
    pub start: usize,
    pub end: usize,
}

/// Prompt tokens that a step with decoding sequences may always compute.
const MIXED_PREFILL_MIN: usize = 2;

/// Continuous batching over a pool of pages.
#[derive(Debug)]
pub struct Scheduler {
    pub(crate) config: Config,
    pub(crate) cache: PrefixCache,
    pub(crate) sequences: Sequences,
    pub(crate) queue: VecDeque<RequestId>,
    /// Sequences with a slot, in the order of their admission.
    pub(crate) running: Vec<SequenceKey>,
    pub(crate) free_slots: Vec<u32>,
    pub(crate) in_flight: VecDeque<Flight>,
    /// After a failure: groups that run by themselves until the step that failed has succeeded.
    pub(crate) trials: VecDeque<Vec<RequestId>>,
    pub(crate) ended: Vec<(RequestId, Ended)>,
    pub(crate) step: u64,
    /// Share of the tokens they may still generate for which running sequences reserve pages.
    pub(crate) reserved_share: f64,
    pub(crate) last_was_prefill: bool,
    /// What a step may compute of prompts in which others decode.
    pub(crate) mixed_prefill: PrefillLimit,
    pub(crate) refused: Option<crate::admit::Refused>,
    pub(crate) counters: Counters,
    /// For tests: a bug to plant.
    #[cfg(test)]
    pub(crate) planted: crate::sim::Planted,
}

#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Counters {
    pub prompt_tokens: u64,
    pub cached_tokens: u64,
    pub retractions: u64,
}

/// A step being put together.
pub(crate) struct Plan {
    pub rows: Vec<Row>,
    /// What is kept of each row until the step is complete.
    pub flown: Vec<FlightRow>,
    pub budget: usize,
    pub prefill_budget: usize,
    /// What is left of the limit on prompts beside sequences that decode.
    pub mixed_left: f64,
    /// Tokens of prompts that are computed whatever that limit says.
    pub mixed_min_left: usize,
}

impl Plan {
    /// Whether any prompt may still get into it.
    pub fn has_room(&self) -> bool {
        self.budget > 0 && self.prefill_budget > 0 && (self.mixed_left >= 0.5 || self.mixed_min_left > 0)
    }

    fn tokens(&self) -> usize {
        self.rows.iter().map(|row| row.len).sum()
    }
}

impl Scheduler {
    pub fn new(config: Config) -> Self {
        let cache = PrefixCache::new(config.pages, config.page_size, config.prefix_cache);
        Self {
            cache,
            sequences: Sequences::default(),
            queue: VecDeque::new(),
            running: Vec::new(),
            free_slots: (0..config.max_running as u32).rev().collect(),
            in_flight: VecDeque::new(),
            trials: VecDeque::new(),
            ended: Vec::new(),
            step: 0,
            reserved_share: crate::admit::RESERVED_SHARE_MAX,
            last_was_prefill: false,
            mixed_prefill: PrefillLimit::NONE,
            refused: None,
            counters: Counters::default(),
            config,
            #[cfg(test)]
            planted: crate::sim::Planted::Nothing,
        }
    }

    /// Takes a request into the queue.
    pub fn submit(&mut self, request: Request) -> Result<(), AdmitError> {
        let (tokens, capacity) = (request.prompt.len(), (self.config.pages - 1) * self.config.page_size);
        if tokens == 0 {
            return Err(AdmitError::EmptyPrompt);
        }
        if tokens > capacity {
            return Err(AdmitError::TooLong { tokens, capacity });
        }
        if self.queue.len() >= self.config.max_queued {
            return Err(AdmitError::QueueFull { queued: self.queue.len() });
        }
        if self.sequences.key(request.id).is_some() {
            return Err(AdmitError::DuplicateId(request.id));
        }
        self.queue.push_back(request.id);
        self.sequences.insert(Sequence::new(request));
        Ok(())
    }

    /// Limits what steps compute of prompts in which others decode, so that these do not wait long for their next tokens,
    /// unless more wait for their first. At least a few tokens are computed, or prompts would never end.
    pub fn limit_mixed_prefill(&mut self, limit: PrefillLimit) {
        self.mixed_prefill = limit;
    }

    /// The limit beside so many that decode, with so many prompts begun. It is for one prompt; the more others wait for
    /// their first token, the higher it is: a step costs little more for another that decodes, so a burst is done sooner,
    /// with all that follows, when most of its prompts are computed before most of it decodes.
    fn mixed_prefill_limit(&self, decodes: usize, prefills: usize) -> f64 {
        /// Of a prompt that waits behind another, against a sequence that decodes.
        const WEIGHT: f64 = 4.0;
        let behind = (self.queue.len() + prefills).saturating_sub(1);
        self.mixed_prefill.tokens * (1.0 + WEIGHT * behind as f64 / decodes as f64)
    }

    /// The next step, if there is anything to compute and room for one more in flight.
    pub fn schedule(&mut self) -> Option<Batch> {
        self.end_trials();
        let in_flight_max = if self.trials.is_empty() { self.config.in_flight_max } else { 1 };
        if self.in_flight.len() >= in_flight_max {
            return None;
        }
        self.step += 1;
        let mut plan = Plan {
            rows: Vec::with_capacity(self.running.len()),
            flown: Vec::with_capacity(self.running.len()),
            budget: self.config.token_budget,
            prefill_budget: self.config.max_prefill_tokens,
            mixed_left: f64::INFINITY,
            mixed_min_left: MIXED_PREFILL_MIN,
        };
        if self.config.mixed {
            self.add_decodes(&mut plan);
            let begun = self.begun_prompts();
            if !plan.rows.is_empty() {
                plan.mixed_left = self.mixed_prefill_limit(plan.rows.len(), begun.len());
            }
            self.add_prefills(&mut plan, &begun);
        } else if self.last_was_prefill {
            self.add_decodes(&mut plan);
            self.last_was_prefill = plan.rows.is_empty();
            if plan.rows.is_empty() {
                self.add_prefills(&mut plan, &self.begun_prompts());
            }
        } else {
            self.add_prefills(&mut plan, &self.begun_prompts());
            self.last_was_prefill = !plan.rows.is_empty();
            if plan.rows.is_empty() {
                self.add_decodes(&mut plan);
            }
        }
        if plan.rows.is_empty() {
            return None;
        }
        self.decay_reserved_share();
        let id = BatchId(self.step);
        self.in_flight.push_back(Flight { id, rows: plan.flown });
        Some(Batch { id, rows: plan.rows })
    }

    /// One token of every sequence that decodes. If there are more of them than the budget, they take turns.
    fn add_decodes(&mut self, plan: &mut Plan) {
        let mut order = self.running.clone();
        if order.len() > plan.budget {
            let turn = (self.step as usize).wrapping_mul(plan.budget) % order.len();
            order.rotate_left(turn);
        }
        for key in order {
            if plan.budget == 0 {
                break;
            }
            // Retracted on the way here, or not of those on trial.
            let Some(sequence) = self.sequences.at(key).filter(|s| s.wants_more() && s.decodes()) else { continue };
            if !self.is_eligible(sequence.request.id) {
                continue;
            }
            let has_room = sequence.scheduled < sequence.pages.len() * self.config.page_size;
            if has_room || self.take_pages(key, 1) || self.make_room(key, 1) {
                self.push_row(plan, key, 1);
            }
        }
    }

    /// Sequences with a slot whose prompts are not computed yet.
    fn begun_prompts(&self) -> Vec<SequenceKey> {
        let begun = |key: &SequenceKey| self.sequences.at(*key).is_some_and(|sequence| !sequence.decodes());
        self.running.iter().copied().filter(begun).collect()
    }

    /// Chunks of prompts: those begun first, then of those admitted now.
    fn add_prefills(&mut self, plan: &mut Plan, begun: &[SequenceKey]) {
        for key in begun {
            // Others may have made it give its pages up.
            let Some(sequence) = self.sequences.at(*key).filter(|s| s.wants_more() && !s.decodes()) else { continue };
            if self.is_eligible(sequence.request.id) && sequence.last_step != self.step {
                self.add_chunk(plan, *key);
            }
        }
        self.admit(plan);
    }

    /// As much of a prompt as budget and pages allow. False if that is nothing.
    pub(crate) fn add_chunk(&mut self, plan: &mut Plan, key: SequenceKey) -> bool {
        let page_size = self.config.page_size;
        let Some(sequence) = self.sequences.at(key) else { return false };
        let (scheduled, held) = (sequence.scheduled, sequence.pages.len());
        let limited = sequence.request.step_tokens_max.filter(|_| scheduled < sequence.request.prompt.len());
        let room = limited.map_or(plan.budget, |max| plan.budget.min(max.saturating_sub(plan.tokens())));
        let beside = self.mixed_prefill.fitting(scheduled, plan.mixed_left).max(plan.mixed_min_left);
        let wanted = (sequence.len() - scheduled).min(room).min(plan.prefill_budget).min(beside);
        if wanted == 0 {
            return false;
        }
        // A shorter chunk is better than none.
        let affordable = (held + self.cache.available()) * page_size - scheduled;
        let mut len = wanted.min(affordable);
        if len == 0 && plan.rows.is_empty() && self.in_flight.is_empty() {
            // Nothing else goes on that would free pages.
            if !self.make_room(key, 1) {
                return false;
            }
            len = wanted.min(page_size);
        }
        let missing = (scheduled + len).div_ceil(page_size).saturating_sub(self.held_pages(key));
        if len == 0 || !self.take_pages(key, missing) {
            return false;
        }
        self.push_row(plan, key, len);
        plan.prefill_budget -= len;
        plan.mixed_left -= self.mixed_prefill.count(scheduled, len);
        plan.mixed_min_left = plan.mixed_min_left.saturating_sub(len);
        if limited.is_some() {
            plan.budget = plan.budget.min(room - len);
        }
        true
    }

    fn held_pages(&self, key: SequenceKey) -> usize {
        self.sequences.at(key).map_or(0, |sequence| sequence.pages.len())
    }

    /// Gives a sequence more pages, if there are any.
    fn take_pages(&mut self, key: SequenceKey, count: usize) -> bool {
        let Some(sequence) = self.sequences.at_mut(key) else { return false };
        if !self.cache.allocate_onto(count, &mut sequence.pages) {
            return false;
        }
        sequence.private.resize(sequence.pages.len(), true);
        true
    }

    /// Takes pages from other sequences until this one has what it misses. False if it must wait: for steps in flight
    /// of those that give theirs up, or because it had to give up its own.
    fn make_room(&mut self, key: SequenceKey, missing: usize) -> bool {
        loop {
            if self.take_pages(key, missing) {
                return true;
            }
            let awaited = |key: &SequenceKey| self.sequences.at(*key).is_some_and(|s| s.leaving.is_some());
            if self.running.iter().any(awaited) {
                return false;
            }
            let Some(victim) = self.victim() else { return false };
            if victim == key && self.running.len() == 1 {
                return self.take_last_pages(key, missing);
            }
            self.counters.retractions += 1;
            self.reserve_more();
            self.leave(victim, Leaving::Retract);
            if victim == key {
                return false;
            }
        }
    }

    /// The pages a sequence misses that has the pool to itself. If they are not there, it is too large for it.
    fn take_last_pages(&mut self, key: SequenceKey, missing: usize) -> bool {
        if self.sequences.at(key).is_some_and(|sequence| sequence.in_flight > 0) {
            return false;
        }
        // Tokens that it keeps twice, in pages of its own and in the tree, are given up now.
        self.share_prefix(key);
        if self.take_pages(key, missing) {
            return true;
        }
        self.ended.extend(self.sequences.at(key).map(|sequence| (sequence.request.id, Ended::OutOfPages)));
        self.leave(key, Leaving::End);
        false
    }

    /// Who gives its pages up: who may not run now, then who has generated least, and of those the longest prompt.
    fn victim(&self) -> Option<SequenceKey> {
        let sequences = self.running.iter().filter_map(|key| self.sequences.at(*key).map(|sequence| (*key, sequence)));
        let candidates = sequences.filter(|(_, s)| s.last_step != self.step && s.leaving.is_none());
        let order = |(_, s): &(SequenceKey, &Sequence)| {
            let may_run = self.is_eligible(s.request.id);
            (may_run, s.output.len(), std::cmp::Reverse((s.request.prompt.len(), s.request.id)))
        };
        candidates.min_by_key(order).map(|(key, _)| key)
    }

    fn push_row(&mut self, plan: &mut Plan, key: SequenceKey, len: usize) {
        let Some(sequence) = self.sequences.at_mut(key) else { return };
        let Some(slot) = sequence.slot else { return };
        let (request, start) = (sequence.request.id, sequence.scheduled);
        sequence.scheduled += len;
        sequence.in_flight += 1;
        sequence.last_step = self.step;
        let samples = (sequence.scheduled == sequence.len()).then_some(sequence.sampled);
        let tokens = sequence.tokens(start, len);
        sequence.sampled += usize::from(samples.is_some());
        let new_pages = sequence.take_new_pages();
        let admitted = sequence.admitted.take();
        plan.budget -= len;
        plan.flown.push(FlightRow { key, request, start, end: start + len });
        plan.rows.push(Row { request, slot, admitted, start, len, tokens, samples, new_pages });
    }

    /// Requests that ended by themselves since the last call.
    pub fn take_ended(&mut self) -> Vec<(RequestId, Ended)> {
        std::mem::take(&mut self.ended)
    }

    pub fn in_flight(&self) -> usize {
        self.in_flight.len()
    }

    /// Whether nothing runs, waits or is in flight.
    pub fn is_idle(&self) -> bool {
        self.sequences.is_empty() && self.in_flight.is_empty()
    }

    /// Empties the prefix cache. With requests about, the answer is how many run and wait.
    pub fn flush(&mut self) -> Result<usize, (usize, usize)> {
        let pending = (self.running.len(), self.queue.len());
        if !self.sequences.is_empty() {
            return Err(pending);
        }
        self.cache.flush().map_err(|_| pending)
    }

    pub fn stats(&self) -> Stats {
        Stats {
            running: self.running.len(),
            queued: self.queue.len(),
            pages: self.cache.stats(),
            prompt_tokens: self.counters.prompt_tokens,
            cached_tokens: self.counters.cached_tokens,
            retractions: self.counters.retractions,
        }
    }
}
