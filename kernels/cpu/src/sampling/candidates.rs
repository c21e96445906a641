//! The tokens that a draw looks at.

use super::{
    CHUNK, Draw, Peak, Tempered, find_peak,
    random::{GUMBEL_MAX, GUMBEL_MIN, gumbel},
};
use crate::{
    level::Level,
    math::exp,
    workspace::{Buffer, Plain},
};

#[derive(Clone, Copy, Debug)]
#[repr(C)]
struct Candidate {
    value: f32,
    /// `exp(value - peak)`
    weight: f32,
    token: u32,
}

// SAFETY: numbers.
unsafe impl Plain for Candidate {}

/// Tokens whose values are not below some floor.
pub(super) struct Candidates {
    held: Buffer<Candidate>,
    len: usize,
}

/// How far below the peak to look, one after the other. Most of what a model finds possible is in the first.
const DEPTHS: [f32; 3] = [8.0, 16.0, f32::INFINITY];

impl Candidates {
    /// Those that may be drawn.
    pub fn of(row: &Tempered<'_>, draw: &Draw) -> Self {
        let vocab = row.values.get().len();
        let (top_k, limits_mass) = (draw.top_k.clamp(1, vocab), draw.top_p < 1.0);
        let mut held = Buffer::take(vocab);
        if top_k == vocab && !limits_mass {
            // No noise lifts anything above the peak that lies further below.
            let depth = if draw.min_p > 0.0 { -draw.min_p.ln() + 1e-3 } else { f32::INFINITY };
            let mut all = Self { len: 0, held };
            all.collect(row, depth.min(GUMBEL_MAX - GUMBEL_MIN));
            all.retain(|candidate| candidate.weight >= draw.min_p);
            return all;
        }
        let mass = if top_k == vocab { row.mass() } else { f32::NAN };
        for depth in DEPTHS {
            let mut found = Self { len: 0, held };
            found.collect(row, depth);
            let all = depth == f32::INFINITY;
            if (all || found.len >= top_k || top_k == vocab) && found.keep(draw, top_k, mass, all) {
                return found;
            }
            held = found.held;
        }
        unreachable!("the last depth holds all tokens")
    }

    /// Takes the tokens in that lie at most so far below the peak.
    fn collect(&mut self, row: &Tempered<'_>, depth: f32) {
        let floor = row.peak - depth;
        for (index, chunk) in row.values.get().chunks(CHUNK).enumerate() {
            let mut peak = Peak { value: f32::NEG_INFINITY, is_number: true };
            find_peak(row.level, chunk, &mut peak);
            if peak.value < floor {
                continue;
            }
            for (offset, value) in chunk.iter().enumerate().filter(|(_, value)| **value >= floor) {
                let token = (index * CHUNK + offset) as u32;
                self.held[self.len] = Candidate { value: *value, weight: exp(*value - row.peak), token };
                self.len += 1;
            }
        }
    }

    /// Keeps what top-k, top-p and min-p leave. `mass` is that of the whole vocabulary, if top-k takes nothing away.
    /// False, with nothing changed that matters, if more candidates must be looked at.
    fn keep(&mut self, draw: &Draw, top_k: usize, mut mass: f32, all: bool) -> bool {
        if top_k < self.len {
            let (_, last, _) = self.held[..self.len].select_nth_unstable_by(top_k - 1, descending);
            let threshold = last.value;
            self.retain(|candidate| candidate.value >= threshold);
        }
        if draw.top_p < 1.0 {
            let here = self.weight(0..self.len);
            if mass.is_nan() || all {
                mass = here;
            }
            let wanted = mass * draw.top_p;
            if here < wanted && !all {
                return false;
            }
            let threshold = self.nucleus(wanted);
            self.retain(|candidate| candidate.value >= threshold);
        }
        self.retain(|candidate| candidate.weight >= draw.min_p);
        true
    }

    /// The largest value such that the candidates not below it weigh `wanted`, by halving what may hold it (a weighted
    /// quickselect).
    fn nucleus(&mut self, wanted: f32) -> f32 {
        let (mut range, mut before) = (0..self.len, 0.0);
        while range.len() > 1 {
            let half = range.len() / 2;
            let middle = range.start + half;
            self.held[range.clone()].select_nth_unstable_by(half, descending);
            let upper = self.weight(range.start..middle);
            if before + upper >= wanted {
                range.end = middle;
            } else {
                before += upper;
                range.start = middle;
            }
        }
        self.held[range.start].value
    }

    fn weight(&self, range: std::ops::Range<usize>) -> f32 {
        self.held[range].iter().map(|candidate| candidate.weight).sum()
    }

    fn retain(&mut self, keep: impl Fn(&Candidate) -> bool) {
        let mut kept = 0;
        for index in 0..self.len {
            let candidate = self.held[index];
            if keep(&candidate) {
                self.held[kept] = candidate;
                kept += 1;
            }
        }
        self.len = kept;
    }

    /// The candidate that noise lifts highest; of equal ones the first of the vocabulary.
    pub fn draw(&self, level: Level, draw: &Draw) -> usize {
        let (mut best, mut highest) = (u32::MAX, f32::NEG_INFINITY);
        let (mut tokens, mut noise) = ([0; CHUNK], [0.0; CHUNK]);
        for chunk in self.held[..self.len].chunks(CHUNK) {
            tokens.iter_mut().zip(chunk).for_each(|(token, candidate)| *token = candidate.token);
            gumbel(level, draw.key, draw.position, &tokens[..chunk.len()], &mut noise);
            for (candidate, noise) in chunk.iter().zip(&noise) {
                let lifted = candidate.value + noise;
                if lifted > highest || lifted == highest && candidate.token < best {
                    (best, highest) = (candidate.token, lifted);
                }
            }
        }
        best as usize
    }
}

fn descending(one: &Candidate, other: &Candidate) -> std::cmp::Ordering {
    other.value.total_cmp(&one.value)
}
