//! The target model: a Markov chain whose next token depends on the last two.

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// How a token is chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Choice {
    /// The likeliest; of several, the first.
    Greedy,
    /// Drawn with the random number of this seed and the token's position.
    Sampled { seed: u64 },
}

/// Probabilities of the next token for every pair of last tokens.
#[derive(Clone, Debug)]
pub struct Target {
    vocab: usize,
    /// `[last but one, last, next]`
    probabilities: Vec<f64>,
}

impl Target {
    pub fn new(vocab: u32, seed: u64) -> Self {
        const LOGIT_RANGE: f64 = 3.0;
        let vocab = vocab as usize;
        let mut random = ChaCha8Rng::seed_from_u64(seed);
        let weights: Vec<f64> = (0..vocab.pow(3)).map(|_| random.random_range(0.0..LOGIT_RANGE).exp()).collect();
        let normalized = |row: &[f64]| {
            let total: f64 = row.iter().sum();
            row.iter().map(move |weight| weight / total).collect::<Vec<_>>()
        };
        Self { vocab, probabilities: weights.chunks(vocab).flat_map(normalized).collect() }
    }

    /// Of each token after these.
    pub fn probabilities(&self, tokens: &[u32]) -> &[f64] {
        let from_end = |back: usize| tokens.len().checked_sub(back).map_or(0, |place| tokens[place] as usize);
        let context = from_end(2) * self.vocab + from_end(1);
        &self.probabilities[context * self.vocab..][..self.vocab]
    }

    /// The token that follows these.
    pub fn next(&self, tokens: &[u32], choice: Choice) -> u32 {
        let probabilities = self.probabilities(tokens);
        let last = probabilities.len() - 1;
        let chosen = match choice {
            Choice::Greedy => {
                (0..=last).fold(0, |best, i| if probabilities[i] > probabilities[best] { i } else { best })
            }
            Choice::Sampled { seed } => {
                let mut random = ChaCha8Rng::seed_from_u64(seed);
                random.set_stream(tokens.len() as u64);
                let mut rest: f64 = random.random();
                let below = |probability: &f64| {
                    rest -= probability;
                    rest < 0.0
                };
                probabilities.iter().position(below).unwrap_or(last)
            }
        };
        chosen as u32
    }
}
