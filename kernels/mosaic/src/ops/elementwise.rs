//! Arithmetic, comparison and selection, lane by lane. Scalars and axes of size 1 are broadcast.

use std::ops;

use crate::{
    IntoValue, Value,
    ir::{Binary, OpKind, Predicate, Scalar, Unary},
    types::{Elem, Type},
};

impl<'k> Value<'k> {
    #[track_caller]
    fn unary(self, unary: Unary) -> Value<'k> {
        let wants_float = unary != Unary::AbsInt;
        self.k.value(OpKind::Unary(unary), &[self], |types| match types[0].elem() {
            Some(Elem::F32 | Elem::Bf16) if wants_float => Ok(types[0].clone()),
            Some(Elem::I32) if !wants_float => Ok(types[0].clone()),
            _ => Err("the operand must be f32 or bf16".to_owned()),
        })
    }

    /// `e` to the power. The interpreter computes it as the platform's `f32` function; a TPU differs in the last bits.
    #[track_caller]
    pub fn exp(self) -> Value<'k> {
        self.unary(Unary::Exp)
    }

    /// 2 to the power, the cheapest exponential of a TPU.
    #[track_caller]
    pub fn exp2(self) -> Value<'k> {
        self.unary(Unary::Exp2)
    }

    #[track_caller]
    pub fn log(self) -> Value<'k> {
        self.unary(Unary::Log)
    }

    #[track_caller]
    pub fn tanh(self) -> Value<'k> {
        self.unary(Unary::Tanh)
    }

    #[track_caller]
    pub fn sqrt(self) -> Value<'k> {
        self.unary(Unary::Sqrt)
    }

    /// One over the square root.
    #[track_caller]
    pub fn rsqrt(self) -> Value<'k> {
        self.unary(Unary::Rsqrt)
    }

    #[track_caller]
    pub fn floor(self) -> Value<'k> {
        self.unary(Unary::Floor)
    }

    #[track_caller]
    pub fn ceil(self) -> Value<'k> {
        self.unary(Unary::Ceil)
    }

    /// To the nearest whole number, halves to the even one.
    #[track_caller]
    pub fn round(self) -> Value<'k> {
        self.unary(Unary::RoundEven)
    }

    #[track_caller]
    pub fn abs(self) -> Value<'k> {
        self.unary(if self.elem() == Elem::I32 { Unary::AbsInt } else { Unary::AbsFloat })
    }

    /// One over a vector. With `approximate`, a TPU gives about half of `f32`'s bits in a fraction of the time; the
    /// interpreter always gives the nearest `f32`.
    #[track_caller]
    pub fn reciprocal(self, approximate: bool) -> Value<'k> {
        self.unary(Unary::Reciprocal { approximate })
    }

    #[track_caller]
    pub fn max(self, other: impl IntoValue<'k>) -> Value<'k> {
        self.binary(Binary::Max, other)
    }

    #[track_caller]
    pub fn min(self, other: impl IntoValue<'k>) -> Value<'k> {
        self.binary(Binary::Min, other)
    }

    /// A shift that moves zeros in. `>>` moves the sign in.
    #[track_caller]
    pub fn shift_right_logical(self, other: impl IntoValue<'k>) -> Value<'k> {
        self.binary(Binary::ShiftRightLogical, other)
    }

    #[track_caller]
    fn binary(self, binary: Binary, other: impl IntoValue<'k>) -> Value<'k> {
        let (a, b) = self.paired(other);
        self.k.value(OpKind::Binary(binary), &[a, b], |types| {
            let elem = same_types(types)?;
            let fits = match binary {
                Binary::Add | Binary::Sub | Binary::Mul | Binary::Div | Binary::Max | Binary::Min => {
                    matches!(elem, Elem::F32 | Elem::Bf16 | Elem::I32)
                }
                Binary::Rem | Binary::ShiftLeft | Binary::ShiftRight | Binary::ShiftRightLogical => elem == Elem::I32,
                Binary::And | Binary::Or | Binary::Xor => matches!(elem, Elem::I32 | Elem::I1),
            };
            match fits {
                true => Ok(types[0].clone()),
                false => Err(format!("there is no {} of {elem}", binary.name())),
            }
        })
    }

    /// Both operands in the same shape.
    #[track_caller]
    fn paired(self, other: impl IntoValue<'k>) -> (Value<'k>, Value<'k>) {
        let other = other.into_value(self.k, self.elem());
        let (a, b) = (self.dims(), other.dims());
        match common_dims(&a, &b) {
            // The mismatch is reported by the operation.
            None => (self, other),
            Some(dims) => (self.spread(&dims), other.spread(&dims)),
        }
    }

    /// The value in these dimensions: itself, if it has them.
    #[track_caller]
    fn spread(self, dims: &[usize]) -> Value<'k> {
        if self.dims() == dims { self } else { self.broadcast(dims) }
    }

    #[track_caller]
    fn compare(self, predicate: Predicate, other: impl IntoValue<'k>) -> Value<'k> {
        let (a, b) = self.paired(other);
        self.k.value(OpKind::Compare(predicate), &[a, b], |types| match same_types(types)? {
            Elem::F32 | Elem::Bf16 | Elem::I32 => Ok(types[0].with_elem(Elem::I1)),
            elem => Err(format!("{elem} cannot be compared")),
        })
    }

    #[track_caller]
    pub fn lt(self, other: impl IntoValue<'k>) -> Value<'k> {
        self.compare(Predicate::Lt, other)
    }

    #[track_caller]
    pub fn le(self, other: impl IntoValue<'k>) -> Value<'k> {
        self.compare(Predicate::Le, other)
    }

    #[track_caller]
    pub fn gt(self, other: impl IntoValue<'k>) -> Value<'k> {
        self.compare(Predicate::Gt, other)
    }

    #[track_caller]
    pub fn ge(self, other: impl IntoValue<'k>) -> Value<'k> {
        self.compare(Predicate::Ge, other)
    }

    #[track_caller]
    pub fn eq(self, other: impl IntoValue<'k>) -> Value<'k> {
        self.compare(Predicate::Eq, other)
    }

    /// True for NaN, as usual.
    #[track_caller]
    pub fn ne(self, other: impl IntoValue<'k>) -> Value<'k> {
        // Of floats the compiler knows only comparisons that are false for NaN.
        if self.elem().is_float() { !self.eq(other) } else { self.compare(Predicate::Ne, other) }
    }

    /// `on_true` where this mask holds, else `on_false`. A scalar condition chooses between whole vectors.
    #[track_caller]
    pub fn select(self, on_true: Value<'k>, on_false: impl IntoValue<'k>) -> Value<'k> {
        let (a, b) = on_true.paired(on_false);
        let (mask, a, b) = match common_dims(&self.dims(), &a.dims()) {
            Some(dims) => (self.spread(&dims), a.spread(&dims), b.spread(&dims)),
            None => (self, a, b),
        };
        self.k.value(OpKind::Select, &[mask, a, b], |types| {
            same_types(&types[1..])?;
            match types[0] == types[1].with_elem(Elem::I1) {
                true => Ok(types[1].clone()),
                false => Err(format!("{} is no mask of {}", types[0], types[1])),
            }
        })
    }
}

/// The shape of an elementwise operation's result.
fn common_dims(a: &[usize], b: &[usize]) -> Option<Vec<usize>> {
    if a.is_empty() || b.is_empty() {
        return Some(if a.is_empty() { b } else { a }.to_vec());
    }
    let pair = |(a, b): (&usize, &usize)| (a == b || *a == 1 || *b == 1).then(|| *a.max(b));
    if a.len() == b.len() { a.iter().zip(b).map(pair).collect() } else { None }
}

fn same_types(types: &[Type]) -> Result<Elem, String> {
    match (types[0].elem(), types[0] == types[1]) {
        (Some(elem), true) => Ok(elem),
        _ => Err("the operands' types differ".to_owned()),
    }
}

macro_rules! operators {
    ($($trait:ident $method:ident $binary:ident;)*) => {$(
        impl<'k, T: IntoValue<'k>> ops::$trait<T> for Value<'k> {
            type Output = Value<'k>;

            #[track_caller]
            fn $method(self, other: T) -> Value<'k> {
                self.binary(Binary::$binary, other)
            }
        }
    )*};
}

operators! {
    Add add Add;
    Sub sub Sub;
    Mul mul Mul;
    Div div Div;
    Rem rem Rem;
    BitAnd bitand And;
    BitOr bitor Or;
    BitXor bitxor Xor;
    Shl shl ShiftLeft;
    Shr shr ShiftRight;
}

impl<'k> ops::Neg for Value<'k> {
    type Output = Value<'k>;

    #[track_caller]
    fn neg(self) -> Value<'k> {
        // From minus zero, so that zero becomes minus zero.
        let elem = self.elem();
        let zero = if elem.is_float() { Scalar::Float(-0.0) } else { Scalar::Int(0) };
        self.k.constant(Type::Scalar(elem), zero) - self
    }
}

impl<'k> ops::Not for Value<'k> {
    type Output = Value<'k>;

    /// Of masks and of bits.
    #[track_caller]
    fn not(self) -> Value<'k> {
        let ones = if self.elem() == Elem::I1 { 1 } else { -1 };
        self ^ ones
    }
}
