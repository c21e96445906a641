//! Sampling: from a row of logits to a token and its logprob, in one pass over the vocabulary where that is enough.
//!
//! It computes what the engine's sampling graph does: penalties, bias and allowed tokens; for greedy rows the largest
//! logit, the first of equal ones; else temperature, top-k, top-p over what is left, min-p, and one draw by the
//! Gumbel-max method with the numbers of [`random`]. The vocabulary is never sorted: a draw looks at the
//! [`candidates`] near the peak, and goes further down only where these are not enough.

use crate::{
    activations::for_levels,
    level::Level,
    math::{exp, ln},
    workspace::Buffer,
};

mod candidates;
mod random;
#[cfg(test)]
mod tests;

use candidates::Candidates;

/// In the count word of a token: whether it is in the prompt. The bits below count it in the output.
pub const IN_PROMPT: i32 = 1 << 24;

/// Logits, and what they are changed by. All slices but `allowed` are `[vocab]`.
#[derive(Clone, Copy, Debug)]
pub struct Row<'a> {
    pub logits: &'a [f32],
    pub penalties: Option<Penalties<'a>>,
    pub bias: Option<&'a [f32]>,
    /// Bit `i` of word `w` allows token `32 w + i`.
    pub allowed: Option<&'a [u32]>,
    /// 0 takes the largest logit.
    pub temperature: f32,
}

/// Repetition (Keskar et al., "CTRL", 2019), frequency and presence penalties.
#[derive(Clone, Copy, Debug)]
pub struct Penalties<'a> {
    /// See [`IN_PROMPT`].
    pub counts: &'a [i32],
    pub repetition: f32,
    pub frequency: f32,
    pub presence: f32,
}

/// Which tokens may be drawn, and the place of the draw among all random numbers.
#[derive(Clone, Copy, Debug)]
pub struct Draw {
    /// Tokens with the largest logits; more than the vocabulary has are all.
    pub top_k: usize,
    /// Share of the probability of what top-k leaves; 1 keeps all.
    pub top_p: f32,
    /// Least probability, relative to the largest.
    pub min_p: f32,
    /// The request's seed.
    pub key: [u32; 2],
    /// Of the token in its sequence.
    pub position: u32,
}

/// A row as it is sampled from: after penalties, bias, mask and temperature.
pub struct Tempered<'a> {
    level: Level,
    values: Values<'a>,
    peak: f32,
    /// The first token at the peak.
    best: usize,
    is_number: bool,
}

enum Values<'a> {
    Logits(&'a [f32]),
    Changed(Buffer<f32>),
}

impl Values<'_> {
    fn get(&self) -> &[f32] {
        match self {
            Self::Logits(logits) => logits,
            Self::Changed(values) => values,
        }
    }
}

/// Values looked at together.
const CHUNK: usize = 256;

impl<'a> Tempered<'a> {
    /// # Panics
    /// If the row is empty, or what it is changed by is shorter.
    pub fn new(level: Level, row: &Row<'a>) -> Self {
        let values = changed(level, row);
        let (mut peak, mut best_chunk, mut is_number) = (f32::NEG_INFINITY, 0, true);
        for (index, chunk) in values.get().chunks(CHUNK).enumerate() {
            let mut found = Peak { value: f32::NEG_INFINITY, is_number: true };
            find_peak(level, chunk, &mut found);
            is_number &= found.is_number;
            if found.value > peak {
                (peak, best_chunk) = (found.value, index);
            }
        }
        let chunk = &values.get()[best_chunk * CHUNK..];
        let best = best_chunk * CHUNK + chunk.iter().position(|value| *value == peak).unwrap_or(0);
        Self { level, values, peak, best, is_number: is_number && peak.is_finite() }
    }

    /// The largest value's token, the first of equal ones.
    pub fn best(&self) -> usize {
        self.best
    }

    /// Whether all values are numbers, and some token is possible.
    pub fn is_number(&self) -> bool {
        self.is_number
    }

    /// The logarithm of what the values' exponentials add up to: a value less it is a logprob.
    pub fn normalizer(&self) -> f32 {
        self.peak + self.mass().ln()
    }

    /// A token's value.
    pub fn value(&self, token: usize) -> f32 {
        self.values.get()[token]
    }

    /// What all tokens weigh relative to the peak.
    fn mass(&self) -> f32 {
        let mut total = 0.0;
        for chunk in self.values.get().chunks(CHUNK) {
            let mut sum = 0.0;
            add_weights(self.level, chunk, self.peak, &mut sum);
            total += sum;
        }
        total
    }

    /// One token by chance.
    pub fn draw(&self, draw: &Draw) -> usize {
        if !self.is_number {
            return self.best;
        }
        Candidates::of(self, draw).draw(self.level, draw)
    }

    /// The likeliest tokens, best first and of equal ones the first, with their values.
    pub fn likeliest(&self, found: &mut [(usize, f32)]) {
        let mut count = 0;
        for (index, chunk) in self.values.get().chunks(CHUNK).enumerate() {
            let mut peak = Peak { value: f32::NEG_INFINITY, is_number: true };
            find_peak(self.level, chunk, &mut peak);
            if count == found.len() && peak.value <= found[count - 1].1 {
                continue;
            }
            for (offset, value) in chunk.iter().enumerate() {
                let place = found[..count].partition_point(|(_, held)| held >= value);
                if place < found.len() {
                    count = (count + 1).min(found.len());
                    found[place..count].rotate_right(1);
                    found[place] = (index * CHUNK + offset, *value);
                }
            }
        }
    }
}

/// The row after all changes.
fn changed<'a>(level: Level, row: &Row<'a>) -> Values<'a> {
    let is_plain = row.penalties.is_none() && row.bias.is_none() && row.allowed.is_none();
    if is_plain && (row.temperature <= 0.0 || row.temperature == 1.0) {
        return Values::Logits(row.logits);
    }
    let mut values = Buffer::<f32>::take(row.logits.len());
    values.copy_from_slice(row.logits);
    if let Some(penalties) = &row.penalties {
        penalize(level, &mut values, penalties);
    }
    if let Some(bias) = row.bias {
        crate::activations::add_f32(level, bias, &mut values);
    }
    if let Some(allowed) = row.allowed {
        for (values, word) in values.chunks_mut(32).zip(allowed) {
            let mask = |(bit, value): (usize, &mut f32)| {
                if word >> bit & 1 == 0 {
                    *value = f32::NEG_INFINITY;
                }
            };
            values.iter_mut().enumerate().for_each(mask);
        }
    }
    if row.temperature > 0.0 {
        divide(level, &mut values, row.temperature);
    }
    Values::Changed(values)
}

for_levels! {
    fn penalize(values: &mut [f32], penalties: &Penalties<'_>) {
        let Penalties { counts, repetition, frequency, presence } = *penalties;
        for (value, count) in values.iter_mut().zip(counts) {
            let in_output = count & (IN_PROMPT - 1);
            let repeated = if *value > 0.0 { *value / repetition } else { *value * repetition };
            let held = if *count != 0 { repeated } else { *value };
            let present = if in_output > 0 { presence } else { 0.0 };
            *value = held - in_output as f32 * frequency - present;
        }
    }
}

for_levels! {
    fn divide(values: &mut [f32], divisor: f32) {
        values.iter_mut().for_each(|value| *value /= divisor);
    }
}

struct Peak {
    value: f32,
    is_number: bool,
}

for_levels! {
    fn find_peak(values: &[f32], found: &mut Peak) {
        // What is no number stays out of the peaks and makes `odd` one.
        let (mut peaks, mut odd) = ([f32::NEG_INFINITY; 16], [0u32; 16]);
        let (chunks, rest) = values.as_chunks::<16>();
        for chunk in chunks {
            for ((peak, odd), value) in peaks.iter_mut().zip(&mut odd).zip(chunk) {
                *peak = if *value > *peak { *value } else { *peak };
                *odd |= u32::from(value.is_nan());
            }
        }
        let mut peak = peaks.iter().fold(f32::NEG_INFINITY, |peak, value| if *value > peak { *value } else { peak });
        for value in rest {
            peak = if *value > peak { *value } else { peak };
            odd[0] |= u32::from(value.is_nan());
        }
        *found = Peak { value: peak, is_number: odd.iter().all(|odd| *odd == 0) };
    }
}

for_levels! {
    /// `sum = sum of exp(value - peak)`
    fn add_weights(values: &[f32], peak: f32, sum: &mut f32) {
        let mut sums = [0f32; 16];
        let (chunks, rest) = values.as_chunks::<16>();
        for chunk in chunks {
            sums.iter_mut().zip(chunk).for_each(|(sum, value)| *sum += exp(*value - peak));
        }
        *sum = sums.iter().sum::<f32>() + rest.iter().map(|value| exp(*value - peak)).sum::<f32>();
    }
}
