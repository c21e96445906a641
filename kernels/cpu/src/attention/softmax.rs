//! The softmax of attention, block by block: scores become weights relative to the largest score so far, and what was
//! added up before is made smaller when a larger one comes.
//!
//! Everything is in powers of two. Queries come multiplied with what [`factor`] says, so that scores need nothing more.

use std::{f32::consts::LOG2_E, ops::Range};

use super::{Params, STRIP_ROWS, pages::Compute, tile::BLOCK_TOKENS};
use crate::{Level, activations::for_levels, math::exp2, workspace::Buffer};

#[cfg(target_arch = "x86_64")]
mod x86;

/// The running softmax of a strip of rows.
pub(super) struct Partial {
    /// `[rows, head_dim]`: values weighted relative to the peak.
    pub sums: Buffer<f32>,
    /// Largest score so far, times log2(e).
    pub peaks: [f32; STRIP_ROWS],
    /// Sum of the weights.
    pub totals: [f32; STRIP_ROWS],
}

impl Partial {
    /// Of nothing yet.
    pub fn new(rows: usize, head_dim: usize) -> Self {
        let sums = Buffer::zeroed(rows * head_dim);
        Self { sums, peaks: [f32::NEG_INFINITY; STRIP_ROWS], totals: [0.0; STRIP_ROWS] }
    }

    /// Elements that [`Self::save`] takes.
    pub fn saved(head_dim: usize) -> usize {
        STRIP_ROWS * (head_dim + 2)
    }

    /// Writes sums, peaks and totals one after the other.
    pub fn save(&self, out: &mut [f32], head_dim: usize) {
        let (sums, rest) = out.split_at_mut(STRIP_ROWS * head_dim);
        sums[..self.sums.len()].copy_from_slice(&self.sums);
        rest[..STRIP_ROWS].copy_from_slice(&self.peaks);
        rest[STRIP_ROWS..].copy_from_slice(&self.totals);
    }

    /// Takes a saved part in.
    pub fn merge(&mut self, part: &[f32], head_dim: usize) {
        let (sums, rest) = part.split_at(STRIP_ROWS * head_dim);
        for row in 0..self.sums.len() / head_dim {
            let (peak, total) = (rest[row], rest[STRIP_ROWS + row]);
            if peak == f32::NEG_INFINITY {
                continue;
            }
            let highest = self.peaks[row].max(peak);
            let (own, other) = (exp2(self.peaks[row] - highest), exp2(peak - highest));
            self.peaks[row] = if peak.is_nan() { peak } else { highest };
            self.totals[row] = self.totals[row] * own + total * other;
            let held = &mut self.sums[row * head_dim..][..head_dim];
            held.iter_mut().zip(&sums[row * head_dim..]).for_each(|(held, sum)| *held = *held * own + sum * other);
        }
    }
}

/// What queries are multiplied with before their products with keys.
pub(super) fn factor(params: &Params) -> f32 {
    // A cap is for scores as they are.
    params.scale * if params.soft_cap.is_some() { 1.0 } else { LOG2_E }
}

/// Turns the scores of a block, `[rows, BLOCK_TOKENS]`, into `weights` of the same shape, of which only those of the
/// `visible` tokens of a row are not zero.
pub(super) fn weigh<C: Compute>(
    level: Level,
    scores: &mut [f32],
    visible: &[Range<usize>],
    params: &Params,
    out: &mut Partial,
    weights: &mut [C],
) {
    if let Some(cap) = params.soft_cap {
        soft_cap(level, scores, cap);
    }
    match level {
        // SAFETY: the level is one that this machine has.
        #[cfg(target_arch = "x86_64")]
        Level::Avx512Bf16 | Level::Amx if C::PAIRS => unsafe {
            x86::weigh_avx512_bf16(scores, visible, params.head_dim, out, weights);
        },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Level::Avx512 | Level::Avx512Bf16 | Level::Amx if !C::PAIRS => unsafe {
            x86::weigh_avx512(scores, visible, params.head_dim, out, weights);
        },
        #[cfg(target_arch = "x86_64")]
        Level::Avx2 => {
            // SAFETY: as above.
            unsafe { x86::weigh_avx2(scores, visible, params.head_dim, out, weights) };
        }
        _ => {
            weigh_plain(scores, visible, params.head_dim, out);
            C::narrow(level, scores, weights);
        }
    }
}

for_levels! {
    /// `log2(e) * cap * tanh(score / cap)`
    fn soft_cap(scores: &mut [f32], cap: f32) {
        let (inner, outer) = (-2.0 * LOG2_E / cap, LOG2_E * cap);
        for score in scores {
            let e = exp2(score.abs() * inner);
            *score = (outer * (1.0 - e) / (1.0 + e)).copysign(*score);
        }
    }
}

/// See [`weigh`]; in place.
fn weigh_plain(scores: &mut [f32], visible: &[Range<usize>], head_dim: usize, out: &mut Partial) {
    for (row, (scores, visible)) in scores.as_chunks_mut().0.iter_mut().zip(visible).enumerate() {
        let sums = &mut out.sums[row * head_dim..][..head_dim];
        weigh_row(scores, visible, [&mut out.peaks[row], &mut out.totals[row]], sums);
    }
}

/// One row: `state` is its peak and its total.
fn weigh_row(scores: &mut [f32; BLOCK_TOKENS], visible: &Range<usize>, state: [&mut f32; 2], sums: &mut [f32]) {
    let [held_peak, total] = state;
    if visible.is_empty() {
        return scores.fill(0.0);
    }
    scores[..visible.start].fill(f32::NEG_INFINITY);
    scores[visible.end..].fill(f32::NEG_INFINITY);
    let mut peaks = [f32::NEG_INFINITY; 16];
    for chunk in scores.as_chunks::<16>().0 {
        for (peak, score) in peaks.iter_mut().zip(chunk) {
            *peak = if *score > *peak { *score } else { *peak };
        }
    }
    let block_peak = peaks.iter().fold(f32::NEG_INFINITY, |peak, score| if *score > peak { *score } else { peak });
    raise(block_peak, held_peak, total, sums);
    let peak = if *held_peak == f32::NEG_INFINITY { 0.0 } else { *held_peak };
    let mut totals = [0f32; 16];
    for chunk in scores.as_chunks_mut::<16>().0 {
        for (total, score) in totals.iter_mut().zip(chunk) {
            *score = exp2(*score - peak);
            *total += *score;
        }
    }
    *total += totals.iter().sum::<f32>();
}

/// Makes smaller what is relative to a lower peak.
#[inline(always)]
fn raise(block_peak: f32, held_peak: &mut f32, total: &mut f32, sums: &mut [f32]) {
    if block_peak > *held_peak {
        let before = std::mem::replace(held_peak, block_peak);
        if before == f32::NEG_INFINITY {
            // The first time, that is nothing.
            return;
        }
        let decay = exp2(before - block_peak);
        *total *= decay;
        sums.iter_mut().for_each(|sum| *sum *= decay);
    }
}
