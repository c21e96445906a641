//! Plain floats in little-endian bytes: reading them as f32, and rounding f32 to what is stored.

use half::{bf16, f16, slice::HalfFloatSliceExt};

use crate::StorageDType;

/// Elements converted at once through a small array on the stack, so that half's vector code is used.
const LANES: usize = 64;

pub(crate) fn read_f32(bytes: &[u8], out: &mut [f32]) {
    for (element, out) in bytes.as_chunks::<4>().0.iter().zip(out) {
        *out = f32::from_le_bytes(*element);
    }
}

pub(crate) fn read_bf16(bytes: &[u8], out: &mut [f32]) {
    for (element, out) in bytes.as_chunks::<2>().0.iter().zip(out) {
        *out = f32::from_bits(u32::from(u16::from_le_bytes(*element)) << 16);
    }
}

pub(crate) fn read_f16(bytes: &[u8], out: &mut [f32]) {
    for (bytes, out) in bytes.chunks(2 * LANES).zip(out.chunks_mut(LANES)) {
        let mut halves = [f16::ZERO; LANES];
        for (element, half) in bytes.as_chunks::<2>().0.iter().zip(&mut halves) {
            *half = f16::from_le_bytes(*element);
        }
        halves[..out.len()].convert_to_f32_slice(out);
    }
}

/// Rounds to nearest, ties to even. `out` has room for exactly these values.
pub(crate) fn write(values: &[f32], dtype: StorageDType, out: &mut [u8]) {
    match dtype {
        StorageDType::F32 => {
            for (value, out) in values.iter().zip(out.as_chunks_mut::<4>().0) {
                *out = value.to_le_bytes();
            }
        }
        StorageDType::Bf16 => {
            for (value, out) in values.iter().zip(out.as_chunks_mut::<2>().0) {
                *out = bf16_bits(*value).to_le_bytes();
            }
        }
        StorageDType::F16 => write_f16(values, out),
    }
}

fn write_f16(values: &[f32], out: &mut [u8]) {
    for (values, out) in values.chunks(LANES).zip(out.chunks_mut(2 * LANES)) {
        let mut halves = [f16::ZERO; LANES];
        halves[..values.len()].convert_from_f32_slice(values);
        for (half, out) in halves.iter().zip(out.as_chunks_mut::<2>().0) {
            *out = half.to_le_bytes();
        }
    }
}

/// As `bf16::from_f32`, but without a branch: the compiler makes vector code of it.
fn bf16_bits(value: f32) -> u16 {
    let bits = value.to_bits();
    let ties_to_even = (bits >> 16) & 1;
    let rounded = bits.wrapping_add(0x7fff + ties_to_even) >> 16;
    // Rounding could carry a NaN's payload into infinity; the quiet bit keeps it one.
    let nan = (bits >> 16) | u32::from(bf16::NAN.to_bits() & 0x40);
    (if value.is_nan() { nan } else { rounded }) as u16
}

#[cfg(test)]
mod tests {
    use rand::{RngExt, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    use super::*;

    /// Values at and around every rounding boundary, and random ones.
    fn values() -> Vec<f32> {
        let mut random = ChaCha8Rng::seed_from_u64(7);
        let special =
            [0.0, -0.0, f32::INFINITY, f32::NEG_INFINITY, f32::NAN, f32::MAX, f32::MIN_POSITIVE, 1e-45, 65520.0];
        let ties =
            [0x3f80_8000, 0x3f81_8000, 0x3f80_8001, 0x7f7f_8000, 0x7f80_0001, 0xffff_ffff, 0x3880_1000, 0x3880_3000];
        let ties = ties.map(f32::from_bits);
        let random = (0..10_000).map(|_| f32::from_bits(random.random()));
        special.into_iter().chain(ties).chain(random).collect()
    }

    fn written(values: &[f32], dtype: StorageDType) -> Vec<u8> {
        let mut out = vec![0; values.len() * dtype.bytes()];
        write(values, dtype, &mut out);
        out
    }

    #[test]
    fn bf16_rounds_as_the_reference_does() {
        let values = values();
        let bytes = written(&values, StorageDType::Bf16);
        for (value, bytes) in values.iter().zip(bytes.as_chunks::<2>().0) {
            assert_eq!(
                u16::from_le_bytes(*bytes),
                bf16::from_f32(*value).to_bits(),
                "{value:e} {:#x}",
                value.to_bits()
            );
        }
    }

    #[test]
    fn f16_rounds_as_the_scalar_reference_does() {
        let values = values();
        let bytes = written(&values, StorageDType::F16);
        for (value, bytes) in values.iter().zip(bytes.as_chunks::<2>().0) {
            let (found, expected) = (f16::from_le_bytes(*bytes), f16::from_f32_const(*value));
            assert!(found.to_bits() == expected.to_bits() || found.is_nan() && expected.is_nan(), "{value:e}");
        }
    }

    #[test]
    fn every_half_reads_as_itself_and_writes_back() {
        let bytes: Vec<u8> = (0..=u16::MAX).flat_map(u16::to_le_bytes).collect();
        let mut out = vec![0.0; 1 << 16];
        read_f16(&bytes, &mut out);
        assert!(out.iter().zip(0..=u16::MAX).all(|(value, bits)| {
            let expected = f16::from_bits(bits).to_f32_const();
            value.to_bits() == expected.to_bits() || value.is_nan() && expected.is_nan()
        }));
        read_bf16(&bytes, &mut out);
        let back = written(&out, StorageDType::Bf16);
        for (found, bits) in back.as_chunks::<2>().0.iter().zip(0..=u16::MAX) {
            let found = bf16::from_le_bytes(*found);
            assert!(found.to_bits() == bits || found.is_nan() && bf16::from_bits(bits).is_nan(), "{bits:#x}");
        }
    }

    #[test]
    fn f32_passes_unchanged() {
        let values = values();
        let mut out = vec![0.0; values.len()];
        read_f32(&written(&values, StorageDType::F32), &mut out);
        assert!(out.iter().zip(&values).all(|(a, b)| a.to_bits() == b.to_bits()));
    }
}
