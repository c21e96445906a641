//! Many rows at AVX2: activations lie in panels of six rows, column by column, so that a register tile reads two
//! streams. Row by row, each of its rows would be a stream, and those of a long row would share a few sets of the caches.

use std::arch::x86_64::*;

use super::{
    Job,
    x86::{Halves, first, second},
};
use crate::{activations::PANEL_ROWS, level::unknown, packed::Format};

/// The weights of a format as f32, two columns of a group at a time.
trait Weights {
    /// Bytes of two columns.
    const BYTES: usize;
    /// Column 0 or 1 of the two at `w`.
    ///
    /// # Safety
    /// It is there, and the machine has the level.
    unsafe fn column(w: *const u8, column: usize) -> Halves;
}

struct F32;
struct F16;
struct Bf16;

impl Weights for F32 {
    const BYTES: usize = 128;

    #[inline(always)]
    unsafe fn column(w: *const u8, column: usize) -> Halves {
        // SAFETY: as the caller says.
        unsafe { [0, 32].map(|half| _mm256_loadu_ps(w.add(column * 64 + half).cast())) }
    }
}

impl Weights for F16 {
    const BYTES: usize = 64;

    #[inline(always)]
    unsafe fn column(w: *const u8, column: usize) -> Halves {
        // SAFETY: as the caller says.
        unsafe { [0, 16].map(|half| _mm256_cvtph_ps(_mm_loadu_si128(w.add(column * 32 + half).cast()))) }
    }
}

impl Weights for Bf16 {
    const BYTES: usize = 64;

    #[inline(always)]
    unsafe fn column(w: *const u8, column: usize) -> Halves {
        // Loaded again for the second column: sums of six rows leave no room for both.
        let w = unknown(w);
        // SAFETY: as the caller says.
        unsafe {
            let pairs = [0, 32].map(|half| _mm256_loadu_si256(w.add(half).cast()));
            if column == 0 { first(pairs) } else { second(pairs) }
        }
    }
}

/// What a register tile reads and writes.
struct Panel {
    x: *const f32,
    w: *const u8,
    columns: usize,
    out: *mut f32,
    stride: usize,
    /// Rows that are written; all are computed.
    rows: usize,
}

impl Job<'_, '_> {
    /// As [`Job::run`], with activations in panels.
    pub(super) fn run_panels(self) {
        let (columns, group_bytes) = (self.segment.columns, self.segment.group_bytes());
        let (first, end) = (self.rows.start, self.rows.end);
        assert!(first.is_multiple_of(PANEL_ROWS) && end <= self.x.rows(), "whole panels");
        assert!(self.x.columns() == columns && self.groups.end <= self.segment.groups(), "the shape of activations");
        assert!(
            self.rows.len() <= self.out.rows() && self.groups.len() * 16 <= self.out.stride(),
            "the shape of a tile"
        );
        let x = &self.x.panels()[first * self.x.stride()..end.next_multiple_of(PANEL_ROWS) * self.x.stride()];
        let (out, stride) = (self.out.as_mut_ptr(), self.out.stride());
        let multiply = match self.segment.format {
            Format::F32 => multiply::<F32>,
            Format::F16 => multiply::<F16>,
            Format::Bf16 => multiply::<Bf16>,
            format => unreachable!("{format:?} is no format of floats"),
        };
        for (index, group) in self.groups.enumerate() {
            let w = self.segment.group(group);
            debug_assert_eq!(w.len(), group_bytes);
            for row in (0..end - first).step_by(PANEL_ROWS) {
                // SAFETY: whole panels of the activations, a group, and the part of the tile for both, as asserted. Only
                // this level has panels.
                unsafe {
                    let x = x.as_ptr().add(row * self.x.stride());
                    let out = out.add(row * stride + index * 16);
                    multiply(&Panel {
                        x,
                        w: w.as_ptr(),
                        columns,
                        out,
                        stride,
                        rows: PANEL_ROWS.min(end - first - row),
                    });
                }
            }
        }
    }
}

/// # Safety
/// The machine has the level; `x` is a panel of so many columns, `w` as many of a group, and `out` has room for the rows.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn multiply<W: Weights>(panel: &Panel) {
    let mut sums = [[_mm256_setzero_ps(); 2]; PANEL_ROWS];
    let (mut x, mut w) = (panel.x, panel.w);
    // SAFETY: as the caller says.
    unsafe {
        let mut add = |x: *const f32, weights: Halves| {
            for (row, sums) in sums.iter_mut().enumerate() {
                let x = _mm256_set1_ps(x.add(row).read());
                *sums = [_mm256_fmadd_ps(weights[0], x, sums[0]), _mm256_fmadd_ps(weights[1], x, sums[1])];
            }
        };
        for _ in 0..panel.columns / 2 {
            add(x, W::column(w, 0));
            add(x.add(PANEL_ROWS), W::column(w, 1));
            (x, w) = (x.add(2 * PANEL_ROWS), w.add(W::BYTES));
        }
        if panel.columns % 2 == 1 {
            add(x, W::column(w, 0));
        }
        for (row, sums) in sums.iter().enumerate().take(panel.rows) {
            for (half, sum) in sums.iter().enumerate() {
                _mm256_storeu_ps(panel.out.add(row * panel.stride + half * 8), *sum);
            }
        }
    }
}
