//! Operations that move lanes.

use crate::{
    interpret::{compute::Operands, fault::FaultKind, memory::all_undefined, register::Register},
    kernel::MAX_RANK,
    types::Elem,
};

/// Row-major strides of a shape.
fn strides(dims: &[usize]) -> Vec<usize> {
    let mut strides = vec![1; dims.len()];
    for axis in (1..dims.len()).rev() {
        strides[axis - 1] = strides[axis] * dims[axis];
    }
    strides
}

/// Fills a box of `dims` at `to`, with steps `to_strides`, from elements of `source` at `from` with steps
/// `from_strides`.
struct Walk<'a> {
    dims: &'a [usize],
    from: usize,
    from_strides: &'a [usize],
    to: usize,
    to_strides: &'a [usize],
}

impl Walk<'_> {
    fn copy<T: Copy>(&self, source: &[T], target: &mut [T]) {
        let Some(last) = self.dims.len().checked_sub(1) else {
            target[self.to] = source[self.from];
            return;
        };
        let count = self.dims[last];
        let (from_step, to_step) = (self.from_strides[last], self.to_strides[last]);
        let mut index = [0; MAX_RANK];
        loop {
            let at = |base: usize, strides: &[usize]| (0..last).fold(base, |at, axis| at + index[axis] * strides[axis]);
            let (from, to) = (at(self.from, self.from_strides), at(self.to, self.to_strides));
            match (from_step, to_step) {
                (1, 1) => target[to..to + count].copy_from_slice(&source[from..from + count]),
                (0, 1) => target[to..to + count].fill(source[from]),
                _ => (0..count).for_each(|i| target[to + i * to_step] = source[from + i * from_step]),
            }
            let Some(axis) = (0..last).rev().find(|axis| index[*axis] + 1 < self.dims[*axis]) else { return };
            index[axis] += 1;
            index[axis + 1..].fill(0);
        }
    }

    fn apply(&self, source: &Register, out: &mut Register) {
        self.copy(&source.lanes, &mut out.lanes);
        if source.dirty {
            self.copy(&source.shadow, &mut out.shadow);
        }
    }
}

pub(super) fn broadcast(operands: &Operands<'_>, out: &mut Register) {
    let (source, from, dims) = (operands.register(0), operands.shape(0), operands.result_shape());
    let own = strides(from);
    let from_strides: Vec<_> = (0..dims.len())
        .map(|axis| if from.is_empty() || (from[axis] == 1 && dims[axis] != 1) { 0 } else { own[axis] })
        .collect();
    out.dirty = source.dirty;
    Walk { dims, from: 0, from_strides: &from_strides, to: 0, to_strides: &strides(dims) }.apply(source, out);
}

pub(super) fn transpose(permutation: &[usize], operands: &Operands<'_>, out: &mut Register) {
    let (source, dims) = (operands.register(0), operands.result_shape());
    let own = strides(operands.shape(0));
    let from_strides: Vec<_> = permutation.iter().map(|axis| own[*axis]).collect();
    out.dirty = source.dirty;
    Walk { dims, from: 0, from_strides: &from_strides, to: 0, to_strides: &strides(dims) }.apply(source, out);
}

pub(super) fn slice(offsets: &[usize], operands: &Operands<'_>, out: &mut Register) {
    let (source, dims) = (operands.register(0), operands.result_shape());
    let own = strides(operands.shape(0));
    let from = offsets.iter().zip(&own).map(|(offset, stride)| offset * stride).sum();
    out.dirty = source.dirty;
    Walk { dims, from, from_strides: &own, to: 0, to_strides: &strides(dims) }.apply(source, out);
}

pub(super) fn extract(position: &[usize], operands: &Operands<'_>, out: &mut Register) {
    let own = strides(operands.shape(0));
    let from: usize = position.iter().zip(&own).map(|(at, stride)| at * stride).sum();
    let source = operands.register(0);
    out.lanes[0] = source.lanes[from];
    out.shadow[0] = source.shadow_of(from);
    out.dirty = out.shadow[0] != 0;
}

pub(super) fn concatenate(axis: usize, operands: &Operands<'_>, out: &mut Register) {
    let to_strides = strides(operands.result_shape());
    out.dirty = (0..operands.lanes.len()).any(|i| operands.register(i).dirty);
    if out.dirty {
        out.shadow.fill(0);
    }
    let mut to = 0;
    for i in 0..operands.lanes.len() {
        let dims = operands.shape(i);
        Walk { dims, from: 0, from_strides: &strides(dims), to, to_strides: &to_strides }
            .apply(operands.register(i), out);
        to += dims[axis] * to_strides[axis];
    }
}

pub(super) fn iota(axis: usize, operands: &Operands<'_>, out: &mut Register) {
    let dims = operands.result_shape();
    let (stride, size) = (strides(dims)[axis], dims[axis]);
    out.dirty = false;
    if stride == 1 {
        let lines = out.lanes.chunks_mut(size);
        lines.for_each(|line| line.iter_mut().enumerate().for_each(|(i, lane)| *lane = i as u32));
    } else {
        let lines = out.lanes.chunks_mut(stride);
        lines.enumerate().for_each(|(i, line)| line.fill((i % size) as u32));
    }
}

/// Between element widths, rows of words become rows of elements and back; see `number.rs`.
pub(super) fn bitcast(operands: &Operands<'_>, to: Elem, out: &mut Register) {
    let (source, from) = (operands.register(0), operands.elem(0));
    if from.bits() == to.bits() {
        out.clone_from(source);
        return;
    }
    let columns = operands.result_shape().last().copied().unwrap_or(1);
    let (narrow_in, narrow_out) = (from.packing(), to.packing());
    out.dirty = source.dirty;
    if out.dirty {
        out.shadow.fill(0);
    }
    if narrow_in == 1 && !source.dirty {
        let rows = source.lanes.chunks(columns).zip(out.lanes.chunks_mut(columns * narrow_out));
        for (words, lanes) in rows {
            let parts = lanes.chunks_mut(columns).enumerate();
            parts.for_each(|(sub, lanes)| super::number::decode_run(to, sub, words, lanes));
        }
        return;
    }
    out.lanes.fill(0);
    for word in 0..source.lanes.len() / narrow_in {
        let (row, column) = (word / columns, word % columns);
        let lane = |packing: usize, sub: usize| (row * packing + sub) * columns + column;
        let (mut bits, mut shadow) = (0, 0);
        for sub in 0..narrow_in {
            bits = super::number::encode(from, bits, sub, source.lanes[lane(narrow_in, sub)]);
            shadow |= source.shadow_of(lane(narrow_in, sub)) << (sub * from.bits() / 8);
        }
        for sub in 0..narrow_out {
            out.lanes[lane(narrow_out, sub)] = super::number::decode(to, bits, sub);
            if out.dirty {
                out.shadow[lane(narrow_out, sub)] = (shadow >> (sub * to.bits() / 8)) & all_undefined(to);
            }
        }
    }
}

/// Calls `visit` with each line along an axis: its first element, and the steps along it.
fn lines(dims: &[usize], axis: usize, mut visit: impl FnMut(usize)) {
    let stride = strides(dims)[axis];
    let block = stride * dims[axis];
    let elements: usize = dims.iter().product();
    for outer in (0..elements).step_by(block) {
        (outer..outer + stride).for_each(&mut visit);
    }
}

pub(super) fn rotate(
    axis: usize,
    stride: Option<(usize, usize)>,
    operands: &Operands<'_>,
    out: &mut Register,
) -> Result<(), FaultKind> {
    let (source, by, dims) = (operands.register(0), operands.register(1), operands.shape(0));
    if by.is_undefined() {
        return Err(FaultKind::UndefinedControl { what: "distance" });
    }
    let (size, step) = (dims[axis], strides(dims)[axis]);
    let base = by.lanes[0] as i32;
    if base < 0 {
        return Err(FaultKind::Index { index: base.into(), size });
    }
    out.dirty = source.dirty;
    lines(dims, axis, |first| {
        let more = stride.map_or(0, |(stride, row_axis)| first / strides(dims)[row_axis] % dims[row_axis] * stride);
        let by = (base as usize + more) % size;
        for i in 0..size {
            let (to, from) = (first + (i + by) % size * step, first + i * step);
            out.lanes[to] = source.lanes[from];
            if source.dirty {
                out.shadow[to] = source.shadow[from];
            }
        }
    });
    Ok(())
}

pub(super) fn gather(axis: usize, elem: Elem, operands: &Operands<'_>, out: &mut Register) -> Result<(), FaultKind> {
    let (source, indices, dims) = (operands.register(0), operands.register(1), operands.shape(0));
    let (size, step) = (dims[axis], strides(dims)[axis]);
    out.dirty = source.dirty || indices.dirty;
    let mut outside = None;
    lines(dims, axis, |first| {
        for i in 0..size {
            let at = first + i * step;
            let index = indices.lanes[at] as i32;
            let known = indices.shadow_of(at) == 0;
            let from = usize::try_from(index).ok().filter(|index| *index < size);
            if from.is_none() && known {
                outside.get_or_insert(FaultKind::Index { index: index.into(), size });
            }
            let from = first + from.unwrap_or(0) * step;
            out.lanes[at] = source.lanes[from];
            if out.dirty {
                out.shadow[at] = if known { source.shadow_of(from) } else { all_undefined(elem) };
            }
        }
    });
    outside.map_or(Ok(()), Err)
}
