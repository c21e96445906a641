//! The products of attention with AVX-512, over the groups of pages.
//!
//! A register holds 16 tokens' keys or 16 dimensions of values; each row has accumulators of its own, and an element (a
//! pair) of queries or weights is broadcast from memory. Two registers at a time share a broadcast.
//!
//! As with AVX2, products with keys fetch the same group's values, those with values the next block's keys.

use std::arch::x86_64::*;

use super::{
    STRIP_ROWS,
    pages::{Compute, GROUP},
    tile::{BLOCK_TOKENS, Next},
};

/// Bytes of a register.
const REGISTER: usize = 64;

/// Calls a function whose first constant is a number of rows.
macro_rules! for_rows {
    ($rows:expr, $function:ident, [$($rest:tt)*], $arguments:tt) => {
        match $rows {
            1 => $function::<1, $($rest)*> $arguments,
            2 => $function::<2, $($rest)*> $arguments,
            3 => $function::<3, $($rest)*> $arguments,
            4 => $function::<4, $($rest)*> $arguments,
            5 => $function::<5, $($rest)*> $arguments,
            6 => $function::<6, $($rest)*> $arguments,
            7 => $function::<7, $($rest)*> $arguments,
            8 => $function::<8, $($rest)*> $arguments,
            9 => $function::<9, $($rest)*> $arguments,
            10 => $function::<10, $($rest)*> $arguments,
            11 => $function::<11, $($rest)*> $arguments,
            _ => $function::<12, $($rest)*> $arguments,
        }
    };
}

/// The two loops over one float format: `stream` for few rows and one group, `pair` for many rows and two groups.
macro_rules! float {
    ($stream:ident, $pair:ident, $x:ty, $bytes:literal, |$weights:ident| $load:expr, |$sum:ident, $w:ident, $value:ident| $add:expr) => {
        /// # Safety
        /// `x` points to `M` rows of `steps` elements, `x_stride` apart, `weights` to a group of as many, `out` to `M` rows of 16,
        /// `out_stride` apart.
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vnni")]
        unsafe fn $stream<const M: usize>(
            x: *const $x,
            x_stride: usize,
            weights: *const u8,
            steps: usize,
            out: *mut f32,
            out_stride: usize,
        ) {
            const UNROLL: usize = 8;
            // Accumulators of a row: together at least as many as hide the latency.
            let chains = const {
                if M == 1 {
                    8
                } else if M < 4 {
                    4
                } else if M < 7 {
                    2
                } else {
                    1
                }
            };
            let mut sums = [[_mm512_setzero_ps(); UNROLL]; M];
            let whole = steps / UNROLL * UNROLL;
            let mut step = 0;
            // SAFETY: the caller's promise.
            unsafe {
                while step < whole {
                    for unrolled in 0..UNROLL {
                        let $weights = weights.add((step + unrolled) * $bytes);
                        fetch($weights.add(steps * $bytes));
                        let $w = $load;
                        for row in 0..M {
                            let $value = x.add(row * x_stride + step + unrolled).read_unaligned();
                            let $sum = sums[row][unrolled % chains];
                            sums[row][unrolled % chains] = $add;
                        }
                    }
                    step += UNROLL;
                }
                while step < steps {
                    let $weights = weights.add(step * $bytes);
                    let $w = $load;
                    for row in 0..M {
                        let $value = x.add(row * x_stride + step).read_unaligned();
                        let $sum = sums[row][0];
                        sums[row][0] = $add;
                    }
                    step += 1;
                }
                for row in 0..M {
                    let mut total = sums[row][0];
                    for chain in 1..chains {
                        total = _mm512_add_ps(total, sums[row][chain]);
                    }
                    _mm512_storeu_ps(out.add(row * out_stride), total);
                }
            }
        }

        /// # Safety
        /// As above, with two groups, and rows of 32 in `out`.
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vnni")]
        unsafe fn $pair<const M: usize>(
            x: *const $x,
            x_stride: usize,
            weights: [*const u8; 2],
            steps: usize,
            out: *mut f32,
            out_stride: usize,
        ) {
            let mut sums = [[_mm512_setzero_ps(); 2]; M];
            // SAFETY: the caller's promise.
            unsafe {
                for step in 0..steps {
                    let both = [weights[0].add(step * $bytes), weights[1].add(step * $bytes)];
                    both.iter().for_each(|weights| fetch(weights.add(steps * $bytes)));
                    let both = both.map(|$weights| $load);
                    for row in 0..M {
                        let $value = x.add(row * x_stride + step).read_unaligned();
                        for side in 0..2 {
                            let ($sum, $w) = (sums[row][side], both[side]);
                            sums[row][side] = $add;
                        }
                    }
                }
                for row in 0..M {
                    for side in 0..2 {
                        _mm512_storeu_ps(out.add(row * out_stride + side * GROUP), sums[row][side]);
                    }
                }
            }
        }
    };
}

float!(
    bf16_stream,
    bf16_pair,
    i32,
    64,
    |weights| _mm512_loadu_si512(weights.cast()),
    |sum, w, value| _mm512_dpbf16_ps(sum, pairs(w), pairs(_mm512_set1_epi32(value)))
);
float!(f32_stream, f32_pair, f32, 64, |weights| _mm512_loadu_ps(weights.cast()), |sum, w, value| _mm512_fmadd_ps(
    w,
    _mm512_set1_ps(value),
    sum
));

/// Asks for a line of memory that will be read.
#[inline(always)]
fn fetch(line: *const u8) {
    // SAFETY: nothing is read.
    unsafe { _mm_prefetch::<_MM_HINT_T0>(line.cast()) };
}

#[inline(always)]
fn pairs(bits: __m512i) -> __m512bh {
    // SAFETY: both are 512 bits without invalid values.
    unsafe { std::mem::transmute(bits) }
}

pub(super) fn scores<C: Compute>(q: &[C], rows: usize, head_dim: usize, groups: &[&[C]], out: &mut [f32]) {
    assert!((1..=STRIP_ROWS).contains(&rows) && q.len() >= rows * head_dim && out.len() >= rows * BLOCK_TOKENS);
    assert!(groups.len() * GROUP <= BLOCK_TOKENS && groups.iter().all(|group| group.len() == 2 * GROUP * head_dim));
    assert!(head_dim.is_multiple_of(16));
    let q = q.as_ptr();
    for (index, both) in groups.chunks(2).enumerate() {
        let out = out[index * 2 * GROUP..].as_mut_ptr();
        let first = both[0].as_ptr().cast();
        // SAFETY: this level has the instructions; `q` has `rows` rows of `head_dim`, `out` as many of `BLOCK_TOKENS`, and
        // each group begins with its keys (asserted above).
        unsafe {
            match (C::PAIRS, both.get(1).map(|second| second.as_ptr().cast())) {
                (true, Some(second)) => {
                    let steps = head_dim / 2;
                    for_rows!(rows, bf16_pair, [], (q.cast(), steps, [first, second], steps, out, BLOCK_TOKENS));
                }
                (true, None) => {
                    let steps = head_dim / 2;
                    for_rows!(rows, bf16_stream, [], (q.cast(), steps, first, steps, out, BLOCK_TOKENS));
                }
                (false, Some(second)) => {
                    for_rows!(rows, f32_pair, [], (q.cast(), head_dim, [first, second], head_dim, out, BLOCK_TOKENS));
                }
                (false, None) => {
                    for_rows!(rows, f32_stream, [], (q.cast(), head_dim, first, head_dim, out, BLOCK_TOKENS));
                }
            }
        }
    }
}

pub(super) fn weighted<C: Compute>(
    weights: &[C],
    rows: usize,
    head_dim: usize,
    groups: &[&[C]],
    next: &Next,
    sums: &mut [f32],
) {
    assert!((1..=STRIP_ROWS).contains(&rows) && weights.len() >= rows * BLOCK_TOKENS && sums.len() >= rows * head_dim);
    assert!(groups.len() * GROUP <= BLOCK_TOKENS && groups.iter().all(|group| group.len() == 2 * GROUP * head_dim));
    assert!(head_dim.is_multiple_of(16));
    let mut values = [std::ptr::null(); BLOCK_TOKENS / GROUP];
    for (values, group) in values.iter_mut().zip(groups) {
        *values = group[GROUP * head_dim..].as_ptr().cast::<u8>();
    }
    let (values, weights, sums) = (&values[..groups.len()], weights.as_ptr(), sums.as_mut_ptr());
    let mut block = 0;
    while block < head_dim / 16 {
        let pair = block + 1 < head_dim / 16;
        // SAFETY: this level has the instructions; the rows are as long as the loops go, each group ends with its values,
        // and there are one or two blocks of 16 dimensions more (asserted above).
        unsafe {
            let sums = sums.add(block * 16);
            match (C::PAIRS, pair) {
                (true, true) => {
                    for_rows!(rows, weighted_bf16, [2], (weights.cast(), head_dim, block, values, next, sums))
                }
                (true, false) => {
                    for_rows!(rows, weighted_bf16, [1], (weights.cast(), head_dim, block, values, next, sums))
                }
                (false, true) => {
                    for_rows!(rows, weighted_f32, [2], (weights.cast(), head_dim, block, values, next, sums))
                }
                (false, false) => {
                    for_rows!(rows, weighted_f32, [1], (weights.cast(), head_dim, block, values, next, sums))
                }
            }
        }
        block += 2;
    }
}

/// `N` blocks of 16 dimensions at a time, with a number of blocks known to the compiler, so that sums stay in registers.
macro_rules! weighted {
    ($name:ident, $x:ty, $steps:literal, |$sum:ident, $w:ident, $value:ident| $add:expr) => {
        /// # Safety
        /// `weights` points to `M` rows of [`BLOCK_TOKENS`] elements, `values` to groups of values, `sums` to `M` rows that are
        /// `head_dim` apart, from dimension `16 * block` on.
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vnni")]
        unsafe fn $name<const M: usize, const N: usize>(
            weights: *const $x,
            head_dim: usize,
            block: usize,
            values: &[*const u8],
            next: &Next,
            sums: *mut f32,
        ) {
            /// Registers of a group's values for 16 dimensions.
            const STEPS: usize = $steps;
            const STRIDE: usize = BLOCK_TOKENS / GROUP * STEPS;
            // SAFETY: the caller's promise.
            unsafe {
                let mut held = [[_mm512_setzero_ps(); N]; M];
                for row in 0..M {
                    for side in 0..N {
                        held[row][side] = _mm512_loadu_ps(sums.add(row * head_dim + side * 16));
                    }
                }
                for (group, (values, next)) in values.iter().zip(next).enumerate() {
                    let values = values.add(block * STEPS * REGISTER);
                    let next = next.wrapping_add(block * STEPS * REGISTER);
                    for step in 0..STEPS {
                        let mut registers = [_mm512_setzero_si512(); N];
                        for side in 0..N {
                            let register = (side * STEPS + step) * REGISTER;
                            registers[side] = _mm512_loadu_si512(values.add(register).cast());
                            fetch(next.wrapping_add(register));
                        }
                        for row in 0..M {
                            let $value = weights.add(row * STRIDE + group * STEPS + step).read_unaligned();
                            for side in 0..N {
                                let ($sum, $w) = (held[row][side], registers[side]);
                                held[row][side] = $add;
                            }
                        }
                    }
                }
                for row in 0..M {
                    for side in 0..N {
                        _mm512_storeu_ps(sums.add(row * head_dim + side * 16), held[row][side]);
                    }
                }
            }
        }
    };
}

weighted!(weighted_bf16, i32, 8, |sum, w, value| _mm512_dpbf16_ps(sum, pairs(w), pairs(_mm512_set1_epi32(value))));
weighted!(weighted_f32, f32, 16, |sum, w, value| _mm512_fmadd_ps(_mm512_castsi512_ps(w), _mm512_set1_ps(value), sum));
