//! Linear layers: products of activations with packed matrices.
//!
//! The work is cut into *tasks* (a range of groups for a range of rows), which threads run; each task computes *tiles*
//! that stay in the nearest cache until they are finished, that is, until bias, residual or activation have been
//! applied and the result is written. Two shapes of work:
//! - *Few rows* are limited by memory: each task reads one contiguous run of the matrix, once; a thread has a few of them.
//! - *Many rows* are limited by arithmetic: a block of groups that fits the second-level cache is multiplied with all
//!   rows of its task, before the next block.

mod float;
mod gated;
mod quantized;
#[cfg(test)]
mod reference;
#[cfg(test)]
mod tests;
mod tile;
mod widened;

use std::ops::Range;

use torus_abi::kernel::{parallel_for, threads};

pub use gated::{gated_mlp, gated_mlp_fits};
pub use tile::{Finished, Tile};
pub(crate) use widened::is_widened;
use widened::{Groups, any_is_widened};

use crate::{
    activations::{Element, Prepared, rms_norm},
    level::{Level, level},
    packed::{GROUP, PackedMatrix, PackedSegment},
    shared::Shared,
    workspace::Buffer,
};

/// Up to so many rows, a task takes all rows, and the matrix is read once.
const FEW_ROWS: usize = 32;
/// Tasks of each thread when there are few rows: whoever the system interrupts leaves the rest to others.
const TASKS_PER_THREAD: usize = 4;
/// Rows of a task when there are many, but for whole register tiles.
const TASK_ROWS: usize = 132;
/// The same where weights are widened, once for each task.
const WIDENED_TASK_ROWS: usize = 512;
/// Rows of a tile at most, but for the matrix unit's.
const TILE_ROWS: usize = 24;
/// Two of the matrix unit's.
const UNIT_TILE_ROWS: usize = 32;
/// Groups of a tile at most: 24 rows of 128 columns are 12 KiB.
const TILE_GROUPS: usize = 8;
/// Bytes of weights that a task keeps in the second-level cache.
const BLOCK_BYTES: usize = 256 << 10;

/// What is added to a product, in f32, before it is rounded.
#[derive(Clone, Copy, Debug)]
pub struct Epilogue<'a, Y> {
    /// `[out]`
    pub bias: Option<&'a [f32]>,
    /// `[rows, out]`
    pub residual: Option<&'a [Y]>,
}

impl<Y> Epilogue<'_, Y> {
    pub const NONE: Self = Self { bias: None, residual: None };
}

/// `y = x · wᵀ + bias + residual`, with `x` `[rows, in]` and `y` `[rows, out]`, for a matrix `w` `[out, in]`.
///
/// # Panics
/// If the lengths do not fit each other.
pub fn linear<X: Element, Y: Element>(x: &[X], w: &PackedMatrix<'_>, epilogue: Epilogue<'_, Y>, y: &mut [Y]) {
    let level = level();
    let prepared = Prepared::of(level, x, w);
    linear_prepared(&prepared, w, epilogue, y);
}

/// As [`linear`], with activations that are prepared for `w`.
pub fn linear_prepared<R: Element, Y: Element>(
    x: &Prepared,
    w: &PackedMatrix<'_>,
    epilogue: Epilogue<'_, R>,
    y: &mut [Y],
) {
    let outputs = w.rows();
    assert_eq!(y.len(), x.rows() * outputs, "an output of {} rows of {outputs}", x.rows());
    assert!(epilogue.bias.is_none_or(|bias| bias.len() == outputs), "a bias for {outputs} outputs");
    assert!(epilogue.residual.is_none_or(|residual| residual.len() == y.len()), "a residual like the output");
    let out = Shared::new(y);
    product(x, w, |tile| {
        for row in 0..tile.rows() {
            let (at, values) = ((tile.first_row() + row) * outputs + tile.first_column(), tile.row_mut(row));
            if let Some(bias) = epilogue.bias {
                f32::add(x.level(), &bias[at % outputs..][..values.len()], values);
            }
            if let Some(residual) = epilogue.residual {
                R::add(x.level(), &residual[at..at + values.len()], values);
            }
            // SAFETY: each element belongs to one tile.
            Y::store(x.level(), values, unsafe { out.part(at..at + values.len()) });
        }
    });
}

/// Scales to a root mean square of 1, times weights.
#[derive(Clone, Copy, Debug)]
pub struct Norm<'a> {
    /// `[columns]`
    pub weights: &'a [f32],
    pub eps: f32,
}

/// `y = residual + norm(x · wᵀ + bias)`, for activations that are prepared for `w`.
///
/// # Panics
/// If the lengths do not fit each other.
pub fn linear_normed<R: Element, Y: Element>(
    x: &Prepared,
    w: &PackedMatrix<'_>,
    bias: Option<&[f32]>,
    norm: Norm<'_>,
    residual: &[R],
    y: &mut [Y],
) {
    /// Values from which all threads share the work.
    const PARALLEL_VALUES: usize = 1 << 14;
    let (level, outputs, rows) = (x.level(), w.rows(), x.rows());
    assert!(norm.weights.len() == outputs && residual.len() == y.len(), "a norm and a residual for {outputs} outputs");
    let mut wide = Buffer::<f32>::take(y.len());
    linear_prepared(x, w, Epilogue::<f32> { bias, residual: None }, &mut wide);
    let (products, out) = (Shared::new(&mut wide), Shared::new(y));
    let chunk = if rows * outputs < PARALLEL_VALUES { rows } else { rows.div_ceil(2 * threads()) }.max(1);
    parallel_for(rows.div_ceil(chunk), |index| {
        for row in index * chunk..((index + 1) * chunk).min(rows) {
            let at = row * outputs..(row + 1) * outputs;
            // SAFETY: each row is one index's alone.
            let values = unsafe { products.part(at.clone()) };
            rms_norm(level, values, norm.weights, norm.eps);
            R::add(level, &residual[at.clone()], values);
            // SAFETY: as above.
            Y::store(level, values, unsafe { out.part(at) });
        }
    });
}

/// Calls `finish` for each tile of `x · wᵀ`, on the thread that computed it. Tiles are cut at the matrix's true rows,
/// and do not cross segments.
///
/// # Panics
/// If `x` has other columns than `w`, or lacks a form that `w` needs.
pub fn product<F: Fn(&mut Finished<'_>) + Sync>(x: &Prepared, w: &PackedMatrix<'_>, finish: F) {
    assert_eq!(x.columns(), w.columns(), "columns of the activations and of the matrix");
    let bytes: usize = w.segments().iter().map(|segment| segment.bytes.len()).sum();
    let groups: usize = w.segments().iter().map(PackedSegment::groups).sum();
    let cut = Cut::new(x.level(), x.rows(), any_is_widened(x, w.segments()), groups, bytes.div_ceil(groups.max(1)));
    parallel_for(cut.tasks(), |task| {
        let (rows, part) = cut.task(task);
        let (begin, end) = (cut.begin(part, bytes), cut.begin(part + 1, bytes));
        let next_task = cut.next_task(task).and_then(|task| cut.first_weights(w.segments(), cut.task(task).1, bytes));
        let (mut at, mut column) = (0, 0);
        for segment in w.segments() {
            let group = |byte: usize| cut.groups_before(segment, byte.saturating_sub(at));
            let own = group(begin)..group(end);
            for groups in blocks(own.clone(), cut.block) {
                let weights = Groups::new(x, segment, groups.clone());
                let next = next_task.filter(|_| groups.end == own.end && end <= at + segment.bytes.len());
                for rows in blocks(rows.clone(), cut.tile_rows) {
                    let width = segment.rows.min(groups.end * GROUP) - groups.start * GROUP;
                    let mut memory = Buffer::take(rows.len() * groups.len() * GROUP);
                    let mut tile = Tile::new(&mut memory, groups.len() * GROUP);
                    weights_product(x, rows.clone(), &weights, next, &mut tile);
                    finish(&mut Finished::new(tile, rows.start, column + groups.start * GROUP, width));
                }
            }
            at += segment.bytes.len();
            column += segment.rows;
        }
    });
}

/// One tile: the products of some rows with some groups of a segment. Quantized products fetch the weights that come `next`,
/// if these are not simply the following ones.
fn weights_product(x: &Prepared, rows: Range<usize>, weights: &Groups<'_>, next: Option<&[u8]>, out: &mut Tile<'_>) {
    let (segment, groups) = weights.place();
    match segment.format.is_quantized() {
        true => quantized::product(x.level(), x, rows, &segment, groups, next, out),
        false => float::product(x.level(), x, rows, &segment, groups, out),
    }
}

/// Rows of a tile at most.
fn tile_rows(level: Level) -> usize {
    match level {
        Level::Amx => UNIT_TILE_ROWS,
        _ => TILE_ROWS,
    }
}

/// How a product is cut into tasks.
struct Cut {
    rows: usize,
    /// Rows of a tile at most: two register tiles of the level.
    tile_rows: usize,
    row_chunks: usize,
    /// Parts of the matrix.
    parts: usize,
    /// Groups that stay together.
    unit: usize,
    /// Groups of a tile at most.
    block: usize,
}

impl Cut {
    fn new(level: Level, rows: usize, widened: bool, groups: usize, group_bytes: usize) -> Self {
        let tile_rows = tile_rows(level);
        let block = (BLOCK_BYTES / group_bytes.max(1) / 2 * 2).clamp(2, TILE_GROUPS);
        if rows <= FEW_ROWS {
            return Self {
                rows,
                tile_rows,
                row_chunks: 1,
                parts: (threads() * TASKS_PER_THREAD).min(groups),
                unit: 1,
                block,
            };
        }
        let row_chunks = rows.div_ceil(if widened { WIDENED_TASK_ROWS } else { TASK_ROWS });
        // Some tasks for each thread, so that none waits long for another at the end.
        let wanted = (threads() * 4).div_ceil(row_chunks).min(groups.div_ceil(2));
        Self { rows, tile_rows, row_chunks, parts: wanted.max(groups.div_ceil(block)), unit: 2, block }
    }

    fn tasks(&self) -> usize {
        self.row_chunks * self.parts
    }

    /// Where a part begins, of so many bytes or groups. The later half are a third as long as the others, so that little is
    /// left to wait for when a thread finds no more: threads are not equally fast.
    fn begin(&self, part: usize, whole: usize) -> usize {
        let late = self.parts / 2;
        let early = self.parts - late;
        whole * (3 * part.min(early) + part.saturating_sub(early)) / (3 * early + late)
    }

    /// The groups of a segment that belong to parts which begin before the segment's byte `byte`: a group belongs to the part
    /// in which it begins.
    fn groups_before(&self, segment: &PackedSegment<'_>, byte: usize) -> usize {
        (byte.div_ceil(segment.group_bytes() * self.unit) * self.unit).min(segment.groups())
    }

    /// The first group of a part of a matrix of so many bytes, if it has any.
    fn first_weights<'a>(&self, segments: &[PackedSegment<'a>], part: usize, bytes: usize) -> Option<&'a [u8]> {
        let mut begin = self.begin(part, bytes);
        for segment in segments {
            let first = self.groups_before(segment, begin);
            if first < segment.groups() {
                return Some(segment.group(first));
            }
            begin = begin.saturating_sub(segment.bytes.len());
        }
        None
    }

    /// The task that a thread probably takes after this one.
    fn next_task(&self, task: usize) -> Option<usize> {
        Some(task + threads()).filter(|task| *task < self.tasks())
    }

    /// The rows of a task, and its part of the matrix. Neighbours share the part.
    fn task(&self, task: usize) -> (Range<usize>, usize) {
        let (chunk, part) = (task % self.row_chunks, task / self.row_chunks);
        let unit = if self.row_chunks > 1 { self.tile_rows / 2 } else { 1 };
        let len = self.rows.div_ceil(self.row_chunks).next_multiple_of(unit);
        (self.rows.min(chunk * len)..self.rows.min((chunk + 1) * len), part)
    }
}

/// Splits a range into pieces of at most `len`.
fn blocks(range: Range<usize>, len: usize) -> impl Iterator<Item = Range<usize>> {
    let end = range.end;
    range.step_by(len).map(move |start| start..end.min(start + len))
}
