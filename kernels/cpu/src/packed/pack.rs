//! Packing: from the rows of a tensor, as a model file stores them, to a group.
//!
//! The quantized sources are the block types of GGUF (ggml's `ggml-quants.h` describes them). K-quants have scales of
//! scales; their products are rounded to f16 here, which is finer than the elements by orders of magnitude.

use half::{bf16, f16};

use super::{BLOCK, Format, GROUP};

/// How a file stores the rows to pack.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SourceType {
    F32,
    F16,
    Bf16,
    Q8_0,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q4K,
    Q5K,
    Q6K,
}

/// Columns of a super-block of the K types.
const SUPER_BLOCK: usize = 256;

/// Packs up to 16 rows of `columns` columns, given as their bytes in the file, into a group of a format. Missing rows
/// become zeros.
///
/// # Panics
/// If a row is too short, there are more than 16, `out` is no group of the format, or the format does not hold the
/// source: float formats and [`Format::Q8`] hold floats, quantized formats their own blocks.
pub fn pack_group(format: Format, source: SourceType, rows: &[&[u8]], columns: usize, out: &mut [u8]) {
    assert!(rows.len() <= GROUP, "a group has {GROUP} rows");
    assert_eq!(Some(out.len()), format.group_bytes(columns), "bytes of a group");
    out.fill(0);
    for (lane, row) in rows.iter().enumerate() {
        match format {
            Format::F32 => {
                for k in 0..columns {
                    put(out, (k * GROUP + lane) * 4, &float(source, row, k).to_le_bytes());
                }
            }
            Format::Bf16 => {
                for k in 0..columns {
                    let at = ((k / 2 * GROUP + lane) * 2 + k % 2) * 2;
                    put(out, at, &bf16::from_f32(float(source, row, k)).to_le_bytes());
                }
            }
            Format::F16 => {
                for k in 0..columns {
                    put(out, (k * GROUP + lane) * 2, &f16::from_f32(float(source, row, k)).to_le_bytes());
                }
            }
            quantized => {
                for (index, tile) in out.chunks_exact_mut(format.tile_bytes()).take(columns / BLOCK).enumerate() {
                    put_block(quantized, tile, lane, &block(source, row, index));
                }
            }
        }
    }
}

fn put(out: &mut [u8], at: usize, bytes: &[u8]) {
    out[at..at + bytes.len()].copy_from_slice(bytes);
}

fn float(source: SourceType, row: &[u8], k: usize) -> f32 {
    match source {
        SourceType::F32 => f32::from_le_bytes([row[k * 4], row[k * 4 + 1], row[k * 4 + 2], row[k * 4 + 3]]),
        SourceType::F16 => half_at(row, k * 2).to_f32(),
        SourceType::Bf16 => bf16::from_le_bytes([row[k * 2], row[k * 2 + 1]]).to_f32(),
        _ => panic!("{source:?} is not stored as floats"),
    }
}

fn half_at(bytes: &[u8], at: usize) -> f16 {
    f16::from_le_bytes([bytes[at], bytes[at + 1]])
}

/// 32 elements of a row: unsigned integers, and two f16 values whose meaning is the format's.
struct Block {
    elements: [u8; BLOCK],
    halves: [f16; 2],
}

fn put_block(format: Format, tile: &mut [u8], lane: usize, block: &Block) {
    for (k, element) in block.elements.iter().enumerate() {
        let (plane, byte) = (k / 4, lane * 4 + k % 4);
        if let Format::Q8 = format {
            tile[plane * 64 + byte] = *element;
            continue;
        }
        tile[plane % 4 * 64 + byte] |= (element & 15) << (plane / 4 * 4);
        match format {
            Format::Q5 | Format::Q5Min => tile[4 * 64 + byte] |= (element >> 4 & 1) << plane,
            Format::Q6 => tile[(4 + plane / 4) * 64 + byte] |= (element >> 4 & 3) << (plane % 4 * 2),
            _ => {}
        }
    }
    let scales = format.plane_bytes();
    for (index, half) in block.halves.iter().enumerate().take((format.tile_bytes() - scales) / (GROUP * 2)) {
        put(tile, scales + (index * GROUP + lane) * 2, &half.to_le_bytes());
    }
}

/// Block number `index` of a row.
fn block(source: SourceType, row: &[u8], index: usize) -> Block {
    let bytes = |len: usize| &row[index * len..][..len];
    let whole = |len: usize| (&row[index / 8 * len..][..len], index % (SUPER_BLOCK / BLOCK));
    match source {
        SourceType::F32 | SourceType::F16 | SourceType::Bf16 => {
            int8(std::array::from_fn(|k| float(source, row, index * BLOCK + k)))
        }
        SourceType::Q8_0 => {
            let block = bytes(34);
            Block { elements: std::array::from_fn(|k| block[2 + k] ^ 0x80), halves: [half_at(block, 0), f16::ZERO] }
        }
        SourceType::Q4_0 => {
            let block = bytes(18);
            Block { elements: nibbles(&block[2..]), halves: [half_at(block, 0), f16::ZERO] }
        }
        SourceType::Q4_1 => {
            let block = bytes(20);
            Block { elements: nibbles(&block[4..]), halves: [half_at(block, 0), half_at(block, 2)] }
        }
        SourceType::Q5_0 => {
            let block = bytes(22);
            Block { elements: five_bits(&block[2..6], &block[6..]), halves: [half_at(block, 0), f16::ZERO] }
        }
        SourceType::Q5_1 => {
            let block = bytes(24);
            Block { elements: five_bits(&block[4..8], &block[8..]), halves: [half_at(block, 0), half_at(block, 2)] }
        }
        SourceType::Q4K => {
            let (block, part) = whole(144);
            let run = &block[16 + part / 2 * 32..][..32];
            let elements = std::array::from_fn(|k| run[k] >> (part % 2 * 4) & 15);
            Block { elements, halves: k_halves(block, part) }
        }
        SourceType::Q5K => {
            let (block, part) = whole(176);
            let (high, run) = (&block[16..48], &block[48 + part / 2 * 32..][..32]);
            let element = |k: usize| run[k] >> (part % 2 * 4) & 15 | (high[k] >> part & 1) << 4;
            Block { elements: std::array::from_fn(element), halves: k_halves(block, part) }
        }
        SourceType::Q6K => {
            let (block, part) = whole(210);
            // Half of the super-block, and which of its four runs of 32.
            let (side, run) = (part / 4, part % 4);
            let (low, high) = (&block[side * 64 + run % 2 * 32..][..32], &block[128 + side * 32..][..32]);
            let element = |k: usize| low[k] >> (run / 2 * 4) & 15 | (high[k] >> (run * 2) & 3) << 4;
            let d = half_at(block, 208).to_f32();
            let scale = |half: usize| f16::from_f32(d * f32::from(block[192 + part * 2 + half] as i8));
            Block { elements: std::array::from_fn(element), halves: [scale(0), scale(1)] }
        }
    }
}

/// Byte `i` holds elements `i` and `i + 16`.
fn nibbles(bytes: &[u8]) -> [u8; BLOCK] {
    std::array::from_fn(|k| bytes[k % 16] >> (k / 16 * 4) & 15)
}

/// As [`nibbles`], with the fifth bit of element `k` as bit `k` of a word.
fn five_bits(high: &[u8], low: &[u8]) -> [u8; BLOCK] {
    let low = nibbles(low);
    std::array::from_fn(|k| low[k] | (high[k / 8] >> (k % 8) & 1) << 4)
}

/// Scale and minimum of part `i` of eight, six bits each in twelve bytes: those of the first four are the low six bits
/// of bytes 0-3 and 4-7; those of the others have their low four bits in bytes 8-11 (scale low, minimum high) and their
/// upper two in the upper two of bytes 0-3 and 4-7.
fn k_halves(block: &[u8], part: usize) -> [f16; 2] {
    let packed = &block[4..16];
    let (scale, minimum) = match part {
        0..4 => (packed[part] & 63, packed[part + 4] & 63),
        _ => (
            packed[part + 4] & 15 | packed[part - 4] >> 6 << 4,
            packed[part + 4] >> 4 | packed[part] >> 6 << 4,
        ),
    };
    let (d, d_min) = (half_at(block, 0).to_f32(), half_at(block, 2).to_f32());
    [f16::from_f32(d * f32::from(scale)), f16::from_f32(-d_min * f32::from(minimum))]
}

/// Rounds floats to 8 bits around 128, with the largest of them at the end of the range.
fn int8(values: [f32; BLOCK]) -> Block {
    const LARGEST: f32 = 127.0;
    let largest = values.iter().fold(0f32, |most, value| most.max(value.abs()));
    let scale = f16::from_f32(largest / LARGEST);
    let inverse = if scale.to_f32() > 0.0 { 1.0 / scale.to_f32() } else { 0.0 };
    let element = |value: f32| ((value * inverse).round_ties_even().clamp(-LARGEST, LARGEST) as i32 + 128) as u8;
    Block { elements: values.map(element), halves: [scale, f16::ZERO] }
}
