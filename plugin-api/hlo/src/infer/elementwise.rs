//! Broadcasting by name, and which operations take which dtypes.

use torus_abi::DType;

use super::Inferred;
use crate::{Axis, Shape};

/// The dtypes an operation takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Class {
    /// Integers and floats.
    Number,
    /// Signed integers and floats.
    Signed,
    Float,
    Integer,
    /// Integers and booleans.
    Bits,
    Bool,
    Any,
}

impl Class {
    pub(crate) fn check(self, dtype: DType) -> Inferred<()> {
        let (holds, wanted) = match self {
            Class::Number => (dtype != DType::Bool, "numbers"),
            Class::Signed => (dtype != DType::Bool && !dtype.is_unsigned(), "signed numbers"),
            Class::Float => (dtype.is_float(), "floats"),
            Class::Integer => (dtype.is_integer(), "integers"),
            Class::Bits => (!dtype.is_float(), "integers or booleans"),
            Class::Bool => (dtype == DType::Bool, "booleans"),
            Class::Any => (true, "anything"),
        };
        if holds { Ok(()) } else { Err(format!("it takes {wanted}, not {dtype}")) }
    }
}

/// The axes of an elementwise result. They come from the operand with the most axes, the leftmost of several; axes
/// that only others have follow in order of appearance. An axis in several operands must have one size.
pub(crate) fn broadcast(operands: &[Shape]) -> Inferred<Vec<(Axis, u64)>> {
    let mut lead = 0;
    for (i, shape) in operands.iter().enumerate() {
        if shape.rank() > operands[lead].rank() {
            lead = i;
        }
    }
    let mut axes = operands.get(lead).map(|shape| shape.axes.clone()).unwrap_or_default();
    for (axis, size) in operands.iter().flat_map(|shape| &shape.axes) {
        match axes.iter().find(|(known, _)| known == axis) {
            Some((_, known)) if known != size => {
                return Err(format!("the axis '{axis}' has the sizes {known} and {size}"));
            }
            Some(_) => {}
            None => axes.push((*axis, *size)),
        }
    }
    Ok(axes)
}

pub(crate) fn same_dtype(shapes: &[Shape]) -> Inferred<DType> {
    let first = shapes.first().map_or(DType::F32, |shape| shape.dtype);
    match shapes.iter().find(|shape| shape.dtype != first) {
        Some(other) => Err(format!("the dtypes {first} and {} differ; convert one", other.dtype)),
        None => Ok(first),
    }
}

/// One operand, same shape.
pub(crate) fn unary(class: Class, shapes: &[Shape]) -> Inferred {
    let shape = first(shapes)?;
    class.check(shape.dtype)?;
    Ok(shape.clone())
}

/// Operands that were already broadcast to the same axes.
pub(crate) fn binary(class: Class, shapes: &[Shape]) -> Inferred {
    class.check(same_dtype(shapes)?)?;
    first(shapes).cloned()
}

pub(crate) fn compare(shapes: &[Shape]) -> Inferred {
    same_dtype(shapes)?;
    Ok(first(shapes)?.with_dtype(DType::Bool))
}

/// `(predicate, on true, on false)`.
pub(crate) fn select(shapes: &[Shape]) -> Inferred {
    let (predicate, branches) = shapes.split_first().ok_or("it takes three operands")?;
    if predicate.dtype != DType::Bool {
        return Err(format!("the predicate is {}, not bool", predicate.dtype));
    }
    same_dtype(branches)?;
    first(branches).cloned()
}

fn first(shapes: &[Shape]) -> Inferred<&Shape> {
    shapes.first().ok_or_else(|| "it takes an operand".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::axes::*;

    fn shape(axes: &[(Axis, u64)]) -> Shape {
        Shape::new(DType::F32, axes)
    }

    #[test]
    fn the_longer_operand_leads_and_missing_axes_follow() {
        let (t, h, d) = ((TOKENS, 2), (Q_HEADS, 3), (HEAD_DIM, 4));
        let order =
            |list: &[&[(Axis, u64)]]| broadcast(&list.iter().map(|axes| shape(axes)).collect::<Vec<_>>()).unwrap();
        assert_eq!(order(&[&[d], &[t, h, d]]), [t, h, d]);
        assert_eq!(order(&[&[t], &[d]]), [t, d]);
        assert_eq!(order(&[&[t, d], &[d, h]]), [t, d, h]);
        assert_eq!(order(&[&[], &[t]]), [t]);
        assert_eq!(order(&[]), []);
    }

    #[test]
    fn sizes_and_dtypes_must_agree() {
        let reason = broadcast(&[shape(&[(TOKENS, 2)]), shape(&[(TOKENS, 3)])]).unwrap_err();
        assert_eq!(reason, "the axis 'tokens' has the sizes 2 and 3");
        let mixed = [Shape::scalar(DType::F32), Shape::scalar(DType::Bf16)];
        assert_eq!(binary(Class::Number, &mixed).unwrap_err(), "the dtypes f32 and bf16 differ; convert one");
        assert_eq!(unary(Class::Float, &[Shape::scalar(DType::I32)]).unwrap_err(), "it takes floats, not i32");
    }
}
