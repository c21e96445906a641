//! Operations that move elements without computing.

use std::ops::Range;

use super::{Inferred, index, indices};
use crate::{Axis, Shape};

/// The positions of the target's axes in the operand, which must have the same axes in another order.
pub(crate) fn permutation(shape: &Shape, target: &[Axis]) -> Inferred<Vec<usize>> {
    if target.len() != shape.rank() {
        return Err(format!("{} axes are named, but {shape} has {}", target.len(), shape.rank()));
    }
    indices(shape, target)
}

/// Positions of the operand's axes in the target, in the operand's order.
pub(crate) fn broadcast(shape: &Shape, target: &[(Axis, u64)]) -> Inferred<Vec<usize>> {
    let place = |(axis, size): &(Axis, u64)| {
        let at = target.iter().position(|(name, _)| name == axis);
        let at = at.ok_or_else(|| format!("the target has no axis '{axis}'"))?;
        if target[at].1 != *size {
            return Err(format!("the axis '{axis}' has {size} elements, not {}", target[at].1));
        }
        Ok(at)
    };
    shape.axes.iter().map(place).collect()
}

pub(crate) fn reshape(shape: &Shape, axes: &[(Axis, u64)]) -> Inferred {
    let result = shape.with_axes(axes);
    if result.elements() != shape.elements() {
        return Err(format!("{} elements cannot become {result}", shape.elements()));
    }
    Ok(result)
}

/// Replaces an axis by several, outermost first.
pub(crate) fn split(shape: &Shape, axis: Axis, into: &[(Axis, u64)]) -> Inferred {
    let at = index(shape, axis)?;
    let product = into.iter().map(|(_, size)| *size).fold(1, u64::saturating_mul);
    if product != shape.axes[at].1 {
        return Err(format!("the axis '{axis}' has {} elements, not {product}", shape.axes[at].1));
    }
    let mut axes = shape.axes.clone();
    axes.splice(at..=at, into.iter().copied());
    Ok(shape.with_axes(axes))
}

/// Replaces neighbouring axes by one.
pub(crate) fn merge(shape: &Shape, from: &[Axis], into: Axis) -> Inferred {
    let at = indices(shape, from)?;
    let Some(&start) = at.first() else {
        return Err("no axis is named".to_owned());
    };
    if at.windows(2).any(|pair| pair[1] != pair[0] + 1) {
        return Err(format!("the axes {from:?} are not neighbours in this order in {shape}; transpose first"));
    }
    let product = at.iter().map(|i| shape.axes[*i].1).fold(1, u64::saturating_mul);
    let mut axes = shape.axes.clone();
    axes.splice(start..start + at.len(), [(into, product)]);
    Ok(shape.with_axes(axes))
}

pub(crate) fn rename(shape: &Shape, from: Axis, to: Axis) -> Inferred {
    let at = index(shape, from)?;
    let mut axes = shape.axes.clone();
    axes[at].0 = to;
    Ok(shape.with_axes(axes))
}

pub(crate) fn concatenate(shapes: &[Shape], axis: Axis) -> Inferred {
    let (first, rest) = shapes.split_first().ok_or("nothing to concatenate")?;
    let at = index(first, axis)?;
    let mut result = first.clone();
    for shape in rest {
        let mut expected = first.clone();
        expected.axes[at].1 = shape.size(axis).unwrap_or(0);
        if *shape != expected {
            return Err(format!("{shape} does not continue {first}"));
        }
        result.axes[at].1 += expected.axes[at].1;
    }
    Ok(result)
}

pub(crate) fn slice(shape: &Shape, axis: Axis, range: &Range<u64>, stride: u64) -> Inferred {
    let at = index(shape, axis)?;
    let size = shape.axes[at].1;
    if range.start > range.end || range.end > size || stride == 0 {
        return Err(format!("{range:?} by {stride} is not within the {size} elements of '{axis}'"));
    }
    let mut result = shape.clone();
    result.axes[at].1 = (range.end - range.start).div_ceil(stride);
    Ok(result)
}

pub(crate) fn pad(shapes: &[Shape], axis: Axis, low: u64, high: u64) -> Inferred {
    let shape = shapes.first().ok_or("nothing to pad")?;
    let at = index(shape, axis)?;
    let mut result = shape.clone();
    result.axes[at].1 = result.axes[at].1.saturating_add(low).saturating_add(high);
    Ok(result)
}

/// A bit pattern read as elements of another width: the innermost axis is made, kept or used up.
pub(crate) fn bitcast(shape: &Shape, dtype: torus_abi::DType, axis: Option<Axis>) -> Inferred {
    let (from, to) = (shape.dtype.bytes(), dtype.bytes());
    let mut result = shape.with_dtype(dtype);
    match axis {
        None if from == to => {}
        Some(axis) if from > to => result.axes.push((axis, (from / to) as u64)),
        Some(axis) if from < to => {
            if shape.axes.last() != Some(&(axis, (to / from) as u64)) {
                return Err(format!("'{axis}' must be the last axis and have {} elements", to / from));
            }
            result.axes.pop();
        }
        None => return Err(format!("{} and {dtype} differ in width; name the axis of the parts", shape.dtype)),
        Some(_) => return Err(format!("{} and {dtype} have the same width; there are no parts", shape.dtype)),
    }
    Ok(result)
}

#[cfg(test)]
mod tests {
    use torus_abi::DType;

    use super::*;
    use crate::axes::*;

    fn hidden() -> Shape {
        Shape::new(DType::F32, [(TOKENS, 2), (Q_HEADS, 3), (HEAD_DIM, 4)])
    }

    #[test]
    fn split_and_merge_are_inverse() {
        let merged = merge(&hidden(), &[Q_HEADS, HEAD_DIM], HIDDEN).unwrap();
        assert_eq!(merged.to_string(), "f32[tokens=2, hidden=12]");
        assert_eq!(split(&merged, HIDDEN, &[(Q_HEADS, 3), (HEAD_DIM, 4)]).unwrap(), hidden());
    }

    #[test]
    fn mistakes_are_named() {
        let reason = |result: Inferred| result.unwrap_err();
        assert!(reason(merge(&hidden(), &[HEAD_DIM, Q_HEADS], HIDDEN)).contains("transpose first"));
        assert_eq!(reason(split(&hidden(), TOKENS, &[(SEQS, 3)])), "the axis 'tokens' has 2 elements, not 3");
        assert!(reason(slice(&hidden(), HEAD_DIM, &(1..5), 1)).contains("not within the 4 elements"));
        assert!(reason(bitcast(&hidden(), DType::U8, None)).contains("differ in width"));
        assert!(reason(concatenate(&[hidden(), Shape::scalar(DType::F32)], TOKENS)).contains("does not continue"));
        let twice = [TOKENS, TOKENS, Q_HEADS];
        assert_eq!(permutation(&hidden(), &twice).unwrap_err(), "the axis 'tokens' is named twice");
    }

    #[test]
    fn strided_slices_round_up() {
        let result = slice(&hidden(), HEAD_DIM, &(0..3), 2).unwrap();
        assert_eq!(result.size(HEAD_DIM), Some(2));
    }
}
