//! Sorting along an axis.

use torus_abi::DType;

use crate::{
    Axis, Direction, Func, Shape, Value,
    func::OpSpec,
    infer::{self, reduce},
    ir::Attribute,
};

/// Which elements come first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    Ascending,
    Descending,
}

impl<'f> Value<'f> {
    /// The elements in order, and the `i32` places they had. Equal ones keep their order; NaN is largest.
    #[track_caller]
    pub fn sort(self, axis: Axis, order: Order) -> (Self, Self) {
        let size = self.size(axis);
        let places = self.func.iota(DType::I32, axis, size).broadcast(&self.shape().axes);
        let direction = if order == Order::Ascending { Direction::Lt } else { Direction::Gt };
        let sorted = self.func.sort(&[self, places], axis, |a, b| a[0].compare_total(direction, b[0]));
        match sorted[..] {
            [values, places] => (values, places),
            _ => (self.func.poison(), self.func.poison()),
        }
    }
}

impl<'f> Func<'f> {
    /// Sorts tensors of equal axes together along an axis, stably. `before` is given two scalars of each and says
    /// whether the first must come earlier.
    #[track_caller]
    pub fn sort(
        &'f self,
        values: &[Value<'f>],
        axis: Axis,
        before: impl FnOnce(&[Value<'f>], &[Value<'f>]) -> Value<'f>,
    ) -> Vec<Value<'f>> {
        let spec = OpSpec::new("stablehlo.sort");
        let shapes: Vec<_> = values.iter().map(Value::shape).collect();
        let poisoned = || vec![self.poison(); values.len()];
        let at = self.check(&spec, values, || {
            reduce::same_axes(&shapes)?;
            infer::index(&shapes[0], axis)
        });
        let Some(at) = at else { return poisoned() };
        let pairs: Vec<_> = shapes.iter().flat_map(|shape| vec![Shape::scalar(shape.dtype); 2]).collect();
        let arguments = self.open_region(&pairs);
        let (left, right): (Vec<_>, Vec<_>) = arguments.chunks_exact(2).map(|pair| (pair[0], pair[1])).unzip();
        let verdict = before(&left, &right);
        let Some(region) = self.close_region(&spec, &[verdict], &[Shape::scalar(DType::Bool)]) else {
            return poisoned();
        };
        let spec = spec.with("dimension", Attribute::I64(at as i64)).with("is_stable", Attribute::Bool(true));
        self.emit_many(spec.region(region), values, values.len(), |_| Ok(shapes.clone()))
    }
}
