//! Products of bytes in pairs, for both halves of a group, whose sums stay in registers for a block.
//!
//! The instruction multiplies unsigned bytes with signed ones, and adds neighbours up in 16 bits, where they must fit.
//! - Elements of up to six bits: all products that belong to one scale are added up in 16 bits. A lane gets 16 columns of
//!   a block (of Q6, whose scales are for half of it, 8), and the sum, less the offset times the activations, is within
//!   `16 * 16 * 127` (`8 * 32 * 127`). It begins with the offset's part, and wraps on the way at most. Q5Min is computed
//!   around 16 like Q5, which its minimum makes up for.
//! - Q8: weights as they are stored, with 128 added, times activations whose magnitudes are at most 127 in two neighbours
//!   together, and 255 in the eight that belong to a lane's sum of half a block: two products are within `255 * 127`, the
//!   sum, less the offset, within `128 * 255`. (With activations that may be 127 each, weights would have to give their
//!   signs to the activations, and each two products be added up in 32 bits: twice as many operations.)

use std::{arch::x86_64::*, mem::MaybeUninit};

use super::{super::TILE_ROWS, Panel, Q4, Q4_MIN, Q5, Q5_MIN, Q6, Q8, first_sum, for_format, format_of, has_minimum};
use crate::{
    activations::SUMS,
    packed::{BLOCK, Format, GROUP, quantized::scales_at},
    shared::LINE,
};

/// Rows whose sums stay in registers with two registers of weights and one of activations; with Q8, whose sums of the first
/// half of a block are kept besides, in memory.
const ROWS: usize = 6;
const Q8_ROWS: usize = 4;

/// # Safety
/// The level is available, and the panel has so many rows, at most [`TILE_ROWS`].
pub(super) unsafe fn run(format: Format, panel: Panel, rows: usize) {
    // SAFETY: as the caller says.
    unsafe { for_format!(format, all, (panel, rows)) }
}

/// All rows, in register tiles of about the same height: first the higher ones, then those with a row less.
///
/// # Safety
/// That of [`run`].
unsafe fn all<const F: u32>(panel: Panel, rows: usize) {
    assert!(rows <= TILE_ROWS, "a panel of {rows} rows");
    let tiles = rows.div_ceil(if F == Q8 { Q8_ROWS } else { ROWS });
    let (low, high) = (rows / tiles, rows % tiles);
    // One row waits for memory all the time, which gives no more to who asks earlier.
    let fetches = rows > 1;
    // SAFETY: as the caller says, and these are all rows.
    unsafe {
        if high > 0 {
            tiles_of::<F>(panel, low + 1, high, fetches);
        }
        tiles_of::<F>(panel.after(high * (low + 1)), low, tiles - high, fetches && high == 0);
    }
}

/// [`rows_of`] with a constant for the rows of a tile.
///
/// # Safety
/// That of [`rows_of`].
unsafe fn tiles_of<const F: u32>(panel: Panel, rows: usize, tiles: usize, fetches: bool) {
    // SAFETY: as the caller says.
    unsafe {
        match rows {
            1 => rows_of::<F, 1>(panel, tiles, fetches),
            2 => rows_of::<F, 2>(panel, tiles, fetches),
            3 => rows_of::<F, 3>(panel, tiles, fetches),
            4 => rows_of::<F, 4>(panel, tiles, fetches),
            5 => rows_of::<F, 5>(panel, tiles, fetches),
            6 => rows_of::<F, 6>(panel, tiles, fetches),
            _ => unreachable!("a tile's rows"),
        }
    }
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
        if F == Q8 {
            return load(J);
        }
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
/// A tile, or its [unpacked](is_unpacked) elements, is at `tile`, a block of `R` rows, `stride` bytes apart, at `x`, and the
/// level is available.
#[inline(always)]
unsafe fn step<const F: u32, const R: usize, const J: usize>(
    tile: *const u8,
    x: *const i8,
    stride: usize,
    sums: &mut [Halves<__m256i>; R],
) {
    // SAFETY: as the caller says.
    unsafe {
        let w = match is_unpacked(F, R) {
            true => [unpack::<Q8, J>(tile), unpack::<Q8, J>(tile.add(32))],
            false => [unpack::<F, J>(tile), unpack::<F, J>(tile.add(32))],
        };
        for (row, sums) in sums.iter_mut().enumerate() {
            let x = _mm256_set1_epi32(x.add(row * stride + J * 4).cast::<i32>().read_unaligned());
            for half in 0..2 {
                let pairs = _mm256_maddubs_epi16(w[half], x);
                sums[half] = held(_mm256_add_epi16(sums[half], pairs));
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

/// The sums of all rows of a pass, of which there are more than registers. What the compiler saves on the stack by itself may
/// lie across two lines, as chance has it from thread to thread, and take half as long again.
#[repr(align(64))]
struct Sums([MaybeUninit<Halves<__m256>>; TILE_ROWS]);

/// Whether elements are unpacked once for all tiles of `rows` rows, to a byte each. Few rows take them from registers, and
/// those of four bits are unpacked as fast as they would be stored.
const fn is_unpacked(format: u32, rows: usize) -> bool {
    matches!(format, Q5 | Q5_MIN | Q6) && rows > 2
}

/// The format's first and second scales, or its minimums, around what the elements are computed around.
///
/// # Safety
/// The level is available, and a tile of the format is at `tile`.
#[inline(always)]
unsafe fn scales<const F: u32>(tile: *const u8) -> [Halves<__m256>; 2] {
    let at = |index: usize| tile.wrapping_add(scales_at(format_of(F)) + index * 32);
    // SAFETY: as the caller says.
    unsafe {
        let load = |at: *const u8| [0, 16].map(|half| _mm256_cvtph_ps(_mm_loadu_si128(at.wrapping_add(half).cast())));
        let first = load(at(0));
        if F != Q6 && !has_minimum(F) {
            return [first; 2];
        }
        let mut second = load(at(1));
        if F == Q5_MIN {
            let sixteen = _mm256_set1_ps(16.0);
            second = [0, 1].map(|half| _mm256_fmadd_ps(first[half], sixteen, second[half]));
        }
        [first, second]
    }
}

/// Room for a block's elements in the order of Q8.
#[repr(align(64))]
struct Unpacked([MaybeUninit<u8>; BLOCK * GROUP]);

impl Unpacked {
    /// # Safety
    /// The level is available, and a tile of the format is at `tile`.
    #[inline(always)]
    unsafe fn fill<const F: u32>(&mut self, tile: *const u8) {
        let to = self.0.as_mut_ptr().cast::<__m256i>();
        macro_rules! fill {
            ($($register:literal)*) => {
                for half in 0..2 {
                    // SAFETY: as the caller says, and there is room for eight registers of both halves.
                    unsafe {
                        $( _mm256_store_si256(to.add($register * 2 + half), unpack::<F, $register>(tile.add(half * 32))); )*
                    }
                }
            };
        }
        fill!(0 1 2 3 4 5 6 7);
    }
}

/// Calls [`step`] for some registers.
macro_rules! steps {
    ($format:ident, $rows:ident, [$($register:literal),*], $arguments:tt) => {
        $( step::<$format, $rows, $register> $arguments; )*
    };
}

/// About so far ahead, weights are fetched with each tile, of the next group where this one ends.
const AHEAD_BYTES: usize = 8 << 10;

/// Goes over the weights once, for `tiles` register tiles of `R` rows each: a weight tile stays in the nearest cache until all
/// have used it.
///
/// # Safety
/// The level is available, and the panel has so many rows.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn rows_of<const F: u32, const R: usize>(panel: Panel, tiles: usize, fetches: bool) {
    // SAFETY: as the caller says.
    unsafe {
        match (R, tiles) {
            // With a constant, the sums stay in registers, for which there is room.
            (1 | 2, 1) => pass::<F, R>(panel, 1, fetches),
            _ => pass::<F, R>(panel, tiles, fetches),
        }
    }
}

/// # Safety
/// That of [`rows_of`].
#[inline(always)]
unsafe fn pass<const F: u32, const R: usize>(panel: Panel, tiles: usize, fetches: bool) {
    let tile_bytes = format_of(F).tile_bytes();
    let mut sums = Sums([const { MaybeUninit::uninit() }; TILE_ROWS]);
    let sums = &mut sums.0[..tiles * R];
    // SAFETY: the level is available.
    sums.iter_mut().for_each(|sums| _ = sums.write(unsafe { [_mm256_setzero_ps(); 2] }));
    // SAFETY: all of them are written.
    let sums = unsafe { sums.assume_init_mut() };
    let mut unpacked = Unpacked([const { MaybeUninit::uninit() }; BLOCK * GROUP]);
    let ahead = const { AHEAD_BYTES / format_of(F).tile_bytes() }.min(panel.blocks);
    for block in 0..panel.blocks {
        // SAFETY: the panel has tiles for all blocks, and so many rows in the activations.
        unsafe {
            let tile = panel.w.add(block * tile_bytes);
            if fetches {
                let (w, block) = match (block + ahead).checked_sub(panel.blocks) {
                    Some(block) => (panel.next, block),
                    None => (panel.w, block + ahead),
                };
                for line in 0..tile_bytes.div_ceil(LINE) {
                    _mm_prefetch::<_MM_HINT_T0>(w.wrapping_add(block * tile_bytes + line * LINE).cast());
                }
            }
            let mut elements = tile;
            if is_unpacked(F, R) {
                unpacked.fill::<F>(tile);
                elements = unpacked.0.as_ptr().cast();
            }
            // Few rows are there before their weights, and would wait for scales before they ask for the elements.
            let scales_of_all = if R > 2 { Some(scales::<F>(tile)) } else { None };
            let mut rows = panel;
            for sums in sums.as_chunks_mut::<R>().0 {
                add_block::<F, R>(&rows, block, elements, || scales_of_all.unwrap_or_else(|| scales::<F>(tile)), sums);
                rows = rows.after(R);
            }
        }
    }
    for (row, sums) in sums.iter().enumerate() {
        for (half, sum) in sums.iter().enumerate() {
            // SAFETY: the output has so many rows of 16.
            unsafe { _mm256_storeu_ps(panel.out.add(row * panel.stride + half * 8), *sum) };
        }
    }
}

/// Adds the products of a block to the sums of the panel's first `R` rows.
///
/// # Safety
/// The level is available, the panel has `R` rows and the block, whose elements are at `tile`: as they are stored, or
/// [unpacked](is_unpacked).
#[inline(always)]
unsafe fn add_block<const F: u32, const R: usize>(
    panel: &Panel,
    block: usize,
    tile: *const u8,
    scales: impl Fn() -> [Halves<__m256>; 2],
    sums: &mut [Halves<__m256>; R],
) {
    let (blocks, stride) = (panel.blocks, panel.blocks * BLOCK);
    // SAFETY: as the caller says.
    unsafe {
        let x = panel.x.add(block * BLOCK);
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
        let mut dots = begin(0);
        steps!(F, R, [0, 1, 2, 3], (tile, x, stride, &mut dots));
        match F {
            Q6 => {
                scaled(panel, block, lanes_sums(dots), scales()[0], sums);
                dots = begin(1);
                steps!(F, R, [4, 5, 6, 7], (tile, x, stride, &mut dots));
                scaled(panel, block, lanes_sums(dots), scales()[1], sums);
            }
            Q8 => {
                let first = lanes_sums(dots);
                dots = begin(1);
                steps!(F, R, [4, 5, 6, 7], (tile, x, stride, &mut dots));
                let mut both = lanes_sums(dots);
                for (both, first) in both.iter_mut().flatten().zip(first.as_flattened()) {
                    *both = _mm256_add_epi32(*both, *first);
                }
                scaled(panel, block, both, scales()[0], sums);
            }
            _ => {
                steps!(F, R, [4, 5, 6, 7], (tile, x, stride, &mut dots));
                scaled(panel, block, lanes_sums(dots), scales()[0], sums);
            }
        }
        if has_minimum(F) {
            let minimums = scales()[1];
            for (row, sums) in sums.iter_mut().enumerate() {
                let sum = _mm256_set1_ps(*panel.scaled_sums.add(row * blocks + block));
                for half in 0..2 {
                    sums[half] = _mm256_fmadd_ps(minimums[half], sum, sums[half]);
                }
            }
        }
    }
}

/// Neighbours of 16 bits, added up in 32.
#[inline]
#[target_feature(enable = "avx2")]
fn lanes_sums<const R: usize>(dots: [Halves<__m256i>; R]) -> [Halves<__m256i>; R] {
    #[repr(align(32))]
    struct Ones(#[expect(dead_code, reason = "read by the instruction")] [i16; 16]);
    static ONES: Ones = Ones([1; 16]);
    let mut sums = dots;
    for sums in sums.as_flattened_mut() {
        // The compiler would fetch the ones anew for each, for which it has no register, in an instruction of its own.
        // SAFETY: 32 bytes are read from an aligned address.
        unsafe {
            std::arch::asm!("vpmaddwd {0}, {0}, [rip + {1}]", inout(ymm_reg) *sums, sym ONES,
                options(readonly, nostack, preserves_flags));
        }
    }
    sums
}

/// Adds the sums of products of a block, times the scales of both sides.
///
/// # Safety
/// That of [`rows_of`], whose blocks there are.
#[inline(always)]
unsafe fn scaled<const R: usize>(
    panel: &Panel,
    block: usize,
    dots: [Halves<__m256i>; R],
    scale: Halves<__m256>,
    sums: &mut [Halves<__m256>; R],
) {
    for (row, (dots, sums)) in dots.iter().zip(sums).enumerate() {
        // SAFETY: as the caller says.
        unsafe {
            let x_scale = _mm256_set1_ps(*panel.scales.add(row * panel.blocks + block));
            for half in 0..2 {
                let product = _mm256_mul_ps(_mm256_cvtepi32_ps(dots[half]), scale[half]);
                sums[half] = _mm256_fmadd_ps(product, x_scale, sums[half]);
            }
        }
    }
}
