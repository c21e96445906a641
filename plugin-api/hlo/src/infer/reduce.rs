//! Operations along axes: reductions and sorts.

use super::{Inferred, indices};
use crate::{Axis, Shape};

/// Positions of the reduced axes, and the result: the other axes in order.
pub(crate) fn reduce(shape: &Shape, axes: &[Axis]) -> Inferred<(Vec<usize>, Shape)> {
    let mut at = indices(shape, axes)?;
    at.sort_unstable();
    let kept: Vec<_> = shape.axes.iter().filter(|(axis, _)| !axes.contains(axis)).copied().collect();
    Ok((at, shape.with_axes(kept)))
}

/// Tensors that are walked together: the same axes, any dtypes.
pub(crate) fn same_axes(shapes: &[Shape]) -> Inferred<()> {
    let Some((first, rest)) = shapes.split_first() else {
        return Err("it takes an operand".to_owned());
    };
    match rest.iter().find(|shape| shape.axes != first.axes) {
        Some(other) => Err(format!("{other} has other axes than {first}")),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use torus_abi::DType;

    use super::*;
    use crate::axes::*;

    #[test]
    fn reduced_axes_vanish_and_their_positions_ascend() {
        let shape = Shape::new(DType::F32, [(TOKENS, 2), (Q_HEADS, 3), (HEAD_DIM, 4)]);
        let (at, result) = reduce(&shape, &[HEAD_DIM, TOKENS]).unwrap();
        assert_eq!((at, result.to_string()), (vec![0, 2], "f32[q_heads=3]".to_owned()));
        assert!(reduce(&shape, &[VOCAB]).is_err());
    }
}
