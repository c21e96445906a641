//! Products of bytes in pairs, for both halves of a group, whose sums stay in registers for a block.
//!
//! The instruction multiplies unsigned bytes with signed ones, and adds neighbours up in 16 bits, where they must fit.
//! - Elements of up to six bits: all products that belong to one scale are added up in 16 bits. A lane gets 16 columns of
//!   a block (of Q6, whose scales are for half of it, 8), and the sum, less the offset times the activations, is within
//!   `16 * 16 * 127` (`8 * 32 * 127`). It begins with the offset's part, and wraps on the way at most. Q5Min is computed
//!   around 16 like Q5, which its minimum makes up for.
//! - Q8: weights as they are stored, with 128 added, times activations of which two neighbours' magnitudes are at most 127
//!   together: two products are within `255 * 127`. Twice two, less the offset times their activations, are within
//!   `2 * 128 * 127`, and wrap on the way at most; they are added up in 32 bits, which takes a multiplication for each sum.
//!   (With activations that may be 127 each, weights would have to give their signs to the activations, which takes two
//!   more operations for each product, in the same units: half as much time again.)

use std::{arch::x86_64::*, ops::Range};

use super::{
    Panel, Q4, Q4_MIN, Q5, Q5_MIN, Q6, Q8, fetched_lines, first_sum, for_format, format_of, has_minimum, run_rows,
};
use crate::{
    activations::SUMS,
    packed::{BLOCK, Format, quantized::scales_at},
    shared::LINE,
};

/// Rows whose sums stay in registers with two registers of weights and one of activations; with Q8, with most of four of
/// weights.
const ROWS: usize = 6;
const Q8_ROWS: usize = 4;

/// # Safety
/// The level is available, and the panel has so many rows.
pub(super) unsafe fn run(format: Format, panel: Panel, rows: usize) {
    run_rows!(format, panel, rows, |f| if f == Q8 { Q8_ROWS } else { ROWS }, [1, 2, 3, 4, 5, 6]);
}

/// Both halves of a group.
type Halves<T> = [T; 2];

/// Register `J` of a tile, an element in each byte, from the bytes of half of a group.
///
/// # Safety
/// The format's tile is there, and the level is available.
#[inline(always)]
unsafe fn unpack<const F: u32, const J: usize>(tile: *const u8) -> __m256i {
    // SAFETY: as the caller says.
    unsafe {
        let load = |register: usize| _mm256_loadu_si256(tile.add(register * 64).cast());
        let fours = load(J % 4);
        let fours = if J < 4 { fours } else { _mm256_srli_epi16::<4>(fours) };
        let low = _mm256_and_si256(fours, _mm256_set1_epi8(15));
        let high = match F {
            Q5 | Q5_MIN => {
                let bits = load(4);
                let bits = match J {
                    0 => _mm256_slli_epi16::<4>(bits),
                    1 => _mm256_slli_epi16::<3>(bits),
                    2 => _mm256_slli_epi16::<2>(bits),
                    3 => _mm256_slli_epi16::<1>(bits),
                    4 => bits,
                    5 => _mm256_srli_epi16::<1>(bits),
                    6 => _mm256_srli_epi16::<2>(bits),
                    _ => _mm256_srli_epi16::<3>(bits),
                };
                _mm256_and_si256(bits, _mm256_set1_epi8(16))
            }
            Q6 => {
                let bits = load(4 + J / 4);
                let bits = match J % 4 {
                    0 => _mm256_slli_epi16::<4>(bits),
                    1 => _mm256_slli_epi16::<2>(bits),
                    2 => bits,
                    _ => _mm256_srli_epi16::<2>(bits),
                };
                _mm256_and_si256(bits, _mm256_set1_epi8(48))
            }
            _ => return low,
        };
        _mm256_or_si256(low, high)
    }
}

/// Adds the products of register `J` to the sums of all rows.
///
/// # Safety
/// A tile is at `tile`, a block of `R` rows, `stride` bytes apart, at `x`, and the level is available.
#[inline(always)]
unsafe fn step<const F: u32, const R: usize, const J: usize>(
    tile: *const u8,
    x: *const i8,
    stride: usize,
    sums: &mut [Halves<__m256i>; R],
) {
    // SAFETY: as the caller says.
    unsafe {
        let w = [unpack::<F, J>(tile), unpack::<F, J>(tile.add(32))];
        for (row, sums) in sums.iter_mut().enumerate() {
            let x = _mm256_set1_epi32(x.add(row * stride + J * 4).cast::<i32>().read_unaligned());
            for half in 0..2 {
                let pairs = _mm256_maddubs_epi16(w[half], x);
                sums[half] = held(_mm256_add_epi16(sums[half], pairs));
            }
        }
    }
}

/// Adds the products of registers `2 * J` and `2 * J + 1` of Q8 to the sums of all rows. Operations of a kind come in twos,
/// for which there are two units: in another order it takes up to a tenth longer.
///
/// # Safety
/// As above; the offset's parts of the rows' blocks are `sums_stride` words apart.
#[inline(always)]
unsafe fn double_step<const R: usize, const J: usize>(
    tile: *const u8,
    (x, stride): (*const i8, usize),
    (offset_sums, sums_stride): (*const i32, usize),
    sums: &mut [Halves<__m256i>; R],
) {
    // SAFETY: as the caller says.
    unsafe {
        let load = |part: usize| _mm256_loadu_si256(tile.add(J * 128 + part * 32).cast());
        let w = [[load(0), load(1)], [load(2), load(3)]];
        for (row, sums) in sums.iter_mut().enumerate() {
            let fours = x.add(row * stride + J * 8).cast::<i32>();
            let x = [_mm256_set1_epi32(fours.read_unaligned()), _mm256_set1_epi32(fours.add(1).read_unaligned())];
            let offset = _mm256_set1_epi32(*offset_sums.add(row * sums_stride + J));
            // Written out, for what closures hold may become a call for each.
            let mut products = [held(_mm256_maddubs_epi16(w[0][0], x[0])), held(_mm256_maddubs_epi16(w[0][1], x[0]))];
            let others = [held(_mm256_maddubs_epi16(w[1][0], x[1])), held(_mm256_maddubs_epi16(w[1][1], x[1]))];
            for part in [[offset; 2], others] {
                for half in 0..2 {
                    products[half] = held(_mm256_add_epi16(products[half], part[half]));
                }
            }
            let ones = _mm256_set1_epi16(1);
            let dots = [held(_mm256_madd_epi16(products[0], ones)), held(_mm256_madd_epi16(products[1], ones))];
            for half in 0..2 {
                sums[half] = held(if J == 0 { dots[half] } else { _mm256_add_epi32(sums[half], dots[half]) });
            }
        }
    }
}

/// The same sum, which the compiler must have in a register here: else it computes row by row, and keeps the weights of
/// all steps in memory.
#[inline]
#[target_feature(enable = "avx2")]
fn held(mut sum: __m256i) -> __m256i {
    // SAFETY: nothing is done.
    unsafe { std::arch::asm!("/* {0} */", inout(ymm_reg) sum, options(nomem, nostack, preserves_flags)) };
    sum
}

/// Sums of which there are more than registers. What the compiler saves on the stack by itself may lie across two lines,
/// as chance has it from thread to thread, and take half as long again.
#[repr(align(64))]
struct Sums<const R: usize>([Halves<__m256>; R]);

impl<const R: usize> Sums<R> {
    /// The sums: where a register tile has few rows, in registers, else in memory, for all that the compiler knows.
    #[inline(always)]
    fn held(&mut self) -> &mut [Halves<__m256>; R] {
        let mut sums = &raw mut self.0;
        if R > 2 {
            // SAFETY: nothing is done.
            unsafe { std::arch::asm!("/* {0} */", inout(reg) sums, options(nostack, preserves_flags)) };
        }
        // SAFETY: it points to what is borrowed here.
        unsafe { &mut *sums }
    }
}

/// Calls [`step`] for some registers.
macro_rules! steps {
    ($format:ident, $rows:ident, [$($register:literal),*], $arguments:tt) => {
        $( step::<$format, $rows, $register> $arguments; )*
    };
}

/// With each tile, lines `fetched` of the next group's are fetched.
///
/// # Safety
/// The level is available, and the panel has `R` rows.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn rows_of<const F: u32, const R: usize>(panel: Panel, fetched: Range<usize>) {
    let (format, blocks) = (format_of(F), panel.blocks);
    let stride = blocks * BLOCK;
    let mut sums = Sums([[_mm256_setzero_ps(); 2]; R]);
    let sums = sums.held();
    for block in 0..blocks {
        // SAFETY: the panel has tiles for all blocks, and `R` rows of them in the activations.
        unsafe {
            let tile = panel.w.add(block * format.tile_bytes());
            let x = panel.x.add(block * BLOCK);
            for line in fetched.clone() {
                _mm_prefetch::<_MM_HINT_T0>(tile.wrapping_add(blocks * format.tile_bytes() + line * LINE).cast());
            }
            let scales = |index: usize| -> Halves<__m256> {
                let at = tile.add(scales_at(format) + index * 32);
                [_mm256_cvtph_ps(_mm_loadu_si128(at.cast())), _mm256_cvtph_ps(_mm_loadu_si128(at.add(16).cast()))]
            };
            let begin = |part: usize| -> [Halves<__m256i>; R] {
                let first = if F == Q5_MIN { first_sum(Q5) } else { first_sum(F) };
                std::array::from_fn(|row| match first {
                    Some(first) => {
                        let sums = panel.offset_sums.add((row * blocks + block) * SUMS);
                        [_mm256_set1_epi32(*sums.add(first + part)); 2]
                    }
                    None => [_mm256_setzero_si256(); 2],
                })
            };
            if F == Q8 {
                let x = (x, stride);
                let offsets = (panel.offset_sums.add(block * SUMS), blocks * SUMS);
                let mut dots = [[_mm256_setzero_si256(); 2]; R];
                double_step::<R, 0>(tile, x, offsets, &mut dots);
                double_step::<R, 1>(tile, x, offsets, &mut dots);
                double_step::<R, 2>(tile, x, offsets, &mut dots);
                double_step::<R, 3>(tile, x, offsets, &mut dots);
                scaled::<F, R>(&panel, block, &dots, scales(0), sums);
                continue;
            }
            let mut dots = begin(0);
            let scale = scales(0);
            if F == Q6 {
                steps!(F, R, [0, 1, 2, 3], (tile, x, stride, &mut dots));
                scaled::<F, R>(&panel, block, &dots, scale, sums);
                let mut dots = begin(1);
                steps!(F, R, [4, 5, 6, 7], (tile, x, stride, &mut dots));
                scaled::<F, R>(&panel, block, &dots, scales(1), sums);
            } else {
                steps!(F, R, [0, 1, 2, 3, 4, 5, 6, 7], (tile, x, stride, &mut dots));
                scaled::<F, R>(&panel, block, &dots, scale, sums);
            }
            if has_minimum(F) {
                let mut minimums = scales(1);
                if F == Q5_MIN {
                    let sixteen = _mm256_set1_ps(16.0);
                    for half in 0..2 {
                        minimums[half] = _mm256_fmadd_ps(scale[half], sixteen, minimums[half]);
                    }
                }
                for (row, sums) in sums.iter_mut().enumerate() {
                    let sum = _mm256_set1_ps(*panel.scaled_sums.add(row * blocks + block));
                    for half in 0..2 {
                        sums[half] = _mm256_fmadd_ps(minimums[half], sum, sums[half]);
                    }
                }
            }
        }
    }
    for (row, sums) in sums.iter().enumerate() {
        for (half, sum) in sums.iter().enumerate() {
            // SAFETY: the output has `R` rows of 16.
            unsafe { _mm256_storeu_ps(panel.out.add(row * panel.stride + half * 8), *sum) };
        }
    }
}

/// Adds the sums of products of a block, times the scales of both sides.
///
/// # Safety
/// That of [`rows_of`], whose blocks there are.
#[inline(always)]
unsafe fn scaled<const F: u32, const R: usize>(
    panel: &Panel,
    block: usize,
    dots: &[Halves<__m256i>; R],
    scale: Halves<__m256>,
    sums: &mut [Halves<__m256>; R],
) {
    for (row, (dots, sums)) in dots.iter().zip(sums).enumerate() {
        // SAFETY: as the caller says.
        unsafe {
            let x_scale = _mm256_set1_ps(*panel.scales.add(row * panel.blocks + block));
            for half in 0..2 {
                let dot = if F == Q8 { dots[half] } else { _mm256_madd_epi16(dots[half], _mm256_set1_epi16(1)) };
                let product = _mm256_mul_ps(_mm256_cvtepi32_ps(dot), scale[half]);
                sums[half] = _mm256_fmadd_ps(product, x_scale, sums[half]);
            }
        }
    }
}
