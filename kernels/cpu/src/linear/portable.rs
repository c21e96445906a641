//! Tiles in plain Rust, compiled again for AVX2. A block of weights is decoded once for all rows of the tile.

use std::ops::Range;

use half::f16;

use crate::{
    Level,
    activations::Prepared,
    packed::{BLOCK, Format, GROUP, PackedSegment, element, half_row},
};

pub(super) fn tile(
    level: Level,
    x: &Prepared<'_>,
    rows: Range<usize>,
    segment: &PackedSegment<'_>,
    groups: Range<usize>,
    out: &mut [f32],
) {
    #[cfg(target_arch = "x86_64")]
    {
        #[target_feature(enable = "avx2,fma,f16c")]
        fn avx2(x: &Prepared<'_>, rows: Range<usize>, s: &PackedSegment<'_>, groups: Range<usize>, out: &mut [f32]) {
            plain(x, rows, s, groups, out);
        }
        if level >= Level::Avx2 {
            // SAFETY: the level is one that this machine has.
            return unsafe { avx2(x, rows, segment, groups, out) };
        }
    }
    let _ = level;
    plain(x, rows, segment, groups, out);
}

#[inline(always)]
fn plain(x: &Prepared<'_>, rows: Range<usize>, segment: &PackedSegment<'_>, groups: Range<usize>, out: &mut [f32]) {
    out.fill(0.0);
    let stride = groups.len() * GROUP;
    for (index, group) in groups.enumerate() {
        let bytes = segment.group(group);
        for (row, out) in rows.clone().zip(out.chunks_exact_mut(stride)) {
            let Some(sums) = out[index * GROUP..].first_chunk_mut::<GROUP>() else { continue };
            match segment.format {
                Format::F32 => f32_row(x, row, bytes, sums),
                Format::Bf16 => bf16_row(x, row, bytes, sums),
                Format::F16 => f16_row(x, row, bytes, sums),
                format => quantized_row(x, row, format, bytes, sums),
            }
        }
    }
}

#[inline(always)]
fn f32_row(x: &Prepared<'_>, row: usize, bytes: &[u8], sums: &mut [f32; GROUP]) {
    let x = &x.f32[row * x.columns..][..x.columns];
    for (x, weights) in x.iter().zip(bytes.as_chunks::<{ GROUP * 4 }>().0) {
        for (sum, weight) in sums.iter_mut().zip(weights.as_chunks::<4>().0) {
            *sum += x * f32::from_le_bytes(*weight);
        }
    }
}

#[inline(always)]
fn bf16_row(x: &Prepared<'_>, row: usize, bytes: &[u8], sums: &mut [f32; GROUP]) {
    let x = &x.bf16[row * x.pairs() * 2..][..x.pairs() * 2];
    for (x, weights) in x.as_chunks::<2>().0.iter().zip(bytes.as_chunks::<{ GROUP * 4 }>().0) {
        let [first, second] = x.map(|x| f32::from_bits(u32::from(x.to_bits()) << 16));
        for (sum, pair) in sums.iter_mut().zip(weights.as_chunks::<4>().0) {
            let pair = u32::from_le_bytes(*pair);
            *sum += first * f32::from_bits(pair << 16) + second * f32::from_bits(pair & 0xFFFF_0000);
        }
    }
}

#[inline(always)]
fn f16_row(x: &Prepared<'_>, row: usize, bytes: &[u8], sums: &mut [f32; GROUP]) {
    let x = &x.f32[row * x.columns..][..x.columns];
    for (x, weights) in x.iter().zip(bytes.as_chunks::<{ GROUP * 2 }>().0) {
        for (sum, weight) in sums.iter_mut().zip(weights.as_chunks::<2>().0) {
            *sum += x * f16::from_le_bytes(*weight).to_f32();
        }
    }
}

#[inline(always)]
fn quantized_row(x: &Prepared<'_>, row: usize, format: Format, bytes: &[u8], sums: &mut [f32; GROUP]) {
    let blocks = x.blocks();
    let offset = format.offset();
    for (block, weights) in bytes.chunks_exact(format.tile_bytes()).take(blocks).enumerate() {
        let q = &x.int8.q[row * x.columns + block * BLOCK..][..BLOCK];
        let scale = x.int8.scales[row * blocks + block];
        let halves = &x.int8.sums[(row * blocks + block) * 2..][..2];
        for (lane, sum) in sums.iter_mut().enumerate() {
            let mut dots = [0i32; 2];
            for (k, q) in q.iter().enumerate() {
                dots[k / 16] += i32::from(element(format, weights, lane, k)) * i32::from(*q);
            }
            let first = half_row(format, weights, 0, lane);
            let second = || half_row(format, weights, 1, lane);
            *sum += match format {
                Format::Q6 => {
                    first * (dots[0] as f32 * scale - offset * halves[0])
                        + second() * (dots[1] as f32 * scale - offset * halves[1])
                }
                Format::Q4Min | Format::Q5Min => {
                    first * scale * (dots[0] + dots[1]) as f32 + second() * (halves[0] + halves[1])
                }
                _ => first * (scale * (dots[0] + dots[1]) as f32 - offset * (halves[0] + halves[1])),
            };
        }
    }
}
