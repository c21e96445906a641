//! Tensors of a function under construction.

use std::{num::NonZeroU32, panic::Location};

use torus_abi::DType;

use crate::{Axis, Element, Func, Literal, Scalar, Shape, func::OpSpec, infer, ir::Attribute};

/// A tensor in a function. It is a handle: cheap to copy, and meaningless outside of its function.
///
/// Operations never fail visibly. The first mistake is recorded with the place in the calling code where it was made;
/// its outcome is a *poisoned* value, on which every further operation is silent; [`crate::Builder::finish`] returns
/// the mistake.
#[derive(Clone, Copy)]
pub struct Value<'f> {
    pub(crate) func: &'f Func<'f>,
    /// `None` = poisoned.
    id: Option<ValueId>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct ValueId(NonZeroU32);

impl ValueId {
    pub(crate) fn new(index: usize) -> Self {
        Self(NonZeroU32::MIN.saturating_add(index as u32))
    }

    pub(crate) fn index(self) -> usize {
        self.0.get() as usize - 1
    }
}

/// What an elementwise operation takes beside a value: another value, or a number that takes the value's shape.
pub trait IntoValue<'f> {
    #[track_caller]
    fn into_value(self, func: &'f Func<'f>, like: &Shape) -> Value<'f>;
}

impl<'f> IntoValue<'f> for Value<'f> {
    fn into_value(self, _: &'f Func<'f>, _: &Shape) -> Value<'f> {
        self
    }
}

macro_rules! number_into_value {
    ($($type:ty),*) => {$(
        impl<'f> IntoValue<'f> for $type {
            #[track_caller]
            fn into_value(self, func: &'f Func<'f>, like: &Shape) -> Value<'f> {
                func.full(like.clone(), self)
            }
        }
    )*};
}

number_into_value!(bool, i32, i64, u32, u64, f32, f64, Scalar);

impl<'f> Value<'f> {
    pub(crate) fn new(func: &'f Func<'f>, id: ValueId) -> Self {
        Self { func, id: Some(id) }
    }

    pub(crate) fn poisoned(func: &'f Func<'f>) -> Self {
        Self { func, id: None }
    }

    pub(crate) fn id(&self) -> Option<ValueId> {
        self.id
    }

    /// The function it belongs to.
    pub fn func(&self) -> &'f Func<'f> {
        self.func
    }

    /// The shape; that of a poisoned value is an `f32` scalar.
    pub fn shape(&self) -> Shape {
        self.id.map_or_else(|| Shape::scalar(DType::F32), |id| self.func.shape_of(id))
    }

    pub fn dtype(&self) -> DType {
        self.id.map_or(DType::F32, |id| self.func.with_shape(id, |shape| shape.dtype))
    }

    pub fn rank(&self) -> usize {
        self.id.map_or(0, |id| self.func.with_shape(id, Shape::rank))
    }

    /// The size of an axis. That it has none of this name is a mistake; the answer is then 1.
    #[track_caller]
    pub fn size(&self, axis: Axis) -> u64 {
        let shape = self.shape();
        let size =
            self.func.check(&OpSpec::new("size"), &[*self], || infer::index(&shape, axis).map(|at| shape.axes[at].1));
        size.unwrap_or(1)
    }
}

impl<'f> Func<'f> {
    /// A constant without axes; elementwise operations broadcast it.
    #[track_caller]
    pub fn scalar(&'f self, dtype: DType, value: impl Into<Scalar>) -> Value<'f> {
        self.full(Shape::scalar(dtype), value)
    }

    /// The same value everywhere.
    #[track_caller]
    pub fn full(&'f self, shape: Shape, value: impl Into<Scalar>) -> Value<'f> {
        let literal = Literal::splat(shape.tensor_type(), value);
        self.constant(shape, literal)
    }

    #[track_caller]
    pub fn zeros(&'f self, shape: Shape) -> Value<'f> {
        let zero = if shape.dtype == DType::Bool { Scalar::Bool(false) } else { Scalar::Int(0) };
        self.full(shape, zero)
    }

    /// A constant tensor, in row-major order.
    #[track_caller]
    pub fn array<T: Element>(&'f self, axes: &[(Axis, u64)], values: &[T]) -> Value<'f> {
        let shape = Shape::new(T::DTYPE, axes);
        let values = values.iter().map(|value| (*value).into()).collect();
        let literal = Literal::dense(shape.tensor_type(), values);
        self.constant(shape, literal)
    }

    #[track_caller]
    fn constant(&'f self, shape: Shape, literal: Result<Literal, String>) -> Value<'f> {
        match literal {
            Ok(literal) => {
                let spec = OpSpec::new("stablehlo.constant").with("value", Attribute::Dense(literal));
                self.emit(spec, &[], |_| Ok(shape))
            }
            Err(reason) => self.fail(Location::caller(), "constant", vec![shape], reason),
        }
    }

    /// `0, 1, 2, …` along a single axis.
    #[track_caller]
    pub fn iota(&'f self, dtype: DType, axis: Axis, size: u64) -> Value<'f> {
        let spec = OpSpec::new("stablehlo.iota").with("iota_dimension", Attribute::I64(0));
        self.emit(spec, &[], |_| match dtype {
            DType::Bool => Err("booleans cannot be counted".to_owned()),
            _ => Ok(Shape::new(dtype, [(axis, size)])),
        })
    }
}
