//! AVX-512 and AVX2.

use std::arch::x86_64::*;

use super::{Microkernel, Panel};
use crate::level::unknown;

/// # Safety
/// That of [`Panel::run`].
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")]
unsafe fn run_avx512<K: Microkernel, const R: usize, const G: usize, const S: usize>(panel: &Panel) {
    // SAFETY: as the caller says.
    unsafe { panel.run::<K, R, G, S>() };
}

/// # Safety
/// That of [`Panel::run`].
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
unsafe fn run_avx512_bf16<K: Microkernel, const R: usize, const G: usize, const S: usize>(panel: &Panel) {
    // SAFETY: as the caller says.
    unsafe { panel.run::<K, R, G, S>() };
}

/// # Safety
/// That of [`Panel::run`].
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn run_avx2<K: Microkernel, const R: usize, const G: usize, const S: usize>(panel: &Panel) {
    // SAFETY: as the caller says.
    unsafe { panel.run::<K, R, G, S>() };
}

macro_rules! avx512 {
    ($name:ident, $run:ident, $weights:ty, $bf16:literal, $columns:literal, $bytes:literal, |$w:ident| $load:expr, |$sums:ident, $loaded:ident, $x:ident| $add:expr) => {
        pub struct $name;

        impl Microkernel for $name {
            type Sums = __m512;
            type Weights = $weights;
            const BF16: bool = $bf16;
            const STEP_COLUMNS: usize = $columns;
            const STEP_BYTES: usize = $bytes;
            const ROWS: usize = 12;
            const GROUPS: usize = 2;
            // On servers of many cores, memory is far away: a core by itself asks for too little at once.
            const PREFETCHED: usize = 1;
            const AHEAD_BYTES: usize = 4096;

            #[inline(always)]
            unsafe fn zero() -> __m512 {
                // SAFETY: the level has the instruction.
                unsafe { _mm512_setzero_ps() }
            }

            #[inline(always)]
            fn prefetch(w: *const u8) {
                // SAFETY: a hint, for any address.
                unsafe { _mm_prefetch::<_MM_HINT_T1>(w.cast()) };
            }

            #[inline(always)]
            unsafe fn load($w: *const u8) -> $weights {
                // SAFETY: as above, and the caller says what is at `w`.
                unsafe { $load }
            }

            #[inline(always)]
            unsafe fn add($sums: __m512, $loaded: $weights, $x: *const u8) -> __m512 {
                // SAFETY: as above, and the caller says what is at `x`.
                unsafe { $add }
            }

            #[inline(always)]
            unsafe fn join(one: __m512, other: __m512) -> __m512 {
                // SAFETY: as above.
                unsafe { _mm512_add_ps(one, other) }
            }

            #[inline(always)]
            unsafe fn store(sums: __m512, out: *mut f32) {
                // SAFETY: as above, and the caller says that there is room.
                unsafe { _mm512_storeu_ps(out, sums) };
            }

            #[inline(always)]
            unsafe fn run<const R: usize, const G: usize, const S: usize>(panel: &Panel) {
                // SAFETY: as the caller says.
                unsafe { $run::<Self, R, G, S>(panel) };
            }
        }
    };
}

avx512!(Avx512F32, run_avx512, __m512, false, 1, 64, |w| _mm512_loadu_ps(w.cast()), |sums, w, x| _mm512_fmadd_ps(
    w,
    _mm512_set1_ps(x.cast::<f32>().read()),
    sums
));
avx512!(
    Avx512F16,
    run_avx512,
    __m512,
    false,
    1,
    32,
    |w| _mm512_cvtph_ps(_mm256_loadu_si256(w.cast())),
    |sums, w, x| _mm512_fmadd_ps(w, _mm512_set1_ps(x.cast::<f32>().read()), sums)
);
avx512!(
    Avx512Bf16,
    run_avx512,
    [__m512; 2],
    false,
    2,
    64,
    |w| {
        let pairs = _mm512_loadu_si512(w.cast());
        let second = _mm512_and_si512(pairs, _mm512_set1_epi32(0xffff_0000_u32 as i32));
        [_mm512_castsi512_ps(_mm512_slli_epi32::<16>(pairs)), _mm512_castsi512_ps(second)]
    },
    |sums, w, x| {
        let sums = _mm512_fmadd_ps(w[0], _mm512_set1_ps(x.cast::<f32>().read()), sums);
        _mm512_fmadd_ps(w[1], _mm512_set1_ps(x.cast::<f32>().add(1).read()), sums)
    }
);
avx512!(Avx512Bf16Dots, run_avx512_bf16, __m512i, true, 2, 64, |w| _mm512_loadu_si512(w.cast()), |sums, w, x| {
    let pair = _mm512_set1_epi32(x.cast::<i32>().read_unaligned());
    _mm512_dpbf16_ps(sums, std::mem::transmute::<__m512i, __m512bh>(w), std::mem::transmute::<__m512i, __m512bh>(pair))
});

pub(super) type Halves = [__m256; 2];

/// # Safety
/// The machine has AVX2 and FMA.
#[inline(always)]
unsafe fn multiply_add(sums: Halves, weights: Halves, x: f32) -> Halves {
    // SAFETY: as the caller says.
    unsafe {
        let x = _mm256_set1_ps(x);
        [_mm256_fmadd_ps(weights[0], x, sums[0]), _mm256_fmadd_ps(weights[1], x, sums[1])]
    }
}

macro_rules! avx2 {
    ($name:ident, $weights:ty, $columns:literal, $bytes:literal, |$w:ident| $load:expr, |$sums:ident, $loaded:ident, $x:ident| $add:expr $(, $step:item)?) => {
        pub struct $name;

        impl Microkernel for $name {
            type Sums = Halves;
            type Weights = $weights;
            const BF16: bool = false;
            const STEP_COLUMNS: usize = $columns;
            const STEP_BYTES: usize = $bytes;
            const ROWS: usize = 6;
            const GROUPS: usize = 1;

            #[inline(always)]
            unsafe fn zero() -> Halves {
                // SAFETY: the level has the instruction.
                unsafe { [_mm256_setzero_ps(); 2] }
            }

            #[inline(always)]
            fn prefetch(w: *const u8) {
                // SAFETY: a hint, for any address.
                unsafe { _mm_prefetch::<_MM_HINT_T1>(w.cast()) };
            }

            #[inline(always)]
            unsafe fn load($w: *const u8) -> $weights {
                // SAFETY: as above, and the caller says what is at `w`.
                unsafe { $load }
            }

            #[inline(always)]
            unsafe fn add($sums: Halves, $loaded: $weights, $x: *const u8) -> Halves {
                // SAFETY: as above, and the caller says what is at `x`.
                unsafe { $add }
            }

            $($step)?

            #[inline(always)]
            unsafe fn join(one: Halves, other: Halves) -> Halves {
                // SAFETY: as above.
                unsafe { [_mm256_add_ps(one[0], other[0]), _mm256_add_ps(one[1], other[1])] }
            }

            #[inline(always)]
            unsafe fn store(sums: Halves, out: *mut f32) {
                // SAFETY: as above, and the caller says that there is room.
                unsafe {
                    _mm256_storeu_ps(out, sums[0]);
                    _mm256_storeu_ps(out.add(8), sums[1]);
                }
            }

            #[inline(always)]
            unsafe fn run<const R: usize, const G: usize, const S: usize>(panel: &Panel) {
                // Sums for few rows: as many as there are registers for.
                // SAFETY: as the caller says.
                unsafe {
                    match R {
                        1 => run_avx2::<Self, R, G, 4>(panel),
                        2 | 3 => run_avx2::<Self, R, G, 2>(panel),
                        _ => run_avx2::<Self, R, G, 1>(panel),
                    }
                };
            }
        }
    };
}

avx2!(Avx2F32, Halves, 1, 64, |w| [_mm256_loadu_ps(w.cast()), _mm256_loadu_ps(w.add(32).cast())], |sums, w, x| {
    multiply_add(sums, w, x.cast::<f32>().read())
});
avx2!(
    Avx2F16,
    Halves,
    1,
    32,
    |w| [_mm256_cvtph_ps(_mm_loadu_si128(w.cast())), _mm256_cvtph_ps(_mm_loadu_si128(w.add(16).cast()))],
    |sums, w, x| multiply_add(sums, w, x.cast::<f32>().read())
);
avx2!(
    Avx2Bf16,
    [__m256i; 2],
    2,
    64,
    |w| [_mm256_loadu_si256(w.cast()), _mm256_loadu_si256(w.add(32).cast())],
    |sums, w, x| {
        let [x0, x1] = x.cast::<[f32; 2]>().read();
        multiply_add(multiply_add(sums, first(w), x0), second(w), x1)
    },
    /// The first column for all rows, then the second, whose weights are loaded again: sums of six rows leave no room for
    /// both.
    #[inline(always)]
    unsafe fn step<const R: usize, const G: usize>(
        sums: &mut [[Halves; G]; R],
        x: *const u8,
        x_stride: usize,
        w: *const u8,
        w_stride: usize,
    ) {
        // SAFETY: as the caller says.
        unsafe {
            for column in 0..2 {
                let w = unknown(w);
                for group in 0..G {
                    let pairs = Self::load(w.add(group * w_stride));
                    let weights = if column == 0 { first(pairs) } else { second(pairs) };
                    for (row, sums) in sums.iter_mut().enumerate() {
                        let x = x.add(row * x_stride).cast::<f32>().add(column).read();
                        sums[group] = multiply_add(sums[group], weights, x);
                    }
                }
            }
        }
    }
);

/// The first of each pair: the lower half of a word.
///
/// # Safety
/// The machine has AVX2.
#[inline(always)]
pub(super) unsafe fn first([low, high]: [__m256i; 2]) -> Halves {
    // SAFETY: as the caller says.
    unsafe { [_mm256_castsi256_ps(_mm256_slli_epi32::<16>(low)), _mm256_castsi256_ps(_mm256_slli_epi32::<16>(high))] }
}

/// # Safety
/// As above.
#[inline(always)]
pub(super) unsafe fn second([low, high]: [__m256i; 2]) -> Halves {
    // SAFETY: as the caller says.
    unsafe {
        let mask = _mm256_set1_epi32(0xffff_0000_u32 as i32);
        [_mm256_castsi256_ps(_mm256_and_si256(low, mask)), _mm256_castsi256_ps(_mm256_and_si256(high, mask))]
    }
}
