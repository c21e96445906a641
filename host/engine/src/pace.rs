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
    /// Seconds of a step that only decodes, by the power of two above the number of its sequences.
    decode: [Option<f64>; SIZES],
    /// The same, for sizes that have only been seen with prompts beside: what these leave of the step.
    beside: [Option<f64>; SIZES],
    /// Seconds of a prompt token.
    token: Option<f64>,
}

const SIZES: usize = 20;

fn size(decodes: usize) -> usize {
    (decodes.next_power_of_two().trailing_zeros() as usize).min(SIZES - 1)
}

fn mix(mean: &mut Option<f64>, value: f64) {
    *mean = Some(mean.map_or(value, |mean| mean + (value - mean) * WEIGHT));
}

impl Pace {
    pub fn new(slowdown: f64) -> Self {
        Self { slowdown, decode: [None; SIZES], beside: [None; SIZES], token: None }
    }

    /// Takes a step in that decoded `decodes` sequences and computed `prompt` tokens of prompts.
    pub fn note(&mut self, decodes: usize, prompt: usize, took: Duration) {
        let (took, size) = (took.as_secs_f64(), size(decodes));
        match (decodes, prompt) {
            (0, 0) => {}
            (_, 0) => mix(&mut self.decode[size], took),
            (0, prompt) => mix(&mut self.token, took / prompt as f64),
            // One of the two must be known, or a larger batch would be taken for more costly prompts.
            (_, prompt) => match (self.decode[size], self.token) {
                (Some(decode), _) if decode < took => mix(&mut self.token, (took - decode) / prompt as f64),
                (None, Some(token)) => mix(&mut self.beside[size], (took - token * prompt as f64).max(0.0)),
                _ => {}
            },
        }
    }

    /// Prompt tokens that the next step may compute beside so many that decode; `None` as long as that is unknown.
    pub fn prompt_tokens(&self, decodes: usize) -> Option<usize> {
        let known = |size: usize| self.decode[size].or(self.beside[size]);
        let decode = (0..=size(decodes)).rev().find_map(known)?;
        let tokens = (self.slowdown - 1.0) * decode / self.token?;
        Some(if tokens.is_finite() { tokens.round() as usize } else { usize::MAX })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn a_mixed_step_takes_as_much_longer_as_it_may() {
        let mut pace = Pace::new(2.0);
        assert_eq!(pace.prompt_tokens(8), None);
        pace.note(0, 500, 250 * MS);
        pace.note(8, 0, 10 * MS);
        // 10 ms more, at half a millisecond a token.
        assert_eq!(pace.prompt_tokens(8), Some(20));
        // A mixed step that took 30 ms: 20 ms for 20 tokens, twice as much as was known.
        pace.note(8, 20, 30 * MS);
        assert_eq!(pace.prompt_tokens(8), Some(16));
        assert_eq!(Pace { slowdown: f64::INFINITY, ..pace }.prompt_tokens(8), Some(usize::MAX));
    }

    #[test]
    fn larger_batches_are_not_taken_for_costly_prompts() {
        let mut pace = Pace::new(2.0);
        pace.note(0, 500, 250 * MS);
        pace.note(1, 0, 5 * MS);
        // Never seen alone: of 30 ms, ten are the prompt's.
        pace.note(32, 20, 30 * MS);
        assert_eq!((pace.prompt_tokens(32), pace.prompt_tokens(1)), (Some(40), Some(10)));
        // Unknown sizes are taken for the next smaller one that is known.
        assert_eq!(pace.prompt_tokens(4), Some(10));
    }
}
