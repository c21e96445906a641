//! The products of attention with AVX2, over the groups of pages, with queries and weights in f32.
//!
//! Two registers hold 16 tokens' keys or 16 dimensions of values; up to six rows have accumulators for both, and an
//! element of queries or weights is broadcast from memory. Pairs of bf16 are widened on the way.
//!
//! Products with keys fetch the same group's values, those with values the next block's keys, a line for each that is
//! read: a few rows wait for memory, of which the processor by itself asks for too little at once.

use std::arch::x86_64::*;

use super::{
    STRIP_ROWS,
    pages::{Compute, GROUP},
    tile::{BLOCK_TOKENS, Next},
};
use crate::level::unknown;

/// Rows at a time: their sums, two registers of keys or values and a broadcast element are all the registers there are.
const ROWS: usize = 6;
/// Sums of a row, one for each half of 16.
type Sums = [__m256; 2];

/// Calls a function whose constants are a number of rows, and how many sums of an element hide the latency together.
macro_rules! for_rows {
    ($rows:expr, $function:ident::<$element:ident>, $arguments:tt) => {
        match $rows {
            1 => $function::<$element, 1, 4> $arguments,
            2 => $function::<$element, 2, 2> $arguments,
            3 => $function::<$element, 3, 2> $arguments,
            4 => $function::<$element, 4, 1> $arguments,
            5 => $function::<$element, 5, 1> $arguments,
            _ => $function::<$element, 6, 1> $arguments,
        }
    };
}

/// Rows in pieces of about the same size.
fn pieces(rows: usize) -> impl Iterator<Item = (usize, usize)> {
    let count = rows.div_ceil(ROWS);
    (0..count).map(move |piece| {
        let first = rows * piece / count;
        (first, rows * (piece + 1) / count - first)
    })
}

pub(super) fn scores<C: Compute>(q: &[f32], rows: usize, head_dim: usize, groups: &[&[C]], _: &Next, out: &mut [f32]) {
    assert!((1..=STRIP_ROWS).contains(&rows) && q.len() >= rows * head_dim && out.len() >= rows * BLOCK_TOKENS);
    assert!(groups.len() * GROUP <= BLOCK_TOKENS && groups.iter().all(|group| group.len() == 2 * GROUP * head_dim));
    assert!(head_dim.is_multiple_of(16));
    for (index, group) in groups.iter().enumerate() {
        for (first, count) in pieces(rows) {
            let out = out[first * BLOCK_TOKENS + index * GROUP..].as_mut_ptr();
            // SAFETY: this level has the instructions; `q` has `rows` rows of `head_dim`, `out` as many of `BLOCK_TOKENS`,
            // and the group begins with its keys (asserted above).
            unsafe {
                let q = q.as_ptr().add(first * head_dim);
                for_rows!(count, score::<C>, (q, head_dim, group.as_ptr(), out));
            }
        }
    }
}

pub(super) fn weighted<C: Compute>(
    weights: &[f32],
    rows: usize,
    head_dim: usize,
    groups: &[&[C]],
    next: &Next,
    sums: &mut [f32],
) {
    assert!((1..=STRIP_ROWS).contains(&rows) && weights.len() >= rows * BLOCK_TOKENS && sums.len() >= rows * head_dim);
    assert!(groups.len() * GROUP <= BLOCK_TOKENS && groups.iter().all(|group| group.len() == 2 * GROUP * head_dim));
    assert!(head_dim.is_multiple_of(16));
    for start in (0..head_dim).step_by(16) {
        for (first, count) in pieces(rows) {
            let sums = sums[first * head_dim + start..].as_mut_ptr();
            // SAFETY: this level has the instructions; the rows are as long as the loops go, and each group ends with its
            // values, of which those of these 16 dimensions lie together (asserted above).
            unsafe {
                let weights = weights.as_ptr().add(first * BLOCK_TOKENS);
                for_rows!(count, weigh::<C>, (weights, head_dim, groups, GROUP * (head_dim + start), next, sums));
            }
        }
    }
}

/// # Safety
/// `q` points to `M` rows of `head_dim` elements, `keys` to a group's keys, `out` to `M` rows of 16 that are
/// [`BLOCK_TOKENS`] apart.
#[target_feature(enable = "avx2,fma")]
unsafe fn score<C: Compute, const M: usize, const S: usize>(
    q: *const f32,
    head_dim: usize,
    keys: *const C,
    out: *mut f32,
) {
    let mut sums = [[[_mm256_setzero_ps(); 2]; M]; S];
    // SAFETY: the caller's promise.
    unsafe {
        let values = keys.add(GROUP * head_dim).cast();
        add_products::<C, M, S>(&mut sums, q, head_dim, keys.cast(), head_dim, values);
        store(&sums, out, BLOCK_TOKENS);
    }
}

/// # Safety
/// `weights` points to `M` rows of [`BLOCK_TOKENS`] elements; each group has values of 16 dimensions at `values`; `sums`
/// points to `M` rows of 16 that are `head_dim` apart.
#[target_feature(enable = "avx2,fma")]
unsafe fn weigh<C: Compute, const M: usize, const S: usize>(
    weights: *const f32,
    head_dim: usize,
    groups: &[&[C]],
    values: usize,
    next: &Next,
    sums: *mut f32,
) {
    let mut held = [[[_mm256_setzero_ps(); 2]; M]; S];
    // SAFETY: the caller's promise.
    unsafe {
        for (row, held) in held[0].iter_mut().enumerate() {
            *held = plain(sums.add(row * head_dim).cast());
        }
        for (index, group) in groups.iter().enumerate() {
            let ahead = next[index].wrapping_add((values - GROUP * head_dim) * size_of::<C>());
            let values = group.as_ptr().add(values).cast();
            add_products::<C, M, S>(&mut held, weights.add(index * GROUP), BLOCK_TOKENS, values, GROUP, ahead);
        }
        store(&held, sums, head_dim);
    }
}

/// Adds up the sums of each element, and writes them.
///
/// # Safety
/// `out` points to `M` rows of 16, `stride` apart, and the level is available.
#[inline(always)]
unsafe fn store<const M: usize, const S: usize>(sums: &[[Sums; M]; S], out: *mut f32, stride: usize) {
    for row in 0..M {
        for half in 0..2 {
            // SAFETY: the caller's promise.
            unsafe {
                let total =
                    sums[1..].iter().fold(sums[0][row][half], |sum, other| _mm256_add_ps(sum, other[row][half]));
                _mm256_storeu_ps(out.add(row * stride + half * 8), total);
            }
        }
    }
}

/// `sums[row][lane] += sum over i of x[row][i] * w[i][lane]`, for 16 lanes and `len` elements of each row, a multiple
/// of 16. As much as is read is fetched from `ahead`.
///
/// # Safety
/// `x` points to `M` rows of `len` elements, `stride` apart, `w` to `len` times 16 elements, in pairs of `i` where `C`
/// has them, and the level is available.
#[inline(always)]
unsafe fn add_products<C: Compute, const M: usize, const S: usize>(
    sums: &mut [[Sums; M]; S],
    x: *const f32,
    stride: usize,
    w: *const u8,
    len: usize,
    ahead: *const u8,
) {
    let mut i = 0;
    while i < len {
        for line in 0..size_of::<C>() {
            // SAFETY: nothing is read.
            unsafe { _mm_prefetch::<_MM_HINT_T0>(ahead.wrapping_add((i / 4 * size_of::<C>() + line) * 64).cast()) };
        }
        for unrolled in 0..4 {
            // SAFETY: the caller's promise.
            unsafe {
                let at = i + unrolled;
                // A pair is loaded twice: the sums of six rows leave no room to keep it.
                let w = if C::PAIRS { widened(unknown(w.add(at / 2 * 64)), at % 2) } else { plain(w.add(at * 64)) };
                for (row, sums) in sums[unrolled % S].iter_mut().enumerate() {
                    let x = _mm256_broadcast_ss(&*x.add(row * stride + at));
                    *sums = [_mm256_fmadd_ps(w[0], x, sums[0]), _mm256_fmadd_ps(w[1], x, sums[1])];
                }
            }
        }
        i += 4;
    }
}

/// # Safety
/// 16 elements are at `w`, and the level is available.
#[inline(always)]
unsafe fn plain(w: *const u8) -> Sums {
    // SAFETY: the caller's promise.
    unsafe { [_mm256_loadu_ps(w.cast()), _mm256_loadu_ps(w.add(32).cast())] }
}

/// The first (lower) or second of each of 16 pairs of bf16.
///
/// # Safety
/// They are at `w`, and the level is available.
#[inline(always)]
unsafe fn widened(w: *const u8, which: usize) -> Sums {
    // SAFETY: the caller's promise.
    unsafe {
        let pairs = [_mm256_loadu_si256(w.cast()), _mm256_loadu_si256(w.add(32).cast())];
        if which == 0 {
            return [
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(pairs[0])),
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(pairs[1])),
            ];
        }
        let high = _mm256_set1_epi32(0xffff_0000_u32 as i32);
        [_mm256_castsi256_ps(_mm256_and_si256(pairs[0], high)), _mm256_castsi256_ps(_mm256_and_si256(pairs[1], high))]
    }
}
