//! The softmax of attention, block by block: scores become weights relative to the largest score so far, and what was
//! added up before is made smaller when a larger one comes.
//!
//! Everything is in powers of two. Queries come multiplied with what [`factor`] says, so that scores need nothing more.

use std::{f32::consts::LOG2_E, ops::Range};

use super::{Params, STRIP_ROWS, pages::Compute, tile::BLOCK_TOKENS};
use crate::{Level, activations::for_levels, math::exp2, workspace::Buffer};

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
    #[cfg(target_arch = "x86_64")]
    if level == Level::Avx512 {
        // SAFETY: the level is one that this machine has.
        return unsafe { weigh_avx512(scores, visible, params.head_dim, out, weights) };
    }
    weigh_plain(level, scores, visible, params.head_dim, out);
    C::narrow(level, scores, weights);
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

for_levels! {
    /// See [`weigh`]; in place.
    fn weigh_plain(scores: &mut [f32], visible: &[Range<usize>], head_dim: usize, out: &mut Partial) {
        for (row, (scores, visible)) in scores.as_chunks_mut().0.iter_mut().zip(visible).enumerate() {
            let sums = &mut out.sums[row * head_dim..][..head_dim];
            weigh_row(scores, visible, [&mut out.peaks[row], &mut out.totals[row]], sums);
        }
    }
}

/// One row: `state` is its peak and its total.
#[inline(always)]
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

/// Makes smaller what is relative to a lower peak. The first time that is nothing.
#[inline(always)]
fn raise(block_peak: f32, held_peak: &mut f32, total: &mut f32, sums: &mut [f32]) {
    if block_peak > *held_peak {
        let decay = exp2(*held_peak - block_peak);
        *held_peak = block_peak;
        *total *= decay;
        sums.iter_mut().for_each(|sum| *sum *= decay);
    }
}

/// See [`weigh`]: a row's scores stay in four registers.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
fn weigh_avx512<C: Compute>(
    scores: &[f32],
    visible: &[Range<usize>],
    head_dim: usize,
    out: &mut Partial,
    weights: &mut [C],
) {
    use std::arch::x86_64::*;
    const REGISTERS: usize = BLOCK_TOKENS / 16;
    let rows = scores.as_chunks::<BLOCK_TOKENS>().0.iter().zip(weights.as_chunks_mut::<BLOCK_TOKENS>().0);
    for (row, ((scores, weights), visible)) in rows.zip(visible).enumerate() {
        let bits = |end: usize| if end == BLOCK_TOKENS { u64::MAX } else { (1 << end) - 1 };
        let seen = bits(visible.end) & !bits(visible.start);
        let masks: [u16; REGISTERS] = std::array::from_fn(|part| (seen >> (16 * part)) as u16);
        let lowest = _mm512_set1_ps(f32::NEG_INFINITY);
        let seen_scores: [__m512; REGISTERS] = std::array::from_fn(|part| {
            // SAFETY: the row has so many scores.
            unsafe { _mm512_mask_loadu_ps(lowest, masks[part], scores.as_ptr().add(16 * part)) }
        });
        let highest =
            _mm512_max_ps(_mm512_max_ps(seen_scores[0], seen_scores[1]), _mm512_max_ps(seen_scores[2], seen_scores[3]));
        let (peak, total) = (&mut out.peaks[row], &mut out.totals[row]);
        raise(_mm512_reduce_max_ps(highest), peak, total, &mut out.sums[row * head_dim..][..head_dim]);
        let origin = _mm512_set1_ps(if *peak == f32::NEG_INFINITY { 0.0 } else { *peak });
        let powers: [__m512; REGISTERS] =
            std::array::from_fn(|part| exp2_avx512::<C>(masks[part], _mm512_sub_ps(seen_scores[part], origin)));
        let sum = _mm512_add_ps(_mm512_add_ps(powers[0], powers[1]), _mm512_add_ps(powers[2], powers[3]));
        *total += _mm512_reduce_add_ps(sum);
        for part in (0..REGISTERS).step_by(2) {
            let to = weights[16 * part..].as_mut_ptr();
            // SAFETY: the row has room for all registers, and an element is a pair's half or as wide as an f32.
            unsafe {
                if C::PAIRS {
                    let narrowed = _mm512_cvtne2ps_pbh(powers[part + 1], powers[part]);
                    _mm512_storeu_si512(to.cast(), std::mem::transmute::<__m512bh, __m512i>(narrowed));
                } else {
                    _mm512_storeu_ps(to.cast(), powers[part]);
                    _mm512_storeu_ps(to.add(16).cast(), powers[part + 1]);
                }
            }
        }
    }
}

/// Terms of polynomials for `2^r` with `0 <= r < 1`, the highest power first, from a fit of least relative error: to
/// within 1e-7, and to within 3e-6, which is far less than what bf16 rounds away.
#[cfg(target_arch = "x86_64")]
#[expect(clippy::approx_constant, reason = "fitted, and near ln(2) by its nature")]
const POWER_F32: [f32; 7] =
    [2.170_225_5e-4, 1.243_968_7e-3, 9.678_841e-3, 5.548_334e-2, 2.402_298_3e-1, 6.931_47e-1, 1.0];
#[cfg(target_arch = "x86_64")]
const POWER_BF16: [f32; 5] = [1.353_416_8e-2, 5.201_146e-2, 2.414_427_5e-1, 6.930_038_3e-1, 1.000_002_6];

/// 2 to the power of `x` where the mask is set, else 0.
#[cfg(target_arch = "x86_64")]
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn exp2_avx512<C: Compute>(mask: u16, x: std::arch::x86_64::__m512) -> std::arch::x86_64::__m512 {
    use std::arch::x86_64::*;
    const FLOOR: i32 = 1;
    // What is above the next lower integer; scaling takes that integer.
    let r = _mm512_reduce_ps::<FLOOR>(x);
    let (first, rest) = if C::PAIRS { (POWER_BF16[0], &POWER_BF16[1..]) } else { (POWER_F32[0], &POWER_F32[1..]) };
    let power = rest.iter().fold(_mm512_set1_ps(first), |power, term| _mm512_fmadd_ps(power, r, _mm512_set1_ps(*term)));
    _mm512_maskz_scalef_ps(mask, power, x)
}
