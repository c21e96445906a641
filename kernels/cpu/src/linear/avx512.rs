//! Tiles with AVX-512.
//!
//! A register holds 16 output features; each row has accumulators of its own, and an element (a pair, four) of `x` is
//! broadcast from memory. Few rows have several accumulators each, because the latency of a multiply-add is several
//! times its throughput. Many rows take two groups at a time, so that each broadcast is used twice.

use std::{arch::x86_64::*, ops::Range};

use crate::{
    activations::Prepared,
    packed::{BLOCK, Format, GROUP, PackedSegment},
};

/// Calls a function whose first constant is a number of rows.
macro_rules! for_rows {
    ($rows:expr, $function:ident, [$($rest:tt)*], $arguments:tt) => {
        match $rows {
            1 => $function::<1, $($rest)*> $arguments,
            2 => $function::<2, $($rest)*> $arguments,
            3 => $function::<3, $($rest)*> $arguments,
            4 => $function::<4, $($rest)*> $arguments,
            5 => $function::<5, $($rest)*> $arguments,
            6 => $function::<6, $($rest)*> $arguments,
            7 => $function::<7, $($rest)*> $arguments,
            8 => $function::<8, $($rest)*> $arguments,
            9 => $function::<9, $($rest)*> $arguments,
            10 => $function::<10, $($rest)*> $arguments,
            11 => $function::<11, $($rest)*> $arguments,
            _ => $function::<12, $($rest)*> $arguments,
        }
    };
}
pub(crate) use for_rows;

/// As [`super::tile::tile`].
pub(super) fn tile(
    x: &Prepared<'_>,
    rows: Range<usize>,
    segment: &PackedSegment<'_>,
    groups: Range<usize>,
    out: &mut [f32],
) {
    let (count, stride) = (rows.len(), groups.len() * GROUP);
    assert!((1..=super::TILE_ROWS).contains(&count) && rows.end <= x.rows && out.len() == count * stride);
    assert!(groups.end <= segment.groups() && segment.columns == x.columns);
    let format = segment.format;
    // Where the first row lies, in units of what one register of weights is multiplied with.
    let (x_start, x_stride, steps): (*const u8, usize, usize) = match format {
        Format::Bf16 => (x.bf16[rows.start * x.pairs() * 2..].as_ptr().cast(), x.pairs(), x.pairs()),
        Format::F32 | Format::F16 => (x.f32[rows.start * x.columns..].as_ptr().cast(), x.columns, x.columns),
        _ => (x.int8.q[rows.start * x.columns..].as_ptr().cast(), x.columns, x.blocks()),
    };
    let mut index = 0;
    while index < groups.len() {
        let pair = format == Format::Bf16 || format == Format::F32 || format == Format::F16;
        let together = if pair && x.rows > super::TILE_ROWS && index + 1 < groups.len() { 2 } else { 1 };
        let weights = segment.group(groups.start + index).as_ptr();
        let next = segment.group(groups.start + index + together - 1).as_ptr();
        let out = out[index * GROUP..].as_mut_ptr();
        // SAFETY: this level has the instructions. The rows of `x`, the groups of weights and the columns of `out` that
        // the functions touch lie within their slices: `x` was prepared in the segment's form for so many columns, a
        // group has all of them, and `out` has `count` rows of `stride`.
        unsafe {
            match (format, together) {
                (Format::Bf16, 2) => for_rows!(count, bf16_pair, [], (x_start.cast(), x_stride, [weights, next], steps, out, stride)),
                (Format::F32, 2) => for_rows!(count, f32_pair, [], (x_start.cast(), x_stride, [weights, next], steps, out, stride)),
                (Format::F16, 2) => for_rows!(count, f16_pair, [], (x_start.cast(), x_stride, [weights, next], steps, out, stride)),
                (Format::Bf16, _) => for_rows!(count, bf16_stream, [], (x_start.cast(), x_stride, weights, steps, out, stride)),
                (Format::F32, _) => for_rows!(count, f32_stream, [], (x_start.cast(), x_stride, weights, steps, out, stride)),
                (Format::F16, _) => for_rows!(count, f16_stream, [], (x_start.cast(), x_stride, weights, steps, out, stride)),
                _ => {
                    let blocks = x.blocks();
                    let rows = Int8 {
                        q: x_start.cast(),
                        columns: x_stride,
                        scales: x.int8.scales[rows.start * blocks..].as_ptr(),
                        sums: x.int8.sums[rows.start * blocks * 2..].as_ptr(),
                        blocks,
                    };
                    match format {
                        Format::Q8 => for_rows!(count, quantized, [{ Format::Q8 as u32 }], (rows, weights, out, stride)),
                        Format::Q4 => for_rows!(count, quantized, [{ Format::Q4 as u32 }], (rows, weights, out, stride)),
                        Format::Q4Min => for_rows!(count, quantized, [{ Format::Q4Min as u32 }], (rows, weights, out, stride)),
                        Format::Q5 => for_rows!(count, quantized, [{ Format::Q5 as u32 }], (rows, weights, out, stride)),
                        Format::Q5Min => for_rows!(count, quantized, [{ Format::Q5Min as u32 }], (rows, weights, out, stride)),
                        _ => for_rows!(count, quantized, [{ Format::Q6 as u32 }], (rows, weights, out, stride)),
                    }
                }
            }
        }
        index += together;
    }
}

/// Bytes of a register.
const REGISTER: usize = 64;

/// The two loops over one float format: `stream` for few rows and one group, `pair` for many rows and two groups.
macro_rules! float {
    ($stream:ident, $pair:ident, $x:ty, $bytes:literal, |$weights:ident| $load:expr, |$sum:ident, $w:ident, $value:ident| $add:expr) => {
        /// # Safety
        /// `x` points to `M` rows of `steps` elements, `x_stride` apart, `weights` to a group of as many, `out` to `M` rows of 16,
        /// `out_stride` apart.
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vnni")]
        pub(crate) unsafe fn $stream<const M: usize>(
            x: *const $x,
            x_stride: usize,
            weights: *const u8,
            steps: usize,
            out: *mut f32,
            out_stride: usize,
        ) {
            const UNROLL: usize = 8;
            // Accumulators of a row: together at least as many as hide the latency.
            let chains = const { if M == 1 { 8 } else if M < 4 { 4 } else if M < 7 { 2 } else { 1 } };
            let mut sums = [[_mm512_setzero_ps(); UNROLL]; M];
            let whole = steps / UNROLL * UNROLL;
            let mut step = 0;
            // SAFETY: the caller's promise.
            unsafe {
                while step < whole {
                    for unrolled in 0..UNROLL {
                        let $weights = weights.add((step + unrolled) * $bytes);
                        let $w = $load;
                        for row in 0..M {
                            let $value = x.add(row * x_stride + step + unrolled).read_unaligned();
                            let $sum = sums[row][unrolled % chains];
                            sums[row][unrolled % chains] = $add;
                        }
                    }
                    step += UNROLL;
                }
                while step < steps {
                    let $weights = weights.add(step * $bytes);
                    let $w = $load;
                    for row in 0..M {
                        let $value = x.add(row * x_stride + step).read_unaligned();
                        let $sum = sums[row][0];
                        sums[row][0] = $add;
                    }
                    step += 1;
                }
                for row in 0..M {
                    let mut total = sums[row][0];
                    for chain in 1..chains {
                        total = _mm512_add_ps(total, sums[row][chain]);
                    }
                    _mm512_storeu_ps(out.add(row * out_stride), total);
                }
            }
        }

        /// # Safety
        /// As above, with two groups, and rows of 32 in `out`.
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vnni")]
        pub(crate) unsafe fn $pair<const M: usize>(
            x: *const $x,
            x_stride: usize,
            weights: [*const u8; 2],
            steps: usize,
            out: *mut f32,
            out_stride: usize,
        ) {
            let mut sums = [[_mm512_setzero_ps(); 2]; M];
            // SAFETY: the caller's promise.
            unsafe {
                for step in 0..steps {
                    let both = [weights[0].add(step * $bytes), weights[1].add(step * $bytes)].map(|$weights| $load);
                    for row in 0..M {
                        let $value = x.add(row * x_stride + step).read_unaligned();
                        for side in 0..2 {
                            let ($sum, $w) = (sums[row][side], both[side]);
                            sums[row][side] = $add;
                        }
                    }
                }
                for row in 0..M {
                    for side in 0..2 {
                        _mm512_storeu_ps(out.add(row * out_stride + side * GROUP), sums[row][side]);
                    }
                }
            }
        }
    };
}

float!(
    bf16_stream, bf16_pair, i32, 64,
    |weights| _mm512_loadu_si512(weights.cast()),
    |sum, w, value| _mm512_dpbf16_ps(sum, pairs(w), pairs(_mm512_set1_epi32(value)))
);
float!(
    f32_stream, f32_pair, f32, 64,
    |weights| _mm512_loadu_ps(weights.cast()),
    |sum, w, value| _mm512_fmadd_ps(w, _mm512_set1_ps(value), sum)
);
float!(
    f16_stream, f16_pair, f32, 32,
    |weights| _mm512_cvtph_ps(_mm256_loadu_si256(weights.cast())),
    |sum, w, value| _mm512_fmadd_ps(w, _mm512_set1_ps(value), sum)
);

#[inline(always)]
pub(crate) fn pairs(bits: __m512i) -> __m512bh {
    // SAFETY: both are 512 bits without invalid values.
    unsafe { std::mem::transmute(bits) }
}

/// Where the rows of [`crate::activations::Int8Rows`] lie that a tile takes.
#[derive(Clone, Copy)]
struct Int8 {
    q: *const i8,
    columns: usize,
    scales: *const f32,
    sums: *const f32,
    blocks: usize,
}

/// `M` rows times a group of a quantized format. For each block of 32 columns:
/// `sum += d * (scale * dot(weights, q) - offset * sums)`, or `d * scale * dot + minimum * sums`.
///
/// # Safety
/// `x` has `M` rows, `weights` points to a group of as many blocks, `out` to `M` rows of 16, `out_stride` apart.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vnni")]
unsafe fn quantized<const M: usize, const FORMAT: u32>(x: Int8, weights: *const u8, out: *mut f32, out_stride: usize) {
    let format = const { Format::numbered(FORMAT) };
    let (tile_bytes, planes, offset) = (format.tile_bytes(), format.plane_bytes(), format.offset());
    let mut totals = [_mm512_setzero_ps(); M];
    // SAFETY: the caller's promise.
    unsafe {
        for block in 0..x.blocks {
            let tile = weights.add(block * tile_bytes);
            let elements = unpack(format, tile);
            let half = |index: usize| _mm512_cvtph_ps(_mm256_loadu_si256(tile.add(planes + index * GROUP * 2).cast()));
            let first = half(0);
            let second = match format {
                Format::Q4Min | Format::Q5Min | Format::Q6 => half(1),
                _ => first,
            };
            for row in 0..M {
                let q = x.q.add(row * x.columns + block * BLOCK).cast::<i32>();
                let mut dots = [_mm512_setzero_si512(); 2];
                for (register, element) in elements.iter().enumerate() {
                    let four = _mm512_set1_epi32(q.add(register).read_unaligned());
                    dots[register / 4] = _mm512_dpbusd_epi32(dots[register / 4], *element, four);
                }
                let at = row * x.blocks + block;
                let scale = _mm512_set1_ps(*x.scales.add(at));
                let (low, high) = (*x.sums.add(at * 2), *x.sums.add(at * 2 + 1));
                let total = &mut totals[row];
                if let Format::Q6 = format {
                    let dots = dots.map(|dot| _mm512_cvtepi32_ps(dot));
                    let low = _mm512_fmsub_ps(dots[0], scale, _mm512_set1_ps(offset * low));
                    let high = _mm512_fmsub_ps(dots[1], scale, _mm512_set1_ps(offset * high));
                    *total = _mm512_fmadd_ps(first, low, *total);
                    *total = _mm512_fmadd_ps(second, high, *total);
                    continue;
                }
                let dot = _mm512_cvtepi32_ps(_mm512_add_epi32(dots[0], dots[1]));
                let sum = low + high;
                match format {
                    Format::Q4Min | Format::Q5Min => {
                        *total = _mm512_fmadd_ps(first, _mm512_mul_ps(dot, scale), *total);
                        *total = _mm512_fmadd_ps(second, _mm512_set1_ps(sum), *total);
                    }
                    _ => {
                        let centred = _mm512_fmsub_ps(dot, scale, _mm512_set1_ps(offset * sum));
                        *total = _mm512_fmadd_ps(first, centred, *total);
                    }
                }
            }
        }
        for (row, total) in totals.iter().enumerate() {
            _mm512_storeu_ps(out.add(row * out_stride), *total);
        }
    }
}

/// The elements of a tile: register `j` holds columns `4 j` to `4 j + 3` of each of 16 rows.
///
/// # Safety
/// `tile` points to a tile of the format.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vnni")]
unsafe fn unpack(format: Format, tile: *const u8) -> [__m512i; 8] {
    // SAFETY: the caller's promise.
    let load = |register: usize| unsafe { _mm512_loadu_si512(tile.add(register * REGISTER).cast()) };
    let nibble = _mm512_set1_epi8(0x0F);
    let mut elements = [_mm512_setzero_si512(); 8];
    if let Format::Q8 = format {
        for (register, element) in elements.iter_mut().enumerate() {
            *element = load(register);
        }
        return elements;
    }
    for register in 0..4 {
        let both = load(register);
        elements[register] = _mm512_and_si512(both, nibble);
        elements[register + 4] = _mm512_and_si512(_mm512_srli_epi16::<4>(both), nibble);
    }
    match format {
        Format::Q5 | Format::Q5Min => {
            let (plane, bit) = (load(4), _mm512_set1_epi8(0x10));
            let moved = [
                _mm512_slli_epi16::<4>(plane),
                _mm512_slli_epi16::<3>(plane),
                _mm512_slli_epi16::<2>(plane),
                _mm512_slli_epi16::<1>(plane),
                plane,
                _mm512_srli_epi16::<1>(plane),
                _mm512_srli_epi16::<2>(plane),
                _mm512_srli_epi16::<3>(plane),
            ];
            for (element, moved) in elements.iter_mut().zip(moved) {
                *element = _mm512_or_si512(*element, _mm512_and_si512(moved, bit));
            }
        }
        Format::Q6 => {
            let bits = _mm512_set1_epi8(0x30);
            for half in 0..2 {
                let plane = load(4 + half);
                let moved = [
                    _mm512_slli_epi16::<4>(plane),
                    _mm512_slli_epi16::<2>(plane),
                    plane,
                    _mm512_srli_epi16::<2>(plane),
                ];
                for (element, moved) in elements[half * 4..].iter_mut().zip(moved) {
                    *element = _mm512_or_si512(*element, _mm512_and_si512(moved, bits));
                }
            }
        }
        _ => {}
    }
    elements
}
