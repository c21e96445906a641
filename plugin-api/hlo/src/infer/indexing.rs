//! Reading and writing at computed places.

use torus_abi::DType;

use super::{Inferred, indices, unique};
use crate::{Axis, Shape};

/// How a gather or scatter walks its operand: some axes are indexed, the others are taken whole.
#[derive(Debug)]
pub(crate) struct Plan {
    /// Positions of the indexed axes in the operand, in the order in which they are named.
    pub indexed: Vec<usize>,
    /// For each axis of the operand: how much of it one index takes.
    pub sizes: Vec<usize>,
    /// The index's axes, then the operand's unindexed ones.
    pub picked: Shape,
    /// Number of the index's axes.
    pub index_rank: usize,
}

/// `index` are the axes that all index tensors were broadcast to.
pub(crate) fn plan(operand: &Shape, axes: &[Axis], index: &[(Axis, u64)]) -> Inferred<Plan> {
    let indexed = indices(operand, axes)?;
    let sizes = operand.axes.iter().map(|(axis, size)| if axes.contains(axis) { 1 } else { *size as usize });
    let whole = operand.axes.iter().filter(|(axis, _)| !axes.contains(axis));
    let picked = operand.with_axes(index.iter().chain(whole).copied().collect::<Vec<_>>());
    unique(&picked)?;
    Ok(Plan { indexed, sizes: sizes.collect(), picked, index_rank: index.len() })
}

pub(crate) fn index_dtype(shape: &Shape) -> Inferred<()> {
    if shape.dtype.is_integer() { Ok(()) } else { Err(format!("an index is {}, not an integer", shape.dtype)) }
}

/// The shape of a piece that starts at computed places; unnamed axes are taken whole.
pub(crate) fn dynamic_slice(operand: &Shape, pieces: &[(Axis, u64)]) -> Inferred {
    let at = indices(operand, &pieces.iter().map(|(axis, _)| *axis).collect::<Vec<_>>())?;
    let mut result = operand.clone();
    for (index, (axis, size)) in at.into_iter().zip(pieces) {
        if *size > result.axes[index].1 {
            return Err(format!("{size} elements were asked of '{axis}' in {operand}"));
        }
        result.axes[index].1 = *size;
    }
    Ok(result)
}

/// An update has the operand's axes and is nowhere larger.
pub(crate) fn dynamic_update_slice(operand: &Shape, update: &Shape, starts: &[Shape]) -> Inferred {
    let fits = operand.dtype == update.dtype
        && operand.names().eq(update.names())
        && update.dims().zip(operand.dims()).all(|(part, whole)| part <= whole);
    if !fits {
        return Err(format!("{update} is no part of {operand}"));
    }
    starts.iter().try_for_each(start)?;
    Ok(operand.clone())
}

pub(crate) fn start(shape: &Shape) -> Inferred<()> {
    let scalar = shape.rank() == 0 && shape.dtype == DType::I32;
    if scalar { Ok(()) } else { Err(format!("a start is {shape}, not an i32 scalar")) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::axes::*;

    fn table() -> Shape {
        Shape::new(DType::F32, [(VOCAB, 7), (HIDDEN, 4)])
    }

    #[test]
    fn picked_rows_take_the_axes_of_the_index() {
        let plan = plan(&table(), &[VOCAB], &[(SEQS, 2), (TOKENS, 3)]).unwrap();
        assert_eq!(plan.picked.to_string(), "f32[seqs=2, tokens=3, hidden=4]");
        assert_eq!((plan.indexed, plan.sizes, plan.index_rank), (vec![0], vec![1, 4], 2));
    }

    #[test]
    fn an_axis_of_the_index_that_stays_in_the_operand_is_refused() {
        let reason = plan(&table(), &[VOCAB], &[(HIDDEN, 4)]).unwrap_err();
        assert!(reason.contains("'hidden' would occur twice"), "{reason}");
    }

    #[test]
    fn pieces_must_fit() {
        assert!(dynamic_slice(&table(), &[(VOCAB, 8)]).unwrap_err().contains("8 elements were asked"));
        let small = Shape::new(DType::F32, [(VOCAB, 2), (HIDDEN, 5)]);
        assert!(dynamic_update_slice(&table(), &small, &[]).unwrap_err().contains("no part of"));
        assert!(start(&Shape::scalar(DType::F32)).is_err());
    }
}
