//! Operations that move elements without computing: names, order, pieces.

use std::ops::Range;

use torus_abi::DType;

use crate::{Axis, Func, Shape, Value, func::OpSpec, infer, infer::layout, ir::Attribute, value::IntoValue};

impl<'f> Value<'f> {
    /// The same elements under another name of one axis. No operation is emitted.
    #[track_caller]
    pub fn rename(self, from: Axis, to: Axis) -> Self {
        self.relabel("rename", |shape| layout::rename(shape, from, to))
    }

    /// Names all axes anew, outermost first. No operation is emitted.
    #[track_caller]
    pub fn named(self, names: &[Axis]) -> Self {
        self.relabel("named", |shape| {
            if names.len() != shape.rank() {
                return Err(format!("{} names were given for {} axes", names.len(), shape.rank()));
            }
            Ok(shape.with_axes(names.iter().copied().zip(shape.dims()).collect::<Vec<_>>()))
        })
    }

    #[track_caller]
    fn relabel(self, operation: &'static str, change: impl FnOnce(&Shape) -> infer::Inferred<Shape>) -> Self {
        let Some(id) = self.id() else { return self };
        let shape = self.shape();
        let changed = self.func.check(&OpSpec::new(operation), &[self], || {
            let changed = change(&shape)?;
            infer::unique(&changed)?;
            Ok(changed)
        });
        changed.map_or(self.func.poison(), |changed| self.func.alias(id, changed))
    }

    /// The same elements in row-major order under other axes.
    #[track_caller]
    pub fn reshape(self, axes: &[(Axis, u64)]) -> Self {
        self.reshape_as(|shape| layout::reshape(shape, axes))
    }

    /// Replaces an axis by several, outermost first: `split(HIDDEN, &[(Q_HEADS, 8), (HEAD_DIM, 64)])`.
    #[track_caller]
    pub fn split(self, axis: Axis, into: &[(Axis, u64)]) -> Self {
        self.reshape_as(|shape| layout::split(shape, axis, into))
    }

    /// Replaces neighbouring axes, given in order, by one.
    #[track_caller]
    pub fn merge(self, axes: &[Axis], into: Axis) -> Self {
        self.reshape_as(|shape| layout::merge(shape, axes, into))
    }

    /// Removes an axis of size 1.
    #[track_caller]
    pub fn squeeze(self, axis: Axis) -> Self {
        self.reshape_as(|shape| layout::split(shape, axis, &[]))
    }

    #[track_caller]
    fn reshape_as(self, infer: impl FnOnce(&Shape) -> infer::Inferred) -> Self {
        self.func.emit(OpSpec::new("stablehlo.reshape"), &[self], |shapes| infer(&shapes[0]))
    }

    /// The same axes in another order.
    #[track_caller]
    pub fn transpose(self, order: &[Axis]) -> Self {
        let spec = OpSpec::new("stablehlo.transpose");
        let shape = self.shape();
        let Some(at) = self.func.check(&spec, &[self], || layout::permutation(&shape, order)) else {
            return self.func.poison();
        };
        if at.is_sorted() {
            return self;
        }
        let spec = spec.array("permutation", at.iter().copied());
        self.func.emit(spec, &[self], |_| Ok(shape.with_axes(at.iter().map(|i| shape.axes[*i]).collect::<Vec<_>>())))
    }

    /// Repeats the elements along the axes that this value lacks. The result has exactly the given axes.
    #[track_caller]
    pub fn broadcast(self, axes: &[(Axis, u64)]) -> Self {
        let shape = self.shape();
        if shape.axes == axes {
            return self;
        }
        let spec = OpSpec::new("stablehlo.broadcast_in_dim");
        let Some(at) = self.func.check(&spec, &[self], || layout::broadcast(&shape, axes)) else {
            return self.func.poison();
        };
        let kept: Vec<_> = axes.iter().map(|(axis, _)| *axis).filter(|axis| shape.has(*axis)).collect();
        let ordered = self.transpose(&kept);
        if ordered.rank() == axes.len() {
            return ordered;
        }
        let mut at = at;
        at.sort_unstable();
        let result = shape.with_axes(axes);
        self.func.emit(spec.array("broadcast_dimensions", at), &[ordered], |_| Ok(result))
    }

    /// Elements `range` of an axis.
    #[track_caller]
    pub fn slice(self, axis: Axis, range: Range<u64>) -> Self {
        self.slice_strided(axis, range, 1)
    }

    /// Every `stride`-th element of `range`, from its first.
    #[track_caller]
    pub fn slice_strided(self, axis: Axis, range: Range<u64>, stride: u64) -> Self {
        let spec = OpSpec::new("stablehlo.slice");
        let shape = self.shape();
        let Some(result) = self.func.check(&spec, &[self], || layout::slice(&shape, axis, &range, stride)) else {
            return self.func.poison();
        };
        if result == shape {
            return self;
        }
        let here = |name: &Axis| *name == axis;
        let starts = shape.axes.iter().map(|(name, _)| if here(name) { range.start } else { 0 } as usize);
        let limits = shape.axes.iter().map(|(name, size)| if here(name) { range.end } else { *size } as usize);
        let strides = shape.axes.iter().map(|(name, _)| if here(name) { stride } else { 1 } as usize);
        let spec = spec.array("start_indices", starts).array("limit_indices", limits).array("strides", strides);
        self.func.emit(spec, &[self], |_| Ok(result.clone()))
    }

    /// Adds `low` elements before and `high` elements after those of an axis.
    #[track_caller]
    pub fn pad(self, axis: Axis, low: u64, high: u64, with: impl IntoValue<'f>) -> Self {
        let with = with.into_value(self.func, &Shape::scalar(self.dtype()));
        let at = |amount: u64| {
            let amounts = self.shape().axes.into_iter().map(move |(name, _)| if name == axis { amount } else { 0 });
            amounts.map(|amount| amount as usize)
        };
        let spec = OpSpec::new("stablehlo.pad");
        let spec = spec.array("edge_padding_low", at(low)).array("edge_padding_high", at(high));
        let spec = spec.array("interior_padding", at(0));
        self.func.emit(spec, &[self, with], |shapes| layout::pad(shapes, axis, low, high))
    }

    /// Reads the bits as another dtype of the same width.
    #[track_caller]
    pub fn bitcast(self, dtype: DType) -> Self {
        self.bitcast_as(dtype, None)
    }

    /// Reads the bits as elements of another width. To narrower ones: `axis` is added innermost and holds the parts
    /// of an element, lowest first. To wider ones: `axis` must be innermost, hold the parts, and vanishes.
    #[track_caller]
    pub fn bitcast_parts(self, dtype: DType, axis: Axis) -> Self {
        self.bitcast_as(dtype, Some(axis))
    }

    #[track_caller]
    fn bitcast_as(self, dtype: DType, axis: Option<Axis>) -> Self {
        if self.dtype() == dtype && axis.is_none() {
            return self;
        }
        let spec = OpSpec::new("stablehlo.bitcast_convert");
        self.func.emit(spec, &[self], |shapes| layout::bitcast(&shapes[0], dtype, axis))
    }
}

impl<'f> Func<'f> {
    /// Puts tensors behind one another along an axis. Their other axes are the same.
    #[track_caller]
    pub fn concatenate(&'f self, axis: Axis, values: &[Value<'f>]) -> Value<'f> {
        let at = values.first().and_then(|value| value.shape().index(axis)).unwrap_or_default();
        let spec = OpSpec::new("stablehlo.concatenate").with("dimension", Attribute::I64(at as i64));
        match values {
            [value] => *value,
            _ => self.emit(spec, values, |shapes| layout::concatenate(shapes, axis)),
        }
    }
}
