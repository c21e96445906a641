//! Plain Rust: a tile is unpacked once, and multiplied with all rows.

use half::bf16;

use super::Panel;
use crate::packed::{
    BLOCK, Format, GROUP,
    quantized::{element, offset, scale},
};

/// # Safety
/// The panel has so many rows.
pub(super) unsafe fn run(format: Format, panel: Panel, rows: usize) {
    // SAFETY: the panel's operands have these lengths.
    let (w, elements, scales, scaled_sums) = unsafe {
        (
            std::slice::from_raw_parts(panel.w, panel.blocks * format.tile_bytes()),
            std::slice::from_raw_parts(panel.x, rows * panel.blocks * BLOCK),
            std::slice::from_raw_parts(panel.scales, rows * panel.blocks),
            std::slice::from_raw_parts(panel.scaled_sums, rows * panel.blocks),
        )
    };
    for (block, tile) in w.chunks_exact(format.tile_bytes()).enumerate() {
        let unpacked = Unpacked::new(format, tile);
        for row in 0..rows {
            let at = row * panel.blocks + block;
            let sums = unpacked.product(&elements[at * BLOCK..][..BLOCK], scales[at], scaled_sums[at]);
            // SAFETY: the output has so many rows.
            let out = unsafe { &mut *panel.out.add(row * panel.stride).cast::<[f32; GROUP]>() };
            if block == 0 {
                out.fill(0.0);
            }
            out.iter_mut().zip(sums).for_each(|(out, sum)| *out += sum);
        }
    }
}

/// As [`super::widen`] says.
pub(super) fn widen(format: Format, group: &[u8], out: &mut [u8]) {
    let tiles = group.chunks_exact(format.tile_bytes()).zip(out.chunks_exact_mut(BLOCK * GROUP * 2));
    for (tile, out) in tiles {
        let unpacked = Unpacked::new(format, tile);
        for (k, elements) in unpacked.elements.iter().enumerate() {
            for (lane, element) in elements.iter().enumerate() {
                let value = (i32::from(*element) - unpacked.offset) as f32;
                let value = value * unpacked.scales[k / 16][lane] + unpacked.minimums[lane];
                out[(k / 2 * GROUP + lane) * 4 + k % 2 * 2..][..2]
                    .copy_from_slice(&bf16::from_f32(value).to_le_bytes());
            }
        }
    }
}

/// A tile by columns.
struct Unpacked {
    elements: [[u8; GROUP]; BLOCK],
    /// Of both halves.
    scales: [[f32; GROUP]; 2],
    minimums: [f32; GROUP],
    offset: i32,
}

impl Unpacked {
    fn new(format: Format, tile: &[u8]) -> Self {
        let value = |index: usize| std::array::from_fn(|lane| scale(format, tile, lane, index));
        let (first, minimum) = (value(0), matches!(format, Format::Q4Min | Format::Q5Min));
        Self {
            elements: std::array::from_fn(|k| std::array::from_fn(|lane| element(format, tile, lane, k))),
            scales: [first, if format == Format::Q6 { value(1) } else { first }],
            minimums: if minimum { value(1) } else { [0.0; GROUP] },
            offset: offset(format),
        }
    }

    fn product(&self, x: &[i8], scale: f32, scaled_sum: f32) -> [f32; GROUP] {
        let mut sums = self.minimums.map(|minimum| minimum * scaled_sum);
        let halves = self.elements.as_chunks::<16>().0.iter().zip(x.as_chunks::<16>().0);
        for ((w, x), scales) in halves.zip(&self.scales) {
            let mut dots = [-self.offset * x.iter().map(|x| i32::from(*x)).sum::<i32>(); GROUP];
            for (w, x) in w.iter().zip(x) {
                dots.iter_mut().zip(w).for_each(|(dot, w)| *dot += i32::from(*x) * i32::from(*w));
            }
            for ((sum, dot), w_scale) in sums.iter_mut().zip(dots).zip(scales) {
                *sum += dot as f32 * w_scale * scale;
            }
        }
        sums
    }
}
