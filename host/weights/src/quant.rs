//! Quantized blocks of GGUF: what each block of bytes stands for, in f32.
//!
//! The arithmetic is done in f32 in the order the formats define (scale times integer, then offset), each operation
//! rounded once, so results equal the reference bit for bit.
//!
//! Small blocks hold 32 elements with an f16 scale `d` (and minimum `m`); their 4-bit parts hold elements `i` (low
//! half of byte `i`) and `i + 16` (high half). The `K` formats hold 256 elements in sub-blocks whose scales are
//! themselves quantized.

use half::f16;

use crate::{StorageType, elements};

/// Reads whole blocks: `bytes` holds exactly the elements that `out` has room for.
pub(crate) fn decode(storage: StorageType, bytes: &[u8], out: &mut [f32]) {
    let block = storage.block();
    let whole = bytes.len() as u64 * block.elements == out.len() as u64 * block.bytes;
    assert!(whole, "{} bytes are no {} elements of {storage} in whole blocks", bytes.len(), out.len());
    match storage {
        StorageType::F32 => elements::read_f32(bytes, out),
        StorageType::F16 => elements::read_f16(bytes, out),
        StorageType::Bf16 => elements::read_bf16(bytes, out),
        StorageType::Q4_0 => blocks(bytes, out, q4_0),
        StorageType::Q4_1 => blocks(bytes, out, q4_1),
        StorageType::Q5_0 => blocks(bytes, out, q5_0),
        StorageType::Q5_1 => blocks(bytes, out, q5_1),
        StorageType::Q8_0 => blocks(bytes, out, q8_0),
        StorageType::Q4K => blocks(bytes, out, q4_k),
        StorageType::Q5K => blocks(bytes, out, q5_k),
        StorageType::Q6K => blocks(bytes, out, q6_k),
        StorageType::Other { name, .. } => unreachable!("plans refuse {name}"),
    }
}

fn blocks<const BYTES: usize, const ELEMENTS: usize>(
    bytes: &[u8],
    out: &mut [f32],
    block: impl Fn(&[u8; BYTES], &mut [f32; ELEMENTS]),
) {
    let (bytes, out) = (bytes.as_chunks().0, out.as_chunks_mut().0);
    bytes.iter().zip(out).for_each(|(bytes, out)| block(bytes, out));
}

fn half_at(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

fn word_at(block: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([block[at], block[at + 1], block[at + 2], block[at + 3]])
}

/// `d: f16, 32 x i8`
fn q8_0(block: &[u8; 34], out: &mut [f32; 32]) {
    let d = half_at(block, 0);
    for (out, quant) in out.iter_mut().zip(&block[2..]) {
        *out = f32::from(*quant as i8) * d;
    }
}

/// `d: f16, 32 x 4 bits`, 8 stands for zero.
fn q4_0(block: &[u8; 18], out: &mut [f32; 32]) {
    let d = half_at(block, 0);
    for (i, pair) in block[2..].iter().enumerate() {
        out[i] = f32::from((pair & 15) as i8 - 8) * d;
        out[i + 16] = f32::from((pair >> 4) as i8 - 8) * d;
    }
}

/// `d: f16, m: f16, 32 x 4 bits`
fn q4_1(block: &[u8; 20], out: &mut [f32; 32]) {
    let (d, m) = (half_at(block, 0), half_at(block, 2));
    for (i, pair) in block[4..].iter().enumerate() {
        out[i] = f32::from(pair & 15) * d + m;
        out[i + 16] = f32::from(pair >> 4) * d + m;
    }
}

/// The fifth bits are one word: bit `i` belongs to element `i`.
fn five_bits(low: u8, high: u32, element: usize) -> u8 {
    low | ((high >> element & 1) << 4) as u8
}

/// `d: f16, 32 x fifth bit, 32 x 4 bits`, 16 stands for zero.
fn q5_0(block: &[u8; 22], out: &mut [f32; 32]) {
    let (d, high) = (half_at(block, 0), word_at(block, 2));
    for (i, pair) in block[6..].iter().enumerate() {
        out[i] = f32::from(five_bits(pair & 15, high, i) as i8 - 16) * d;
        out[i + 16] = f32::from(five_bits(pair >> 4, high, i + 16) as i8 - 16) * d;
    }
}

/// `d: f16, m: f16, 32 x fifth bit, 32 x 4 bits`
fn q5_1(block: &[u8; 24], out: &mut [f32; 32]) {
    let (d, m, high) = (half_at(block, 0), half_at(block, 2), word_at(block, 4));
    for (i, pair) in block[8..].iter().enumerate() {
        out[i] = f32::from(five_bits(pair & 15, high, i)) * d + m;
        out[i + 16] = f32::from(five_bits(pair >> 4, high, i + 16)) * d + m;
    }
}

/// Scale and minimum of sub-block `i` of eight, six bits each in twelve bytes: those of the first four are the low six
/// bits of bytes 0-3 and 4-7; those of the last four have their low four bits in bytes 8-11 (scale low, minimum
/// high), and their upper two in the upper two of bytes 0-3 and 4-7.
fn k_scale_and_min(packed: &[u8], i: usize) -> (f32, f32) {
    let (scale, min) = match i {
        0..4 => (packed[i] & 63, packed[i + 4] & 63),
        _ => (packed[i + 4] & 15 | packed[i - 4] >> 6 << 4, packed[i + 4] >> 4 | packed[i] >> 6 << 4),
    };
    (f32::from(scale), f32::from(min))
}

/// `d: f16, dmin: f16, 12 bytes of scales, 256 x 4 bits`; a run of 32 bytes holds two sub-blocks, low halves first.
fn q4_k(block: &[u8; 144], out: &mut [f32; 256]) {
    let (d, d_min) = (half_at(block, 0), half_at(block, 2));
    for (i, out) in out.as_chunks_mut::<32>().0.iter_mut().enumerate() {
        let (scale, min) = k_scale_and_min(&block[4..16], i);
        let (scale, min) = (d * scale, d_min * min);
        let run = &block[16 + i / 2 * 32..][..32];
        let shift = i % 2 * 4;
        for (out, pair) in out.iter_mut().zip(run) {
            *out = scale * f32::from(pair >> shift & 15) - min;
        }
    }
}

/// As Q4_K, with the fifth bits in 32 bytes after the scales: bit `i` of byte `j` belongs to element `j` of sub-block `i`.
fn q5_k(block: &[u8; 176], out: &mut [f32; 256]) {
    let (d, d_min) = (half_at(block, 0), half_at(block, 2));
    let high = &block[16..48];
    for (i, out) in out.as_chunks_mut::<32>().0.iter_mut().enumerate() {
        let (scale, min) = k_scale_and_min(&block[4..16], i);
        let (scale, min) = (d * scale, d_min * min);
        let run = &block[48 + i / 2 * 32..][..32];
        let shift = i % 2 * 4;
        for ((out, pair), high) in out.iter_mut().zip(run).zip(high) {
            *out = scale * f32::from(pair >> shift & 15 | (high >> i & 1) << 4) - min;
        }
    }
}

/// `256 x low 4 bits, 256 x high 2 bits, 16 x i8 scale, d: f16`, 32 stands for zero. Each half of 128 elements is four
/// runs of 32: runs 0 and 1 have their low bits in the low halves of 64 bytes, runs 2 and 3 in the high halves; run
/// `r` has its high bits in bits `2r` and `2r + 1` of 32 bytes. A scale serves 16 elements.
fn q6_k(block: &[u8; 210], out: &mut [f32; 256]) {
    let (low, high, scales) = (&block[..128], &block[128..192], &block[192..208]);
    let d = half_at(block, 208);
    for (i, out) in out.as_chunks_mut::<16>().0.iter_mut().enumerate() {
        let (part, run, side) = (i / 8, i / 2 % 4, i % 2 * 16);
        let scale = d * f32::from(scales[i] as i8);
        let low = &low[part * 64 + run % 2 * 32 + side..][..16];
        let high = &high[part * 32 + side..][..16];
        for ((out, low), high) in out.iter_mut().zip(low).zip(high) {
            let quant = low >> (run / 2 * 4) & 15 | (high >> (run * 2) & 3) << 4;
            *out = scale * f32::from(quant as i8 - 32);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::testdata;

    /// `mixed.gguf` and what the `gguf` Python package reads from it; see `testdata/make_goldens.py`.
    #[test]
    fn every_format_equals_the_reference_bit_for_bit() {
        let (mixed, expected) = (testdata("mixed.gguf"), testdata("mixed-f32.gguf"));
        let mut formats = std::collections::BTreeSet::new();
        for (name, entry) in mixed.tensors() {
            let reference = &expected.tensors()[name];
            assert_eq!(entry.shape, reference.shape, "{name}");
            let elements = entry.shape.iter().product::<u64>() as usize;
            let (mut found, mut wanted) = (vec![0.0; elements], vec![0.0; elements]);
            decode(entry.storage, mixed.bytes(entry), &mut found);
            decode(StorageType::F32, expected.bytes(reference), &mut wanted);
            for (i, (found, wanted)) in found.iter().zip(&wanted).enumerate() {
                assert_eq!(found.to_bits(), wanted.to_bits(), "{name}[{i}]: {found:e}, expected {wanted:e}");
            }
            formats.insert(entry.storage);
        }
        assert_eq!(formats.len(), 11, "{formats:?}");
    }

    #[test]
    #[should_panic(expected = "whole blocks")]
    fn half_a_block_is_refused() {
        decode(StorageType::Q8_0, &[0; 34], &mut [0.0; 31]);
    }
}
