//! The products of attention with AVX-512, over the groups of pages.
//!
//! A register holds 16 tokens' keys or 16 dimensions of values; each row has accumulators of its own, and an element (a
//! pair) of queries or weights is broadcast from memory. Two registers at a time share a broadcast.
//!
//! Products with keys fetch the next block's keys, those with values its values, a line for each that is read: a few rows wait
//! for memory, and by the time that the other half of a block takes (as with AVX2), it has not come.

use std::arch::x86_64::*;

use half::bf16;

use super::{
    STRIP_ROWS,
    pages::{Compute, GROUP},
    tile::{BLOCK_TOKENS, Next},
};

/// Bytes of a register.
const REGISTER: usize = 64;

/// How elements of queries or weights are multiplied with those of keys or values. A *step* is one register of these.
trait Kind {
    /// Elements of queries and weights.
    type X;
    /// How many of a row are in a step.
    const ELEMENTS: usize;
    type W: Copy;

    /// # Safety
    /// A register is at `w`, and the kind's instructions are there.
    unsafe fn load(w: *const u8) -> Self::W;
    /// # Safety
    /// As above, and a step's elements are at `x`.
    unsafe fn add(sums: __m512, w: Self::W, x: *const Self::X) -> __m512;
    /// [`score`] where the kind's instructions are enabled.
    ///
    /// # Safety
    /// That of [`score`].
    unsafe fn score<const M: usize, const N: usize, const S: usize>(
        q: *const Self::X,
        head_dim: usize,
        keys: [*const u8; N],
        next: [*const u8; N],
        out: *mut f32,
    );
    /// [`weigh`] where the kind's instructions are enabled.
    ///
    /// # Safety
    /// That of [`weigh`].
    unsafe fn weigh<const M: usize, const N: usize, const S: usize>(
        values: &Values<'_>,
        weights: *const Self::X,
        sums: *mut f32,
    );
}

macro_rules! kind {
    (
        $(#[$doc:meta])* $name:ident, $features:literal, $x:ty, $elements:literal, $w:ty,
        |$at:ident| $load:expr, |$sums:ident, $loaded:ident, $value:ident| $add:expr
    ) => {
        $(#[$doc])*
        struct $name;

        impl Kind for $name {
            type X = $x;
            type W = $w;
            const ELEMENTS: usize = $elements;

            #[inline(always)]
            unsafe fn load($at: *const u8) -> $w {
                // SAFETY: the caller's promise.
                unsafe { $load }
            }

            #[inline(always)]
            unsafe fn add($sums: __m512, $loaded: $w, $value: *const $x) -> __m512 {
                // SAFETY: the caller's promise.
                unsafe { $add }
            }

            #[target_feature(enable = $features)]
            unsafe fn score<const M: usize, const N: usize, const S: usize>(
                q: *const $x,
                head_dim: usize,
                keys: [*const u8; N],
                next: [*const u8; N],
                out: *mut f32,
            ) {
                // SAFETY: the caller's promise.
                unsafe { score::<Self, M, N, S>(q, head_dim, keys, next, out) };
            }

            #[target_feature(enable = $features)]
            unsafe fn weigh<const M: usize, const N: usize, const S: usize>(
                values: &Values<'_>,
                weights: *const $x,
                sums: *mut f32,
            ) {
                // SAFETY: the caller's promise.
                unsafe { weigh::<Self, M, N, S>(values, weights, sums) };
            }
        }
    };
}

kind!(
    /// All in f32.
    Plain,
    "avx512f,avx512bw,avx512dq,avx512vl",
    f32,
    1,
    __m512,
    |w| _mm512_loadu_ps(w.cast()),
    |sums, w, x| _mm512_fmadd_ps(w, _mm512_set1_ps(*x), sums)
);
kind!(
    /// Pairs of bf16, widened on the way, with f32.
    Widened,
    "avx512f,avx512bw,avx512dq,avx512vl",
    f32,
    2,
    [__m512; 2],
    |w| {
        let pairs = _mm512_loadu_si512(w.cast());
        let second = _mm512_and_si512(pairs, _mm512_set1_epi32(0xffff_0000_u32 as i32));
        [_mm512_castsi512_ps(_mm512_slli_epi32::<16>(pairs)), _mm512_castsi512_ps(second)]
    },
    |sums, w, x| {
        let sums = _mm512_fmadd_ps(w[0], _mm512_set1_ps(*x), sums);
        _mm512_fmadd_ps(w[1], _mm512_set1_ps(*x.add(1)), sums)
    }
);
kind!(
    /// Pairs of bf16 with pairs of bf16.
    Dots,
    "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16",
    bf16,
    2,
    __m512i,
    |w| _mm512_loadu_si512(w.cast()),
    |sums, w, x| {
        let x = _mm512_set1_epi32(x.cast::<i32>().read_unaligned());
        _mm512_dpbf16_ps(sums, std::mem::transmute::<__m512i, __m512bh>(w), std::mem::transmute::<__m512i, __m512bh>(x))
    }
);

/// Calls a function whose constants are a number of rows and of registers at a time, and how many sums of an element hide the
/// latency together.
macro_rules! for_rows {
    ($rows:expr, $sides:literal, $kind:ident::$function:ident $arguments:tt) => {
        match $rows {
            1 => $kind::$function::<1, $sides, 4> $arguments,
            2 => $kind::$function::<2, $sides, 2> $arguments,
            3 => $kind::$function::<3, $sides, 2> $arguments,
            4 => $kind::$function::<4, $sides, 1> $arguments,
            5 => $kind::$function::<5, $sides, 1> $arguments,
            6 => $kind::$function::<6, $sides, 1> $arguments,
            7 => $kind::$function::<7, $sides, 1> $arguments,
            8 => $kind::$function::<8, $sides, 1> $arguments,
            9 => $kind::$function::<9, $sides, 1> $arguments,
            10 => $kind::$function::<10, $sides, 1> $arguments,
            11 => $kind::$function::<11, $sides, 1> $arguments,
            _ => $kind::$function::<12, $sides, 1> $arguments,
        }
    };
}

pub(super) fn scores<X: Compute, C: Compute>(
    q: &[X],
    rows: usize,
    head_dim: usize,
    groups: &[&[C]],
    next: &Next,
    out: &mut [f32],
) {
    match (X::PAIRS, C::PAIRS) {
        (true, true) => scores_of::<Dots, X, C>(q, rows, head_dim, groups, next, out),
        (false, true) => scores_of::<Widened, X, C>(q, rows, head_dim, groups, next, out),
        (false, false) => scores_of::<Plain, X, C>(q, rows, head_dim, groups, next, out),
        (true, false) => unreachable!("pairs of queries with single keys"),
    }
}

pub(super) fn weighted<X: Compute, C: Compute>(
    weights: &[X],
    rows: usize,
    head_dim: usize,
    groups: &[&[C]],
    next: &Next,
    sums: &mut [f32],
) {
    match (X::PAIRS, C::PAIRS) {
        (true, true) => weighted_of::<Dots, X, C>(weights, rows, head_dim, groups, next, sums),
        (false, true) => weighted_of::<Widened, X, C>(weights, rows, head_dim, groups, next, sums),
        (false, false) => weighted_of::<Plain, X, C>(weights, rows, head_dim, groups, next, sums),
        (true, false) => unreachable!("pairs of weights with single values"),
    }
}

/// For a kind whose elements those of `q` are.
fn scores_of<K: Kind, X: Compute, C: Compute>(
    q: &[X],
    rows: usize,
    head_dim: usize,
    groups: &[&[C]],
    next: &Next,
    out: &mut [f32],
) {
    assert!((1..=STRIP_ROWS).contains(&rows) && q.len() >= rows * head_dim && out.len() >= rows * BLOCK_TOKENS);
    assert!(groups.len() * GROUP <= BLOCK_TOKENS && groups.iter().all(|group| group.len() == 2 * GROUP * head_dim));
    assert!(head_dim.is_multiple_of(16) && size_of::<K::X>() == size_of::<X>());
    for (index, (both, next)) in groups.chunks(2).zip(next.chunks(2)).enumerate() {
        let (q, out) = (q.as_ptr().cast(), out[index * 2 * GROUP..].as_mut_ptr());
        let first = both[0].as_ptr().cast();
        // SAFETY: this level has the instructions; `q` has `rows` rows of `head_dim`, `out` as many of `BLOCK_TOKENS`, and
        // each group begins with its keys (asserted above).
        unsafe {
            match both.get(1).map(|second| second.as_ptr().cast()) {
                Some(second) => for_rows!(rows, 2, K::score(q, head_dim, [first, second], [next[0], next[1]], out)),
                None => for_rows!(rows, 1, K::score(q, head_dim, [first], [next[0]], out)),
            }
        }
    }
}

/// For a kind whose elements those of `weights` are.
fn weighted_of<K: Kind, X: Compute, C: Compute>(
    weights: &[X],
    rows: usize,
    head_dim: usize,
    groups: &[&[C]],
    next: &Next,
    sums: &mut [f32],
) {
    assert!((1..=STRIP_ROWS).contains(&rows) && weights.len() >= rows * BLOCK_TOKENS && sums.len() >= rows * head_dim);
    assert!(groups.len() * GROUP <= BLOCK_TOKENS && groups.iter().all(|group| group.len() == 2 * GROUP * head_dim));
    assert!(head_dim.is_multiple_of(16) && size_of::<K::X>() == size_of::<X>());
    let mut of_groups = [std::ptr::null(); BLOCK_TOKENS / GROUP];
    for (values, group) in of_groups.iter_mut().zip(groups) {
        *values = group[GROUP * head_dim..].as_ptr().cast::<u8>();
    }
    let weights = weights.as_ptr().cast();
    for block in (0..head_dim / 16).step_by(2) {
        let values = Values { of_groups: &of_groups[..groups.len()], next, head_dim, block };
        // SAFETY: this level has the instructions; the rows are as long as the loops go, each group ends with its values,
        // and there are one or two blocks of 16 dimensions more (asserted above).
        unsafe {
            let sums = sums.as_mut_ptr().add(block * 16);
            match block + 1 < head_dim / 16 {
                true => for_rows!(rows, 2, K::weigh(&values, weights, sums)),
                false => for_rows!(rows, 1, K::weigh(&values, weights, sums)),
            }
        }
    }
}

/// The values of some dimensions, over all groups.
struct Values<'a> {
    of_groups: &'a [*const u8],
    /// What comes next of each group.
    next: &'a Next,
    head_dim: usize,
    /// The first 16 of the dimensions, as one of so many.
    block: usize,
}

/// # Safety
/// `q` points to `M` rows of `head_dim` elements, each of `keys` to a group, `out` to `M` rows of `N` times 16 that are
/// [`BLOCK_TOKENS`] apart; the kind's instructions are there.
#[inline(always)]
unsafe fn score<K: Kind, const M: usize, const N: usize, const S: usize>(
    q: *const K::X,
    head_dim: usize,
    keys: [*const u8; N],
    next: [*const u8; N],
    out: *mut f32,
) {
    // SAFETY: the caller's promise.
    unsafe {
        let mut sums = [[[_mm512_setzero_ps(); N]; M]; S];
        add_products::<K, M, N, S>(&mut sums, q, head_dim, keys, next, head_dim / K::ELEMENTS);
        store(&sums, out, BLOCK_TOKENS);
    }
}

/// # Safety
/// `weights` points to `M` rows of [`BLOCK_TOKENS`] elements, `sums` to `M` rows that are `head_dim` apart, from the first of `N`
/// times 16 dimensions on; the kind's instructions are there.
#[inline(always)]
unsafe fn weigh<K: Kind, const M: usize, const N: usize, const S: usize>(
    values: &Values<'_>,
    weights: *const K::X,
    sums: *mut f32,
) {
    // SAFETY: the caller's promise.
    unsafe {
        let mut held = [[[_mm512_setzero_ps(); N]; M]; S];
        for (row, held) in held[0].iter_mut().enumerate() {
            for (side, held) in held.iter_mut().enumerate() {
                *held = _mm512_loadu_ps(sums.add(row * values.head_dim + side * 16));
            }
        }
        let steps = GROUP / K::ELEMENTS;
        let at = values.block * steps * REGISTER;
        for (group, (own, next)) in values.of_groups.iter().zip(values.next).enumerate() {
            // After its keys, which are as many.
            let next = next.wrapping_add(values.head_dim / K::ELEMENTS * REGISTER);
            let (mut w, mut ahead) = ([own.add(at); N], [next.wrapping_add(at); N]);
            for side in 1..N {
                w[side] = w[side].add(side * steps * REGISTER);
                ahead[side] = ahead[side].wrapping_add(side * steps * REGISTER);
            }
            let x = weights.add(group * GROUP);
            add_products::<K, M, N, S>(&mut held, x, BLOCK_TOKENS, w, ahead, steps);
        }
        store(&held, sums, values.head_dim);
    }
}

/// `sums[row][side][lane] += sum over i of x[row][i] * w[side][i][lane]`, for 16 lanes and a number of steps that is a multiple
/// of 4. As much as is read of each side is fetched from `ahead`.
///
/// # Safety
/// `x` points to `M` rows, `stride` apart, each of `w` to a register for each step, and the kind's instructions are there.
#[inline(always)]
unsafe fn add_products<K: Kind, const M: usize, const N: usize, const S: usize>(
    sums: &mut [[[__m512; N]; M]; S],
    x: *const K::X,
    stride: usize,
    w: [*const u8; N],
    ahead: [*const u8; N],
    steps: usize,
) {
    const UNROLLED: usize = 4;
    for first in (0..steps).step_by(UNROLLED) {
        for unrolled in 0..UNROLLED {
            let step = first + unrolled;
            // SAFETY: the caller's promise.
            unsafe {
                let mut registers = [K::load(w[0].add(step * REGISTER)); N];
                for side in 0..N {
                    _mm_prefetch::<_MM_HINT_T0>(ahead[side].wrapping_add(step * REGISTER).cast());
                    registers[side] = K::load(w[side].add(step * REGISTER));
                }
                for (row, sums) in sums[unrolled % S].iter_mut().enumerate() {
                    let x = x.add(row * stride + step * K::ELEMENTS);
                    for (sum, register) in sums.iter_mut().zip(registers) {
                        *sum = K::add(*sum, register, x);
                    }
                }
            }
        }
    }
}

/// Adds up the sums of each element, and writes them.
///
/// # Safety
/// `out` points to `M` rows of `N` times 16, `stride` apart, and the level is available.
#[inline(always)]
unsafe fn store<const M: usize, const N: usize, const S: usize>(
    sums: &[[[__m512; N]; M]; S],
    out: *mut f32,
    stride: usize,
) {
    for row in 0..M {
        for side in 0..N {
            // SAFETY: the caller's promise.
            unsafe {
                let mut total = sums[0][row][side];
                for others in &sums[1..] {
                    total = _mm512_add_ps(total, others[row][side]);
                }
                _mm512_storeu_ps(out.add(row * stride + side * 16), total);
            }
        }
    }
}
