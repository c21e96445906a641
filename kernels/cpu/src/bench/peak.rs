//! How fast all threads together multiply and add when they do nothing else.

use std::{hint::black_box, time::Instant};

use torus_abi::kernel::{parallel_for, threads};

use super::{Level, level};
use crate::packed::Format;

/// Which products.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arithmetic {
    F32,
    /// Pairs of bf16, added in f32.
    Bf16,
    /// Fours of bytes, added in i32.
    Int8,
}

impl Arithmetic {
    /// What products with weights of a format are made of.
    pub fn of(format: Format) -> Self {
        match format {
            Format::F32 | Format::F16 => Self::F32,
            Format::Bf16 => Self::Bf16,
            _ => Self::Int8,
        }
    }
}

/// Operations a second (a product and a sum are two) of all threads; `None` where no instruction for it is used.
pub fn peak(arithmetic: Arithmetic) -> Option<f64> {
    #[cfg(target_arch = "x86_64")]
    if level() == Level::Avx512 {
        const ROUNDS: usize = 50_000;
        let start = Instant::now();
        parallel_for(threads(), |_| {
            // SAFETY: the level is one that this machine has.
            unsafe {
                match arithmetic {
                    Arithmetic::F32 => _ = black_box(multiply_f32(ROUNDS)),
                    Arithmetic::Bf16 => _ = black_box(multiply_bf16(ROUNDS)),
                    Arithmetic::Int8 => _ = black_box(multiply_int8(ROUNDS)),
                }
            }
        });
        let each = match arithmetic {
            Arithmetic::F32 => 2,
            Arithmetic::Bf16 => 4,
            Arithmetic::Int8 => 8,
        };
        return Some((threads() * ROUNDS * CHAINS * 16 * each) as f64 / start.elapsed().as_secs_f64());
    }
    let _ = arithmetic;
    None
}

/// Independent sums: enough to hide latency.
#[cfg(target_arch = "x86_64")]
const CHAINS: usize = 16;

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
fn multiply_f32(rounds: usize) -> f32 {
    use std::arch::x86_64::*;
    let (mut sums, one) = ([_mm512_setzero_ps(); CHAINS], _mm512_set1_ps(black_box(0.5)));
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
