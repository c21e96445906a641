//! Operations on one element at a time. Operands are broadcast by axis name: the axes of the result come from the
//! operand with the most axes, the left one of equals, and axes that only the other has follow.

use std::ops;

use torus_abi::DType;

use crate::{
    Axis, Scalar, Value,
    func::OpSpec,
    infer::elementwise::{self as infer, Class},
    ir::Attribute,
    value::IntoValue,
};

/// How two elements are compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    Eq,
    Ne,
    Lt,
    Le,
    Gt,
    Ge,
}

impl Direction {
    fn mlir(self) -> &'static str {
        match self {
            Direction::Eq => "EQ",
            Direction::Ne => "NE",
            Direction::Lt => "LT",
            Direction::Le => "LE",
            Direction::Gt => "GT",
            Direction::Ge => "GE",
        }
    }
}

macro_rules! unary {
    ($($(#[$doc:meta])* $method:ident: $class:ident $op:literal;)*) => {
        impl<'f> Value<'f> {$(
            $(#[$doc])*
            #[track_caller]
            pub fn $method(self) -> Self {
                let spec = OpSpec::new(concat!("stablehlo.", $op));
                self.func.emit(spec, &[self], |shapes| infer::unary(Class::$class, shapes))
            }
        )*}
    };
}

unary! {
    abs: Signed "abs";
    ceil: Float "ceil";
    cos: Float "cosine";
    exp: Float "exponential";
    /// `exp(x) - 1`.
    expm1: Float "exponential_minus_one";
    floor: Float "floor";
    log: Float "log";
    /// `log(1 + x)`.
    log1p: Float "log_plus_one";
    /// `1 / (1 + exp(-x))`.
    logistic: Float "logistic";
    /// To the nearest integer, halves to the even one.
    round_even: Float "round_nearest_even";
    /// `1 / sqrt(x)`.
    rsqrt: Float "rsqrt";
    /// -1, 0 or 1; zeros keep their sign.
    sign: Signed "sign";
    sin: Float "sine";
    sqrt: Float "sqrt";
    tanh: Float "tanh";
}

macro_rules! binary {
    ($($(#[$doc:meta])* $method:ident: $class:ident $op:literal;)*) => {
        impl<'f> Value<'f> {$(
            $(#[$doc])*
            #[track_caller]
            pub fn $method(self, other: impl IntoValue<'f>) -> Self {
                self.binary(OpSpec::new(concat!("stablehlo.", $op)), Class::$class, other.into_value(self.func, &self.shape()))
            }
        )*}
    };
}

binary! {
    /// The larger one; NaN if one is NaN.
    max: Number "maximum";
    /// The smaller one; NaN if one is NaN.
    min: Number "minimum";
    pow: Number "power";
    /// Fills with zeros from the left, also for signed integers.
    shift_right_logical: Integer "shift_right_logical";
    /// Keeps the sign, also of unsigned integers.
    shift_right_arithmetic: Integer "shift_right_arithmetic";
}

macro_rules! operator {
    ($($trait:ident::$method:ident $class:ident $op:literal;)*) => {$(
        impl<'f, T: IntoValue<'f>> ops::$trait<T> for Value<'f> {
            type Output = Value<'f>;

            #[track_caller]
            fn $method(self, other: T) -> Value<'f> {
                self.binary(OpSpec::new(concat!("stablehlo.", $op)), Class::$class, other.into_value(self.func, &self.shape()))
            }
        }
    )*};
}

operator! {
    Add::add Number "add";
    Sub::sub Number "subtract";
    Mul::mul Number "multiply";
    Div::div Number "divide";
    Rem::rem Number "remainder";
    BitAnd::bitand Bits "and";
    BitOr::bitor Bits "or";
    BitXor::bitxor Bits "xor";
    Shl::shl Integer "shift_left";
}

macro_rules! number_first {
    ($($trait:ident::$method:ident;)*) => {$(
        impl<'f> ops::$trait<Value<'f>> for f64 {
            type Output = Value<'f>;

            #[track_caller]
            fn $method(self, right: Value<'f>) -> Value<'f> {
                ops::$trait::$method(right.full_like(self), right)
            }
        }
    )*};
}

number_first! {
    Add::add;
    Sub::sub;
    Mul::mul;
    Div::div;
}

/// As in Rust: fills with zeros for unsigned integers and with the sign for signed ones.
impl<'f, T: IntoValue<'f>> ops::Shr<T> for Value<'f> {
    type Output = Value<'f>;

    #[track_caller]
    fn shr(self, other: T) -> Value<'f> {
        if self.dtype().is_unsigned() { self.shift_right_logical(other) } else { self.shift_right_arithmetic(other) }
    }
}

impl<'f> ops::Neg for Value<'f> {
    type Output = Value<'f>;

    #[track_caller]
    fn neg(self) -> Value<'f> {
        self.func.emit(OpSpec::new("stablehlo.negate"), &[self], |shapes| infer::unary(Class::Number, shapes))
    }
}

/// Inverts each bit, or each boolean.
impl<'f> ops::Not for Value<'f> {
    type Output = Value<'f>;

    #[track_caller]
    fn not(self) -> Value<'f> {
        self.func.emit(OpSpec::new("stablehlo.not"), &[self], |shapes| infer::unary(Class::Bits, shapes))
    }
}

macro_rules! compare {
    ($($(#[$doc:meta])* $method:ident $direction:ident;)*) => {
        impl<'f> Value<'f> {$(
            $(#[$doc])*
            #[track_caller]
            pub fn $method(self, other: impl IntoValue<'f>) -> Self {
                self.compare(Direction::$direction, other)
            }
        )*}
    };
}

compare! {
    eq Eq;
    ne Ne;
    lt Lt;
    le Le;
    gt Gt;
    ge Ge;
}

impl<'f> Value<'f> {
    #[track_caller]
    fn binary(self, spec: OpSpec, class: Class, other: Value<'f>) -> Self {
        let operands = align(&spec, &[self, other]);
        self.func.emit(spec, &operands, |shapes| infer::binary(class, shapes))
    }

    /// Compares element by element; with NaN only `Ne` holds.
    #[track_caller]
    pub fn compare(self, direction: Direction, other: impl IntoValue<'f>) -> Self {
        self.compare_as(direction, other.into_value(self.func, &self.shape()), None)
    }

    /// Compares floats in the total order of IEEE 754: -NaN < -inf < … < -0 < +0 < … < inf < NaN.
    #[track_caller]
    pub fn compare_total(self, direction: Direction, other: impl IntoValue<'f>) -> Self {
        let order = self.dtype().is_float().then_some("TOTALORDER");
        self.compare_as(direction, other.into_value(self.func, &self.shape()), order)
    }

    #[track_caller]
    fn compare_as(self, direction: Direction, other: Value<'f>, order: Option<&str>) -> Self {
        let verbatim = |text: String| Attribute::Verbatim(text);
        let direction = verbatim(format!("#stablehlo<comparison_direction {}>", direction.mlir()));
        let mut spec = OpSpec::new("stablehlo.compare").with("comparison_direction", direction);
        if let Some(order) = order {
            spec = spec.with("compare_type", verbatim(format!("#stablehlo<comparison_type {order}>")));
        }
        let operands = align(&spec, &[self, other]);
        self.func.emit(spec, &operands, infer::compare)
    }

    /// `on_true` where this (a boolean) holds, else `on_false`.
    #[track_caller]
    pub fn select(self, on_true: Value<'f>, on_false: impl IntoValue<'f>) -> Self {
        let spec = OpSpec::new("stablehlo.select");
        let operands = align(&spec, &[self, on_true, on_false.into_value(self.func, &on_true.shape())]);
        self.func.emit(spec, &operands, infer::select)
    }

    /// The nearest value between `low` and `high`.
    #[track_caller]
    pub fn clamp(self, low: impl IntoValue<'f>, high: impl IntoValue<'f>) -> Self {
        let spec = OpSpec::new("stablehlo.clamp");
        let shape = self.shape();
        let (low, high) = (low.into_value(self.func, &shape), high.into_value(self.func, &shape));
        let operands = align(&spec, &[low, self, high]);
        self.func.emit(spec, &operands, |shapes| infer::binary(Class::Number, shapes))
    }

    /// The nearest values of another dtype; floats become integers by dropping the fraction, numbers become booleans
    /// by comparison with zero. The same dtype is no operation.
    #[track_caller]
    pub fn convert(self, dtype: DType) -> Self {
        if self.dtype() == dtype {
            return self;
        }
        self.func.emit(OpSpec::new("stablehlo.convert"), &[self], |shapes| {
            infer::unary(Class::Any, shapes).map(|shape| shape.with_dtype(dtype))
        })
    }

    /// A constant of this value's shape.
    #[track_caller]
    pub fn full_like(self, value: impl Into<Scalar>) -> Self {
        self.func.full(self.shape(), value)
    }

    /// True for floats that are neither infinite nor NaN.
    #[track_caller]
    pub fn is_finite(self) -> Self {
        self.func.emit(OpSpec::new("stablehlo.is_finite"), &[self], |shapes| {
            infer::unary(Class::Float, shapes).map(|shape| shape.with_dtype(DType::Bool))
        })
    }
}

/// Brings operands to the same axes. A mistake is recorded under the name of the operation that is to come.
#[track_caller]
pub(super) fn align<'f>(spec: &OpSpec, operands: &[Value<'f>]) -> Vec<Value<'f>> {
    let shapes: Vec<_> = operands.iter().map(Value::shape).collect();
    if shapes.windows(2).all(|pair| pair[0].axes == pair[1].axes) {
        return operands.to_vec();
    }
    let Some(func) = operands.first().map(Value::func) else { return Vec::new() };
    let target = func.check(spec, operands, || infer::broadcast(&shapes));
    let mut aligned = Vec::with_capacity(operands.len());
    for operand in operands {
        aligned.push(target.as_ref().map_or(func.poison(), |target| operand.broadcast(target)));
    }
    aligned
}

/// Broadcasts index tensors and the like to common axes.
#[track_caller]
pub(super) fn align_axes<'f>(spec: &OpSpec, operands: &[Value<'f>]) -> (Vec<Value<'f>>, Vec<(Axis, u64)>) {
    let aligned = align(spec, operands);
    let axes = aligned.first().map(|value| value.shape().axes).unwrap_or_default();
    (aligned, axes)
}
