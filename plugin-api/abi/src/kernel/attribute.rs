//! Attributes of a call: the entries of `backend_config`.

use std::fmt;

/// An attribute's value.
#[derive(Clone, Debug, PartialEq)]
pub enum Attribute<'a> {
    Bool(bool),
    /// Of any integer type.
    Integer(i64),
    /// Of any float type.
    Float(f64),
    Text(&'a str),
    Integers(Vec<i64>),
    Floats(Vec<f64>),
}

impl fmt::Display for Attribute<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Attribute::Bool(value) => write!(f, "the boolean {value}"),
            Attribute::Integer(value) => write!(f, "the integer {value}"),
            Attribute::Float(value) => write!(f, "the number {value}"),
            Attribute::Text(value) => write!(f, "the text {value:?}"),
            Attribute::Integers(values) => write!(f, "the integers {values:?}"),
            Attribute::Floats(values) => write!(f, "the numbers {values:?}"),
        }
    }
}

/// A type that an attribute can be taken as.
pub trait FromAttribute: Sized {
    /// For messages: `a string`.
    const EXPECTED: &'static str;

    /// `None` if the attribute is of another type or out of range.
    fn from_attribute(attribute: Attribute<'_>) -> Option<Self>;
}

macro_rules! from_attribute {
    ($($type:ty, $expected:literal: $pattern:pat => $value:expr;)*) => {
        $(impl FromAttribute for $type {
            const EXPECTED: &'static str = $expected;

            fn from_attribute(attribute: Attribute<'_>) -> Option<Self> {
                match attribute {
                    $pattern => $value,
                    _ => None,
                }
            }
        })*
    };
}

from_attribute! {
    bool, "a boolean": Attribute::Bool(value) => Some(value);
    i64, "an integer": Attribute::Integer(value) => Some(value);
    u32, "an unsigned integer": Attribute::Integer(value) => value.try_into().ok();
    usize, "an unsigned integer": Attribute::Integer(value) => value.try_into().ok();
    f64, "a number": Attribute::Float(value) => Some(value);
    f32, "a number": Attribute::Float(value) => Some(value as f32);
    String, "a string": Attribute::Text(value) => Some(value.to_owned());
    Vec<i64>, "integers": Attribute::Integers(values) => Some(values);
    Vec<f64>, "numbers": Attribute::Floats(values) => Some(values);
}
