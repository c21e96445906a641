//! The requests that the engine's thread has, found by id, and by slot for the rows of a step.
//!
//! A step has thousands of rows, so what every row needs lies in one array by slot; the rest of a request is looked at when
//! there is a reason.

use rustc_hash::FxHashMap;
use slotmap::{SlotMap, new_key_type};
use torus_sched::{RequestId, Row};

use crate::{program::flag, request::RequestState};

new_key_type! {
    /// Where a request is. The key of one that is gone finds nothing.
    pub(crate) struct RequestKey;
}

pub(crate) struct Requests {
    states: SlotMap<RequestKey, RequestState>,
    keys: FxHashMap<RequestId, RequestKey>,
    slots: Vec<Slot>,
    vocab: usize,
}

/// What steps need of the request in a slot.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Slot {
    /// Whose slot it was last.
    request: RequestId,
    key: RequestKey,
    pub wants_prompt_logprobs: bool,
    pub choice: Choice,
}

/// How a row's token is chosen: the words of the step's fields of the same names.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Choice {
    /// The optional parts of a step that it needs ([`flag`]); 0 = the likeliest token.
    pub flags: i32,
    pub temperature: f32,
    pub top_k: i32,
    pub top_p: f32,
    pub min_p: f32,
    pub repetition_penalty: f32,
    pub frequency_penalty: f32,
    pub presence_penalty: f32,
    pub seed: u64,
}

impl Choice {
    pub fn new(request: &RequestState, vocab: usize) -> Self {
        let sampling = &request.sampling;
        let samples = !request.greedy();
        let cuts_top_k = sampling.top_k > 0 && (sampling.top_k as usize) < vocab;
        let flags = [
            (flag::PENALTIES, request.has_penalties()),
            (flag::BIAS, request.has_bias()),
            (flag::SAMPLE, samples),
            (flag::TOP_K, samples && cuts_top_k),
            (flag::TOP_P, samples && sampling.top_p < 1.0),
            (flag::LOGPROBS, request.logprobs.output),
            (flag::TOP_LOGPROBS, request.logprobs.output && request.logprobs.top_n > 0),
        ];
        Self {
            flags: flags.iter().filter(|(_, raised)| *raised).fold(0, |all, (flag, _)| all | flag),
            temperature: sampling.temperature,
            top_k: sampling.top_k as i32,
            top_p: sampling.top_p,
            min_p: sampling.min_p,
            repetition_penalty: sampling.repetition_penalty,
            frequency_penalty: sampling.frequency_penalty,
            presence_penalty: sampling.presence_penalty,
            seed: request.seed,
        }
    }

    /// Whether any of these optional parts is needed.
    pub fn needs(&self, flags: i32) -> bool {
        self.flags & flags != 0
    }
}

impl Requests {
    pub fn new(slots: usize, vocab: usize) -> Self {
        let nobody = Slot {
            request: RequestId(u64::MAX),
            key: RequestKey::default(),
            wants_prompt_logprobs: false,
            choice: Choice::default(),
        };
        Self { states: SlotMap::with_key(), keys: FxHashMap::default(), slots: vec![nobody; slots], vocab }
    }

    pub fn insert(&mut self, id: RequestId, state: RequestState) -> RequestKey {
        let key = self.states.insert(state);
        self.keys.insert(id, key);
        key
    }

    pub fn remove(&mut self, id: RequestId) -> Option<(RequestKey, RequestState)> {
        let key = self.keys.remove(&id)?;
        self.states.remove(key).map(|state| (key, state))
    }

    /// Ids of the requests for which `is_wanted`.
    pub fn ids(&self, is_wanted: impl Fn(&RequestState) -> bool) -> Vec<RequestId> {
        let wanted = |key: &RequestKey| self.states.get(*key).is_some_and(&is_wanted);
        self.keys.iter().filter(|(_, key)| wanted(key)).map(|(id, _)| *id).collect()
    }

    pub fn is_empty(&self) -> bool {
        self.states.is_empty()
    }

    /// The request of a row that was admitted has its slot from now on.
    pub fn take_slot(&mut self, row: &Row) {
        let Some(key) = self.keys.get(&row.request).copied() else { return };
        let Some(state) = self.states.get(key) else { return };
        let (wants_prompt_logprobs, choice) = (state.wants_prompt_logprobs(), Choice::new(state, self.vocab));
        self.slots[row.slot.0 as usize] = Slot { request: row.request, key, wants_prompt_logprobs, choice };
    }

    /// What steps need of a row's request, if it has not ended and given its slot to another.
    pub fn slot(&self, row: &Row) -> Option<&Slot> {
        self.slots.get(row.slot.0 as usize).filter(|slot| slot.request == row.request)
    }

    /// The request of a row, if it has not ended.
    pub fn of_row(&self, row: &Row) -> Option<&RequestState> {
        self.states.get(self.slot(row)?.key)
    }

    pub fn of_row_mut(&mut self, row: &Row) -> Option<(RequestKey, &mut RequestState)> {
        let key = self.slot(row)?.key;
        self.states.get_mut(key).map(|state| (key, state))
    }
}
