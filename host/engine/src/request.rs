//! A request as the engine's thread keeps it: what it asked for, what it got, and when it ends.

use std::{collections::BTreeMap, sync::Arc, time::Instant};

use crate::{
    api::{FinishReason, GenerateRequest, LogprobOptions, SamplingParams, TokenLogprob},
    mailbox::Prefilled,
    sampling::IN_PROMPT,
};

pub(crate) struct RequestState {
    pub id: String,
    pub prompt: Arc<[u32]>,
    /// Tokens sampled so far.
    pub generated: usize,
    /// They themselves, where penalties count them.
    output: Vec<u32>,
    pub sampling: SamplingParams,
    pub logprobs: LogprobOptions,
    pub seed: u64,
    pub deadline: Option<Instant>,
    /// Tokens that end it.
    stop_tokens: Vec<u32>,
    pub max_new_tokens: usize,
    /// Whether its row of biases still forbids stop tokens (`min_new_tokens`).
    pub stops_forbidden: bool,
    pub cached_tokens: Option<usize>,
    prompt_logprobs: Vec<TokenLogprob>,
    prefilled: bool,
    /// Still counted among those that wait for their first step.
    pub waiting: bool,
}

impl RequestState {
    /// `end_tokens` are the model's; `longest` is the longest prompt plus output; `seed` is for requests without one.
    pub fn new(request: GenerateRequest, end_tokens: &[u32], longest: usize, seed: u64) -> Self {
        let mut stop_tokens = request.sampling.stop_token_ids.clone();
        if !request.sampling.ignore_eos {
            stop_tokens.extend(end_tokens);
        }
        let room = longest - request.prompt.len();
        let max_new_tokens = request.sampling.max_new_tokens.map_or(room, |max| room.min(max as usize));
        let first = request.logprobs.prompt_from == Some(0);
        let unconditional = TokenLogprob { token: request.prompt[0], logprob: None, top: Vec::new() };
        Self {
            id: request.id,
            generated: 0,
            output: Vec::new(),
            seed: request.sampling.seed.unwrap_or(seed),
            logprobs: request.logprobs,
            deadline: request.deadline,
            stops_forbidden: false,
            stop_tokens,
            max_new_tokens,
            cached_tokens: None,
            prompt_logprobs: if first { vec![unconditional] } else { Vec::new() },
            prefilled: false,
            waiting: true,
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

    /// What the client is told of its prompt, once.
    pub fn take_prefilled(&mut self) -> Option<Prefilled> {
        if std::mem::replace(&mut self.prefilled, true) {
            return None;
        }
        let prompt_logprobs = std::mem::take(&mut self.prompt_logprobs);
        Some(Prefilled { cached_tokens: self.cached_tokens.unwrap_or(0), prompt_logprobs })
    }

    /// Takes a sampled token. Answers why the request ends with it, if it does.
    pub fn take_token(&mut self, token: u32) -> Option<FinishReason> {
        self.generated += 1;
        if self.has_penalties() {
            self.output.push(token);
        }
        let enough = self.generated > self.sampling.min_new_tokens as usize;
        if enough && self.stop_tokens.contains(&token) {
            return Some(FinishReason::Stop { token });
        }
        (self.generated >= self.max_new_tokens).then_some(FinishReason::Length)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::GenerateRequest;

    fn request(sampling: SamplingParams, logprobs: LogprobOptions) -> RequestState {
        let prompt: Arc<[u32]> = [5, 6, 7].into();
        let request = GenerateRequest { id: "r".into(), prompt, sampling, logprobs, namespace: None, deadline: None };
        RequestState::new(request, &[2], 10, 1)
    }

    fn token(token: u32) -> TokenLogprob {
        TokenLogprob { token, logprob: Some(-1.0), top: vec![] }
    }

    #[test]
    fn it_ends_at_a_stop_token_but_not_before_the_minimum() {
        let sampling = SamplingParams { min_new_tokens: 1, stop_token_ids: vec![9], ..Default::default() };
        let mut state = request(sampling, LogprobOptions::default());
        assert!(state.forbids_stops(0) && !state.forbids_stops(1));
        assert_eq!(state.take_token(2), None);
        assert_eq!(state.take_token(9), Some(FinishReason::Stop { token: 9 }));
    }

    #[test]
    fn it_ends_when_the_context_is_full() {
        let mut state = request(SamplingParams { ignore_eos: true, ..Default::default() }, Default::default());
        assert_eq!(state.max_new_tokens, 7);
        for _ in 0..6 {
            assert_eq!(state.take_token(2), None);
        }
        assert_eq!(state.take_token(2), Some(FinishReason::Length));
    }

    #[test]
    fn penalties_count_the_prompt_and_what_was_generated() {
        let mut state = request(SamplingParams { frequency_penalty: 0.5, ..Default::default() }, Default::default());
        [6, 8, 8].into_iter().for_each(|token| assert_eq!(state.take_token(token), None));
        assert_eq!(state.token_counts(), [(5, IN_PROMPT), (6, IN_PROMPT + 1), (7, IN_PROMPT), (8, 2)]);
    }

    #[test]
    fn prompt_logprobs_come_in_order_and_once() {
        let logprobs = LogprobOptions { output: false, top_n: 0, prompt_from: Some(0) };
        let mut state = request(SamplingParams::default(), logprobs);
        assert!(state.wants_prompt_logprob_after(0) && state.wants_prompt_logprob_after(1));
        assert!(!state.wants_prompt_logprob_after(2));
        state.take_prompt_logprob(1, token(6));
        state.take_prompt_logprob(1, token(6));
        state.take_prompt_logprob(2, token(7));
        let Prefilled { prompt_logprobs, .. } = state.take_prefilled().unwrap();
        assert!(state.take_prefilled().is_none());
        assert_eq!(prompt_logprobs.iter().map(|t| t.token).collect::<Vec<_>>(), [5, 6, 7]);
        assert_eq!(prompt_logprobs[0].logprob, None);
    }
}
