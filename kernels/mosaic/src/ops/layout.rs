//! Operations that move lanes.

use crate::{
    IntoValue, Value,
    ir::OpKind,
    types::{Elem, Tensor, Type},
};

fn tensor(ty: &Type) -> Result<&Tensor, String> {
    match ty {
        Type::Vector(tensor) => Ok(tensor),
        _ => Err("the operand must be a vector".to_owned()),
    }
}

fn axis_of(tensor: &Tensor, axis: usize) -> Result<usize, String> {
    tensor.dims.get(axis).copied().ok_or_else(|| format!("{tensor} has no axis {axis}"))
}

impl<'k> Value<'k> {
    /// Repeats a scalar, or a vector along its axes of size 1.
    #[track_caller]
    pub fn broadcast(self, dims: &[usize]) -> Value<'k> {
        self.k.value(OpKind::Broadcast, &[self], |types| {
            let (from, elem) = (types[0].dims(), self.elem());
            let fits = from.is_empty()
                || (from.len() == dims.len() && from.iter().zip(dims).all(|(from, to)| from == to || *from == 1));
            match fits && !dims.is_empty() {
                true => Ok(Type::vector(elem, dims)),
                false => Err(format!("{} cannot be repeated to {dims:?}", types[0])),
            }
        })
    }

    /// The same lanes in the same order under other dimensions. What moves lanes or rows may be slow or refused by the
    /// compiler.
    #[track_caller]
    pub fn reshape(self, dims: &[usize]) -> Value<'k> {
        self.k.value(OpKind::ShapeCast, &[self], |types| {
            let tensor = tensor(&types[0])?;
            match tensor.elements() == dims.iter().product::<usize>() && !dims.is_empty() {
                true => Ok(Type::vector(tensor.elem, dims)),
                false => Err(format!("{tensor} has no {dims:?}")),
            }
        })
    }

    /// Reorders axes: axis `i` of the result is axis `permutation[i]`.
    #[track_caller]
    pub fn permute(self, permutation: &[usize]) -> Value<'k> {
        self.k.value(OpKind::Transpose(permutation.to_vec()), &[self], |types| {
            let tensor = tensor(&types[0])?;
            let mut sorted = permutation.to_vec();
            sorted.sort_unstable();
            match sorted.iter().copied().eq(0..tensor.dims.len()) {
                true => {
                    Ok(Type::vector(tensor.elem, permutation.iter().map(|axis| tensor.dims[*axis]).collect::<Vec<_>>()))
                }
                false => Err(format!("{permutation:?} is no order of the axes of {tensor}")),
            }
        })
    }

    /// Swaps the axes of a matrix.
    #[track_caller]
    pub fn transpose(self) -> Value<'k> {
        self.permute(&[1, 0])
    }

    /// This and `others` after one another along an axis.
    #[track_caller]
    pub fn concatenate(self, others: &[Value<'k>], axis: usize) -> Value<'k> {
        let mut operands = vec![self];
        operands.extend(others);
        self.k.value(OpKind::Concatenate(axis), &operands, |types| {
            let first = tensor(&types[0])?;
            let mut dims = first.dims.clone();
            dims[axis] = axis_of(first, axis).map(|_| 0)?;
            for ty in types {
                let part = tensor(ty)?;
                let same = |at: usize| at == axis || part.dims[at] == first.dims[at];
                if part.elem != first.elem || part.dims.len() != dims.len() || !(0..dims.len()).all(same) {
                    return Err(format!("{part} and {first} differ beyond axis {axis}"));
                }
                dims[axis] += part.dims[axis];
            }
            Ok(Type::vector(first.elem, dims))
        })
    }

    /// A box of the given size that begins at the given offsets.
    #[track_caller]
    pub fn slice(self, offsets: &[usize], sizes: &[usize]) -> Value<'k> {
        self.k.value(OpKind::Slice(offsets.to_vec()), &[self], |types| {
            let tensor = tensor(&types[0])?;
            let rank = tensor.dims.len();
            let inside = |axis: usize| sizes[axis] > 0 && offsets[axis] + sizes[axis] <= tensor.dims[axis];
            match offsets.len() == rank && sizes.len() == rank && (0..rank).all(inside) {
                true => Ok(Type::vector(tensor.elem, sizes)),
                false => Err(format!("{tensor} has no box {sizes:?} at {offsets:?}")),
            }
        })
    }

    /// Turns an axis: lane `i` of the result is lane `i - by` of this, around the end. `by` must not be negative.
    #[track_caller]
    pub fn rotate(self, by: impl IntoValue<'k>, axis: usize) -> Value<'k> {
        self.rotate_op(by, OpKind::Rotate { axis, stride: None }, axis)
    }

    /// Turns each row of `row_axis` by `stride` more than the one before.
    #[track_caller]
    pub fn rotate_strided(self, by: impl IntoValue<'k>, axis: usize, stride: usize, row_axis: usize) -> Value<'k> {
        self.rotate_op(by, OpKind::Rotate { axis, stride: Some((stride, row_axis)) }, axis.max(row_axis))
    }

    #[track_caller]
    fn rotate_op(self, by: impl IntoValue<'k>, kind: OpKind, last_axis: usize) -> Value<'k> {
        let by = by.into_value(self.k, Elem::I32);
        self.k.value(kind, &[self, by], |types| {
            axis_of(tensor(&types[0])?, last_axis)?;
            match types[1] {
                Type::Scalar(Elem::I32) => Ok(types[0].clone()),
                _ => Err("the distance is an i32 scalar".to_owned()),
            }
        })
    }

    /// Lane `i` along `axis` is this one's lane `indices[i]`; `indices` are `i32` of the same shape.
    #[track_caller]
    pub fn gather(self, indices: Value<'k>, axis: usize) -> Value<'k> {
        self.k.value(OpKind::Gather(axis), &[self, indices], |types| {
            let source = tensor(&types[0])?;
            axis_of(source, axis)?;
            match types[1] == types[0].with_elem(Elem::I32) {
                true => Ok(types[0].clone()),
                false => Err(format!("the indices of {source} must be i32{:?}", source.dims)),
            }
        })
    }

    /// One element as a scalar.
    #[track_caller]
    pub fn extract(self, position: &[usize]) -> Value<'k> {
        self.k.value(OpKind::Extract(position.to_vec()), &[self], |types| {
            let tensor = tensor(&types[0])?;
            let inside = position.len() == tensor.dims.len() && position.iter().zip(&tensor.dims).all(|(p, d)| p < d);
            match inside {
                true => Ok(Type::Scalar(tensor.elem)),
                false => Err(format!("{tensor} has no element {position:?}")),
            }
        })
    }
}
