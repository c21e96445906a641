//! The intermediate representation: what the printer prints and the interpreter runs.

use std::{num::NonZeroU32, panic::Location};

use crate::types::{Elem, Type};

/// A value of a kernel: its number among all values.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub(crate) struct Id(NonZeroU32);

impl Id {
    pub fn new(index: usize) -> Self {
        Self(NonZeroU32::MIN.saturating_add(index as u32))
    }

    pub fn index(self) -> usize {
        self.0.get() as usize - 1
    }
}

#[derive(Clone, Debug)]
pub(crate) struct Op {
    pub kind: OpKind,
    pub operands: Vec<Id>,
    pub results: Vec<Id>,
    pub regions: Vec<Block>,
    /// Where the kernel's author asked for it.
    pub location: &'static Location<'static>,
}

/// A region: arguments, operations, and the values it hands to the operation around it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Block {
    pub arguments: Vec<Id>,
    pub ops: Vec<Op>,
    pub yields: Vec<Id>,
}

/// A constant.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Scalar {
    Int(i32),
    Float(f32),
}

impl Scalar {
    /// The constant in an element type: whole numbers may be floats.
    pub(crate) fn in_type(self, elem: Elem) -> Self {
        match self {
            Self::Int(value) if elem.is_float() => Self::Float(value as f32),
            other => other,
        }
    }
}

impl From<i32> for Scalar {
    fn from(value: i32) -> Self {
        Self::Int(value)
    }
}

impl From<f32> for Scalar {
    fn from(value: f32) -> Self {
        Self::Float(value)
    }
}

impl From<bool> for Scalar {
    fn from(value: bool) -> Self {
        Self::Int(value.into())
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Unary {
    Exp,
    Exp2,
    Log,
    Tanh,
    Sqrt,
    Rsqrt,
    AbsFloat,
    AbsInt,
    Floor,
    Ceil,
    RoundEven,
    Reciprocal { approximate: bool },
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Binary {
    Add,
    Sub,
    Mul,
    Div,
    Rem,
    Max,
    Min,
    And,
    Or,
    Xor,
    ShiftLeft,
    ShiftRight,
    ShiftRightLogical,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Predicate {
    Eq,
    Ne,
    Lt,
    Le,
    Gt,
    Ge,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Reduction {
    Sum,
    Max,
    Min,
}

/// Which axis of each rank-2 operand is summed over, and how exactly.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Product {
    pub lhs_axis: usize,
    pub rhs_axis: usize,
    /// `f32` operands in full, not rounded to `bf16`.
    pub exact: bool,
}

#[derive(Clone, PartialEq, Debug)]
pub(crate) enum OpKind {
    /// A scalar, or a vector with the same number in every lane.
    Constant(Scalar),
    Unary(Unary),
    Binary(Binary),
    Compare(Predicate),
    /// mask, where it holds, where not.
    Select,
    /// Between numbers.
    Cast,
    /// Of 32-bit words between scalars' or vectors' element types.
    Bitcast,
    IndexCast,
    /// The scalar is promised to be a multiple of this.
    AssumeMultiple(u32),
    /// The same lanes, whatever was undefined of them now some number.
    Freeze,
    Broadcast,
    ShapeCast,
    /// Along one axis, which vanishes; the second operand is the neutral vector.
    Reduce(Reduction, usize),
    Iota(usize),
    Transpose(Vec<usize>),
    Concatenate(usize),
    /// A box of the result's size at these offsets.
    Slice(Vec<usize>),
    /// Operands: vector, distance. With a stride, row `r` of its axis is turned by `r * stride` more.
    Rotate {
        axis: usize,
        stride: Option<(usize, usize)>,
    },
    /// Operands: source, indices along the axis.
    Gather(usize),
    /// One element of a vector.
    Extract(Vec<usize>),
    /// Operands: left, right, what is added to.
    Matmul(Product),
    /// Operands: memory, one start per axis. `strides` in elements, empty for all 1.
    Load {
        strides: Vec<usize>,
    },
    /// Operands: vector, memory, starts, and a mask if `masked`.
    Store {
        strides: Vec<usize>,
        masked: bool,
    },
    /// Operands: memory, one position per axis.
    ScalarLoad,
    /// Operands: scalar, memory, positions.
    ScalarStore,
    /// Operands: memory, one start per axis, then the sizes that the result's type leaves open.
    RefSlice,
    /// Axes of size 1 that vanish.
    RefSqueeze(Vec<usize>),
    RefReshape,
    RefBitcast,
    /// Operands: source, destination, semaphore.
    DmaStart,
    /// Operands: semaphore, source, destination.
    DmaWait,
    /// Operands: semaphore, count.
    SemaphoreSignal,
    SemaphoreWait,
    SemaphoreRead,
    /// Operands: from, to, step, carried. The body's arguments: index, carried.
    For,
    /// Regions: then, else.
    If,
    /// Operands: carried. Regions: condition (yields the verdict, then what it passes on), body.
    While,
}

impl OpKind {
    /// The operation without its dialect, as errors and counters show it.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Constant(_) => "constant",
            Self::Unary(unary) => unary.name(),
            Self::Binary(binary) => binary.name(),
            Self::Compare(_) => "compare",
            Self::Select => "select",
            Self::Cast => "cast",
            Self::Bitcast => "bitcast",
            Self::IndexCast => "index_cast",
            Self::AssumeMultiple(_) => "assume_multiple",
            Self::Freeze => "freeze",
            Self::Broadcast => "broadcast",
            Self::ShapeCast => "shape_cast",
            Self::Reduce(..) => "reduce",
            Self::Iota(_) => "iota",
            Self::Transpose(_) => "transpose",
            Self::Concatenate(_) => "concatenate",
            Self::Slice(_) => "slice",
            Self::Rotate { .. } => "rotate",
            Self::Gather(_) => "gather",
            Self::Extract(_) => "extract",
            Self::Matmul(_) => "matmul",
            Self::Load { .. } => "load",
            Self::Store { .. } => "store",
            Self::ScalarLoad => "scalar_load",
            Self::ScalarStore => "scalar_store",
            Self::RefSlice => "ref_slice",
            Self::RefSqueeze(_) => "ref_squeeze",
            Self::RefReshape => "ref_reshape",
            Self::RefBitcast => "ref_bitcast",
            Self::DmaStart => "dma_start",
            Self::DmaWait => "dma_wait",
            Self::SemaphoreSignal => "semaphore_signal",
            Self::SemaphoreWait => "semaphore_wait",
            Self::SemaphoreRead => "semaphore_read",
            Self::For => "for",
            Self::If => "if",
            Self::While => "while",
        }
    }
}

impl Unary {
    pub fn is_transcendental(self) -> bool {
        matches!(self, Self::Exp | Self::Exp2 | Self::Log | Self::Tanh | Self::Sqrt | Self::Rsqrt)
    }

    pub fn name(self) -> &'static str {
        match self {
            Self::Exp => "exp",
            Self::Exp2 => "exp2",
            Self::Log => "log",
            Self::Tanh => "tanh",
            Self::Sqrt => "sqrt",
            Self::Rsqrt => "rsqrt",
            Self::AbsFloat | Self::AbsInt => "abs",
            Self::Floor => "floor",
            Self::Ceil => "ceil",
            Self::RoundEven => "round",
            Self::Reciprocal { .. } => "reciprocal",
        }
    }
}

impl Binary {
    pub fn name(self) -> &'static str {
        match self {
            Self::Add => "add",
            Self::Sub => "sub",
            Self::Mul => "mul",
            Self::Div => "div",
            Self::Rem => "rem",
            Self::Max => "max",
            Self::Min => "min",
            Self::And => "and",
            Self::Or => "or",
            Self::Xor => "xor",
            Self::ShiftLeft => "shift_left",
            Self::ShiftRight => "shift_right",
            Self::ShiftRightLogical => "shift_right_logical",
        }
    }
}

impl Reduction {
    /// The number that changes nothing.
    pub fn neutral(self, elem: Elem) -> Scalar {
        match (self, elem.is_float()) {
            (Self::Sum, true) => Scalar::Float(0.0),
            (Self::Sum, false) => Scalar::Int(0),
            (Self::Max, true) => Scalar::Float(f32::NEG_INFINITY),
            (Self::Max, false) => Scalar::Int(i32::MIN),
            (Self::Min, true) => Scalar::Float(f32::INFINITY),
            (Self::Min, false) => Scalar::Int(i32::MAX),
        }
    }
}

/// The types of a kernel's values, by number.
pub(crate) struct Types(pub Vec<Type>);

impl std::ops::Index<Id> for Types {
    type Output = Type;

    fn index(&self, id: Id) -> &Type {
        &self.0[id.index()]
    }
}
