//! Conversions of single rows. The loops are plain; compiled for a level's instructions they become vector code.

use half::bf16;

use super::{Element, Norm};
use crate::{Level, packed::BLOCK};

/// Compiles a function's plain body again for the instructions of each level, and calls the one that fits.
macro_rules! for_each_level {
    ($(#[$doc:meta])* $vis:vis fn $name:ident($($argument:ident: $type:ty),* $(,)?) $(-> $result:ty)? = $plain:path;) => {
        $(#[$doc])*
        $vis fn $name(level: Level, $($argument: $type),*) $(-> $result)? {
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
                fn avx512($($argument: $type),*) $(-> $result)? {
                    $plain($($argument),*)
                }
                #[target_feature(enable = "avx2,fma")]
                fn avx2($($argument: $type),*) $(-> $result)? {
                    $plain($($argument),*)
                }
                match level {
                    // SAFETY: the level is one that this machine has.
                    Level::Avx512 => return unsafe { avx512($($argument),*) },
                    // SAFETY: as above.
                    Level::Avx2 => return unsafe { avx2($($argument),*) },
                    _ => {}
                }
            }
            let _ = level;
            $plain($($argument),*)
        }
    };
}

for_each_level! {
    /// Quantizes a row: see [`super::Int8Rows`].
    pub(super) fn quantize(values: &[f32], q: &mut [i8], scales: &mut [f32], sums: &mut [f32]) = quantize_plain;
}

for_each_level! {
    /// Applies a norm to a row.
    pub(super) fn normalize(values: &mut [f32], norm: Norm<'_>) = normalize_plain;
}

for_each_level! {
    fn widen(values: &[bf16], out: &mut [f32]) = widen_plain;
}

for_each_level! {
    fn narrow(values: &[f32], out: &mut [bf16]) = narrow_plain;
}

#[inline(always)]
fn quantize_plain(values: &[f32], q: &mut [i8], scales: &mut [f32], sums: &mut [f32]) {
    const LARGEST: f32 = 127.0;
    let blocks = values.as_chunks::<BLOCK>().0.iter().zip(q.as_chunks_mut::<BLOCK>().0);
    for ((values, q), (scale, sums)) in blocks.zip(scales.iter_mut().zip(sums.as_chunks_mut::<2>().0)) {
        let mut largest = [0f32; 16];
        for (i, value) in values.iter().enumerate() {
            let (size, most) = (value.abs(), &mut largest[i % 16]);
            // A NaN stays, and spoils the scale.
            *most = if size > *most || size.is_nan() { size } else { *most };
        }
        let larger = |most: f32, size: &f32| if *size > most || size.is_nan() { *size } else { most };
        let largest = largest.iter().fold(0f32, larger);
        *scale = largest / LARGEST;
        let inverse = if largest > 0.0 && largest.is_finite() { LARGEST / largest } else { 0.0 };
        let mut halves = [0i32; 2];
        for (half, (values, q)) in values.as_chunks::<16>().0.iter().zip(q.as_chunks_mut::<16>().0).enumerate() {
            for (value, q) in values.iter().zip(q) {
                let scaled = if inverse == 0.0 { 0.0 } else { (value * inverse).round_ties_even() };
                // SAFETY: finite and at most 127 in size, as the scale was made of the largest.
                let rounded = unsafe { scaled.to_int_unchecked::<i32>() };
                halves[half] += rounded;
                *q = rounded as i8;
            }
        }
        *sums = halves.map(|half| half as f32 * *scale);
    }
}

#[inline(always)]
fn normalize_plain(values: &mut [f32], norm: Norm<'_>) {
    let mut squares = [0f32; 32];
    let (chunks, rest) = values.as_chunks::<32>();
    for chunk in chunks {
        for (sum, value) in squares.iter_mut().zip(chunk) {
            *sum += value * value;
        }
    }
    let total: f32 = squares.iter().sum::<f32>() + rest.iter().map(|value| value * value).sum::<f32>();
    let factor = 1.0 / (total / values.len() as f32 + norm.epsilon).sqrt();
    for (value, weight) in values.iter_mut().zip(norm.weight) {
        *value = *value * factor * weight;
    }
}

#[inline(always)]
fn widen_plain(values: &[bf16], out: &mut [f32]) {
    for (out, value) in out.iter_mut().zip(values) {
        *out = f32::from_bits(u32::from(value.to_bits()) << 16);
    }
}

/// Rounds to the nearest, ties to even; a NaN stays one.
#[inline(always)]
fn narrow_plain(values: &[f32], out: &mut [bf16]) {
    for (out, value) in out.iter_mut().zip(values) {
        let bits = value.to_bits();
        let rounded = (bits.wrapping_add(0x7FFF + ((bits >> 16) & 1))) >> 16;
        let bits = if bits & 0x7FFF_FFFF > 0x7F80_0000 { (bits >> 16) | 0x40 } else { rounded };
        *out = bf16::from_bits(bits as u16);
    }
}

/// The values of a row as f32.
pub(crate) fn load<X: Element>(x: &[X], values: &mut [f32]) {
    if let Some(x) = X::as_f32(x) {
        values.copy_from_slice(x);
    } else if let Some(x) = X::as_bf16(x) {
        widen(crate::level(), x, values);
    }
}

/// Rounds a row to its element type.
pub(crate) fn store<Y: Element>(values: &[f32], y: &mut [Y]) {
    if let Some(y) = Y::as_f32_mut(y) {
        return y.copy_from_slice(values);
    }
    if let Some(y) = Y::as_bf16_mut(y) {
        narrow(crate::level(), values, y);
    }
}

#[cfg(test)]
mod tests {
    use half::slice::HalfFloatSliceExt;

    use super::*;

    #[test]
    fn rounding_equals_that_of_the_half_crate() {
        let mut values: Vec<f32> = (0..5000).map(|i| f32::from_bits(i * 0x000D_1234)).collect();
        values.extend([f32::NAN, f32::INFINITY, -0.0, 1.0039062, 3.3961775e38]);
        for level in Level::available() {
            let (mut found, mut expected) = (vec![bf16::ZERO; values.len()], vec![bf16::ZERO; values.len()]);
            narrow(level, &values, &mut found);
            expected.convert_from_f32_slice(&values);
            let same = |(a, b): (&bf16, &bf16)| a.to_bits() == b.to_bits() || (a.is_nan() && b.is_nan());
            assert!(found.iter().zip(&expected).all(same), "{level}");
            let mut back = vec![0.0; values.len()];
            widen(level, &found, &mut back);
            assert!(back.iter().zip(&found).all(|(a, b)| *a == b.to_f32() || a.is_nan()));
        }
    }

    #[test]
    fn blocks_are_quantized_within_half_a_step() {
        let values: Vec<f32> = (0..96).map(|i| ((i * 37) % 101) as f32 - 50.0).map(|x| if x > 40.0 { 0.0 } else { x }).collect();
        for level in Level::available() {
            let (mut q, mut scales, mut sums) = (vec![0i8; 96], vec![0f32; 3], vec![0f32; 6]);
            quantize(level, &values, &mut q, &mut scales, &mut sums);
            for (i, value) in values.iter().enumerate() {
                assert!((f32::from(q[i]) * scales[i / 32] - value).abs() <= scales[i / 32] * 0.5001, "{level} {i}");
            }
            for half in 0..6 {
                let sum: i32 = q[half * 16..][..16].iter().map(|q| i32::from(*q)).sum();
                assert_eq!(sums[half], sum as f32 * scales[half / 2]);
            }
        }
    }

    #[test]
    fn zeros_and_numbers_that_are_none_are_quantized_too() {
        let (mut q, mut scales, mut sums) = ([1i8; 32], [1f32], [1f32; 2]);
        quantize(Level::Portable, &[0.0; 32], &mut q, &mut scales, &mut sums);
        assert_eq!((q, scales, sums), ([0; 32], [0.0], [0.0; 2]));
        let mut values = [1.0; 32];
        values[5] = f32::NAN;
        for level in Level::available() {
            quantize(level, &values, &mut q, &mut scales, &mut sums);
            assert!(scales[0].is_nan() && sums[0].is_nan(), "{level}");
        }
    }
}
