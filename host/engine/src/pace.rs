//! How many prompt tokens a step may compute beside sequences that decode, from what steps have cost so far.
//!
//! Those that decode wait for the whole step. A step may take so many times as long as one that only decodes; what is
//! left of that time, at the cost of a prompt token, is the limit. With a factor of two, decoding is at most twice as slow
//! while a prompt is computed, and the prompt at most twice as slow as alone.

use std::time::Duration;

/// Weight of a new measurement in the running means.
const WEIGHT: f64 = 0.25;

#[derive(Debug)]
pub(crate) struct Pace {
    slowdown: f64,
    /// Seconds of a step that only decodes.
    decode: Option<f64>,
    /// Seconds of a prompt token.
    token: Option<f64>,
}

fn mix(mean: &mut Option<f64>, value: f64) {
    *mean = Some(mean.map_or(value, |mean| mean + (value - mean) * WEIGHT));
}

impl Pace {
    pub fn new(slowdown: f64) -> Self {
        Self { slowdown, decode: None, token: None }
    }

    /// Takes a step in that decoded `decodes` sequences and computed `prompt` tokens of prompts.
    pub fn note(&mut self, decodes: usize, prompt: usize, took: Duration) {
        let took = took.as_secs_f64();
        match (decodes, prompt) {
            (0, 0) => {}
            (_, 0) => mix(&mut self.decode, took),
            (0, prompt) => mix(&mut self.token, took / prompt as f64),
            // What decoding takes of it is known by then, but for the first steps.
            (_, prompt) => {
                if let Some(decode) = self.decode.filter(|decode| *decode < took) {
                    mix(&mut self.token, (took - decode) / prompt as f64);
                }
            }
        }
    }

    /// Prompt tokens that the next step with decoding sequences may compute; `None` as long as that is unknown.
    pub fn prompt_tokens(&self) -> Option<usize> {
        let (decode, token) = (self.decode?, self.token?);
        let tokens = (self.slowdown - 1.0) * decode / token;
        Some(if tokens.is_finite() { tokens as usize } else { usize::MAX })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn a_mixed_step_takes_as_much_longer_as_it_may() {
        let mut pace = Pace::new(2.0);
        assert_eq!(pace.prompt_tokens(), None);
        pace.note(0, 500, 250 * MS);
        pace.note(8, 0, 10 * MS);
        // 10 ms more, at half a millisecond a token.
        assert_eq!(pace.prompt_tokens(), Some(20));
        // A mixed step that took 30 ms: 20 ms for 20 tokens, twice as much as was known.
        pace.note(8, 20, 30 * MS);
        assert_eq!(pace.prompt_tokens(), Some(16));
        assert_eq!(Pace { slowdown: f64::INFINITY, ..pace }.prompt_tokens(), Some(usize::MAX));
    }
}
