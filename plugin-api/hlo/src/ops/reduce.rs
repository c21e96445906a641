//! Reductions and running sums along named axes.

use torus_abi::DType;

use crate::{
    Axis, Func, IntoAxes, Scalar, Shape, Value,
    func::OpSpec,
    infer::{elementwise::Class, reduce as infer},
};

impl<'f> Value<'f> {
    /// The sum over the axes, in this value's dtype: convert to f32 before summing bf16.
    #[track_caller]
    pub fn sum(self, axes: impl IntoAxes) -> Self {
        self.fold(axes.into_axes(), Class::Number, Scalar::Int(0), |a, b| a + b)
    }

    /// The largest element along the axes; of none, the smallest value of the dtype.
    #[track_caller]
    pub fn reduce_max(self, axes: impl IntoAxes) -> Self {
        self.fold(axes.into_axes(), Class::Number, lowest(self.dtype()), |a, b| a.max(b))
    }

    /// The smallest element along the axes; of none, the largest value of the dtype.
    #[track_caller]
    pub fn reduce_min(self, axes: impl IntoAxes) -> Self {
        self.fold(axes.into_axes(), Class::Number, highest(self.dtype()), |a, b| a.min(b))
    }

    /// Whether all booleans along the axes hold.
    #[track_caller]
    pub fn all(self, axes: impl IntoAxes) -> Self {
        self.fold(axes.into_axes(), Class::Bool, Scalar::Bool(true), |a, b| a & b)
    }

    /// Whether any boolean along the axes holds.
    #[track_caller]
    pub fn any(self, axes: impl IntoAxes) -> Self {
        self.fold(axes.into_axes(), Class::Bool, Scalar::Bool(false), |a, b| a | b)
    }

    /// The mean over the axes, for floats.
    #[track_caller]
    pub fn mean(self, axes: impl IntoAxes) -> Self {
        let axes = axes.into_axes();
        let shape = self.shape();
        let count = axes.iter().filter_map(|axis| shape.size(*axis)).fold(1, u64::saturating_mul);
        self.sum(axes) * (1.0 / count as f64)
    }

    /// The `i32` index of the largest element along an axis, the first of equals. NaN counts as largest.
    #[track_caller]
    pub fn argmax(self, axis: Axis) -> Self {
        let peak = self.reduce_max(axis);
        let is_peak = self.eq(peak) | self.ne(self);
        let size = self.size(axis);
        let index = self.func.iota(DType::I32, axis, size);
        is_peak.select(index, index.full_like(i32::MAX)).reduce_min(axis)
    }

    /// Running sums along an axis, each including its own element, in log2 of the size steps.
    #[track_caller]
    pub fn cumulative_sum(self, axis: Axis) -> Self {
        let size = self.size(axis);
        let mut sums = self;
        let mut distance = 1;
        while distance < size {
            sums = sums + sums.slice(axis, 0..size - distance).pad(axis, distance, 0, 0);
            distance *= 2;
        }
        sums
    }

    #[track_caller]
    fn fold(
        self,
        axes: Vec<Axis>,
        class: Class,
        neutral: Scalar,
        combine: impl FnOnce(Value<'f>, Value<'f>) -> Value<'f>,
    ) -> Self {
        let spec = OpSpec::new("stablehlo.reduce");
        let dtype = self.dtype();
        if self.func.check(&spec, &[self], || class.check(dtype)).is_none() {
            return self.func.poison();
        }
        let neutral = self.func.scalar(dtype, neutral);
        let results = self.func.reduce(&[self], &[neutral], axes, |a, b| vec![combine(a[0], b[0])]);
        results.first().copied().unwrap_or_else(|| self.func.poison())
    }
}

impl<'f> Func<'f> {
    /// Reduces several tensors of equal axes together. `combine` is given two scalars for each and returns one for
    /// each; it must be associative and commutative, use nothing from outside, and `neutral` must not change anything.
    #[track_caller]
    pub fn reduce(
        &'f self,
        values: &[Value<'f>],
        neutral: &[Value<'f>],
        axes: impl IntoAxes,
        combine: impl FnOnce(&[Value<'f>], &[Value<'f>]) -> Vec<Value<'f>>,
    ) -> Vec<Value<'f>> {
        let axes = axes.into_axes();
        let spec = OpSpec::new("stablehlo.reduce");
        let shapes: Vec<_> = values.iter().map(Value::shape).collect();
        let scalars: Vec<_> = shapes.iter().map(|shape| Shape::scalar(shape.dtype)).collect();
        let plan = self.check(&spec, &[values, neutral].concat(), || {
            infer::same_axes(&shapes)?;
            if !neutral.iter().map(Value::shape).eq(scalars.iter().cloned()) {
                return Err("there must be one neutral scalar of the same dtype for each tensor".to_owned());
            }
            shapes.iter().map(|shape| infer::reduce(shape, &axes)).collect::<Result<Vec<_>, _>>()
        });
        let poisoned = || vec![self.poison(); values.len()];
        let Some(plan) = plan else { return poisoned() };
        let arguments = self.open_region(&[scalars.clone(), scalars.clone()].concat());
        let (left, right) = arguments.split_at(values.len());
        let combined = combine(left, right);
        let Some(region) = self.close_region(&spec, &combined, &scalars) else { return poisoned() };
        let at = plan.first().map(|(at, _)| at.clone()).unwrap_or_default();
        let results = plan.into_iter().map(|(_, shape)| shape).collect();
        let spec = spec.array("dimensions", at).region(region);
        self.emit_many(spec, &[values, neutral].concat(), values.len(), |_| Ok(results))
    }
}

/// The value that `max` with never changes.
pub(super) fn lowest(dtype: DType) -> Scalar {
    let bits = 8 * dtype.bytes() as u32;
    match dtype {
        _ if dtype.is_float() => Scalar::Float(f64::NEG_INFINITY),
        _ if dtype.is_unsigned() => Scalar::Int(0),
        _ => Scalar::Int(-(1 << (bits - 1))),
    }
}

fn highest(dtype: DType) -> Scalar {
    let bits = 8 * dtype.bytes() as u32;
    match dtype {
        _ if dtype.is_float() => Scalar::Float(f64::INFINITY),
        _ if dtype.is_unsigned() => Scalar::Int((1 << bits) - 1),
        _ => Scalar::Int((1 << (bits - 1)) - 1),
    }
}
