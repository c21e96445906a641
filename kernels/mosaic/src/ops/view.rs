//! Boxes cut out of memories.

use std::ops::{Range, RangeFull};

use crate::{
    Builder, IntoValue, Ref, Semaphore, Value,
    ir::{Id, OpKind},
    types::{Content, Elem, RefType, Tensor, Type},
};

use super::convert::rows_after_bitcast;

/// What is taken of one axis.
#[derive(Clone, Copy, Debug)]
pub enum Dim<'k> {
    All,
    /// One position; the axis vanishes.
    At(Position<'k>),
    /// So many elements from a position.
    Span {
        start: Position<'k>,
        size: usize,
    },
    /// As many elements as an `i32` says. Only DMAs take such boxes.
    Dynamic {
        start: Position<'k>,
        size: Value<'k>,
    },
    /// So many elements, each `stride` after the one before. Only loads and stores of vectors take such boxes.
    Strided {
        start: Position<'k>,
        size: usize,
        stride: usize,
    },
}

/// A position: known now, or an `i32` scalar.
#[derive(Clone, Copy, Debug)]
pub enum Position<'k> {
    Known(i32),
    Value(Value<'k>),
}

impl<'k> Position<'k> {
    #[track_caller]
    pub(crate) fn i32(self, k: &'k Builder) -> Value<'k> {
        match self {
            Self::Known(number) => k.i32(number),
            Self::Value(value) => value,
        }
    }

    /// As an address.
    #[track_caller]
    pub(crate) fn index(self, k: &'k Builder) -> Option<Id> {
        match self {
            Self::Known(number) => number.into_value(k, Elem::Index).id(),
            Self::Value(value) => value.index(),
        }
    }
}

impl From<i32> for Position<'_> {
    fn from(number: i32) -> Self {
        Self::Known(number)
    }
}

impl From<usize> for Position<'_> {
    fn from(number: usize) -> Self {
        Self::Known(number as i32)
    }
}

impl<'k> From<Value<'k>> for Position<'k> {
    fn from(value: Value<'k>) -> Self {
        Self::Value(value)
    }
}

/// `size` elements from `start`.
pub fn ds<'k>(start: impl Into<Position<'k>>, size: usize) -> Dim<'k> {
    Dim::Span { start: start.into(), size }
}

/// `size` (an `i32`) elements from `start`: for DMAs.
pub fn ds_dynamic<'k>(start: impl Into<Position<'k>>, size: Value<'k>) -> Dim<'k> {
    Dim::Dynamic { start: start.into(), size }
}

/// `size` elements from `start`, each `stride` after the one before: for loads and stores of memories of 32-bit elements
/// whose last axis has 128 lanes, along any other axis.
pub fn strided<'k>(start: impl Into<Position<'k>>, size: usize, stride: usize) -> Dim<'k> {
    Dim::Strided { start: start.into(), size, stride }
}

impl From<RangeFull> for Dim<'_> {
    fn from(_: RangeFull) -> Self {
        Self::All
    }
}

impl From<Range<i32>> for Dim<'_> {
    fn from(range: Range<i32>) -> Self {
        Self::Span { start: Position::Known(range.start), size: (range.end - range.start).max(0) as usize }
    }
}

impl<'k, T: Into<Position<'k>>> From<T> for Dim<'k> {
    fn from(position: T) -> Self {
        Self::At(position.into())
    }
}

/// What is taken of each axis, outermost first: a tuple or a list of [`Dim`]s or of what becomes one (a position, `..`,
/// [`ds`]). Axes that are not named are taken whole.
pub trait IntoIndices<'k> {
    fn into_indices(self) -> Vec<Dim<'k>>;
}

impl<'k> IntoIndices<'k> for Vec<Dim<'k>> {
    fn into_indices(self) -> Vec<Dim<'k>> {
        self
    }
}

impl<'k> IntoIndices<'k> for () {
    fn into_indices(self) -> Vec<Dim<'k>> {
        Vec::new()
    }
}

macro_rules! tuples {
    ($(($($name:ident)*))*) => {$(
        impl<'k, $($name: Into<Dim<'k>>),*> IntoIndices<'k> for ($($name,)*) {
            #[expect(non_snake_case, reason = "the types' names serve as the fields'")]
            fn into_indices(self) -> Vec<Dim<'k>> {
                let ($($name,)*) = self;
                vec![$($name.into()),*]
            }
        }
    )*};
}

tuples! { (A) (A B) (A B C) (A B C D) (A B C D E) (A B C D E F) }

/// For each axis: where the box starts, its size (`None`: run time), the stride, and whether the axis vanishes.
pub(super) struct Resolved<'k> {
    pub starts: Vec<Position<'k>>,
    pub sizes: Vec<Option<usize>>,
    pub dynamic: Vec<Value<'k>>,
    pub strides: Vec<usize>,
    pub squeezed: Vec<usize>,
}

/// Fits indices to a memory's axes and checks what is known.
pub(super) fn resolve<'k>(reference: &RefType, indices: Vec<Dim<'k>>) -> Result<Resolved<'k>, String> {
    let rank = reference.dims.len();
    if indices.len() > rank {
        return Err(format!("{} positions for {rank} axes", indices.len()));
    }
    let mut out = Resolved {
        starts: Vec::new(),
        sizes: Vec::new(),
        dynamic: Vec::new(),
        strides: vec![1; rank],
        squeezed: vec![],
    };
    let padded = indices.into_iter().chain(std::iter::repeat(Dim::All)).take(rank);
    for (axis, (dim, whole)) in padded.zip(&reference.dims).enumerate() {
        let (start, size) = match dim {
            Dim::All => (Position::Known(0), *whole),
            Dim::At(start) => {
                out.squeezed.push(axis);
                (start, Some(1))
            }
            Dim::Span { start, size } => (start, Some(size)),
            Dim::Dynamic { start, size } => {
                out.dynamic.push(size);
                (start, None)
            }
            Dim::Strided { start, size, stride } => {
                out.strides[axis] = stride.max(1);
                (start, Some(size))
            }
        };
        if size.is_none() && matches!(dim, Dim::All) {
            return Err(format!("the size of axis {axis} is known at run time only: name the part you want"));
        }
        if let (Position::Known(start), Some(size), Some(whole)) = (start, size, whole) {
            let end = i64::from(start) + (size.max(1) as i64 - 1) * out.strides[axis] as i64 + 1;
            if start < 0 || end > *whole as i64 || size == 0 {
                return Err(format!("{size} elements from {start} do not lie within {whole} of axis {axis}"));
            }
        }
        out.starts.push(start);
        out.sizes.push(size);
    }
    Ok(out)
}

impl<'k> Ref<'k> {
    /// A box of this memory: what DMAs copy. Positions and sizes along the last two axes must be multiples of the
    /// tile (8 rows of 32-bit words, 128 lanes) as far as the compiler insists; see [`Value::assume_multiple`].
    #[track_caller]
    pub fn at(self, indices: impl IntoIndices<'k>) -> Ref<'k> {
        let (k, Some(id), Some(reference)) = (self.k, self.id(), self.reference()) else { return self };
        let resolved = match resolve(&reference, indices.into_indices()) {
            Ok(resolved) if resolved.strides.iter().all(|stride| *stride == 1) => resolved,
            Ok(_) => return k.fail_ref("ref_slice", &[id], "strides are for loads and stores"),
            Err(reason) => return k.fail_ref("ref_slice", &[id], reason),
        };
        let mut operands = vec![Some(id)];
        // No closure, which would hide the caller's place.
        for start in &resolved.starts {
            operands.push(start.i32(k).id());
        }
        operands.extend(resolved.dynamic.iter().map(Value::id));
        let boxed = RefType { dims: resolved.sizes.clone(), ..reference };
        let slice = k.emit(OpKind::RefSlice, &operands, Vec::new(), |types| {
            match types[1..].iter().all(|ty| *ty == Type::Scalar(Elem::I32)) {
                true => Ok(vec![Type::Ref(boxed.clone())]),
                false => Err("positions and sizes are i32 scalars".to_owned()),
            }
        });
        let Some(slice) = slice.and_then(|results| results.first().copied()) else { return Ref::poisoned(k) };
        if resolved.squeezed.is_empty() { Ref::new(k, slice) } else { squeeze(k, slice, &boxed, &resolved.squeezed) }
    }

    /// The same memory under other dimensions. Rows of packed elements must stay whole, and a box must be contiguous.
    #[track_caller]
    pub fn reshape(self, dims: &[usize]) -> Ref<'k> {
        self.changed(OpKind::RefReshape, |reference| {
            let old = reference.static_dims().ok_or("a size is known at run time only")?;
            match old.iter().product::<usize>() == dims.iter().product::<usize>() && !dims.is_empty() {
                true => Ok(RefType { dims: dims.iter().copied().map(Some).collect(), ..reference }),
                false => Err(format!("{old:?} is not {dims:?}")),
            }
        })
    }

    /// The same memory as other elements. The second-to-last axis shrinks or grows with their width, as for
    /// [`Value::bitcast`].
    #[track_caller]
    pub fn bitcast(self, elem: Elem) -> Ref<'k> {
        self.changed(OpKind::RefBitcast, |reference| {
            let old = reference.static_dims().ok_or("a size is known at run time only")?;
            let from = reference.elem().filter(|_| elem.is_stored()).ok_or("it holds no such elements")?;
            let dims = match from.bits() == elem.bits() {
                true => Some(old.clone()),
                false => rows_after_bitcast(&old, from, elem),
            };
            let dims = dims.ok_or_else(|| format!("the rows of {} are no {elem}", Tensor::new(from, old)))?;
            Ok(RefType { content: Content::Data(elem), dims: dims.into_iter().map(Some).collect(), ..reference })
        })
    }

    #[track_caller]
    fn changed(self, kind: OpKind, infer: impl FnOnce(RefType) -> Result<RefType, String>) -> Ref<'k> {
        let results = self.k.emit(kind, &[self.id()], Vec::new(), |types| match &types[0] {
            Type::Ref(reference) => Ok(vec![Type::Ref(infer(reference.clone())?)]),
            _ => Err("it is no memory".to_owned()),
        });
        Ref::maybe(self.k, results.and_then(|results| results.first().copied()))
    }
}

#[track_caller]
fn squeeze<'k>(k: &'k Builder, slice: Id, boxed: &RefType, squeezed: &[usize]) -> Ref<'k> {
    let kept = boxed.dims.iter().enumerate().filter(|(axis, _)| !squeezed.contains(axis));
    let ty = RefType { dims: kept.map(|(_, dim)| *dim).collect(), ..boxed.clone() };
    let kind = OpKind::RefSqueeze(squeezed.to_vec());
    let results = k.emit(kind, &[Some(slice)], Vec::new(), |_| Ok(vec![Type::Ref(ty)]));
    Ref::maybe(k, results.and_then(|results| results.first().copied()))
}

impl<'k> Semaphore<'k> {
    /// One semaphore of an array.
    #[track_caller]
    pub fn at(self, indices: impl IntoIndices<'k>) -> Semaphore<'k> {
        Semaphore(self.0.at(indices))
    }
}
