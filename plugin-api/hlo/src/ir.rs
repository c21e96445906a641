//! What a function body is made of. [`crate::print`] turns it into text.

use std::fmt;

use crate::literal::Literal;

/// Operations without regions are one line of text; regions nest.
pub(crate) struct Op {
    /// With its dialect: `stablehlo.add`.
    pub name: &'static str,
    pub operands: Vec<Ssa>,
    pub attributes: Attributes,
    pub regions: Vec<Region>,
    pub results: Vec<Ssa>,
}

/// A block with arguments. All regions of StableHLO have one block.
#[derive(Default)]
pub(crate) struct Region {
    pub arguments: Vec<Ssa>,
    pub ops: Vec<Op>,
}

/// The number of a value in the text. Unique in its function.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Ssa(pub u32);

/// Named attributes in any order; the printer sorts them.
pub(crate) type Attributes = Vec<(String, Attribute)>;

/// An attribute of an operation or of a function argument.
#[derive(Clone, Debug, PartialEq)]
pub enum Attribute {
    /// Present or not: `use_global_device_ids`.
    Unit,
    Bool(bool),
    I32(i32),
    I64(i64),
    F32(f32),
    F64(f64),
    Text(String),
    /// `@name`.
    Symbol(String),
    /// `array<i64: …>`.
    Array(Vec<i64>),
    List(Vec<Attribute>),
    Dictionary(Vec<(String, Attribute)>),
    /// `dense<…> : tensor<…>`.
    Dense(Literal),
    /// Any other attribute in MLIR syntax: `#stablehlo<comparison_direction LT>`.
    Verbatim(String),
}

impl fmt::Display for Ssa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "%{}", self.0)
    }
}
