//! Numbers as registers and memories hold them.
//!
//! A register has one 32-bit word a lane, whatever the element type: the bits of an `f32`; a `bf16` as the `f32` of the
//! same value; integers and masks sign-extended; 8-bit floats as their byte. A memory has packed words: a word holds
//! `packing` elements that are neighbours along the second-to-last axis, the first in the low bits. That is how a TPU
//! lays out its tiles as seen by bitcasts, so a memory can be read as other elements without moving anything.

use crate::types::Elem;

/// A register's word of an element of a memory's word.
pub(super) fn decode(elem: Elem, word: u32, sub: usize) -> u32 {
    let shifted = word >> (sub * elem.bits() % 32);
    match elem {
        Elem::I1 | Elem::I32 | Elem::F32 | Elem::Index => word,
        Elem::Bf16 => shifted << 16,
        Elem::I8 => i32::from(shifted as u8 as i8) as u32,
        Elem::I16 => i32::from(shifted as u16 as i16) as u32,
        Elem::F8E4M3 | Elem::F8E5M2 => shifted & 0xFF,
        Elem::I4 => (((shifted << 28) as i32) >> 28) as u32,
    }
}

/// The memory's word with one element replaced.
pub(super) fn encode(elem: Elem, word: u32, sub: usize, lane: u32) -> u32 {
    let bits = elem.bits();
    let (mask, value) = match elem {
        Elem::I1 | Elem::I32 | Elem::F32 | Elem::Index => return lane,
        Elem::Bf16 => (0xFFFF, lane >> 16),
        Elem::I16 => (0xFFFF, lane & 0xFFFF),
        Elem::I8 | Elem::F8E4M3 | Elem::F8E5M2 => (0xFF, lane & 0xFF),
        Elem::I4 => (0xF, lane & 0xF),
    };
    let shift = sub * bits;
    (word & !(mask << shift)) | (value << shift)
}

/// [`decode`] for a run of words.
pub(super) fn decode_run(elem: Elem, sub: usize, words: &[u32], lanes: &mut [u32]) {
    match (elem, sub) {
        (Elem::I1 | Elem::I32 | Elem::F32 | Elem::Index, _) => lanes.copy_from_slice(words),
        (Elem::Bf16, 0) => lanes.iter_mut().zip(words).for_each(|(lane, word)| *lane = word << 16),
        (Elem::Bf16, _) => lanes.iter_mut().zip(words).for_each(|(lane, word)| *lane = word & 0xFFFF_0000),
        _ => lanes.iter_mut().zip(words).for_each(|(lane, word)| *lane = decode(elem, *word, sub)),
    }
}

/// [`encode`] for a run of words.
pub(super) fn encode_run(elem: Elem, sub: usize, lanes: &[u32], words: &mut [u32]) {
    match elem {
        Elem::I1 | Elem::I32 | Elem::F32 | Elem::Index => words.copy_from_slice(lanes),
        _ => words.iter_mut().zip(lanes).for_each(|(word, lane)| *word = encode(elem, *word, sub, *lane)),
    }
}

/// The lane of a float of an element type, rounded to the nearest, halves to even.
pub(super) fn from_f32(elem: Elem, value: f32) -> u32 {
    match elem {
        Elem::Bf16 => round_bf16(value.to_bits()),
        Elem::F8E4M3 => u32::from(to_f8(value, F8E4M3)),
        Elem::F8E5M2 => u32::from(to_f8(value, F8E5M2)),
        _ => value.to_bits(),
    }
}

/// The float of a lane.
pub(super) fn to_f32(elem: Elem, lane: u32) -> f32 {
    match elem {
        Elem::F8E4M3 => from_f8(lane as u8, F8E4M3),
        Elem::F8E5M2 => from_f8(lane as u8, F8E5M2),
        _ => f32::from_bits(lane),
    }
}

/// The bits of an `f32` rounded to `bf16`.
#[inline]
pub(super) fn round_bf16(bits: u32) -> u32 {
    let rounded = bits.wrapping_add(0x7FFF + ((bits >> 16) & 1));
    let nan = (bits & 0x7FFF_FFFF) > 0x7F80_0000;
    // A NaN stays one even if its payload is all in the lower half.
    let kept = if nan { bits | 0x0040_0000 } else { rounded };
    kept & 0xFFFF_0000
}

/// A format of 8-bit floats.
#[derive(Clone, Copy)]
struct F8 {
    mantissa: u32,
    bias: i32,
    /// Magnitude bits of the largest finite number.
    largest: u8,
    /// Magnitude bits of what is beyond it.
    overflow: u8,
    nan: u8,
}

const F8E4M3: F8 = F8 { mantissa: 3, bias: 7, largest: 0x7E, overflow: 0x7F, nan: 0x7F };
const F8E5M2: F8 = F8 { mantissa: 2, bias: 15, largest: 0x7B, overflow: 0x7C, nan: 0x7E };

fn from_f8(byte: u8, format: F8) -> f32 {
    let magnitude = byte & 0x7F;
    let sign = if byte & 0x80 != 0 { -1.0 } else { 1.0 };
    if magnitude > format.largest {
        return if magnitude == format.overflow && format.overflow != format.nan {
            sign * f32::INFINITY
        } else {
            f32::NAN
        };
    }
    let exponent = i32::from(magnitude >> format.mantissa);
    let fraction = f32::from(magnitude & ((1 << format.mantissa) - 1)) / (1 << format.mantissa) as f32;
    // Exact: powers of two within f32's range.
    let scale = |power: i32| f32::from_bits(((power + 127) as u32) << 23);
    let value = if exponent == 0 {
        fraction * scale(1 - format.bias)
    } else {
        (1.0 + fraction) * scale(exponent - format.bias)
    };
    sign * value
}

fn to_f8(value: f32, format: F8) -> u8 {
    let sign = if value.is_sign_negative() { 0x80 } else { 0 };
    if value.is_nan() {
        return sign | format.nan;
    }
    let bits = value.abs().to_bits();
    let exponent = ((bits >> 23) as i32 - 127).max(1 - format.bias);
    // In units of the last place at that exponent; a power of two, so exact.
    let unit = f64::from(exponent - format.mantissa as i32).exp2();
    let steps = (f64::from(value.abs()) / unit).round_ties_even();
    if !steps.is_finite() {
        return sign | format.overflow;
    }
    let first_normal = 1_u64 << format.mantissa;
    let steps = steps as u64;
    let magnitude = match steps < first_normal {
        true => steps,
        // The carry of a mantissa that rounds up goes into the exponent by itself.
        false => (((exponent + format.bias) as u64 - 1) << format.mantissa) + steps,
    };
    if magnitude > u64::from(format.largest) { sign | format.overflow } else { sign | magnitude as u8 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bf16_rounds_like_the_half_crate() {
        for bits in
            (0..=u32::MAX).step_by(4099).chain([0x7F80_0000, 0x7F80_0001, 0xFFFF_FFFF, 0x7F7F_FFFF, 0x0000_8000])
        {
            let expected = half::bf16::from_f32(f32::from_bits(bits));
            assert_eq!(round_bf16(bits) >> 16, u32::from(expected.to_bits()), "{bits:08X}");
        }
    }

    #[test]
    fn eight_bit_floats_survive_a_round_trip_and_round_to_even() {
        for format in [F8E4M3, F8E5M2] {
            for byte in 0..=u8::MAX {
                let value = from_f8(byte, format);
                if !value.is_nan() {
                    assert_eq!(to_f8(value, format), byte, "{value}");
                }
            }
        }
        assert_eq!(from_f8(0x7E, F8E4M3), 448.0);
        assert_eq!(from_f8(0x01, F8E4M3), 2.0_f32.powi(-9));
        assert_eq!(from_f8(0x7B, F8E5M2), 57344.0);
        assert_eq!(to_f8(464.0, F8E4M3), 0x7E);
        assert!(from_f8(to_f8(465.0, F8E4M3), F8E4M3).is_nan());
        assert_eq!(from_f8(to_f8(1e9, F8E5M2), F8E5M2), f32::INFINITY);
        assert_eq!(from_f8(to_f8(1.0625, F8E4M3), F8E4M3), 1.0);
        assert_eq!(from_f8(to_f8(1.1875, F8E4M3), F8E4M3), 1.25);
    }

    #[test]
    fn elements_of_a_word_are_found_again() {
        for (elem, lanes) in [
            (Elem::I8, vec![0xFFFF_FF80, 3, 0xFFFF_FFFF, 127]),
            (Elem::Bf16, vec![0x3F80_0000, 0xC0A0_0000]),
            (Elem::I16, vec![0xFFFF_8000, 0x7FFF]),
            (Elem::I4, vec![0xFFFF_FFF8, 7, 0, 1, 2, 3, 4, 5]),
        ] {
            let word = lanes.iter().enumerate().fold(0, |word, (sub, lane)| encode(elem, word, sub, *lane));
            let found: Vec<_> = (0..lanes.len()).map(|sub| decode(elem, word, sub)).collect();
            assert_eq!(found, lanes);
        }
    }
}
