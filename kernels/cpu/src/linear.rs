//! Products with packed weights: `x · wᵀ`, with what comes before and after it.
//!
//! A product is cut into *tiles* of up to [`TILE_ROWS`] rows by up to [`TILE_GROUPS`] groups of 16 output features, summed
//! in f32. Few rows stream the weights once, each thread a contiguous part; many rows reuse a part of the weights from
//! the second-level cache and a tile's rows from the first. What is done to a finished tile (bias, residual, activation)
//! happens while it is hot.

use std::ops::Range;

use torus_abi::{
    fragment::Activation,
    kernel::{parallel_for, threads},
};

use crate::{
    activations::{Element, Forms, Norm, Prepared, prepare, prepare_with, store},
    level, math,
    packed::{GROUP, PackedMatrix, PackedSegment},
    workspace::{Frame, with_frame},
};

#[cfg(target_arch = "x86_64")]
pub(crate) mod avx512;
mod portable;
#[cfg(test)]
mod tests;
mod tile;

use tile::tile;

/// Rows that are multiplied with a group of weights at a time at most.
pub(crate) const TILE_ROWS: usize = 12;
/// Groups of a tile at most.
const TILE_GROUPS: usize = 4;
/// Output features of a tile at most.
const TILE_COLUMNS: usize = TILE_GROUPS * GROUP;

/// What is added to a product before it is rounded.
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

/// `y = x · wᵀ + bias + residual`, from `[rows, in]` to `[rows, out]`.
///
/// # Panics
/// If the slices do not have the sizes that the matrix asks for.
pub fn linear<X: Element, Y: Element>(x: &[X], weight: &PackedMatrix<'_>, epilogue: Epilogue<'_, Y>, y: &mut [Y]) {
    with_frame(|frame| {
        let x = prepare(frame, x, weight.columns(), Forms::of(weight), None);
        product_into(&x, weight, epilogue, y);
    });
}

/// As [`linear`], of rows that are prepared already.
pub fn product_into<Y: Element>(
    x: &Prepared<'_>,
    weight: &PackedMatrix<'_>,
    epilogue: Epilogue<'_, Y>,
    y: &mut [Y],
) {
    let out = weight.rows();
    assert_eq!(y.len(), x.rows * out, "elements of the result");
    assert!(epilogue.bias.is_none_or(|bias| bias.len() == out), "elements of the bias");
    assert!(epilogue.residual.is_none_or(|residual| residual.len() == y.len()), "elements of the residual");
    let y = Shared::new(y);
    product(x, weight, |row, column, values| {
        let range = row * out + column..row * out + column + values.len();
        if let Some(bias) = epilogue.bias {
            values.iter_mut().zip(&bias[column..]).for_each(|(value, bias)| *value += bias);
        }
        if let Some(residual) = epilogue.residual {
            values.iter_mut().zip(&residual[range.clone()]).for_each(|(value, residual)| *value += residual.to_f32());
        }
        // SAFETY: each element of the product is finished once.
        store(values, unsafe { y.slice(range) });
    });
}

/// Computes `x · wᵀ` and hands out finished pieces of rows: row, first output feature, values. Each element comes once,
/// from any thread.
pub fn product(x: &Prepared<'_>, weight: &PackedMatrix<'_>, finish: impl Fn(usize, usize, &mut [f32]) + Sync) {
    assert_eq!(x.columns, weight.columns(), "columns of activations and weights");
    let work = Work::of(weight.segments(), x.rows);
    let level = level();
    work.run(|segment, groups| {
        let (first_feature, segment) = (first_feature(weight, segment), &weight.segments()[segment]);
        let mut out = [0f32; TILE_ROWS * TILE_COLUMNS];
        for rows in row_tiles(x.rows) {
            for groups in pieces(groups.clone(), TILE_GROUPS) {
                let stride = groups.len() * GROUP;
                let out = &mut out[..rows.len() * stride];
                tile(level, x, rows.clone(), segment, groups.clone(), out);
                let columns = stride.min(segment.rows - groups.start * GROUP);
                for (row, out) in rows.clone().zip(out.chunks_exact_mut(stride)) {
                    finish(row, first_feature + groups.start * GROUP, &mut out[..columns]);
                }
            }
        }
    });
}

/// As [`product`], of the two halves of a matrix's rows side by side: row, first feature of the half, values of the
/// first half and of the second.
fn product_of_halves(
    x: &Prepared<'_>,
    weight: &PackedMatrix<'_>,
    finish: impl Fn(usize, usize, &mut [f32], &[f32]) + Sync,
) {
    assert_eq!(x.columns, weight.columns(), "columns of activations and weights");
    let [first, second] = match *weight.segments() {
        [whole] => {
            let (bytes, rows) = (whole.bytes.len() / 2, whole.rows / 2);
            let half = |bytes| PackedSegment { rows, bytes, ..whole };
            [half(&whole.bytes[..bytes]), half(&whole.bytes[bytes..])]
        }
        [first, second] => [first, second],
        _ => return,
    };
    let work = Work::of(&[first], x.rows);
    let level = level();
    work.run(|_, groups| {
        let mut out = [[0f32; TILE_ROWS * TILE_COLUMNS]; 2];
        for rows in row_tiles(x.rows) {
            for groups in pieces(groups.clone(), TILE_GROUPS) {
                let stride = groups.len() * GROUP;
                let [left, right] = &mut out;
                let (left, right) = (&mut left[..rows.len() * stride], &mut right[..rows.len() * stride]);
                tile(level, x, rows.clone(), &first, groups.clone(), left);
                tile(level, x, rows.clone(), &second, groups.clone(), right);
                let columns = stride.min(first.rows - groups.start * GROUP);
                let halves = left.chunks_exact_mut(stride).zip(right.chunks_exact(stride));
                for (row, (left, right)) in rows.clone().zip(halves) {
                    finish(row, groups.start * GROUP, &mut left[..columns], &right[..columns]);
                }
            }
        }
    });
}

/// Whether [`gated_mlp`] takes these matrices: the halves of the first must lie in groups of their own.
pub fn gated_mlp_fits(gate_up: &PackedMatrix<'_>, down: &PackedMatrix<'_>) -> bool {
    let halves = match gate_up.segments() {
        [whole] => whole.rows.is_multiple_of(2 * GROUP),
        [first, second] => first.rows == second.rows,
        _ => false,
    };
    halves && gate_up.rows() == 2 * down.columns()
}

/// `y = x + down · (act(gate · n) * (up · n))` with `n = norm(x)`, all `[rows, hidden]`.
///
/// # Panics
/// If the matrices do not fit ([`gated_mlp_fits`]) or the slices have other sizes than they.
pub fn gated_mlp<X: Element>(
    x: &[X],
    norm: Norm<'_>,
    gate_up: &PackedMatrix<'_>,
    down: &PackedMatrix<'_>,
    activation: Activation,
    y: &mut [X],
) {
    assert!(gated_mlp_fits(gate_up, down), "gate and up are not the halves of one matrix");
    with_frame(|frame| {
        let normed = prepare(frame, x, gate_up.columns(), Forms::of(gate_up), Some(norm));
        let (rows, inner_columns) = (normed.rows, down.columns());
        let inner = frame.take::<f32>(rows * inner_columns);
        let shared = Shared::new(inner);
        product_of_halves(&normed, gate_up, |row, column, gate, up| {
            math::activate(level(), gate, activation);
            let range = row * inner_columns + column..row * inner_columns + column + gate.len();
            // SAFETY: each element is finished once.
            let inner = unsafe { shared.slice(range) };
            inner.iter_mut().zip(gate.iter().zip(up)).for_each(|(inner, (gate, up))| *inner = gate * up);
        });
        let inner = prepare_rows(frame, inner, down);
        product_into(&inner, down, Epilogue { bias: None, residual: Some(x) }, y);
    });
}

/// Prepares rows of f32 for a product with a matrix.
pub fn prepare_rows<'w>(frame: &'w Frame, rows: &[f32], weight: &PackedMatrix<'_>) -> Prepared<'w> {
    let columns = weight.columns();
    let read = |row: usize, values: &mut [f32]| values.copy_from_slice(&rows[row * columns..][..columns]);
    prepare_with(frame, rows.len() / columns, columns, Forms::of(weight), read)
}

/// The output feature that a segment begins with.
fn first_feature(weight: &PackedMatrix<'_>, segment: usize) -> usize {
    weight.segments()[..segment].iter().map(|segment| segment.rows).sum()
}

/// Rows in tiles of nearly equal size, for a short last one would cost as much as a long one.
fn row_tiles(rows: usize) -> impl Iterator<Item = Range<usize>> {
    let tiles = rows.div_ceil(TILE_ROWS).max(1);
    (0..tiles).map(move |tile| tile * rows / tiles..(tile + 1) * rows / tiles)
}

fn pieces(range: Range<usize>, len: usize) -> impl Iterator<Item = Range<usize>> {
    range.clone().step_by(len).map(move |start| start..(start + len).min(range.end))
}

/// The groups of a product's segments, cut into parts for threads.
struct Work {
    /// Groups of all segments.
    groups: usize,
    /// Groups of each segment.
    segments: [usize; crate::packed::SEGMENTS_MAX],
    /// Groups of a part.
    part: usize,
}

impl Work {
    fn of(segments: &[PackedSegment<'_>], rows: usize) -> Self {
        let mut counts = [0; crate::packed::SEGMENTS_MAX];
        counts.iter_mut().zip(segments).for_each(|(count, segment)| *count = segment.groups());
        let groups: usize = counts.iter().sum();
        let part = if rows <= TILE_ROWS {
            // Memory is the limit: each thread reads one stream.
            groups.div_ceil(threads())
        } else {
            // Small enough that no thread waits long for the last, a multiple of what a tile takes at once.
            const PARTS_PER_THREAD: usize = 8;
            (groups / (PARTS_PER_THREAD * threads())).next_multiple_of(2).clamp(2, TILE_GROUPS * 2)
        };
        Self { groups, segments: counts, part: part.max(1) }
    }

    /// Calls `body` with segment and groups of each part; a part that spans segments is several calls.
    fn run(&self, body: impl Fn(usize, Range<usize>) + Sync) {
        parallel_for(self.groups.div_ceil(self.part), |index| {
            let part = index * self.part..((index + 1) * self.part).min(self.groups);
            let mut begin = 0;
            for (segment, count) in self.segments.iter().enumerate() {
                let (start, end) = (part.start.max(begin), part.end.min(begin + count));
                if start < end {
                    body(segment, start - begin..end - begin);
                }
                begin += count;
            }
        });
    }
}

/// A result whose disjoint parts are written by several threads.
pub(crate) struct Shared<'a, T> {
    start: *mut T,
    len: usize,
    _lent: std::marker::PhantomData<&'a mut [T]>,
}

// SAFETY: parts are only handed out by `slice`, whose callers keep them disjoint.
unsafe impl<T: Send> Sync for Shared<'_, T> {}

impl<'a, T> Shared<'a, T> {
    pub fn new(slice: &'a mut [T]) -> Self {
        Self { start: slice.as_mut_ptr(), len: slice.len(), _lent: std::marker::PhantomData }
    }

    /// # Safety
    /// No two slices that live at the same time overlap.
    #[expect(clippy::mut_from_ref, reason = "the caller keeps them disjoint")]
    pub unsafe fn slice(&self, range: Range<usize>) -> &mut [T] {
        assert!(range.start <= range.end && range.end <= self.len, "a part of the result");
        // SAFETY: within the slice that is lent; disjoint as the caller promises.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(range.start), range.len()) }
    }
}
