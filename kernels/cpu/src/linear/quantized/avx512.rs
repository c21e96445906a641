//! Four products of bytes for each of 16 rows of weights in one instruction.
//!
//! Of 11 such instructions and their like, of which a core runs two at a time, eight multiply: what scales a block's sums
//! takes the others. So 73 % of the multipliers' peak is the most. Many rows reach some 80 % of that.

use std::{arch::x86_64::*, mem::MaybeUninit};

use super::{
    super::UNIT_TILE_ROWS, Panel, Q4, Q4_MIN, Q5, Q5_MIN, Q6, Q8, first_sum, for_format, format_of, has_minimum,
};
use crate::{
    activations::SUMS,
    packed::{
        BLOCK, Format, GROUP,
        quantized::{offset, scales_at},
    },
    shared::LINE,
};

/// Rows of a register tile: their sums for two groups, a register of both groups' weights and one of activations, are nearly
/// all registers.
const ROWS: usize = 12;
/// Up to so many rows take a group by itself, and keep its sums over all blocks in registers: they wait for memory anyway.
const FEW_ROWS: usize = 4;

/// # Safety
/// The level is available, and the panel has so many rows, at most [`UNIT_TILE_ROWS`].
pub(super) unsafe fn run(format: Format, panel: Panel, rows: usize) {
    // SAFETY: as the caller says.
    unsafe { for_format!(format, all, (panel, rows)) }
}

/// All rows, in register tiles of about the same height: first the higher ones, then those with a row less.
///
/// # Safety
/// That of [`run`].
unsafe fn all<const F: u32>(panel: Panel, rows: usize) {
    assert!(rows <= UNIT_TILE_ROWS, "a panel of {rows} rows");
    // SAFETY: as the caller says, and these are all rows.
    unsafe {
        if rows <= FEW_ROWS {
            few_of::<F>(Panel { next: panel.second.unwrap_or(panel.next), ..panel }, rows);
            if let Some(second) = panel.second {
                few_of::<F>(Panel { w: second, out: panel.out.add(GROUP), ..panel }, rows);
            }
            return;
        }
        let tiles = rows.div_ceil(ROWS);
        let (low, high) = (rows / tiles, rows % tiles);
        if high > 0 {
            tiles_of::<F>(panel, low + 1, high, true);
        }
        tiles_of::<F>(panel.after(high * (low + 1)), low, tiles - high, high == 0);
    }
}

/// [`few_rows`] with a constant for the rows.
///
/// # Safety
/// That of [`few_rows`].
unsafe fn few_of<const F: u32>(panel: Panel, rows: usize) {
    // SAFETY: as the caller says.
    unsafe {
        match rows {
            1 => few_rows::<F, 1>(panel),
            2 => few_rows::<F, 2>(panel),
            3 => few_rows::<F, 3>(panel),
            4 => few_rows::<F, 4>(panel),
            _ => unreachable!("few rows"),
        }
    }
}

/// [`pass`] with a constant for the rows of a tile.
///
/// # Safety
/// That of [`pass`].
unsafe fn tiles_of<const F: u32>(panel: Panel, rows: usize, tiles: usize, fetches: bool) {
    macro_rules! dispatch {
        ($($count:literal)*) => {
            match rows {
                // SAFETY: as the caller says.
                $( $count => unsafe { pass::<F, $count>(&panel, tiles, fetches) }, )*
                _ => unreachable!("a tile's rows"),
            }
        };
    }
    dispatch!(5 6 7 8 9 10 11 12);
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

/// About so far ahead, weights are fetched with each tile, of the next group where this one ends. A core by itself asks for too
/// little at once, even for one row.
const AHEAD_BYTES: usize = 4 << 10;

/// Asks for the tile of weights that is used some blocks after this one, of a group or the one that comes then.
#[inline(always)]
fn fetch_ahead<const F: u32>([group, next]: [*const u8; 2], blocks: usize, block: usize) {
    let bytes = const { format_of(F).tile_bytes() };
    let ahead = (AHEAD_BYTES / bytes).min(blocks);
    let tile = match (block + ahead).checked_sub(blocks) {
        Some(block) => next.wrapping_add(block * bytes),
        None => group.wrapping_add((block + ahead) * bytes),
    };
    for line in 0..bytes.div_ceil(LINE) {
        // SAFETY: nothing is read.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(tile.wrapping_add(line * LINE).cast()) };
    }
}

/// One of a tile's scales, or its minimums.
///
/// # Safety
/// The level is available, and a tile of the format is at `tile`.
#[inline(always)]
unsafe fn scales<const F: u32>(tile: *const u8, index: usize) -> __m512 {
    // SAFETY: as the caller says.
    unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(tile.add(scales_at(format_of(F)) + index * 32).cast())) }
}

/// One group, whose sums stay in registers.
///
/// # Safety
/// The level is available, and the panel has `R` rows.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn few_rows<const F: u32, const R: usize>(panel: Panel) {
    let blocks = panel.blocks;
    let mut sums = [_mm512_setzero_ps(); R];
    for block in 0..blocks {
        // SAFETY: the panel has tiles for all blocks, and `R` rows of them in the activations.
        unsafe {
            let tile = panel.w.add(block * format_of(F).tile_bytes());
            fetch_ahead::<F>([panel.w, panel.next], blocks, block);
            let w = unpack::<F>(tile);
            let scale = scales::<F>(tile, 0);
            let second = if has_minimum(F) || F == Q6 { scales::<F>(tile, 1) } else { scale };
            for (row, sum) in sums.iter_mut().enumerate() {
                let at = row * blocks + block;
                let x = panel.x.add(at * BLOCK).cast::<i32>();
                let begin = |part: usize| match first_sum(F) {
                    Some(first) => _mm512_set1_epi32(*panel.offset_sums.add(at * SUMS + first + part)),
                    None => _mm512_setzero_si512(),
                };
                let add = |dot, register: usize| {
                    _mm512_dpbusd_epi32(dot, w[register], _mm512_set1_epi32(x.add(register).read_unaligned()))
                };
                // Two chains, since there are few rows to hide one's latency.
                let first = (0..4).fold(begin(0), add);
                let scaled = if F == Q6 {
                    let other = (4..8).fold(begin(1), add);
                    let first = _mm512_mul_ps(_mm512_cvtepi32_ps(first), scale);
                    _mm512_fmadd_ps(_mm512_cvtepi32_ps(other), second, first)
                } else {
                    let other = (4..8).fold(_mm512_setzero_si512(), add);
                    _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_add_epi32(first, other)), scale)
                };
                *sum = _mm512_fmadd_ps(scaled, _mm512_set1_ps(*panel.scales.add(at)), *sum);
                if has_minimum(F) {
                    *sum = _mm512_fmadd_ps(second, _mm512_set1_ps(*panel.scaled_sums.add(at)), *sum);
                }
            }
        }
    }
    for (row, sum) in sums.into_iter().enumerate() {
        // SAFETY: the output has `R` rows.
        unsafe { _mm512_storeu_ps(panel.out.add(row * panel.stride), sum) };
    }
}

/// Of two groups.
type Pair<T> = [T; 2];

/// A block's elements, as registers.
#[repr(align(64))]
struct Unpacked(Pair<[MaybeUninit<u8>; BLOCK * GROUP]>);

/// The sums of all rows of a pass.
#[repr(align(64))]
struct Sums([Pair<MaybeUninit<__m512>>; UNIT_TILE_ROWS]);

/// Goes over the weights of two groups once, for `tiles` register tiles of `R` rows each.
///
/// # Safety
/// The level is available, and the panel has so many rows.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn pass<const F: u32, const R: usize>(panel: &Panel, tiles: usize, fetches: bool) {
    let tile_bytes = const { format_of(F).tile_bytes() };
    // One group is computed twice.
    let groups = [panel.w, panel.second.unwrap_or(panel.w)];
    let mut sums = Sums([const { [MaybeUninit::uninit(); 2] }; UNIT_TILE_ROWS]);
    let sums = &mut sums.0[..tiles * R];
    sums.as_flattened_mut().iter_mut().for_each(|sum| _ = sum.write(_mm512_setzero_ps()));
    // SAFETY: all of them are written.
    let sums = unsafe { &mut *(std::ptr::from_mut(sums) as *mut [Pair<__m512>]) };
    let mut unpacked = Unpacked([const { [MaybeUninit::uninit(); BLOCK * GROUP] }; 2]);
    for block in 0..panel.blocks {
        // SAFETY: the panel has tiles for all blocks, and so many rows in the activations.
        unsafe {
            let tiles = groups.map(|group| group.add(block * tile_bytes));
            if fetches {
                let next = [panel.next, panel.next.wrapping_add(panel.blocks * tile_bytes)];
                for group in 0..if panel.second.is_some() { 2 } else { 1 } {
                    fetch_ahead::<F>([groups[group], next[group]], panel.blocks, block);
                }
            }
            let mut elements = tiles;
            if F != Q8 {
                for (group, to) in unpacked.0.iter_mut().enumerate() {
                    let to = to.as_mut_ptr().cast::<__m512i>();
                    for (index, register) in unpack::<F>(tiles[group]).into_iter().enumerate() {
                        _mm512_store_si512(to.add(index), register);
                    }
                    elements[group] = to.cast();
                }
            }
            let first = [scales::<F>(tiles[0], 0), scales::<F>(tiles[1], 0)];
            let other = match has_minimum(F) || F == Q6 {
                true => [scales::<F>(tiles[0], 1), scales::<F>(tiles[1], 1)],
                false => first,
            };
            let mut rows = *panel;
            for sums in sums.as_chunks_mut::<R>().0 {
                add_block::<F, R>(&rows, block, elements, [first, other], sums);
                rows = rows.after(R);
            }
        }
    }
    for (row, sums) in sums.iter().enumerate() {
        // SAFETY: the output has so many rows of both groups.
        unsafe {
            let out = panel.out.add(row * panel.stride);
            _mm512_storeu_ps(out, sums[0]);
            if panel.second.is_some() {
                _mm512_storeu_ps(out.add(GROUP), sums[1]);
            }
        }
    }
}

/// Adds the products of a register of weights of both groups to the sums of all rows, in this order: the compiler would go row
/// by row, each sum waiting for the one before. Rows are told by every third one, from which the processor finds two more.
macro_rules! step {
    ($register:literal, $w:ident, $x:ident, $stride:ident, $dots:ident, [$($row:literal)*]) => {
        let (w0, w1): (__m512i, __m512i);
        std::arch::asm!(
            "vmovdqu64 {w0}, [{first} + {at}]",
            "vmovdqu64 {w1}, [{second} + {at}]",
            w0 = out(zmm_reg) w0,
            w1 = out(zmm_reg) w1,
            first = in(reg) $w[0],
            second = in(reg) $w[1],
            at = const $register * 64,
            options(nostack, readonly, preserves_flags),
        );
        $(
            if $row < R {
                const ROW: usize = $row;
                let broadcast: __m512i;
                match ROW % 3 {
                    0 => step!($register, w0, w1, $x, $stride, $dots, ROW, " /* {s} */", broadcast),
                    1 => step!($register, w0, w1, $x, $stride, $dots, ROW, " + {s}", broadcast),
                    _ => step!($register, w0, w1, $x, $stride, $dots, ROW, " + 2 * {s}", broadcast),
                }
                let _ = broadcast;
            }
        )*
    };
    ($register:literal, $w0:ident, $w1:ident, $x:ident, $stride:ident, $dots:ident, $row:ident, $place:literal, $broadcast:ident) => {
        std::arch::asm!(
            concat!("vpbroadcastd {broadcast}, dword ptr [{p} + {at}", $place, "]"),
            "vpdpbusd {first}, {w0}, {broadcast}",
            "vpdpbusd {second}, {w1}, {broadcast}",
            broadcast = out(zmm_reg) $broadcast,
            first = inout(zmm_reg) $dots[$row][0],
            second = inout(zmm_reg) $dots[$row][1],
            w0 = in(zmm_reg) $w0,
            w1 = in(zmm_reg) $w1,
            p = in(reg) $x[$row / 3],
            s = in(reg) $stride,
            at = const $register * 4,
            options(nostack, readonly, preserves_flags),
        )
    };
}

/// Adds the products of a block to the sums of the panel's first `R` rows.
///
/// # Safety
/// The level is available, the panel has `R` rows and the block, whose elements are in registers at `elements`.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn add_block<const F: u32, const R: usize>(
    panel: &Panel,
    block: usize,
    elements: Pair<*const u8>,
    scales: [Pair<__m512>; 2],
    sums: &mut [Pair<__m512>; R],
) {
    let stride = panel.blocks * BLOCK;
    // SAFETY: as the caller says.
    unsafe {
        let begin = |part: usize| -> [Pair<__m512i>; R] {
            std::array::from_fn(|row| match first_sum(F) {
                Some(first) => {
                    let sums = panel.offset_sums.add((row * panel.blocks + block) * SUMS);
                    [_mm512_set1_epi32(*sums.add(first + part)); 2]
                }
                None => [_mm512_setzero_si512(); 2],
            })
        };
        let x = panel.x.add(block * BLOCK);
        // Every third row, from which the processor itself finds the next two.
        let x = [x, x.wrapping_add(3 * stride), x.wrapping_add(6 * stride), x.wrapping_add(9 * stride)];
        macro_rules! steps {
            ($dots:ident, $($register:literal)*) => {
                $( step!($register, elements, x, stride, $dots, [0 1 2 3 4 5 6 7 8 9 10 11]); )*
            };
        }
        let mut dots = begin(0);
        steps!(dots, 0 1 2 3);
        if F == Q6 {
            scaled(panel, block, dots, scales[0], sums);
            dots = begin(1);
        }
        steps!(dots, 4 5 6 7);
        scaled(panel, block, dots, scales[usize::from(F == Q6)], sums);
        if has_minimum(F) {
            for (row, sums) in sums.iter_mut().enumerate() {
                let sum = _mm512_set1_ps(*panel.scaled_sums.add(row * panel.blocks + block));
                *sums = [_mm512_fmadd_ps(scales[1][0], sum, sums[0]), _mm512_fmadd_ps(scales[1][1], sum, sums[1])];
            }
        }
    }
}

/// Adds the sums of products of a block, times the scales of both sides.
///
/// # Safety
/// The level is available, and the panel has `R` rows with the block.
#[inline(always)]
unsafe fn scaled<const R: usize>(
    panel: &Panel,
    block: usize,
    dots: [Pair<__m512i>; R],
    scale: Pair<__m512>,
    sums: &mut [Pair<__m512>; R],
) {
    for (row, (dots, sums)) in dots.into_iter().zip(sums).enumerate() {
        // SAFETY: as the caller says.
        unsafe {
            let x_scale = _mm512_set1_ps(*panel.scales.add(row * panel.blocks + block));
            for group in 0..2 {
                let product = _mm512_mul_ps(_mm512_cvtepi32_ps(dots[group]), scale[group]);
                sums[group] = _mm512_fmadd_ps(product, x_scale, sums[group]);
            }
        }
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
