//! Four products of bytes for each of 16 rows of weights in one instruction.

use std::{arch::x86_64::*, ops::RangeInclusive};

use super::{Panel, Q4, Q4_MIN, Q5, Q5_MIN, Q6, Q8, first_sum, for_format, format_of, has_minimum};
use crate::{
    activations::SUMS,
    packed::{
        BLOCK, Format,
        quantized::{offset, scales_at},
    },
    shared::LINE,
};

/// Rows whose sums stay in registers with a block's weights.
const ROWS: usize = 12;

/// So many rows wait for the next group's tiles unless these are fetched: so much is computed with each tile that the
/// processor, which by itself looks little ahead, would do one after the other, wait and compute. One row waits for memory
/// all the time, which gives no more to who asks earlier; more rows find the group in the cache.
const FETCHING_ROWS: RangeInclusive<usize> = 2..=16;

/// # Safety
/// The level is available, and the panel has so many rows.
pub(super) unsafe fn run(format: Format, panel: Panel, rows: usize) {
    // SAFETY: as the caller says.
    unsafe { for_format!(format, all, (panel, rows)) }
}

/// All rows, in register tiles of about the same height.
///
/// # Safety
/// That of [`run`].
unsafe fn all<const F: u32>(mut panel: Panel, rows: usize) {
    let tiles = rows.div_ceil(ROWS);
    for tile in 0..tiles {
        let count = rows * (tile + 1) / tiles - rows * tile / tiles;
        // SAFETY: as the caller says, and so many rows are left.
        unsafe {
            tile_of::<F>(panel, count, tile == 0 && FETCHING_ROWS.contains(&rows));
            panel = panel.after(count);
        }
    }
}

/// [`rows_of`] with a constant for the rows.
///
/// # Safety
/// That of [`rows_of`].
unsafe fn tile_of<const F: u32>(panel: Panel, rows: usize, fetches: bool) {
    macro_rules! dispatch {
        ($($count:literal)*) => {
            match rows {
                // SAFETY: as the caller says.
                $( $count => unsafe { rows_of::<F, $count>(panel, fetches) }, )*
                _ => unreachable!("a tile's rows"),
            }
        };
    }
    dispatch!(1 2 3 4 5 6 7 8 9 10 11 12);
}

/// The registers of a tile, an element in each byte.
///
/// # Safety
/// A tile of the format begins at `tile`, and the level is available.
#[inline(always)]
unsafe fn unpack<const F: u32>(tile: *const u8) -> [__m512i; 8] {
    // SAFETY: as the caller says.
    unsafe {
        let load = |register: usize| _mm512_loadu_si512(tile.add(register * 64).cast());
        if F == Q8 {
            return [load(0), load(1), load(2), load(3), load(4), load(5), load(6), load(7)];
        }
        let mask = _mm512_set1_epi8(15);
        let mut registers = [_mm512_setzero_si512(); 8];
        for i in 0..4 {
            let pairs = load(i);
            registers[i] = _mm512_and_si512(pairs, mask);
            registers[i + 4] = _mm512_and_si512(_mm512_srli_epi16::<4>(pairs), mask);
        }
        // The ternary operation of this number is `register | high & mask`.
        if F == Q5 || F == Q5_MIN {
            let (high, mask) = (load(4), _mm512_set1_epi8(16));
            let shifted = [
                _mm512_slli_epi16::<4>(high),
                _mm512_slli_epi16::<3>(high),
                _mm512_slli_epi16::<2>(high),
                _mm512_slli_epi16::<1>(high),
                high,
                _mm512_srli_epi16::<1>(high),
                _mm512_srli_epi16::<2>(high),
                _mm512_srli_epi16::<3>(high),
            ];
            for (register, high) in registers.iter_mut().zip(shifted) {
                *register = _mm512_ternarylogic_epi32::<0xf8>(*register, high, mask);
            }
        }
        if F == Q6 {
            let mask = _mm512_set1_epi8(48);
            for half in 0..2 {
                let high = load(4 + half);
                let shifted =
                    [_mm512_slli_epi16::<4>(high), _mm512_slli_epi16::<2>(high), high, _mm512_srli_epi16::<2>(high)];
                for (register, high) in registers[half * 4..].iter_mut().zip(shifted) {
                    *register = _mm512_ternarylogic_epi32::<0xf8>(*register, high, mask);
                }
            }
        }
        registers
    }
}

/// A loop over rows that is written out, so that their sums stay in registers: the compiler finds it too long to do that.
macro_rules! unrolled {
    ($row:ident in 0..$rows:ident $body:block) => {
        unrolled!($row in 0..$rows [0 1 2 3 4 5 6 7 8 9 10 11] $body)
    };
    ($row:ident in 0..$rows:ident [$($index:literal)*] $body:block) => {$(
        if $index < $rows {
            let $row = $index;
            $body
        }
    )*};
}

/// With each of its weight tiles, it fetches the next group's.
///
/// # Safety
/// The level is available, and the panel has `R` rows.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn rows_of<const F: u32, const R: usize>(panel: Panel, fetches: bool) {
    let (format, blocks) = (format_of(F), panel.blocks);
    let mut sums = [_mm512_setzero_ps(); R];
    for block in 0..blocks {
        // SAFETY: the panel has tiles for all blocks, and `R` rows of them in the activations.
        unsafe {
            let tile = panel.w.add(block * format.tile_bytes());
            if fetches {
                for line in 0..const { format_of(F).tile_bytes().div_ceil(LINE) } {
                    _mm_prefetch::<_MM_HINT_T0>(
                        panel.next.wrapping_add(block * format.tile_bytes() + line * LINE).cast(),
                    );
                }
            }
            let w = unpack::<F>(tile);
            let scales =
                |index: usize| _mm512_cvtph_ps(_mm256_loadu_si256(tile.add(scales_at(format) + index * 32).cast()));
            let scale = scales(0);
            let second = if has_minimum(F) || F == Q6 { scales(1) } else { scale };
            unrolled!(row in 0..R {
                let at = row * blocks + block;
                let x = panel.x.add(at * BLOCK).cast::<i32>();
                let begin = |part: usize| match first_sum(F) {
                    Some(first) => _mm512_set1_epi32(*panel.offset_sums.add(at * SUMS + first + part)),
                    None => _mm512_setzero_si512(),
                };
                let add = |dot, register: usize| {
                    _mm512_dpbusd_epi32(dot, w[register], _mm512_set1_epi32(x.add(register).read_unaligned()))
                };
                let scaled = if F == Q6 {
                    let first = (0..4).fold(begin(0), add);
                    let other = (4..8).fold(begin(1), add);
                    let first = _mm512_mul_ps(_mm512_cvtepi32_ps(first), scale);
                    _mm512_fmadd_ps(_mm512_cvtepi32_ps(other), second, first)
                } else if R <= 2 {
                    // Two chains, since there are few rows to hide one's latency.
                    let dot = (0..4).fold(begin(0), add);
                    let other = (4..8).fold(_mm512_setzero_si512(), add);
                    _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_add_epi32(dot, other)), scale)
                } else {
                    _mm512_mul_ps(_mm512_cvtepi32_ps((0..8).fold(begin(0), add)), scale)
                };
                sums[row] = _mm512_fmadd_ps(scaled, _mm512_set1_ps(*panel.scales.add(at)), sums[row]);
                if has_minimum(F) {
                    sums[row] = _mm512_fmadd_ps(second, _mm512_set1_ps(*panel.scaled_sums.add(at)), sums[row]);
                }
            });
        }
    }
    for (row, sum) in sums.into_iter().enumerate() {
        // SAFETY: the output has `R` rows.
        unsafe { _mm512_storeu_ps(panel.out.add(row * panel.stride), sum) };
    }
}

/// As [`super::widen`] says.
///
/// # Safety
/// The level is available; the group is `blocks` tiles, and `out` has room for as many of bf16.
pub(super) unsafe fn widen(format: Format, group: *const u8, blocks: usize, out: *mut u8) {
    // SAFETY: as the caller says.
    unsafe { for_format!(format, widen_all, (group, blocks, out)) }
}

/// # Safety
/// That of [`widen`].
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16")]
unsafe fn widen_all<const F: u32>(group: *const u8, blocks: usize, out: *mut u8) {
    /// The words of two registers of bf16, which lie one after the other, in turns.
    static TURNS: [u16; 32] = {
        let mut turns = [0; 32];
        let mut word = 0;
        while word < 32 {
            turns[word] = (word / 2 + word % 2 * 16) as u16;
            word += 1;
        }
        turns
    };
    let format = format_of(F);
    // SAFETY: both are there for so many blocks, as the caller says; a register of bytes becomes two of bf16.
    unsafe {
        let turns = _mm512_loadu_si512(TURNS.as_ptr().cast());
        for block in 0..blocks {
            let tile = group.add(block * format.tile_bytes());
            let registers = unpack::<F>(tile);
            let scales =
                |index: usize| _mm512_cvtph_ps(_mm256_loadu_si256(tile.add(scales_at(format) + index * 32).cast()));
            let first = scales(0);
            let second = if F == Q6 { scales(1) } else { first };
            for (index, register) in registers.into_iter().enumerate() {
                let scale = if index < 4 { first } else { second };
                let start = match has_minimum(F) {
                    true => scales(1),
                    false => _mm512_mul_ps(scale, _mm512_set1_ps(-offset(format) as f32)),
                };
                let column = |byte: __m512i| {
                    let element = _mm512_cvtepi32_ps(_mm512_and_si512(byte, _mm512_set1_epi32(255)));
                    _mm512_fmadd_ps(element, scale, start)
                };
                let columns = [
                    column(register),
                    column(_mm512_srli_epi32::<8>(register)),
                    column(_mm512_srli_epi32::<16>(register)),
                    column(_mm512_srli_epi32::<24>(register)),
                ];
                for pair in 0..2 {
                    let both = words(_mm512_cvtne2ps_pbh(columns[pair * 2 + 1], columns[pair * 2]));
                    let to = out.add((block * BLOCK / 2 + index * 2 + pair) * 64);
                    _mm512_storeu_si512(to.cast(), _mm512_permutexvar_epi16(turns, both));
                }
            }
        }
    }
}

#[inline(always)]
fn words(values: __m512bh) -> __m512i {
    // SAFETY: both are 512 bits without invalid values.
    unsafe { std::mem::transmute(values) }
}
