//! Products and sums: where the order of additions is the interpreter's own.

use crate::{
    interpret::{
        compute::Operands,
        memory::all_undefined,
        number::{round_bf16, to_f32},
        register::Register,
    },
    ir::{Product, Reduction},
    types::Elem,
};

/// Additions happen in the order of the summed axis, each rounded to `f32`; the sum so far is added last, as the matrix
/// unit's result buffer does.
pub(super) fn matmul(product: Product, operands: &Operands<'_>, out: &mut Register) {
    let (a_shape, b_shape) = (operands.shape(0), operands.shape(1));
    let (m, n) = (a_shape[1 - product.lhs_axis], b_shape[1 - product.rhs_axis]);
    let k = a_shape[product.lhs_axis];
    let acc = operands.register(2);
    if operands.elem(2) == Elem::I32 {
        let read = |lane: u32| lane as i32;
        let a = arranged(operands.register(0), product.lhs_axis == 0, m, k, read);
        let b = arranged(operands.register(1), product.rhs_axis == 1, k, n, read);
        let sums = multiply(&a, &b, (m, k, n), 0_i32, |sum, a, b| sum.wrapping_add(a * b));
        let pairs = sums.iter().zip(&acc.lanes);
        out.lanes.iter_mut().zip(pairs).for_each(|(out, (sum, acc))| *out = sum.wrapping_add(*acc as i32) as u32);
    } else {
        let reader = |elem: Elem| {
            move |lane: u32| match elem == Elem::F32 && !product.exact {
                true => f32::from_bits(round_bf16(lane)),
                false => to_f32(elem, lane),
            }
        };
        let a = arranged(operands.register(0), product.lhs_axis == 0, m, k, reader(operands.elem(0)));
        let b = arranged(operands.register(1), product.rhs_axis == 1, k, n, reader(operands.elem(1)));
        let sums = multiply(&a, &b, (m, k, n), 0.0_f32, |sum, a, b| sum + a * b);
        let pairs = sums.iter().zip(&acc.lanes);
        out.lanes.iter_mut().zip(pairs).for_each(|(out, (sum, acc))| *out = (sum + f32::from_bits(*acc)).to_bits());
    }
    taint(product, operands, (m, k, n), out);
}

/// A matrix in row-major order, transposed first if it is stored the other way round.
fn arranged<T>(source: &Register, transposed: bool, rows: usize, columns: usize, read: impl Fn(u32) -> T) -> Vec<T> {
    match transposed {
        false => source.lanes.iter().map(|lane| read(*lane)).collect(),
        true => (0..rows * columns).map(|i| read(source.lanes[i % columns * rows + i / columns])).collect(),
    }
}

/// Four rows of the result at a time, so that each row of `b` is read once for them.
fn multiply<T: Copy>(
    a: &[T],
    b: &[T],
    (m, k, n): (usize, usize, usize),
    zero: T,
    step: impl Fn(T, T, T) -> T,
) -> Vec<T> {
    let mut out = vec![zero; m * n];
    for (block, rows) in out.chunks_mut(4 * n).enumerate() {
        if rows.len() == 4 * n {
            let (first, rest) = rows.split_at_mut(n);
            let (second, rest) = rest.split_at_mut(n);
            let (third, fourth) = rest.split_at_mut(n);
            for i in 0..k {
                let factor = |row: usize| a[(4 * block + row) * k + i];
                let (w, x, y, z) = (factor(0), factor(1), factor(2), factor(3));
                let sums = first.iter_mut().zip(second.iter_mut()).zip(third.iter_mut().zip(fourth.iter_mut()));
                for (((s, t), (u, v)), b) in sums.zip(&b[i * n..(i + 1) * n]) {
                    *s = step(*s, w, *b);
                    *t = step(*t, x, *b);
                    *u = step(*u, y, *b);
                    *v = step(*v, z, *b);
                }
            }
        } else {
            for (row, sums) in rows.chunks_mut(n).enumerate() {
                for i in 0..k {
                    let factor = a[(4 * block + row) * k + i];
                    sums.iter_mut().zip(&b[i * n..(i + 1) * n]).for_each(|(sum, b)| *sum = step(*sum, factor, *b));
                }
            }
        }
    }
    out
}

/// An element of the product depends on a whole row of one operand and a whole column of the other: an undefined number
/// times zero is undefined, as a NaN would be.
fn taint(product: Product, operands: &Operands<'_>, (m, k, n): (usize, usize, usize), out: &mut Register) {
    let (a, b, acc) = (operands.register(0), operands.register(1), operands.register(2));
    out.dirty = a.dirty || b.dirty || acc.dirty;
    if !out.dirty {
        return;
    }
    let line = |register: &Register, summed_axis: usize, size: usize, at: usize| {
        let element = |i: usize| if summed_axis == 1 { at * k + i } else { i * size + at };
        register.dirty && (0..k).any(|i| register.shadow[element(i)] != 0)
    };
    let rows: Vec<_> = (0..m).map(|row| line(a, product.lhs_axis, m, row)).collect();
    let columns: Vec<_> = (0..n).map(|column| line(b, product.rhs_axis, n, column)).collect();
    for lane in 0..m * n {
        let undefined = rows[lane / n] || columns[lane % n] || acc.shadow_of(lane) != 0;
        out.shadow[lane] = if undefined { all_undefined(Elem::F32) } else { 0 };
    }
}

/// Along the last axis eight partial results, one for each eighth lane, are combined in order; along others elements are
/// combined in order.
pub(super) fn reduce(reduction: Reduction, axis: usize, elem: Elem, operands: &Operands<'_>, out: &mut Register) {
    let (source, shape) = (operands.register(0), operands.shape(0));
    let size = shape[axis];
    let inner: usize = shape[axis + 1..].iter().product();
    macro_rules! apply {
        ($read:expr, $write:expr, $combine:expr) => {{
            let (read, write, combine) = ($read, $write, $combine);
            if inner == 1 {
                for (out, line) in out.lanes.iter_mut().zip(source.lanes.chunks(size)) {
                    *out = write(partial(line, read, combine));
                }
            } else {
                let blocks = out.lanes.chunks_mut(inner).zip(source.lanes.chunks(size * inner));
                for (out, block) in blocks {
                    out.copy_from_slice(&block[..inner]);
                    for row in block[inner..].chunks(inner) {
                        let pairs = out.iter_mut().zip(row);
                        pairs.for_each(|(out, lane)| *out = write(combine(read(*out), read(*lane))));
                    }
                }
            }
        }};
    }
    let float = |lane: u32| f32::from_bits(lane);
    let int = |lane: u32| lane as i32;
    match (reduction, elem.is_float()) {
        (Reduction::Sum, true) => apply!(float, f32::to_bits, |x: f32, y: f32| x + y),
        (Reduction::Max, true) => apply!(float, f32::to_bits, |x: f32, y: f32| if x > y || x.is_nan() { x } else { y }),
        (Reduction::Min, true) => apply!(float, f32::to_bits, |x: f32, y: f32| if x < y || x.is_nan() { x } else { y }),
        (Reduction::Sum, false) => apply!(int, |x: i32| x as u32, |x: i32, y: i32| x.wrapping_add(y)),
        (Reduction::Max, false) => apply!(int, |x: i32| x as u32, |x: i32, y: i32| x.max(y)),
        (Reduction::Min, false) => apply!(int, |x: i32| x as u32, |x: i32, y: i32| x.min(y)),
    }
    if elem == Elem::Bf16 {
        out.lanes.iter_mut().for_each(|lane| *lane = round_bf16(*lane));
    }
    out.dirty = source.dirty;
    if source.dirty {
        for lane in 0..out.lanes.len() {
            let first = lane / inner * size * inner + lane % inner;
            let any = (0..size).any(|i| source.shadow[first + i * inner] != 0);
            out.shadow[lane] = if any { all_undefined(elem) } else { 0 };
        }
    }
}

fn partial<T: Copy>(line: &[u32], read: impl Fn(u32) -> T, combine: impl Fn(T, T) -> T) -> T {
    const WAYS: usize = 8;
    if line.len() < WAYS {
        return line[1..].iter().fold(read(line[0]), |sum, lane| combine(sum, read(*lane)));
    }
    let mut sums: [T; WAYS] = std::array::from_fn(|i| read(line[i]));
    let mut chunks = line[WAYS..].chunks_exact(WAYS);
    for chunk in &mut chunks {
        sums.iter_mut().zip(chunk).for_each(|(sum, lane)| *sum = combine(*sum, read(*lane)));
    }
    for (sum, lane) in sums.iter_mut().zip(chunks.remainder()) {
        *sum = combine(*sum, read(*lane));
    }
    sums[1..].iter().fold(sums[0], |sum, more| combine(sum, *more))
}
