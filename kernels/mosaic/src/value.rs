//! Handles of a kernel under construction.

use std::fmt;

use crate::{
    Builder,
    ir::{Id, OpKind, Scalar},
    types::{Elem, RefType, Tensor, Type},
};

/// A scalar or a vector in a register. It is a handle: cheap to copy.
///
/// Operations never fail visibly. The first mistake is recorded with the place in the calling code where it was made;
/// its outcome is a *poisoned* handle, on which every further operation is silent; [`crate::Kernel::build`] returns
/// the mistake.
#[derive(Clone, Copy)]
pub struct Value<'k> {
    pub(crate) k: &'k Builder,
    id: Option<Id>,
}

/// A memory, or a box cut out of one.
#[derive(Clone, Copy)]
pub struct Ref<'k> {
    pub(crate) k: &'k Builder,
    id: Option<Id>,
}

/// A semaphore or an array of them; [`Semaphore::at`] picks one.
#[derive(Clone, Copy)]
pub struct Semaphore<'k>(pub(crate) Ref<'k>);

impl fmt::Debug for Value<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.id {
            Some(id) => write!(f, "%{}: {}", id.index(), self.k.type_of(id)),
            None => f.write_str("poisoned"),
        }
    }
}

/// What operations take beside a value: another value, or a number, which takes the value's element type.
pub trait IntoValue<'k> {
    #[track_caller]
    fn into_value(self, k: &'k Builder, elem: Elem) -> Value<'k>;
}

impl<'k> IntoValue<'k> for Value<'k> {
    fn into_value(self, _: &'k Builder, _: Elem) -> Value<'k> {
        self
    }
}

macro_rules! number_into_value {
    ($($type:ty),*) => {$(
        impl<'k> IntoValue<'k> for $type {
            #[track_caller]
            fn into_value(self, k: &'k Builder, elem: Elem) -> Value<'k> {
                k.constant(Type::Scalar(elem), self)
            }
        }
    )*};
}

number_into_value!(i32, f32, bool, Scalar);

impl<'k> Value<'k> {
    pub(crate) fn maybe(k: &'k Builder, id: Option<Id>) -> Self {
        Self { k, id }
    }

    pub(crate) fn poisoned(k: &'k Builder) -> Self {
        Self { k, id: None }
    }

    pub(crate) fn id(&self) -> Option<Id> {
        self.id
    }

    /// The type; that of a poisoned value is an `i32`.
    pub(crate) fn ty(&self) -> Type {
        self.id.map_or(Type::Scalar(Elem::I32), |id| self.k.type_of(id))
    }

    /// The element type; that of a poisoned value is `i32`.
    pub fn elem(&self) -> Elem {
        self.id.and_then(|id| self.k.with_type(id, Type::elem)).unwrap_or(Elem::I32)
    }

    /// The sizes of a vector's axes; none for a scalar.
    pub fn dims(&self) -> Vec<usize> {
        self.id.map_or(Vec::new(), |id| self.k.with_type(id, |ty| ty.dims().to_vec()))
    }

    pub fn is_scalar(&self) -> bool {
        self.dims().is_empty()
    }
}

impl<'k> Ref<'k> {
    pub(crate) fn new(k: &'k Builder, id: Id) -> Self {
        Self { k, id: Some(id) }
    }

    pub(crate) fn maybe(k: &'k Builder, id: Option<Id>) -> Self {
        Self { k, id }
    }

    pub(crate) fn poisoned(k: &'k Builder) -> Self {
        Self { k, id: None }
    }

    pub(crate) fn id(&self) -> Option<Id> {
        self.id
    }

    pub(crate) fn reference(&self) -> Option<RefType> {
        match self.k.type_of(self.id?) {
            Type::Ref(reference) => Some(reference),
            _ => None,
        }
    }

    /// The sizes of the axes; 0 for one that is known at run time only.
    pub fn dims(&self) -> Vec<usize> {
        let dims = self.reference().map(|reference| reference.dims).unwrap_or_default();
        dims.into_iter().map(|dim| dim.unwrap_or(0)).collect()
    }

    /// The element type; that of a poisoned reference is `i32`.
    pub fn elem(&self) -> Elem {
        self.reference().and_then(|reference| reference.elem()).unwrap_or(Elem::I32)
    }
}

impl Elem {
    /// A tensor of this element type.
    pub fn of(self, dims: impl Into<Vec<usize>>) -> Tensor {
        Tensor::new(self, dims)
    }
}

/// Constants.
impl Builder {
    #[track_caller]
    pub fn i32(&self, number: i32) -> Value<'_> {
        self.constant(Type::Scalar(Elem::I32), number)
    }

    #[track_caller]
    pub fn f32(&self, number: f32) -> Value<'_> {
        self.constant(Type::Scalar(Elem::F32), number)
    }

    #[track_caller]
    pub fn bool(&self, value: bool) -> Value<'_> {
        self.constant(Type::Scalar(Elem::I1), value)
    }

    /// A vector with the same number in every lane. `bf16` rounds it; 8-bit floats are made with [`Value::cast`].
    #[track_caller]
    pub fn full(&self, tensor: Tensor, number: impl Into<Scalar>) -> Value<'_> {
        self.constant(Type::Vector(tensor), number)
    }

    #[track_caller]
    pub fn zeros(&self, tensor: Tensor) -> Value<'_> {
        self.full(tensor, 0)
    }

    /// `i32` numbers 0, 1, 2, … along an axis of at least two: `[1, n]` rather than `[n]`.
    #[track_caller]
    pub fn iota(&self, dims: impl Into<Vec<usize>>, axis: usize) -> Value<'_> {
        let dims = dims.into();
        self.value(OpKind::Iota(axis), &[], |_| match axis < dims.len() && dims.len() >= 2 {
            true => Ok(Type::vector(Elem::I32, dims)),
            false => Err(format!("there is no axis {axis} among two or more of {dims:?}")),
        })
    }
}
