//! Packing of quantized rows.
//!
//! A group is a run of tiles of 16 rows by [`BLOCK`] columns. Elements are unsigned; the formats without minimums
//! subtract an offset (128, 8, 16 and 32 for [`Format::Q8`], [`Format::Q4`], [`Format::Q5`] and [`Format::Q6`]). *Register*
//! `j` of a tile is 64 bytes, four consecutive columns of each of the 16 rows: byte `4 * row + b` belongs to column
//! `4 * j + b`, as the dot product instructions for bytes want it. A tile is, in this order:
//!
//! | Format | Bytes | Elements | Scales, f16 each |
//! |---|---|---|---|
//! | Q8 | 544 | registers 0 to 7 | `[16]` |
//! | Q4 | 288 | 4 x 64: low halves of bytes are registers 0 to 3, high ones 4 to 7 | `[16]` |
//! | Q4Min | 320 | as Q4 | `[16]`, minimums `[16]` |
//! | Q5 | 352 | as Q4, then 64: bit `j` of a byte is the fifth bit in register `j` | `[16]` |
//! | Q5Min | 384 | as Q5 | `[16]`, minimums `[16]` |
//! | Q6 | 448 | as Q4, then 2 x 64: bits `2i` of the first are the upper two of register `i`, of the second `i + 4` | first 16 columns `[16]`, others `[16]` |
//!
//! An element stands for `scale * (element - offset)` or `scale * element + minimum`. The two-level scales of the K
//! blocks become their product, rounded to f16.

use half::{bf16, f16};

use super::{BLOCK, Format, GROUP, SourceType};
use crate::PackError;

/// A block of a row: elements with their offset, scales (or scale and minimum).
struct Block {
    elements: [u8; BLOCK],
    scales: [f16; 2],
}

/// What is subtracted from the elements of a format.
pub(crate) fn offset(format: Format) -> i32 {
    match format {
        Format::Q8 => 128,
        Format::Q4 => 8,
        Format::Q5 => 16,
        Format::Q6 => 32,
        _ => 0,
    }
}

/// Where the scales of a tile begin.
pub(crate) const fn scales_at(format: Format) -> usize {
    match format {
        Format::Q8 => 512,
        Format::Q5 | Format::Q5Min => 320,
        Format::Q6 => 384,
        _ => 256,
    }
}

pub(super) fn pack_group(
    format: Format,
    rows: &[&[u8]],
    source: SourceType,
    columns: usize,
    out: &mut [u8],
) -> Result<(), PackError> {
    use SourceType as S;
    let read: fn(&[u8], SourceType, usize) -> Block = match (source, format) {
        (S::F32 | S::F16 | S::Bf16, Format::Q8) => from_floats,
        (S::Q8_0, Format::Q8) => q8_0,
        (S::Q4_0, Format::Q4) | (S::Q4_1, Format::Q4Min) => four_bits,
        (S::Q5_0, Format::Q5) | (S::Q5_1, Format::Q5Min) => five_bits,
        (S::Q4K, Format::Q4Min) | (S::Q5K, Format::Q5Min) => q4_k_or_q5_k,
        (S::Q6K, Format::Q6) => q6_k,
        _ => return Err(PackError::Source { from: source, to: format }),
    };
    let (tiles, rest) = out.split_at_mut(columns / BLOCK * format.tile_bytes());
    rest.fill(0);
    if rows.len() < GROUP {
        tiles.fill(0);
    }
    for (index, tile) in tiles.chunks_exact_mut(format.tile_bytes()).enumerate() {
        for (lane, row) in rows.iter().enumerate() {
            put(format, &read(row, source, index), lane, tile);
        }
    }
    Ok(())
}

/// Writes all that a tile holds of a row.
fn put(format: Format, block: &Block, lane: usize, tile: &mut [u8]) {
    let registers = block.elements.as_chunks::<4>().0;
    let mut set = |start: usize, bytes: [u8; 4]| tile[start + lane * 4..][..4].copy_from_slice(&bytes);
    if format == Format::Q8 {
        registers.iter().enumerate().for_each(|(register, bytes)| set(register * 64, *bytes));
    } else {
        for i in 0..4 {
            let (low, high) = (registers[i], registers[i + 4]);
            set(i * 64, std::array::from_fn(|b| low[b] & 15 | (high[b] & 15) << 4));
        }
    }
    // The bits above the lowest four of some registers, so many of each.
    let mut above = |start: usize, registers: &[[u8; 4]], bits: usize| {
        let joined = |b: usize| registers.iter().rev().fold(0u8, |joined, bytes| joined << bits | bytes[b] >> 4);
        set(start, std::array::from_fn(joined));
    };
    match format {
        Format::Q5 | Format::Q5Min => above(256, registers, 1),
        Format::Q6 => (0..2).for_each(|half| above(256 + half * 64, &registers[half * 4..][..4], 2)),
        _ => {}
    }
    let scales = tile[scales_at(format)..].chunks_exact_mut(GROUP * 2);
    for (scales, scale) in scales.zip(block.scales) {
        scales[lane * 2..lane * 2 + 2].copy_from_slice(&scale.to_le_bytes());
    }
}

/// Element `k` of a row of a tile, with its offset.
pub(crate) fn element(format: Format, tile: &[u8], lane: usize, k: usize) -> u8 {
    let (register, at) = (k / 4, lane * 4 + k % 4);
    if format == Format::Q8 {
        return tile[register * 64 + at];
    }
    let low = tile[register % 4 * 64 + at] >> (register / 4 * 4) & 15;
    match format {
        Format::Q5 | Format::Q5Min => low | (tile[256 + at] >> register & 1) << 4,
        Format::Q6 => low | (tile[256 + register / 4 * 64 + at] >> (register % 4 * 2) & 3) << 4,
        _ => low,
    }
}

/// The first or second f16 of a row of a tile.
pub(crate) fn scale(format: Format, tile: &[u8], lane: usize, index: usize) -> f32 {
    half_at(tile, scales_at(format) + (index * GROUP + lane) * 2).to_f32()
}

fn half_at(bytes: &[u8], at: usize) -> f16 {
    f16::from_le_bytes([bytes[at], bytes[at + 1]])
}

fn from_floats(row: &[u8], source: SourceType, index: usize) -> Block {
    let mut values = [0.0f32; BLOCK];
    for (k, value) in values.iter_mut().enumerate() {
        let at = index * BLOCK + k;
        *value = match source {
            SourceType::F32 => f32::from_le_bytes(row.as_chunks().0[at]),
            SourceType::F16 => f16::from_le_bytes(row.as_chunks().0[at]).to_f32(),
            _ => bf16::from_le_bytes(row.as_chunks().0[at]).to_f32(),
        };
    }
    let largest = values.iter().fold(0.0f32, |largest, value| largest.max(value.abs()));
    // Quantized with the scale as it is stored, so that its rounding costs nothing.
    let scale = f16::from_f32(largest / 127.0);
    let inverse = if scale == f16::ZERO { 0.0 } else { 1.0 / scale.to_f32() };
    let elements = values.map(|value| ((value * inverse).round_ties_even().clamp(-127.0, 127.0) + 128.0) as u8);
    Block { elements, scales: [scale, f16::ZERO] }
}

fn q8_0(row: &[u8], _: SourceType, index: usize) -> Block {
    let block = &row[index * 34..][..34];
    let elements = std::array::from_fn(|k| block[2 + k] ^ 0x80);
    Block { elements, scales: [half_at(block, 0), f16::ZERO] }
}

fn four_bits(row: &[u8], source: SourceType, index: usize) -> Block {
    let (bytes, minimum) = if source == SourceType::Q4_1 { (20, true) } else { (18, false) };
    let block = &row[index * bytes..][..bytes];
    let pairs = &block[bytes - 16..];
    let elements = std::array::from_fn(|k| pairs[k % 16] >> (k / 16 * 4) & 15);
    Block { elements, scales: [half_at(block, 0), if minimum { half_at(block, 2) } else { f16::ZERO }] }
}

fn five_bits(row: &[u8], source: SourceType, index: usize) -> Block {
    let (bytes, minimum) = if source == SourceType::Q5_1 { (24, true) } else { (22, false) };
    let block = &row[index * bytes..][..bytes];
    let (high, pairs) = (&block[bytes - 20..bytes - 16], &block[bytes - 16..]);
    let fifth = |k: usize| (high[k / 8] >> (k % 8) & 1) << 4;
    let elements = std::array::from_fn(|k| pairs[k % 16] >> (k / 16 * 4) & 15 | fifth(k));
    Block { elements, scales: [half_at(block, 0), if minimum { half_at(block, 2) } else { f16::ZERO }] }
}

/// A 6-bit scale and minimum of eight: the first four in the low bits of bytes 0-3 and 4-7; of the others the low bits
/// are the halves of bytes 8-11, and the high bits those left over before.
fn k_scales(packed: &[u8], i: usize) -> (u8, u8) {
    if i < 4 {
        return (packed[i] & 63, packed[i + 4] & 63);
    }
    (packed[i + 4] & 15 | packed[i - 4] >> 6 << 4, packed[i + 4] >> 4 | packed[i] >> 6 << 4)
}

fn q4_k_or_q5_k(row: &[u8], source: SourceType, index: usize) -> Block {
    let (bytes, fifth) = if source == SourceType::Q5K { (176, true) } else { (144, false) };
    let (block, i) = (&row[index / 8 * bytes..][..bytes], index % 8);
    let (scale, minimum) = k_scales(&block[4..16], i);
    let scale = half_at(block, 0).to_f32() * f32::from(scale);
    let minimum = -half_at(block, 2).to_f32() * f32::from(minimum);
    let pairs = &block[bytes - 128 + i / 2 * 32..][..32];
    let elements = std::array::from_fn(|k| {
        let low = pairs[k] >> (i % 2 * 4) & 15;
        if fifth { low | (block[16 + k] >> i & 1) << 4 } else { low }
    });
    Block { elements, scales: [f16::from_f32(scale), f16::from_f32(minimum)] }
}

fn q6_k(row: &[u8], _: SourceType, index: usize) -> Block {
    let (block, i) = (&row[index / 8 * 210..][..210], index % 8);
    let (part, run) = (i / 4, i % 4);
    let low = &block[part * 64 + run % 2 * 32..][..32];
    let high = &block[128 + part * 32..][..32];
    let elements = std::array::from_fn(|k| low[k] >> (run / 2 * 4) & 15 | (high[k] >> (run * 2) & 3) << 4);
    let d = half_at(block, 208).to_f32();
    let scale = |half: usize| f16::from_f32(d * f32::from(block[192 + i * 2 + half] as i8));
    Block { elements, scales: [scale(0), scale(1)] }
}
