//! Products of tensors.

use torus_abi::DType;

use super::{Inferred, elementwise::same_dtype, indices};
use crate::{Axis, Shape};

/// Where the axes of a contraction lie, and what comes out.
#[derive(Debug)]
pub(crate) struct Plan {
    pub left_batch: Vec<usize>,
    pub right_batch: Vec<usize>,
    pub left_contract: Vec<usize>,
    pub right_contract: Vec<usize>,
    pub result: Shape,
}

/// The result has the batch axes, then the left operand's other axes, then the right operand's.
pub(crate) fn dot(left: &Shape, right: &Shape, contract: &[Axis], batch: &[Axis], result: DType) -> Inferred<Plan> {
    let dtype = same_dtype(&[left.clone(), right.clone()])?;
    if dtype == DType::Bool {
        return Err("it takes numbers, not bool".to_owned());
    }
    for axis in contract.iter().chain(batch) {
        if let (Some(a), Some(b)) = (left.size(*axis), right.size(*axis))
            && a != b
        {
            return Err(format!("the axis '{axis}' has the sizes {a} and {b}"));
        }
    }
    if let Some(axis) = contract.iter().find(|axis| batch.contains(axis)) {
        return Err(format!("the axis '{axis}' is both contracted and a batch axis"));
    }
    let used = |axis: &Axis| contract.contains(axis) || batch.contains(axis);
    let left_free = left.axes.iter().filter(|(axis, _)| !used(axis));
    let right_free = right.axes.iter().filter(|(axis, _)| !used(axis));
    if let Some((axis, _)) = left_free.clone().find(|(axis, _)| right.has(*axis)) {
        return Err(format!("both have the axis '{axis}'; contract it, make it a batch axis, or rename one"));
    }
    let left_batch = indices(left, batch)?;
    let axes: Vec<_> = left_batch.iter().map(|i| left.axes[*i]).chain(left_free.chain(right_free).copied()).collect();
    Ok(Plan {
        right_batch: indices(right, batch)?,
        left_contract: indices(left, contract)?,
        right_contract: indices(right, contract)?,
        left_batch,
        result: Shape::new(result, axes),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::axes::*;

    #[test]
    fn batch_axes_come_first() {
        let q = Shape::new(DType::F32, [(TOKENS, 2), (KV_HEADS, 3), (HEAD_DIM, 4)]);
        let k = Shape::new(DType::F32, [(SLOTS, 5), (HEAD_DIM, 4), (KV_HEADS, 3)]);
        let plan = dot(&q, &k, &[HEAD_DIM], &[KV_HEADS], DType::F32).unwrap();
        assert_eq!(plan.result.to_string(), "f32[kv_heads=3, tokens=2, slots=5]");
        assert_eq!((plan.left_contract, plan.right_contract), (vec![2], vec![1]));
        assert_eq!((plan.left_batch, plan.right_batch), (vec![1], vec![2]));
    }

    #[test]
    fn unnamed_common_axes_and_missing_ones_are_refused() {
        let x = Shape::new(DType::F32, [(TOKENS, 2), (HIDDEN, 4)]);
        let reason = |right: &Shape, axis| dot(&x, right, &[axis], &[], DType::F32).unwrap_err();
        assert!(reason(&x, HIDDEN).contains("both have the axis 'tokens'"));
        let w = Shape::new(DType::F32, [(VOCAB, 3), (HIDDEN, 5)]);
        assert_eq!(reason(&w, HIDDEN), "the axis 'hidden' has the sizes 4 and 5");
        assert_eq!(reason(&w, VOCAB), "both have the axis 'hidden'; contract it, make it a batch axis, or rename one");
        let w = Shape::new(DType::F32, [(VOCAB, 3)]);
        assert_eq!(reason(&w, VOCAB), "f32[tokens=2, hidden=4] has no axis 'vocab'");
    }
}
