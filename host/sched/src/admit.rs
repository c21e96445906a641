//! Letting waiting requests in.

use crate::{
    RequestId, SlotId,
    policy::{LOOKAHEAD, order},
    scheduler::{Plan, Scheduler},
    sequences::SequenceKey,
};

/// Running sequences reserve pages for this share of the tokens they may still generate, since most end earlier. The
/// share decays while all goes well and rises when a sequence had to be retracted.
pub(crate) const RESERVED_SHARE_MAX: f64 = 0.7;
const RESERVED_SHARE_MIN: f64 = 0.1;
/// Steps in which the share decays from the most to the least.
const DECAY_STEPS: f64 = 600.0;
/// Tokens to come beyond this are not reserved for: a request without a limit would keep all others out.
const RESERVED_TOKENS_MAX: usize = 4096;

/// A request that was not admitted, and how things stood then.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Refused {
    id: RequestId,
    available: usize,
    running: usize,
}

impl Scheduler {
    pub(crate) fn decay_reserved_share(&mut self) {
        let decay = (RESERVED_SHARE_MAX - RESERVED_SHARE_MIN) / DECAY_STEPS;
        self.reserved_share = (self.reserved_share - decay).max(RESERVED_SHARE_MIN);
    }

    pub(crate) fn reserve_more(&mut self) {
        self.reserved_share = RESERVED_SHARE_MAX;
    }

    /// Admits from the queue while there are slots, budget and pages, and adds first chunks to the plan.
    pub(crate) fn admit(&mut self, plan: &mut Plan) {
        if self.queue.is_empty() || self.free_slots.is_empty() || !plan.has_room() {
            return;
        }
        let eligible: Vec<_> = self.queue.iter().copied().filter(|id| self.is_eligible(*id)).take(LOOKAHEAD).collect();
        for index in order(self.config.policy, &eligible, &self.sequences, &self.cache, self.step) {
            let id = eligible[index];
            if self.free_slots.is_empty() || !plan.has_room() {
                break;
            }
            let Some(key) = self.sequences.key(id).filter(|key| self.try_admit(*key)) else {
                break;
            };
            self.note_overtaken(id);
            if !self.add_chunk(plan, key) {
                break;
            }
        }
    }

    /// Gives a request its slot and the pages of its cached prefix, unless memory is short.
    fn try_admit(&mut self, key: SequenceKey) -> bool {
        // With nothing else to run it is let in all the same; what it misses is taken from those that may not run.
        let others_run = self.running.iter().any(|key| self.is_eligible(self.sequences[*key].request.id));
        let Some(sequence) = self.sequences.at(key) else { return false };
        let id = sequence.request.id;
        if others_run && self.is_still_refused(id) {
            return false;
        }
        let known = sequence.tokens(0, sequence.known());
        // At least one token is left to compute: its logits are needed.
        let limit = sequence.request.reuse_max_tokens.min(known.len() - 1);
        let new_tokens = sequence.remaining_new();
        let namespace = sequence.request.namespace.clone();
        let found = self.cache.match_prefix(&namespace, &known, limit);
        self.cache.lock(found.node);
        let cached = found.pages.len() * self.config.page_size;
        let wanted = self.reserve(known.len() - cached, new_tokens);
        let promised: usize = self.running.iter().map(|key| self.still_to_come(*key)).sum();
        if others_run && wanted + promised > self.cache.available() {
            self.cache.unlock(found.node);
            self.refused = Some(Refused { id, available: self.cache.available(), running: self.running.len() });
            return false;
        }
        self.refused = None;
        let (Some(slot), Some(sequence)) = (self.free_slots.pop(), self.sequences.at_mut(key)) else { return false };
        if !std::mem::replace(&mut sequence.counted, true) {
            self.counters.prompt_tokens += known.len() as u64;
            self.counters.cached_tokens += cached as u64;
        }
        sequence.slot = Some(SlotId(slot));
        sequence.private = vec![false; found.pages.len()];
        sequence.pages = found.pages;
        sequence.node = Some(found.node);
        sequence.scheduled = cached;
        sequence.computed = cached;
        sequence.admitted = Some(cached);
        self.running.push(key);
        true
    }

    /// Whether a request was refused for want of pages and nobody has given any back since: looking again would cost
    /// as much as its prompt is long, at every step.
    fn is_still_refused(&self, id: RequestId) -> bool {
        self.refused.is_some_and(|refused| {
            let no_better = self.cache.available() <= refused.available && self.running.len() >= refused.running;
            refused.id == id && no_better
        })
    }

    /// Pages for tokens to compute and a share of those to generate.
    fn reserve(&self, to_compute: usize, to_generate: usize) -> usize {
        let generated = to_generate.min(RESERVED_TOKENS_MAX) as f64 * self.reserved_share;
        (to_compute + generated as usize).div_ceil(self.config.page_size)
    }

    fn still_to_come(&self, key: SequenceKey) -> usize {
        let sequence = &self.sequences[key];
        self.reserve(sequence.len() - sequence.scheduled, sequence.remaining_new())
    }

    /// Takes a request out of the queue and counts it against those that came before it.
    fn note_overtaken(&mut self, id: RequestId) {
        let Some(place) = self.queue.iter().position(|waiting| *waiting == id) else { return };
        self.queue.remove(place);
        for waiting in self.queue.iter().take(place) {
            if let Some(sequence) = self.sequences.get_mut(*waiting) {
                sequence.overtaken += 1;
            }
        }
    }

    /// Puts sequences at the head of the queue, keeping their order.
    pub(crate) fn requeue(&mut self, ids: &[RequestId]) {
        ids.iter().rev().for_each(|id| self.queue.push_front(*id));
    }

    /// Slots come back sorted, so that runs repeat.
    pub(crate) fn free_slot(&mut self, slot: SlotId) {
        let place = self.free_slots.partition_point(|free| *free > slot.0);
        self.free_slots.insert(place, slot.0);
    }
}
