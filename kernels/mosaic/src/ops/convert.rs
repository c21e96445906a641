//! Between element types.

use crate::{
    Value,
    ir::{Id, OpKind},
    types::{Elem, Type},
};

impl<'k> Value<'k> {
    /// The same numbers in another element type. To a narrower float rounds to the nearest, halves to even; to an
    /// integer cuts the fraction off. What does not fit: floats to `i32` saturate, to narrower integers and integers
    /// to narrower ones wrap, and `F8E4M3` has NaN beyond 448 (the interpreter's model; clamp before you cast). Masks
    /// become 0 and 1.
    #[track_caller]
    pub fn cast(self, elem: Elem) -> Value<'k> {
        let from = self.elem();
        if from == elem && self.id().is_some() {
            return self;
        }
        match stepping_stone(from, elem) {
            Some(middle) => self.cast(middle).cast(elem),
            None => self.k.value(OpKind::Cast, &[self], |types| match (from, elem) {
                (_, Elem::I1 | Elem::Index) | (Elem::Index, _) => Err(format!("{from} cannot become {elem}")),
                _ => Ok(types[0].with_elem(elem)),
            }),
        }
    }

    /// The same bits in another element type. Where widths differ, the second-to-last axis shrinks or grows: one row
    /// of 32-bit words is two rows of `bf16` (the low halves first) or four of `i8`.
    #[track_caller]
    pub fn bitcast(self, elem: Elem) -> Value<'k> {
        self.k.value(OpKind::Bitcast, &[self], |types| {
            let from = types[0].elem().filter(|from| from.is_stored() && elem.is_stored());
            let Some(from) = from else { return Err(format!("no {elem} has these bits")) };
            match (&types[0], from.bits() == elem.bits()) {
                (ty, true) => Ok(ty.with_elem(elem)),
                (Type::Vector(tensor), false) => match rows_after_bitcast(&tensor.dims, from, elem) {
                    Some(dims) => Ok(Type::vector(elem, dims)),
                    None => Err(format!("the rows of {tensor} are no whole number of {elem} rows")),
                },
                _ => Err(format!("{from} and {elem} differ in width")),
            }
        })
    }

    /// The same words, of which none is undefined any more: what was is some number, and may be another one each time. For
    /// kernels in which every number does (weighted with zero, say, if all of them are finite). It costs nothing.
    #[track_caller]
    pub fn freeze(self) -> Value<'k> {
        self.k.value(OpKind::Freeze, &[self], |types| match &types[0] {
            Type::Vector(tensor) if tensor.elem == Elem::I32 => Ok(types[0].clone()),
            _ => Err("only vectors of i32 are frozen".to_owned()),
        })
    }

    /// Promises the compiler that an `i32` is a multiple of `multiple`, which it wants to know of offsets into tiled
    /// memory. The interpreter checks it.
    #[track_caller]
    pub fn assume_multiple(self, multiple: u32) -> Value<'k> {
        self.k.value(OpKind::AssumeMultiple(multiple), &[self], |types| match types[0] {
            Type::Scalar(Elem::I32) if multiple > 0 => Ok(types[0].clone()),
            _ => Err("only i32 scalars are multiples of a positive number".to_owned()),
        })
    }

    /// The scalar as an address.
    #[track_caller]
    pub(crate) fn index(self) -> Option<Id> {
        let cast = self.k.value(OpKind::IndexCast, &[self], |types| match types[0] {
            Type::Scalar(Elem::I32) => Ok(Type::Scalar(Elem::Index)),
            _ => Err("positions are i32 scalars".to_owned()),
        });
        cast.id()
    }
}

/// The type to go through where there is no direct conversion.
fn stepping_stone(from: Elem, to: Elem) -> Option<Elem> {
    match (from, to) {
        (Elem::I1, Elem::I32) => None,
        (Elem::I1, _) => Some(Elem::I32),
        (Elem::F8E4M3 | Elem::F8E5M2 | Elem::Bf16, Elem::I32 | Elem::I16 | Elem::I8 | Elem::I4) => Some(Elem::F32),
        (Elem::I32, Elem::Bf16 | Elem::F8E4M3 | Elem::F8E5M2) => Some(Elem::F32),
        (Elem::I8 | Elem::I4, Elem::F8E4M3 | Elem::F8E5M2) => Some(Elem::F32),
        (Elem::F8E4M3, Elem::F8E5M2) | (Elem::F8E5M2, Elem::F8E4M3) => Some(Elem::F32),
        (Elem::I16, Elem::F32 | Elem::Bf16 | Elem::F8E4M3 | Elem::F8E5M2) => Some(Elem::I32),
        // Through i32, so that what does not fit wraps everywhere.
        (Elem::F32, Elem::I16 | Elem::I8 | Elem::I4) => Some(Elem::I32),
        _ => None,
    }
}

/// The dimensions after a bitcast between widths.
pub(super) fn rows_after_bitcast(dims: &[usize], from: Elem, to: Elem) -> Option<Vec<usize>> {
    let mut dims = dims.to_vec();
    let rows = dims.len().checked_sub(2)?;
    let bits = dims[rows] * from.bits();
    dims[rows] = bits / to.bits();
    (bits.is_multiple_of(to.bits()) && bits.is_multiple_of(32)).then_some(dims)
}
