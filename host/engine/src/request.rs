//! A request as the engine's thread keeps it: what it asked for, what it got, and when it ends.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Instant,
};

use tokio::sync::mpsc::{self, error::TrySendError};

use crate::{
    api::{Abort, Event, FinishReason, LogprobOptions, SamplingParams, TokenLogprob},
    handle::{Ending, Submission},
    sampling::IN_PROMPT,
};

pub(crate) struct RequestState {
    pub id: String,
    pub prompt: Arc<[u32]>,
    /// Tokens sampled and accepted so far.
    pub output: Vec<u32>,
    pub sampling: SamplingParams,
    pub logprobs: LogprobOptions,
    pub seed: u64,
    pub deadline: Option<Instant>,
    /// Tokens that end it.
    pub stop_tokens: BTreeSet<u32>,
    pub max_new_tokens: usize,
    /// The slot it was last prepared for; another one means that it was retracted and comes back.
    pub slot: Option<u32>,
    /// Whether its row of biases still forbids stop tokens (`min_new_tokens`).
    pub stops_forbidden: bool,
    pub cached_tokens: Option<usize>,
    prompt_logprobs: Vec<TokenLogprob>,
    prefilled: bool,
    /// Still counted among those that wait for their first step.
    pub waiting: bool,
    /// Events not handed to the client yet.
    unsent: Vec<Event>,
    events: mpsc::Sender<Event>,
    ending: Ending,
}

impl RequestState {
    /// `end_tokens` are the model's; `longest` is the longest prompt plus output; `seed` is for requests without one.
    pub fn new(submission: Submission, end_tokens: &[u32], longest: usize, seed: u64) -> Self {
        let request = submission.request;
        let mut stop_tokens: BTreeSet<u32> = request.sampling.stop_token_ids.iter().copied().collect();
        if !request.sampling.ignore_eos {
            stop_tokens.extend(end_tokens);
        }
        let room = longest - request.prompt.len();
        let max_new_tokens = request.sampling.max_new_tokens.map_or(room, |max| room.min(max as usize));
        let first = request.logprobs.prompt_from == Some(0);
        let unconditional = TokenLogprob { token: request.prompt[0], logprob: None, top: Vec::new() };
        Self {
            id: request.id,
            output: Vec::new(),
            seed: request.sampling.seed.unwrap_or(seed),
            logprobs: request.logprobs,
            deadline: request.deadline,
            stops_forbidden: false,
            stop_tokens,
            max_new_tokens,
            slot: None,
            cached_tokens: None,
            prompt_logprobs: if first { vec![unconditional] } else { Vec::new() },
            prefilled: false,
            waiting: true,
            unsent: Vec::new(),
            events: submission.events,
            ending: submission.ending,
            prompt: request.prompt,
            sampling: request.sampling,
        }
    }

    pub fn greedy(&self) -> bool {
        self.sampling.temperature == 0.0
    }

    pub fn has_penalties(&self) -> bool {
        let sampling = &self.sampling;
        sampling.repetition_penalty != 1.0 || sampling.frequency_penalty != 0.0 || sampling.presence_penalty != 0.0
    }

    /// Whether its row of biases on the device is used.
    pub fn has_bias(&self) -> bool {
        !self.sampling.logit_bias.is_empty() || (self.sampling.min_new_tokens > 0 && !self.stop_tokens.is_empty())
    }

    /// Entries of its row of biases: what was asked for, and stop tokens while they are forbidden.
    pub fn biases(&self) -> Vec<(u32, f32)> {
        let mut biases: BTreeMap<u32, f32> = self.sampling.logit_bias.iter().copied().collect();
        if self.stops_forbidden {
            biases.extend(self.stop_tokens.iter().map(|token| (*token, f32::NEG_INFINITY)));
        }
        biases.into_iter().collect()
    }

    /// Entries of its row of token counts: what the penalties read.
    pub fn token_counts(&self) -> Vec<(u32, i32)> {
        let mut counts: BTreeMap<u32, i32> = self.prompt.iter().map(|token| (*token, IN_PROMPT)).collect();
        for token in &self.output {
            *counts.entry(*token).or_default() += 1;
        }
        counts.into_iter().collect()
    }

    /// How much of a cached prefix it can use: logprobs of prompt tokens must be computed.
    pub fn reuse_max_tokens(&self) -> usize {
        let first_wanted = self.logprobs.prompt_from.map(|from| from.max(1) - 1);
        first_wanted.unwrap_or(usize::MAX)
    }

    /// Whether the `n`-th token sampled (counted from 0) must not be a stop token.
    pub fn forbids_stops(&self, n: usize) -> bool {
        n < self.sampling.min_new_tokens as usize && !self.stop_tokens.is_empty()
    }

    /// Prompt positions whose logits give wanted logprobs: those before each wanted token.
    pub fn wants_prompt_logprob_after(&self, position: usize) -> bool {
        let next = position + 1;
        !self.prefilled && next < self.prompt.len() && self.logprobs.prompt_from.is_some_and(|from| next >= from.max(1))
    }

    pub fn wants_prompt_logprobs(&self) -> bool {
        self.logprobs.prompt_from.is_some_and(|from| from.max(1) < self.prompt.len())
    }

    /// Takes the logprob of the prompt token at `position`. One that was computed before (the request was retracted
    /// meanwhile) is passed over.
    pub fn take_prompt_logprob(&mut self, position: usize, logprob: TokenLogprob) {
        let from = self.logprobs.prompt_from.unwrap_or(0);
        if position == from + self.prompt_logprobs.len() {
            self.prompt_logprobs.push(logprob);
        }
    }

    /// Notes for the client that the prompt is done, once.
    pub fn note_prefilled(&mut self) {
        if !std::mem::replace(&mut self.prefilled, true) {
            let prompt_logprobs = std::mem::take(&mut self.prompt_logprobs);
            let cached_tokens = self.cached_tokens.unwrap_or(0);
            self.unsent.push(Event::Prefilled { cached_tokens, prompt_logprobs });
        }
    }

    /// Takes a sampled token. Answers why the request ends with it, if it does.
    pub fn take_token(&mut self, token: TokenLogprob) -> Option<FinishReason> {
        self.note_prefilled();
        let id = token.token;
        self.output.push(id);
        let logprobs = if self.logprobs.output { vec![token] } else { Vec::new() };
        self.unsent.push(Event::Tokens { tokens: vec![id], logprobs });
        let enough = self.output.len() > self.sampling.min_new_tokens as usize;
        if self.stop_tokens.contains(&id) && enough {
            return Some(FinishReason::Stop { token: id });
        }
        (self.output.len() >= self.max_new_tokens).then_some(FinishReason::Length)
    }

    /// Hands the client what was noted for it.
    pub fn deliver(&mut self) -> Result<(), Abort> {
        // Its memory is used again for the next step's.
        let mut unsent = std::mem::take(&mut self.unsent);
        let sent = unsent.drain(..).try_for_each(|event| self.send(event));
        self.unsent = unsent;
        sent
    }

    /// Says how it ended. A client that is too slow to take this finds it when it has read what is before it.
    pub fn finish(&mut self, reason: FinishReason) {
        let _ = self.ending.set(reason.clone());
        let _ = self.send(Event::Finished(reason));
    }

    fn send(&mut self, event: Event) -> Result<(), Abort> {
        self.events.try_send(event).map_err(|refused| match refused {
            TrySendError::Full(_) => Abort::SlowClient,
            TrySendError::Closed(_) => Abort::ByUser,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::GenerateRequest;

    fn request(sampling: SamplingParams, logprobs: LogprobOptions) -> (RequestState, mpsc::Receiver<Event>) {
        let (events, receiver) = mpsc::channel(8);
        let prompt: Arc<[u32]> = [5, 6, 7].into();
        let request = GenerateRequest { id: "r".into(), prompt, sampling, logprobs, namespace: None, deadline: None };
        (RequestState::new(Submission { number: 0, request, events, ending: Ending::default() }, &[2], 10, 1), receiver)
    }

    fn token(token: u32) -> TokenLogprob {
        TokenLogprob { token, logprob: Some(-1.0), top: vec![] }
    }

    #[test]
    fn it_ends_at_a_stop_token_but_not_before_the_minimum() {
        let sampling = SamplingParams { min_new_tokens: 1, stop_token_ids: vec![9], ..Default::default() };
        let (mut state, mut events) = request(sampling, LogprobOptions::default());
        assert!(state.forbids_stops(0) && !state.forbids_stops(1));
        assert_eq!(state.take_token(token(2)), None);
        assert_eq!(state.take_token(token(9)), Some(FinishReason::Stop { token: 9 }));
        assert!(events.try_recv().is_err(), "nothing is sent before it is delivered");
        state.deliver().unwrap();
        assert!(matches!(events.try_recv().unwrap(), Event::Prefilled { cached_tokens: 0, .. }));
        assert_eq!(events.try_recv().unwrap(), Event::Tokens { tokens: vec![2], logprobs: vec![] });
    }

    #[test]
    fn it_ends_when_the_context_is_full() {
        let (mut state, _events) =
            request(SamplingParams { ignore_eos: true, ..Default::default() }, Default::default());
        assert_eq!(state.max_new_tokens, 7);
        for _ in 0..3 {
            assert_eq!(state.take_token(token(2)), None);
        }
        assert_eq!(state.output.len(), 3);
    }

    #[test]
    fn a_client_that_does_not_read_is_told_apart_from_one_that_left() {
        let (mut state, events) =
            request(SamplingParams { ignore_eos: true, ..Default::default() }, Default::default());
        let mut next = || {
            state.take_token(token(1));
            state.deliver()
        };
        assert_eq!((0..8).find_map(|_| next().err()), Some(Abort::SlowClient));
        drop(events);
        assert_eq!(next(), Err(Abort::ByUser));
    }

    #[test]
    fn prompt_logprobs_come_in_order_and_once() {
        let logprobs = LogprobOptions { output: false, top_n: 0, prompt_from: Some(0) };
        let (mut state, mut events) = request(SamplingParams::default(), logprobs);
        assert!(state.wants_prompt_logprob_after(0) && state.wants_prompt_logprob_after(1));
        assert!(!state.wants_prompt_logprob_after(2));
        state.take_prompt_logprob(1, token(6));
        state.take_prompt_logprob(1, token(6));
        state.take_prompt_logprob(2, token(7));
        state.note_prefilled();
        state.deliver().unwrap();
        let Event::Prefilled { prompt_logprobs, .. } = events.try_recv().unwrap() else { panic!("no prefill") };
        assert_eq!(prompt_logprobs.iter().map(|t| t.token).collect::<Vec<_>>(), [5, 6, 7]);
        assert_eq!(prompt_logprobs[0].logprob, None);
    }
}
