//! Products with segments of floats: f32 and f16 by multiplying and adding in f32, bf16 with the dot products of pairs
//! where there are such that are fast, else as f32.

#[cfg(target_arch = "x86_64")]
mod amx;
#[cfg(target_arch = "x86_64")]
mod panels;
mod portable;
#[cfg(target_arch = "x86_64")]
mod x86;

use std::ops::Range;

use super::Tile;
use crate::{
    activations::Prepared,
    level::Level,
    packed::{Format, PackedSegment},
};

/// Computes `out[row - rows.start][(group - groups.start) * 16 + lane] = sum over k of x[row][k] * w[group * 16 +
/// lane][k]`, in f32.
pub(super) fn product(
    level: Level,
    x: &Prepared,
    rows: Range<usize>,
    segment: &PackedSegment<'_>,
    groups: Range<usize>,
    out: &mut Tile<'_>,
) {
    let job = Job { x, rows, segment, groups, out };
    match (level, segment.format) {
        #[cfg(target_arch = "x86_64")]
        (Level::Avx2, _) if x.is_in_panels() => job.run_panels(),
        // The level says that the machine has the instructions.
        #[cfg(target_arch = "x86_64")]
        (Level::Avx512 | Level::Avx512Bf16 | Level::Amx, Format::F32) => job.run::<x86::Avx512F32>(),
        #[cfg(target_arch = "x86_64")]
        (Level::Avx512 | Level::Avx512Bf16 | Level::Amx, Format::F16) => job.run::<x86::Avx512F16>(),
        #[cfg(target_arch = "x86_64")]
        (Level::Amx, Format::Bf16) if amx::takes(job.rows.len(), segment.columns) => job.run_amx(),
        // The level says that the machine has the instructions.
        #[cfg(target_arch = "x86_64")]
        (Level::Avx512Bf16 | Level::Amx, Format::Bf16) => job.run::<x86::Avx512Bf16Dots>(),
        #[cfg(target_arch = "x86_64")]
        (Level::Avx512, Format::Bf16) => job.run::<x86::Avx512Bf16>(),
        #[cfg(target_arch = "x86_64")]
        (Level::Avx2, Format::F32) => job.run::<x86::Avx2F32>(),
        #[cfg(target_arch = "x86_64")]
        (Level::Avx2, Format::F16) => job.run::<x86::Avx2F16>(),
        #[cfg(target_arch = "x86_64")]
        (Level::Avx2, Format::Bf16) => job.run::<x86::Avx2Bf16>(),
        (_, Format::F32) => job.run::<portable::PlainF32>(),
        (_, Format::F16) => job.run::<portable::PlainF16>(),
        (_, Format::Bf16) => job.run::<portable::PlainBf16>(),
        (_, format) => unreachable!("{format:?} is no format of floats"),
    }
}

/// The operations of one format at one level, on one group (16 lanes) at a time. A *step* is the column, or the two,
/// that one load of weights brings.
trait Microkernel {
    type Sums: Copy;
    type Weights: Copy;
    /// Whether activations are read as bf16, else as f32.
    const BF16: bool;
    const STEP_COLUMNS: usize;
    /// Bytes of a group in a step.
    const STEP_BYTES: usize;
    /// Rows of a register tile at most, up to 12, and its groups, 1 or 2.
    const ROWS: usize;
    const GROUPS: usize;
    /// Rows of a register tile from which weights are asked for: arithmetic takes so long then that the processor does not see
    /// far enough ahead on its own. For fewer, asking costs more than it brings.
    const PREFETCHED: usize = 4;
    /// How far ahead weights are asked for.
    const AHEAD_BYTES: usize = 2048;

    /// # Safety
    /// The machine has the level.
    unsafe fn zero() -> Self::Sums;
    /// Asks for a line of weights to come into the second-level cache; does nothing where there is no way to.
    fn prefetch(w: *const u8);
    /// # Safety
    /// As above, and the weights of a step are at `w`.
    unsafe fn load(w: *const u8) -> Self::Weights;
    /// # Safety
    /// As above, and the activations of a step are at `x`.
    unsafe fn add(sums: Self::Sums, weights: Self::Weights, x: *const u8) -> Self::Sums;
    /// Adds the products of `R` rows with `G` groups in a step.
    ///
    /// # Safety
    /// As above, for all rows and groups, whose strides are in bytes.
    #[inline(always)]
    unsafe fn step<const R: usize, const G: usize>(
        sums: &mut [[Self::Sums; G]; R],
        x: *const u8,
        x_stride: usize,
        w: *const u8,
        w_stride: usize,
    ) {
        // SAFETY: as the caller says.
        unsafe {
            let weights: [Self::Weights; G] = std::array::from_fn(|group| Self::load(w.add(group * w_stride)));
            for (row, sums) in sums.iter_mut().enumerate() {
                let x = x.add(row * x_stride);
                for (sum, weights) in sums.iter_mut().zip(weights) {
                    *sum = Self::add(*sum, weights, x);
                }
            }
        }
    }
    /// # Safety
    /// The machine has the level.
    unsafe fn join(one: Self::Sums, other: Self::Sums) -> Self::Sums;
    /// # Safety
    /// As above, and 16 values may be written to `out`.
    unsafe fn store(sums: Self::Sums, out: *mut f32);
    /// Calls [`Panel::run`] where the level's instructions are enabled.
    ///
    /// # Safety
    /// That of [`Panel::run`].
    unsafe fn run<const R: usize, const G: usize, const S: usize>(panel: &Panel);
}

/// What a register tile reads and writes. Strides are in bytes, that of the output in elements.
struct Panel {
    x: *const u8,
    x_stride: usize,
    w: *const u8,
    w_stride: usize,
    steps: usize,
    out: *mut f32,
    out_stride: usize,
}

impl Panel {
    /// The products of `R` rows with `G` groups; `S` sums of every element are independent, to hide latency.
    ///
    /// # Safety
    /// The machine has the level; `x` has `R` rows, `w` `G` groups of `steps` steps, and `out` room for them.
    #[inline(always)]
    unsafe fn run<K: Microkernel, const R: usize, const G: usize, const S: usize>(&self) {
        let x_bytes = if K::BF16 { 2 } else { 4 } * K::STEP_COLUMNS;
        // SAFETY: as the caller says.
        unsafe {
            let mut sums = [[[K::zero(); G]; R]; S];
            let whole = self.steps / S * S;
            let (mut x, mut w) = (self.x, self.w);
            let end = w.add(whole * K::STEP_BYTES);
            while w < end {
                for sums in &mut sums {
                    step::<K, R, G>(sums, x, self.x_stride, w, self.w_stride);
                    (x, w) = (x.add(x_bytes), w.add(K::STEP_BYTES));
                }
            }
            for _ in whole..self.steps {
                step::<K, R, G>(&mut sums[0], x, self.x_stride, w, self.w_stride);
                (x, w) = (x.add(x_bytes), w.add(K::STEP_BYTES));
            }
            for row in 0..R {
                for group in 0..G {
                    let mut sum = sums[0][row][group];
                    for other in &sums[1..] {
                        sum = K::join(sum, other[row][group]);
                    }
                    K::store(sum, self.out.add(row * self.out_stride + group * 16));
                }
            }
        }
    }
}

/// # Safety
/// See [`Panel::run`].
#[inline(always)]
unsafe fn step<K: Microkernel, const R: usize, const G: usize>(
    sums: &mut [[K::Sums; G]; R],
    x: *const u8,
    x_stride: usize,
    w: *const u8,
    w_stride: usize,
) {
    // SAFETY: as the caller says.
    unsafe {
        if R >= K::PREFETCHED {
            (0..G).for_each(|group| K::prefetch(w.wrapping_add(group * w_stride + K::AHEAD_BYTES)));
        }
        K::step::<R, G>(sums, x, x_stride, w, w_stride);
    }
}

struct Job<'a, 'b> {
    x: &'a Prepared,
    rows: Range<usize>,
    segment: &'a PackedSegment<'a>,
    groups: Range<usize>,
    out: &'a mut Tile<'b>,
}

impl Job<'_, '_> {
    fn run<K: Microkernel>(self) {
        let (count, stride) = (self.rows.len(), self.x.stride());
        let (group_bytes, steps) = (self.segment.group_bytes(), self.segment.columns.div_ceil(K::STEP_COLUMNS));
        let weights = &self.segment.bytes[self.groups.start * group_bytes..self.groups.end * group_bytes];
        assert!(self.x.columns() == self.segment.columns && self.rows.end <= self.x.rows(), "the shape of activations");
        assert!(count <= self.out.rows() && self.groups.len() * 16 <= self.out.stride(), "the shape of a tile");
        let (x, x_stride) = if K::BF16 {
            (self.x.bf16()[self.rows.start * stride..self.rows.end * stride].as_ptr().cast::<u8>(), stride * 2)
        } else {
            (self.x.f32()[self.rows.start * stride..self.rows.end * stride].as_ptr().cast::<u8>(), stride * 4)
        };
        let (out, out_stride) = (self.out.as_mut_ptr(), self.out.stride());
        let width = if count < FEW { 1 } else { K::GROUPS };
        let tiles = count.div_ceil(K::ROWS);
        for group in (0..self.groups.len()).step_by(width) {
            let groups = width.min(self.groups.len() - group);
            for tile in 0..tiles {
                // Tiles of about the same height: a last one of few rows would be slow.
                let (row, end) = (count * tile / tiles, count * (tile + 1) / tiles);
                // SAFETY: the activations have these rows of `steps` steps (the stride is a multiple of a step, and
                // filled with zeros), `weights` these groups, the output room for their products: asserted above. The
                // level was found on this machine.
                unsafe {
                    let panel = Panel {
                        x: x.add(row * x_stride),
                        x_stride,
                        w: weights.as_ptr().add(group * group_bytes),
                        w_stride: group_bytes,
                        steps,
                        out: out.add(row * out_stride + group * 16),
                        out_stride,
                    };
                    dispatch::<K>(&panel, end - row, groups);
                }
            }
        }
    }
}

/// Below so many rows, groups are read one at a time, with several sums for every element.
const FEW: usize = 5;

/// # Safety
/// That of [`Panel::run`] for so many rows and groups.
unsafe fn dispatch<K: Microkernel>(panel: &Panel, rows: usize, groups: usize) {
    // SAFETY: as the caller says.
    unsafe {
        match (rows, groups) {
            (1, 1) => K::run::<1, 1, 8>(panel),
            (2, 1) => K::run::<2, 1, 4>(panel),
            (3, 1) => K::run::<3, 1, 2>(panel),
            (4, 1) => K::run::<4, 1, 2>(panel),
            (5, 1) => K::run::<5, 1, 1>(panel),
            (6, 1) => K::run::<6, 1, 1>(panel),
            (7, 1) => K::run::<7, 1, 1>(panel),
            (8, 1) => K::run::<8, 1, 1>(panel),
            (9, 1) => K::run::<9, 1, 1>(panel),
            (10, 1) => K::run::<10, 1, 1>(panel),
            (11, 1) => K::run::<11, 1, 1>(panel),
            (12, 1) => K::run::<12, 1, 1>(panel),
            (5, 2) => K::run::<5, 2, 1>(panel),
            (6, 2) => K::run::<6, 2, 1>(panel),
            (7, 2) => K::run::<7, 2, 1>(panel),
            (8, 2) => K::run::<8, 2, 1>(panel),
            (9, 2) => K::run::<9, 2, 1>(panel),
            (10, 2) => K::run::<10, 2, 1>(panel),
            (11, 2) => K::run::<11, 2, 1>(panel),
            (12, 2) => K::run::<12, 2, 1>(panel),
            _ => unreachable!("a register tile of {rows} rows and {groups} groups"),
        }
    }
}
