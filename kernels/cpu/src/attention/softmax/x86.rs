//! The softmax of attention with AVX-512 and AVX2: a row's scores are in registers.

use std::{arch::x86_64::*, ops::Range};

use super::{Partial, raise};
use crate::attention::{pages::Compute, tile::BLOCK_TOKENS};

/// Both registers of weights are what `$store` writes.
macro_rules! weigh_avx512 {
    ($name:ident, $what:literal, $features:literal, $store:expr) => {
        #[doc = concat!("See [`super::weigh`], for ", $what, ".")]
        #[target_feature(enable = $features)]
        pub fn $name<C: Compute>(
            scores: &[f32],
            visible: &[Range<usize>],
            head_dim: usize,
            out: &mut Partial,
            weights: &mut [C],
        ) {
            let (scores, weights) = (scores.as_chunks::<BLOCK_TOKENS>().0, weights.as_chunks_mut::<BLOCK_TOKENS>().0);
            for (index, visible) in visible.chunks(ROWS).enumerate() {
                let first = index * ROWS;
                let mut highest = [_mm512_setzero_ps(); ROWS];
                for (row, (highest, visible)) in highest.iter_mut().zip(visible).enumerate() {
                    let (scores, seen) = (&scores[first + row], mask_of(visible));
                    *highest = load_visible(scores, seen, 0);
                    for part in 1..REGISTERS {
                        *highest = _mm512_max_ps(*highest, load_visible(scores, seen, part));
                    }
                }
                let highest = of_all_lanes(&highest, |one, other| _mm512_max_ps(one, other));
                let mut sums = [_mm512_setzero_ps(); ROWS];
                for (row, (sum, visible)) in sums.iter_mut().zip(visible).enumerate() {
                    let (highest, row) = (highest[row], first + row);
                    let (peak, total) = (&mut out.peaks[row], &mut out.totals[row]);
                    raise(highest, peak, total, &mut out.sums[row * head_dim..][..head_dim]);
                    let origin = _mm512_set1_ps(if *peak == f32::NEG_INFINITY { 0.0 } else { *peak });
                    let (scores, seen) = (&scores[row], mask_of(visible));
                    for pair in (0..REGISTERS).step_by(2) {
                        let power = |part: usize| {
                            let score = _mm512_sub_ps(load_visible(scores, seen, part), origin);
                            exp2_avx512::<C>((seen >> (16 * part)) as u16, score)
                        };
                        let (one, other) = (power(pair), power(pair + 1));
                        *sum = _mm512_add_ps(*sum, _mm512_add_ps(one, other));
                        let to = weights[row][16 * pair..][..32].as_mut_ptr();
                        // SAFETY: there is room for both registers.
                        unsafe { $store(one, other, to.cast()) };
                    }
                }
                let sums = of_all_lanes(&sums, |one, other| _mm512_add_ps(one, other));
                out.totals[first..].iter_mut().zip(sums).take(visible.len()).for_each(|(total, sum)| *total += sum);
            }
        }
    };
}

/// Registers of a row's scores.
const REGISTERS: usize = BLOCK_TOKENS / 16;
/// Rows whose lanes are joined together, which takes as long as for one.
const ROWS: usize = 4;

/// Which of a row's tokens are visible, a bit for each.
#[inline(always)]
fn mask_of(visible: &Range<usize>) -> u64 {
    let bits = |end: usize| if end == BLOCK_TOKENS { u64::MAX } else { (1 << end) - 1 };
    bits(visible.end) & !bits(visible.start)
}

/// 16 of a row's scores, as low as possible where they are not visible.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn load_visible(scores: &[f32; BLOCK_TOKENS], seen: u64, part: usize) -> __m512 {
    let (lowest, own) = (_mm512_set1_ps(f32::NEG_INFINITY), &scores[16 * part..][..16]);
    // SAFETY: there are so many.
    unsafe { _mm512_mask_loadu_ps(lowest, (seen >> (16 * part)) as u16, own.as_ptr()) }
}

/// What each register's lanes give together.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn of_all_lanes(values: &[__m512; ROWS], join: impl Fn(__m512, __m512) -> __m512) -> [f32; ROWS] {
    let pair = |one, other| _mm512_castps_pd(join(_mm512_unpacklo_ps(one, other), _mm512_unpackhi_ps(one, other)));
    let (first, second) = (pair(values[0], values[1]), pair(values[2], values[3]));
    let low = _mm512_castpd_ps(_mm512_unpacklo_pd(first, second));
    let high = _mm512_castpd_ps(_mm512_unpackhi_pd(first, second));
    // All four in each quarter.
    let quarters = join(low, high);
    let halves = join(quarters, _mm512_shuffle_f32x4::<0b01_00_11_10>(quarters, quarters));
    let whole = join(halves, _mm512_shuffle_f32x4::<0b10_11_00_01>(halves, halves));
    let mut all = [0.0; ROWS];
    // SAFETY: there is room for a quarter of the register.
    unsafe { _mm_storeu_ps(all.as_mut_ptr(), _mm512_castps512_ps128(whole)) };
    all
}

weigh_avx512!(
    weigh_avx512,
    "weights in f32",
    "avx512f,avx512bw,avx512dq,avx512vl",
    |one: __m512, other: __m512, to: *mut f32| {
        _mm512_storeu_ps(to, one);
        _mm512_storeu_ps(to.add(16), other);
    }
);
weigh_avx512!(
    weigh_avx512_bf16,
    "weights in bf16",
    "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16",
    |one: __m512, other: __m512, to: *mut __m512i| {
        let narrowed = _mm512_cvtne2ps_pbh(other, one);
        _mm512_storeu_si512(to, std::mem::transmute::<__m512bh, __m512i>(narrowed));
    }
);

/// Terms of polynomials for `2^r` with `0 <= r < 1`, the highest power first, from a fit of least relative error: to
/// within 1e-7, and to within 3e-6, which is far less than what bf16 rounds away.
#[expect(clippy::approx_constant, reason = "fitted, and near ln(2) by its nature")]
const POWER_F32: [f32; 7] =
    [2.170_225_5e-4, 1.243_968_7e-3, 9.678_841e-3, 5.548_334e-2, 2.402_298_3e-1, 6.931_47e-1, 1.0];
const POWER_BF16: [f32; 5] = [1.353_416_8e-2, 5.201_146e-2, 2.414_427_5e-1, 6.930_038_3e-1, 1.000_002_6];

/// 2 to the power of `x` where the mask is set, else 0.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn exp2_avx512<C: Compute>(mask: u16, x: __m512) -> __m512 {
    const FLOOR: i32 = 1;
    // What is above the next lower integer; scaling takes that integer.
    let r = _mm512_reduce_ps::<FLOOR>(x);
    let (first, rest) = if C::PAIRS { (POWER_BF16[0], &POWER_BF16[1..]) } else { (POWER_F32[0], &POWER_F32[1..]) };
    let power = rest.iter().fold(_mm512_set1_ps(first), |power, term| _mm512_fmadd_ps(power, r, _mm512_set1_ps(*term)));
    _mm512_maskz_scalef_ps(mask, power, x)
}

/// As with AVX-512.
#[target_feature(enable = "avx2,fma")]
pub fn weigh_avx2<C: Compute>(
    scores: &[f32],
    visible: &[Range<usize>],
    head_dim: usize,
    out: &mut Partial,
    weights: &mut [C],
) {
    const REGISTERS: usize = BLOCK_TOKENS / 8;
    assert!(!C::PAIRS, "this level's products take f32");
    let rows = scores.as_chunks::<BLOCK_TOKENS>().0.iter().zip(weights.as_chunks_mut::<BLOCK_TOKENS>().0);
    for (row, ((scores, weights), visible)) in rows.zip(visible).enumerate() {
        let mut held: [__m256; REGISTERS] = std::array::from_fn(|part| {
            // SAFETY: the row has so many scores.
            unsafe { _mm256_loadu_ps(scores.as_ptr().add(8 * part)) }
        });
        if *visible != (0..BLOCK_TOKENS) {
            hide(&mut held, visible);
        }
        let highest = fold(held, |one, other| _mm256_max_ps(one, other));
        let (peak, total) = (&mut out.peaks[row], &mut out.totals[row]);
        raise(largest(highest), peak, total, &mut out.sums[row * head_dim..][..head_dim]);
        let origin = _mm256_set1_ps(if *peak == f32::NEG_INFINITY { 0.0 } else { *peak });
        for (part, held) in held.iter_mut().enumerate() {
            *held = exp2_avx2(_mm256_sub_ps(*held, origin));
            // SAFETY: as above, and elements that are in no pairs are f32.
            unsafe { _mm256_storeu_ps(weights.as_mut_ptr().cast::<f32>().add(8 * part), *held) };
        }
        *total += added(fold(held, |one, other| _mm256_add_ps(one, other)));
    }
}

/// All registers but those of tokens that are `visible` become as low as possible.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn hide(scores: &mut [__m256], visible: &Range<usize>) {
    let (start, end) = (_mm256_set1_epi32(visible.start as i32 - 1), _mm256_set1_epi32(visible.end as i32));
    let lowest = _mm256_set1_ps(f32::NEG_INFINITY);
    let mut token = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    for score in scores {
        let seen = _mm256_and_si256(_mm256_cmpgt_epi32(token, start), _mm256_cmpgt_epi32(end, token));
        *score = _mm256_blendv_ps(lowest, *score, _mm256_castsi256_ps(seen));
        token = _mm256_add_epi32(token, _mm256_set1_epi32(8));
    }
}

/// All registers in one, by halves.
#[inline(always)]
fn fold(values: [__m256; 8], join: impl Fn(__m256, __m256) -> __m256) -> __m256 {
    let fours: [__m256; 4] = std::array::from_fn(|part| join(values[part], values[part + 4]));
    join(join(fours[0], fours[2]), join(fours[1], fours[3]))
}

#[inline]
#[target_feature(enable = "avx2")]
fn largest(values: __m256) -> f32 {
    let four = _mm_max_ps(_mm256_castps256_ps128(values), _mm256_extractf128_ps::<1>(values));
    let two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)))
}

#[inline]
#[target_feature(enable = "avx2")]
fn added(values: __m256) -> f32 {
    let four = _mm_add_ps(_mm256_castps256_ps128(values), _mm256_extractf128_ps::<1>(values));
    let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
}

/// 2 to the power of `x`, which is not above 1; 0 below -126. What is no number stays none.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn exp2_avx2(x: __m256) -> __m256 {
    const LOWEST: f32 = -126.0;
    let lowest = _mm256_set1_ps(LOWEST);
    // Of a number and none, the second operand is the maximum.
    let clamped = _mm256_max_ps(lowest, x);
    let floor = _mm256_floor_ps(clamped);
    let r = _mm256_sub_ps(clamped, floor);
    let terms = POWER_F32[1..].iter();
    let power =
        terms.fold(_mm256_set1_ps(POWER_F32[0]), |power, term| _mm256_fmadd_ps(power, r, _mm256_set1_ps(*term)));
    let exponent = _mm256_slli_epi32::<23>(_mm256_cvtps_epi32(floor));
    let scaled = _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(power), exponent));
    _mm256_and_ps(scaled, _mm256_cmp_ps::<_CMP_NLT_UQ>(x, lowest))
}
