//! How fast all threads together multiply and add when they do nothing else.

use std::{hint::black_box, time::Instant};

use torus_abi::kernel::{parallel_for, threads};

use super::{Level, level};
use crate::{linear::is_widened, packed::Format};

/// Which products.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arithmetic {
    F32,
    /// Pairs of bf16, added in f32: in dot products where these are used, else as f32.
    Bf16,
    /// The same in the matrix unit.
    Tiles,
    /// Fours of bytes, added in i32.
    Int8,
    /// Fours of bytes of which one has six bits, so that AVX2 may add them in i16.
    Int6,
}

impl Arithmetic {
    /// What products of so many rows with weights of a format are made of.
    pub fn of(format: Format, rows: usize) -> Self {
        match format {
            _ if is_widened(level(), format, rows) => Self::Tiles,
            Format::F32 | Format::F16 => Self::F32,
            Format::Bf16 if level() == Level::Amx => Self::Tiles,
            Format::Bf16 => Self::Bf16,
            Format::Q8 => Self::Int8,
            _ => Self::Int6,
        }
    }
}

/// Operations a second (a product and a sum are two) of all threads; `None` where no instruction for it is used.
pub fn peak(arithmetic: Arithmetic) -> Option<f64> {
    #[cfg(target_arch = "x86_64")]
    {
        use Level::{Amx, Avx2, Avx512, Avx512Bf16};
        const ROUNDS: usize = 50_000;
        // What runs, and operations of its instructions for each sum.
        let (run, each): (fn(usize), usize) = match (level(), arithmetic) {
            // SAFETY: here and below, the level is one that this machine has.
            (Amx, Arithmetic::Tiles) => (|rounds| unsafe { amx::multiply_bf16(rounds) }, 16 * 16 * 64),
            (Avx512 | Amx, Arithmetic::F32 | Arithmetic::Bf16) | (Avx512Bf16, Arithmetic::F32) => {
                // SAFETY: as above.
                (|rounds| _ = black_box(unsafe { multiply_f32(rounds) }), 32)
            }
            // SAFETY: as above.
            (Avx512Bf16, Arithmetic::Bf16) => (|rounds| _ = black_box(unsafe { multiply_bf16(rounds) }), 64),
            // SAFETY: as above.
            (Avx512 | Avx512Bf16 | Amx, _) => (|rounds| _ = black_box(unsafe { multiply_int8(rounds) }), 128),
            // SAFETY: as above.
            (Avx2, Arithmetic::Int8) => (|rounds| _ = black_box(unsafe { avx2::multiply_int8(rounds) }), 64),
            // SAFETY: as above.
            (Avx2, Arithmetic::Int6) => (|rounds| _ = black_box(unsafe { avx2::multiply_int6(rounds) }), 64),
            // SAFETY: as above.
            (Avx2, _) => (|rounds| _ = black_box(unsafe { avx2::multiply_f32(rounds) }), 16),
            _ => return None,
        };
        let start = Instant::now();
        parallel_for(threads(), |_| run(ROUNDS));
        Some((threads() * ROUNDS * CHAINS * each) as f64 / start.elapsed().as_secs_f64())
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        let _ = arithmetic;
        None
    }
}

/// Independent sums: enough to hide latency, and as many as stay in registers.
#[cfg(target_arch = "x86_64")]
const CHAINS: usize = 12;

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
fn multiply_f32(rounds: usize) -> f32 {
    use std::arch::x86_64::*;
    let (mut sums, one) = (black_box([_mm512_setzero_ps(); CHAINS]), _mm512_set1_ps(black_box(0.5)));
    for _ in 0..rounds {
        sums.iter_mut().for_each(|sum| *sum = _mm512_fmadd_ps(one, one, *sum));
    }
    sums.iter().map(|sum| _mm512_reduce_add_ps(*sum)).sum()
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bf16")]
fn multiply_bf16(rounds: usize) -> f32 {
    use std::arch::x86_64::*;
    let (mut sums, one) = ([_mm512_setzero_ps(); CHAINS], _mm512_set1_epi32(black_box(0x3f80_3f80)));
    // SAFETY: both are 64 bytes of any value.
    let one = unsafe { std::mem::transmute::<__m512i, __m512bh>(one) };
    for _ in 0..rounds {
        sums.iter_mut().for_each(|sum| *sum = _mm512_dpbf16_ps(*sum, one, one));
    }
    sums.iter().map(|sum| _mm512_reduce_add_ps(*sum)).sum()
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512vnni")]
fn multiply_int8(rounds: usize) -> i32 {
    use std::arch::x86_64::*;
    let (mut sums, one) = ([_mm512_setzero_si512(); CHAINS], _mm512_set1_epi32(black_box(0x0101_0101)));
    for _ in 0..rounds {
        sums.iter_mut().for_each(|sum| *sum = _mm512_dpbusd_epi32(*sum, one, one));
    }
    sums.iter().fold(0, |total, sum| total.wrapping_add(_mm512_reduce_add_epi32(*sum)))
}

/// Products of whole tiles.
#[cfg(target_arch = "x86_64")]
mod amx {
    use super::CHAINS;
    use crate::tiles::{self, ROW_BYTES, ROWS, Shapes};

    fn shapes() -> Shapes {
        (0..8).fold(Shapes::default(), |shapes, register| shapes.with(register, ROWS, ROW_BYTES))
    }

    /// # Safety
    /// The level is available.
    pub unsafe fn multiply_bf16(rounds: usize) {
        // SAFETY: as the caller says; all registers are whole tiles, of zeros.
        unsafe {
            tiles::configured(shapes(), || {
                for _ in 0..rounds * CHAINS / 4 {
                    tiles::add_bf16::<0, 4, 6>();
                    tiles::add_bf16::<1, 4, 7>();
                    tiles::add_bf16::<2, 5, 6>();
                    tiles::add_bf16::<3, 5, 7>();
                }
            });
        }
    }
}

/// The same with half of the width; bytes in two or three instructions.
#[cfg(target_arch = "x86_64")]
mod avx2 {
    use std::{arch::x86_64::*, hint::black_box};

    use super::CHAINS;

    #[target_feature(enable = "avx2,fma")]
    pub fn multiply_f32(rounds: usize) -> [f32; 8] {
        // Not the same number in each, which the compiler would add up once.
        let (mut sums, one) = (black_box([_mm256_setzero_ps(); CHAINS]), _mm256_set1_ps(black_box(0.5)));
        for _ in 0..rounds {
            sums.iter_mut().for_each(|sum| *sum = _mm256_fmadd_ps(one, one, *sum));
        }
        let total = sums.iter().fold(_mm256_setzero_ps(), |total, sum| _mm256_add_ps(total, *sum));
        // SAFETY: both are eight numbers.
        unsafe { std::mem::transmute::<__m256, [f32; 8]>(total) }
    }

    #[target_feature(enable = "avx2")]
    pub fn multiply_int8(rounds: usize) -> [i32; 8] {
        let (mut sums, ones) = ([_mm256_setzero_si256(); CHAINS], _mm256_set1_epi16(black_box(1)));
        for _ in 0..rounds {
            for sum in &mut sums {
                let pairs = _mm256_maddubs_epi16(unknown(ones), ones);
                *sum = _mm256_add_epi32(*sum, _mm256_madd_epi16(pairs, ones));
            }
        }
        total(sums)
    }

    #[target_feature(enable = "avx2")]
    pub fn multiply_int6(rounds: usize) -> [i32; 8] {
        let (mut sums, ones) = ([_mm256_setzero_si256(); CHAINS], _mm256_set1_epi8(black_box(1)));
        for _ in 0..rounds {
            for sum in &mut sums {
                *sum = _mm256_add_epi16(*sum, _mm256_maddubs_epi16(unknown(ones), ones));
            }
        }
        total(sums)
    }

    #[target_feature(enable = "avx2")]
    fn total(sums: [__m256i; CHAINS]) -> [i32; 8] {
        let total = sums.iter().fold(_mm256_setzero_si256(), |total, sum| _mm256_add_epi32(total, *sum));
        // SAFETY: both are eight numbers.
        unsafe { std::mem::transmute::<__m256i, [i32; 8]>(total) }
    }

    /// A register of which the compiler knows nothing: what is computed from the same it would compute once.
    #[target_feature(enable = "avx2")]
    fn unknown(value: __m256i) -> __m256i {
        let mut value = value;
        // SAFETY: nothing is done.
        unsafe { std::arch::asm!("/* {0} */", inout(ymm_reg) value, options(nomem, nostack, preserves_flags)) };
        value
    }
}
