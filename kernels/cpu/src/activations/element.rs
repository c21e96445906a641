//! What activations are made of in memory, and conversions that the compiler vectorizes for each level.

use half::bf16;

use crate::{level::Level, workspace::Plain};

mod sealed {
    pub trait Sealed {}
    impl Sealed for f32 {}
    impl Sealed for half::bf16 {}
}

/// An element of inputs and outputs: f32, or bf16 (rounded to nearest even). Levels given to it are those of
/// [`level`](crate::level()) or [`Level::available`].
pub trait Element: Plain + sealed::Sealed {
    /// Converts to f32. Both slices have the same length.
    fn load(level: Level, from: &[Self], to: &mut [f32]);

    /// Converts from f32. Both slices have the same length.
    fn store(level: Level, from: &[f32], to: &mut [Self]);

    /// Adds to f32. Both slices have the same length.
    fn add(level: Level, from: &[Self], to: &mut [f32]);

    /// Writes zeros.
    fn clear(to: &mut [Self]);
}

/// Defines a function whose body is compiled once for each level that widens what plain code can use. All of these
/// compute the same values: nothing is contracted or reordered.
macro_rules! for_levels {
    ($(#[$doc:meta])* $visibility:vis fn $name:ident($($argument:ident: $type:ty),*) $body:block) => {
        $(#[$doc])*
        $visibility fn $name(level: Level, $($argument: $type),*) {
            #[inline(always)]
            fn plain($($argument: $type),*) $body
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma,f16c")]
            fn avx2($($argument: $type),*) {
                plain($($argument),*);
            }
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")]
            fn avx512($($argument: $type),*) {
                plain($($argument),*);
            }
            debug_assert!(level.is_available());
            match level {
                // SAFETY: the level is one that the machine has.
                #[cfg(target_arch = "x86_64")]
                Level::Avx2 => unsafe { avx2($($argument),*) },
                // SAFETY: as above.
                #[cfg(target_arch = "x86_64")]
                Level::Avx512 | Level::Avx512Bf16 | Level::Amx => unsafe { avx512($($argument),*) },
                _ => plain($($argument),*),
            }
        }
    };
}
pub(crate) use for_levels;

/// Rounds to nearest even, as the conversions of processors do, without a branch.
#[inline(always)]
fn round(value: f32) -> bf16 {
    let bits = value.to_bits();
    let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
    let quiet = bits >> 16 | 0x40;
    bf16::from_bits(if value.is_nan() { quiet } else { rounded } as u16)
}

#[inline(always)]
fn widen(value: bf16) -> f32 {
    f32::from_bits(u32::from(value.to_bits()) << 16)
}

for_levels! {
    fn load_bf16(from: &[bf16], to: &mut [f32]) {
        from.iter().zip(to).for_each(|(from, to)| *to = widen(*from));
    }
}

for_levels! {
    fn store_bf16(from: &[f32], to: &mut [bf16]) {
        from.iter().zip(to).for_each(|(from, to)| *to = round(*from));
    }
}

for_levels! {
    fn add_bf16(from: &[bf16], to: &mut [f32]) {
        from.iter().zip(to).for_each(|(from, to)| *to += widen(*from));
    }
}

for_levels! {
    /// `to += from`
    pub fn add_f32(from: &[f32], to: &mut [f32]) {
        from.iter().zip(to).for_each(|(from, to)| *to += *from);
    }
}

for_levels! {
    /// Scales a row to a root mean square of 1, then by `norm`.
    pub fn rms_norm(row: &mut [f32], norm: &[f32], eps: f32) {
        const LANES: usize = 16;
        let mut sums = [0.0f32; LANES];
        let (chunks, rest) = row.as_chunks::<LANES>();
        for chunk in chunks {
            sums.iter_mut().zip(chunk).for_each(|(sum, value)| *sum += value * value);
        }
        let rest: f32 = rest.iter().map(|value| value * value).sum();
        let mean = (sums.iter().sum::<f32>() + rest) / row.len() as f32;
        let scale = 1.0 / (mean + eps).sqrt();
        row.iter_mut().zip(norm).for_each(|(value, norm)| *value = *value * scale * norm);
    }
}

impl Element for f32 {
    fn load(_level: Level, from: &[Self], to: &mut [f32]) {
        to.copy_from_slice(from);
    }

    fn store(_level: Level, from: &[f32], to: &mut [Self]) {
        to.copy_from_slice(from);
    }

    fn add(level: Level, from: &[Self], to: &mut [f32]) {
        add_f32(level, from, to);
    }

    fn clear(to: &mut [Self]) {
        to.fill(0.0);
    }
}

impl Element for bf16 {
    fn load(level: Level, from: &[Self], to: &mut [f32]) {
        assert_eq!(from.len(), to.len());
        load_bf16(level, from, to);
    }

    fn store(level: Level, from: &[f32], to: &mut [Self]) {
        assert_eq!(from.len(), to.len());
        store_bf16(level, from, to);
    }

    fn add(level: Level, from: &[Self], to: &mut [f32]) {
        assert_eq!(from.len(), to.len());
        add_bf16(level, from, to);
    }

    fn clear(to: &mut [Self]) {
        to.fill(bf16::ZERO);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bf16_is_rounded_as_half_does() {
        let values: Vec<f32> = (0..40_000u32).map(|i| f32::from_bits(i.wrapping_mul(0x9e37_79b1))).collect();
        for level in Level::available() {
            let mut rounded = vec![bf16::ZERO; values.len()];
            bf16::store(level, &values, &mut rounded);
            for (value, rounded) in values.iter().zip(&rounded) {
                assert_eq!(rounded.to_bits(), bf16::from_f32(*value).to_bits(), "{value}");
            }
            let mut back = vec![0.0; values.len()];
            bf16::load(level, &rounded, &mut back);
            assert!(back.iter().zip(&rounded).all(|(back, bits)| back.to_bits() >> 16 == u32::from(bits.to_bits())));
        }
    }

    #[test]
    fn a_normed_row_has_the_mean_square_of_its_weights() {
        let row: Vec<f32> = (0..37).map(|i| (i as f32 - 11.0) / 3.0).collect();
        let norm: Vec<f32> = (0..37).map(|i| 1.0 + i as f32 / 8.0).collect();
        let mean = row.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>() / 37.0;
        for level in Level::available() {
            let mut normed = row.clone();
            rms_norm(level, &mut normed, &norm, 1e-5);
            for ((value, norm), normed) in row.iter().zip(&norm).zip(normed) {
                let expected = f64::from(*value) / (mean + 1e-5).sqrt() * f64::from(*norm);
                assert!((expected - f64::from(normed)).abs() <= 1e-5 * expected.abs(), "{expected} {normed}");
            }
        }
    }
}
