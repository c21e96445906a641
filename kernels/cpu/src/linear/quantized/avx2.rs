//! Products of bytes in pairs, for half of a group at a time.

use std::arch::x86_64::*;

use super::{Panel, Q4, Q4_MIN, Q5, Q5_MIN, Q6, Q8, first_sum, has_minimum, run_rows};
use crate::{
    activations::SUMS,
    packed::{BLOCK, Format, quantized::scales_at},
};

/// # Safety
/// The level is available, and the panel has so many rows.
pub(super) unsafe fn run(format: Format, panel: Panel, rows: usize) {
    run_rows!(format, panel, rows, [4, 2, 1]);
}

/// Register `register` of a tile, for the rows of half of a group, whose bytes begin at `tile`.
///
/// # Safety
/// The format's tile is there, and the level is available.
#[inline(always)]
unsafe fn unpack<const F: u32>(tile: *const u8, register: usize) -> __m256i {
    // SAFETY: as the caller says.
    unsafe {
        let load = |register: usize| _mm256_loadu_si256(tile.add(register * 64).cast());
        let right = |bytes, bits: usize| _mm256_srl_epi16(bytes, _mm_cvtsi32_si128(bits as i32));
        if F == Q8 {
            return load(register);
        }
        let low = _mm256_and_si256(right(load(register % 4), register / 4 * 4), _mm256_set1_epi8(15));
        let high = match F {
            Q5 | Q5_MIN => {
                let bit = _mm256_and_si256(right(load(4), register), _mm256_set1_epi8(1));
                _mm256_slli_epi16::<4>(bit)
            }
            Q6 => {
                let bits = right(load(4 + register / 4), register % 4 * 2);
                _mm256_slli_epi16::<4>(_mm256_and_si256(bits, _mm256_set1_epi8(3)))
            }
            _ => return low,
        };
        _mm256_or_si256(low, high)
    }
}

/// Adds four products of bytes to each sum.
///
/// # Safety
/// The level is available.
#[inline(always)]
unsafe fn dot<const F: u32>(sum: __m256i, w: __m256i, x: __m256i) -> __m256i {
    // SAFETY: as the caller says.
    unsafe {
        if F == Q8 {
            // Two products of 8 bits may exceed 16: odd and even bytes are widened instead.
            let even = _mm256_and_si256(w, _mm256_set1_epi16(255));
            let even = _mm256_madd_epi16(even, _mm256_srai_epi16::<8>(_mm256_slli_epi16::<8>(x)));
            let odd = _mm256_madd_epi16(_mm256_srli_epi16::<8>(w), _mm256_srai_epi16::<8>(x));
            return _mm256_add_epi32(sum, _mm256_add_epi32(even, odd));
        }
        let pairs = _mm256_maddubs_epi16(w, x);
        _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))
    }
}

/// # Safety
/// The level is available, and the panel has `R` rows.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn rows_of<const F: u32, const R: usize>(panel: Panel) {
    let (format, blocks) = (
        match F {
            Q8 => Format::Q8,
            Q4 => Format::Q4,
            Q4_MIN => Format::Q4Min,
            Q5 => Format::Q5,
            Q5_MIN => Format::Q5Min,
            _ => Format::Q6,
        },
        panel.blocks,
    );
    let mut sums = [[_mm256_setzero_ps(); 2]; R];
    for block in 0..blocks {
        for half in 0..2 {
            // SAFETY: the panel has tiles for all blocks, and `R` rows of them in the activations.
            unsafe {
                let tile = panel.w.add(block * format.tile_bytes());
                let scales = |index: usize| {
                    let at = scales_at(format) + index * 32 + half * 16;
                    _mm256_cvtph_ps(_mm_loadu_si128(tile.add(at).cast()))
                };
                let tile = tile.add(half * 32);
                let w: [__m256i; 8] = std::array::from_fn(|register| unpack::<F>(tile, register));
                for (row, sums) in sums.iter_mut().enumerate() {
                    let at = row * blocks + block;
                    let x = panel.x.add(at * BLOCK).cast::<i32>();
                    let begin = |part: usize| match first_sum(F) {
                        Some(first) => _mm256_set1_epi32(*panel.offset_sums.add(at * SUMS + first + part)),
                        None => _mm256_setzero_si256(),
                    };
                    let add = |sum, register: usize| {
                        dot::<F>(sum, w[register], _mm256_set1_epi32(x.add(register).read_unaligned()))
                    };
                    let scaled = if F == Q6 {
                        let first = _mm256_cvtepi32_ps((0..4).fold(begin(0), add));
                        let other = _mm256_cvtepi32_ps((4..8).fold(begin(1), add));
                        _mm256_fmadd_ps(other, scales(1), _mm256_mul_ps(first, scales(0)))
                    } else {
                        _mm256_mul_ps(_mm256_cvtepi32_ps((0..8).fold(begin(0), add)), scales(0))
                    };
                    let sum = &mut sums[half];
                    *sum = _mm256_fmadd_ps(scaled, _mm256_set1_ps(*panel.scales.add(at)), *sum);
                    if has_minimum(F) {
                        *sum = _mm256_fmadd_ps(scales(1), _mm256_set1_ps(*panel.scaled_sums.add(at)), *sum);
                    }
                }
            }
        }
    }
    for (row, sums) in sums.into_iter().enumerate() {
        for (half, sum) in sums.into_iter().enumerate() {
            // SAFETY: the output has `R` rows of 16.
            unsafe { _mm256_storeu_ps(panel.out.add(row * panel.stride + half * 8), sum) };
        }
    }
}
