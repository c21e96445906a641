//! Plain computations on registers.

use crate::{
    interpret::{
        fault::FaultKind,
        memory::all_undefined,
        number::{from_f32, round_bf16, to_f32},
        product,
        program::Lanes,
        register::Register,
        shuffle,
    },
    ir::{Binary, OpKind, Predicate, Scalar, Unary},
    types::Elem,
};

/// Operands of a computation: registers with their element types and shapes.
pub(super) struct Operands<'a> {
    pub registers: &'a [Register],
    pub lanes: &'a [Lanes],
    /// Of the operands, then of the result; empty for scalars.
    pub shapes: &'a [Vec<usize>],
}

impl<'a> Operands<'a> {
    pub fn register(&self, index: usize) -> &'a Register {
        &self.registers[self.lanes[index].reg]
    }

    pub fn elem(&self, index: usize) -> Elem {
        self.lanes[index].elem
    }

    pub fn shape(&self, index: usize) -> &'a [usize] {
        &self.shapes[index]
    }

    pub fn result_shape(&self) -> &'a [usize] {
        &self.shapes[self.lanes.len()]
    }
}

/// Computes `out`, which is none of the operands.
pub(super) fn compute(kind: &OpKind, elem: Elem, operands: &Operands<'_>, out: &mut Register) -> Result<(), FaultKind> {
    match kind {
        OpKind::Constant(number) => {
            out.dirty = false;
            out.lanes.fill(constant(*number, elem));
        }
        OpKind::Unary(op) => unary(*op, elem, operands.register(0), out),
        OpKind::Binary(op) if elem.is_float() => {
            let (a, b) = (operands.register(0), operands.register(1));
            float_binary(*op, a, b, out);
            if elem == Elem::Bf16 {
                out.lanes.iter_mut().for_each(|lane| *lane = round_bf16(*lane));
            }
            out.taint2(a, b, elem);
        }
        OpKind::Binary(op) => int_binary(*op, elem, operands.register(0), operands.register(1), out)?,
        OpKind::Compare(predicate) => compare(*predicate, operands, out),
        OpKind::Select => select(operands, elem, out),
        OpKind::Cast => cast(operands.elem(0), elem, operands.register(0), out),
        OpKind::Bitcast => shuffle::bitcast(operands, elem, out),
        OpKind::AssumeMultiple(multiple) => {
            let value = operands.register(0).lanes[0] as i32;
            if i64::from(value) % i64::from(*multiple) != 0 {
                return Err(FaultKind::NotMultiple { value, multiple: *multiple });
            }
            out.clone_from(operands.register(0));
        }
        OpKind::Freeze => freeze(operands.register(0), out),
        OpKind::IndexCast | OpKind::ShapeCast => out.clone_from(operands.register(0)),
        OpKind::Reduce(reduction, axis) => product::reduce(*reduction, *axis, elem, operands, out),
        OpKind::Matmul(matmul) => product::matmul(*matmul, operands, out),
        OpKind::Iota(axis) => shuffle::iota(*axis, operands, out),
        OpKind::Broadcast => shuffle::broadcast(operands, out),
        OpKind::Transpose(permutation) => shuffle::transpose(permutation, operands, out),
        OpKind::Concatenate(axis) => shuffle::concatenate(*axis, operands, out),
        OpKind::Slice(offsets) => shuffle::slice(offsets, operands, out),
        OpKind::Rotate { axis, stride } => shuffle::rotate(*axis, *stride, operands, out)?,
        OpKind::Gather(axis) => shuffle::gather(*axis, elem, operands, out)?,
        OpKind::Extract(position) => shuffle::extract(position, operands, out),
        other => unreachable!("{} is no plain computation", other.name()),
    }
    Ok(())
}

/// Lanes that are undefined get bits that differ from lane to lane.
fn freeze(a: &Register, out: &mut Register) {
    out.dirty = false;
    for (lane, number) in out.lanes.iter_mut().enumerate() {
        *number = if a.shadow_of(lane) == 0 { a.lanes[lane] } else { (lane as u32 + 1).wrapping_mul(0x9E37_79B1) };
    }
}

fn constant(number: Scalar, elem: Elem) -> u32 {
    match number {
        Scalar::Int(value) => value as u32,
        Scalar::Float(value) => from_f32(elem, value),
    }
}

fn map(out: &mut Register, a: &Register, f: impl Fn(u32) -> u32) {
    out.lanes.iter_mut().zip(&a.lanes).for_each(|(out, a)| *out = f(*a));
}

fn map2(out: &mut Register, a: &Register, b: &Register, f: impl Fn(u32, u32) -> u32) {
    let pairs = a.lanes.iter().zip(&b.lanes);
    out.lanes.iter_mut().zip(pairs).for_each(|(out, (a, b))| *out = f(*a, *b));
}

fn unary(op: Unary, elem: Elem, a: &Register, out: &mut Register) {
    // Masks rather than a test inside of the loop, so that it stays a loop over vectors.
    let float = |out: &mut Register, f: fn(f32) -> f32| map(out, a, |lane| f(f32::from_bits(lane)).to_bits());
    match op {
        Unary::Exp => float(out, f32::exp),
        Unary::Exp2 => float(out, f32::exp2),
        Unary::Log => float(out, f32::ln),
        Unary::Tanh => float(out, f32::tanh),
        Unary::Sqrt => map(out, a, |lane| f32::from_bits(lane).sqrt().to_bits()),
        Unary::Rsqrt => map(out, a, |lane| (1.0 / f64::from(f32::from_bits(lane)).sqrt()).to_f32_bits()),
        Unary::AbsFloat => map(out, a, |lane| lane & 0x7FFF_FFFF),
        Unary::AbsInt => map(out, a, |lane| (lane as i32).wrapping_abs() as u32),
        Unary::Floor => float(out, f32::floor),
        Unary::Ceil => float(out, f32::ceil),
        Unary::RoundEven => float(out, f32::round_ties_even),
        Unary::Reciprocal { .. } => map(out, a, |lane| (1.0 / f32::from_bits(lane)).to_bits()),
    }
    if elem == Elem::Bf16 {
        out.lanes.iter_mut().for_each(|lane| *lane = round_bf16(*lane));
    }
    out.taint(a, elem);
}

trait ToF32Bits {
    fn to_f32_bits(self) -> u32;
}

impl ToF32Bits for f64 {
    fn to_f32_bits(self) -> u32 {
        (self as f32).to_bits()
    }
}

fn float_binary(op: Binary, a: &Register, b: &Register, out: &mut Register) {
    macro_rules! apply {
        (|$x:ident, $y:ident| $result:expr) => {
            map2(out, a, b, |x, y| {
                let ($x, $y) = (f32::from_bits(x), f32::from_bits(y));
                f32::to_bits($result)
            })
        };
    }
    match op {
        Binary::Add => apply!(|x, y| x + y),
        Binary::Sub => apply!(|x, y| x - y),
        Binary::Mul => apply!(|x, y| x * y),
        Binary::Div => apply!(|x, y| x / y),
        Binary::Max => apply!(|x, y| if x > y || x.is_nan() { x } else { y }),
        Binary::Min => apply!(|x, y| if x < y || x.is_nan() { x } else { y }),
        other => unreachable!("there is no {} of floats", other.name()),
    }
}

fn int_binary(op: Binary, elem: Elem, a: &Register, b: &Register, out: &mut Register) -> Result<(), FaultKind> {
    macro_rules! apply {
        (|$x:ident, $y:ident| $result:expr) => {
            map2(out, a, b, |x, y| {
                let ($x, $y) = (x as i32, y as i32);
                $result as u32
            })
        };
    }
    match op {
        Binary::Add => apply!(|x, y| x.wrapping_add(y)),
        Binary::Sub => apply!(|x, y| x.wrapping_sub(y)),
        Binary::Mul => apply!(|x, y| x.wrapping_mul(y)),
        Binary::Max => apply!(|x, y| x.max(y)),
        Binary::Min => apply!(|x, y| x.min(y)),
        Binary::And => map2(out, a, b, |x, y| x & y),
        Binary::Or => map2(out, a, b, |x, y| x | y),
        Binary::Xor => map2(out, a, b, |x, y| x ^ y),
        // Distances of 32 and more are undefined in MLIR; the model shifts everything out.
        Binary::ShiftLeft => map2(out, a, b, |x, y| x.checked_shl(y).unwrap_or(0)),
        Binary::ShiftRight => apply!(|x, y| x >> (y as u32).min(31)),
        Binary::ShiftRightLogical => map2(out, a, b, |x, y| x.checked_shr(y).unwrap_or(0)),
        Binary::Div | Binary::Rem => {
            if (0..b.lanes.len()).any(|lane| b.lanes[lane] == 0 && b.shadow_of(lane) == 0) {
                return Err(FaultKind::DivisionByZero);
            }
            match op {
                Binary::Div => apply!(|x, y| x.wrapping_div(if y == 0 { 1 } else { y })),
                _ => apply!(|x, y| x.wrapping_rem(if y == 0 { 1 } else { y })),
            }
        }
    }
    match op {
        Binary::And | Binary::Or | Binary::Xor => out.taint_bits(op, a, b, elem),
        Binary::ShiftLeft | Binary::ShiftRight | Binary::ShiftRightLogical => out.taint_bits(op, a, b, elem),
        _ => out.taint2(a, b, elem),
    }
    Ok(())
}

fn compare(predicate: Predicate, operands: &Operands<'_>, out: &mut Register) {
    let (a, b) = (operands.register(0), operands.register(1));
    macro_rules! apply {
        ($x:ident $y:ident $read:expr) => {{
            let read = $read;
            match predicate {
                Predicate::Eq => map2(out, a, b, |x, y| u32::from(read(x) == read(y))),
                Predicate::Ne => map2(out, a, b, |x, y| u32::from(read(x) != read(y))),
                Predicate::Lt => map2(out, a, b, |x, y| u32::from(read(x) < read(y))),
                Predicate::Le => map2(out, a, b, |x, y| u32::from(read(x) <= read(y))),
                Predicate::Gt => map2(out, a, b, |x, y| u32::from(read(x) > read(y))),
                Predicate::Ge => map2(out, a, b, |x, y| u32::from(read(x) >= read(y))),
            }
        }};
    }
    if operands.elem(0).is_float() {
        apply!(x y f32::from_bits);
    } else {
        apply!(x y |lane: u32| lane as i32);
    }
    out.taint2(a, b, Elem::I1);
}

fn select(operands: &Operands<'_>, elem: Elem, out: &mut Register) {
    let (mask, a, b) = (operands.register(0), operands.register(1), operands.register(2));
    let lanes = out.lanes.iter_mut().zip(mask.lanes.iter().zip(a.lanes.iter().zip(&b.lanes)));
    lanes.for_each(|(out, (mask, (a, b)))| *out = if *mask != 0 { *a } else { *b });
    out.dirty = mask.dirty || a.dirty || b.dirty;
    if out.dirty {
        for lane in 0..out.lanes.len() {
            let chosen = if mask.lanes[lane] != 0 { a } else { b };
            out.shadow[lane] = if mask.shadow_of(lane) == 0 { chosen.shadow_of(lane) } else { all_undefined(elem) };
        }
    }
}

fn cast(from: Elem, to: Elem, a: &Register, out: &mut Register) {
    let narrow = |lane: u32| {
        let unused = 32 - to.bits();
        (((lane << unused) as i32) >> unused) as u32
    };
    match (from.is_float(), to.is_float()) {
        (true, true) if to == Elem::Bf16 => map(out, a, |lane| round_bf16(to_f32(from, lane).to_bits())),
        (true, true) => map(out, a, |lane| from_f32(to, to_f32(from, lane))),
        // Saturates, and NaN becomes 0.
        (true, false) => map(out, a, |lane| narrow(to_f32(from, lane) as i32 as u32)),
        (false, true) => map(out, a, |lane| from_f32(to, lane as i32 as f32)),
        (false, false) => map(out, a, narrow),
    }
    // The low bytes of an integer are what stays.
    let cut = from.is_int() && to.is_int() && from.bits() > to.bits() && to.bits() >= 8;
    out.taint(a, to);
    if cut && out.dirty {
        out.shadow.iter_mut().zip(&a.shadow).for_each(|(out, a)| *out = a & all_undefined(to));
    }
}
