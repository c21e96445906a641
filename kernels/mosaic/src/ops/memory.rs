//! Loads and stores.

use crate::{
    IntoValue, Ref, Value,
    ir::{Id, OpKind},
    types::{Elem, RefType, Space, Type},
};

use super::view::{IntoIndices, Resolved, resolve};

impl<'k> Ref<'k> {
    /// The whole memory, which lies in VMEM, as a vector.
    #[track_caller]
    pub fn load(self) -> Value<'k> {
        self.load_at(())
    }

    /// A box of a memory in VMEM as a vector; axes that are picked at one position vanish.
    #[track_caller]
    pub fn load_at(self, indices: impl IntoIndices<'k>) -> Value<'k> {
        let k = self.k;
        let Some((id, reference, resolved)) = self.vector_access("load", indices) else { return Value::poisoned(k) };
        let (elem, dims) = (self.elem(), resolved.sizes.iter().flatten().copied().collect::<Vec<_>>());
        let kind = OpKind::Load { strides: strides(&resolved) };
        let operands = addresses(id, &resolved, self);
        let results = k.emit(kind, &operands, Vec::new(), |_| {
            in_vmem(&reference)?;
            Ok(vec![Type::vector(elem, dims)])
        });
        let loaded = Value::maybe(k, results.and_then(|results| results.first().copied()));
        if resolved.squeezed.is_empty() { loaded } else { loaded.reshape(&kept_dims(&resolved)) }
    }

    /// Writes a vector over the whole memory, which lies in VMEM.
    #[track_caller]
    pub fn store(self, value: Value<'k>) {
        self.store_op((), value, None);
    }

    /// Writes a vector over a box of a memory in VMEM.
    #[track_caller]
    pub fn store_at(self, indices: impl IntoIndices<'k>, value: Value<'k>) {
        self.store_op(indices, value, None);
    }

    /// Writes the lanes of a vector where the mask holds.
    #[track_caller]
    pub fn store_masked(self, indices: impl IntoIndices<'k>, value: Value<'k>, mask: Value<'k>) {
        self.store_op(indices, value, Some(mask));
    }

    #[track_caller]
    fn store_op(self, indices: impl IntoIndices<'k>, value: Value<'k>, mask: Option<Value<'k>>) {
        let Some((id, reference, resolved)) = self.vector_access("store", indices) else { return };
        let sizes: Vec<_> = resolved.sizes.iter().flatten().copied().collect();
        let kept = kept_dims(&resolved);
        let whole = |value: Value<'k>| match value.dims() == kept && kept != sizes {
            true => value.reshape(&sizes),
            false => value,
        };
        let (value, mask) = (whole(value), mask.map(whole));
        let mut operands = vec![value.id()];
        operands.extend(addresses(id, &resolved, self));
        operands.extend(mask.iter().map(Value::id));
        let kind = OpKind::Store { strides: strides(&resolved), masked: mask.is_some() };
        let expected = Type::vector(self.elem(), sizes);
        self.k.emit(kind, &operands, Vec::new(), |types| {
            in_vmem(&reference)?;
            if types[0] != expected {
                return Err(format!("the box holds {expected}"));
            }
            match types.last().filter(|_| mask.is_some()) {
                Some(mask) if *mask != expected.with_elem(Elem::I1) => Err(format!("{mask} is no mask of {expected}")),
                _ => Ok(Vec::new()),
            }
        });
    }

    /// The scalar at a position of a memory in SMEM.
    #[track_caller]
    pub fn get(self, indices: impl IntoIndices<'k>) -> Value<'k> {
        let Some((id, reference, resolved)) = self.vector_access("scalar_load", indices) else {
            return Value::poisoned(self.k);
        };
        let elem = self.elem();
        let results = self.k.emit(OpKind::ScalarLoad, &addresses(id, &resolved, self), Vec::new(), |_| {
            in_smem(&reference, &resolved)?;
            Ok(vec![Type::Scalar(elem)])
        });
        Value::maybe(self.k, results.and_then(|results| results.first().copied()))
    }

    /// Writes a scalar to a position of a memory in SMEM.
    #[track_caller]
    pub fn set(self, indices: impl IntoIndices<'k>, value: impl IntoValue<'k>) {
        let Some((id, reference, resolved)) = self.vector_access("scalar_store", indices) else { return };
        let elem = self.elem();
        let mut operands = vec![value.into_value(self.k, elem).id()];
        operands.extend(addresses(id, &resolved, self));
        self.k.emit(OpKind::ScalarStore, &operands, Vec::new(), |types| {
            in_smem(&reference, &resolved)?;
            match types[0] == Type::Scalar(elem) {
                true => Ok(Vec::new()),
                false => Err(format!("the memory holds {elem}")),
            }
        });
    }

    #[track_caller]
    fn vector_access(
        self,
        operation: &'static str,
        indices: impl IntoIndices<'k>,
    ) -> Option<(Id, RefType, Resolved<'k>)> {
        let (id, reference) = (self.id()?, self.reference()?);
        let resolved = resolve(&reference, indices.into_indices());
        let reason = match resolved {
            Ok(resolved) if resolved.dynamic.is_empty() => match strides_fit(&reference, &resolved) {
                Ok(()) => return Some((id, reference, resolved)),
                Err(reason) => reason,
            },
            Ok(_) => "sizes known at run time are for DMAs".to_owned(),
            Err(reason) => reason,
        };
        self.k.fail(operation, &[id], reason);
        None
    }
}

/// The memory, and the position along each axis.
#[track_caller]
fn addresses<'k>(id: Id, resolved: &Resolved<'k>, memory: Ref<'k>) -> Vec<Option<Id>> {
    let mut operands = vec![Some(id)];
    for start in &resolved.starts {
        operands.push(start.index(memory.k));
    }
    operands
}

/// Strides as operations carry them: none if all are 1.
fn strides(resolved: &Resolved<'_>) -> Vec<usize> {
    if resolved.strides.iter().all(|stride| *stride == 1) { Vec::new() } else { resolved.strides.clone() }
}

fn kept_dims(resolved: &Resolved<'_>) -> Vec<usize> {
    let kept = resolved.sizes.iter().enumerate().filter(|(axis, _)| !resolved.squeezed.contains(axis));
    let dims: Vec<_> = kept.filter_map(|(_, size)| *size).collect();
    // Vectors have at least one axis.
    if dims.is_empty() { vec![1] } else { dims }
}

fn strides_fit(reference: &RefType, resolved: &Resolved<'_>) -> Result<(), String> {
    let packed = reference.elem().is_some_and(|elem| elem.packing() > 1);
    let along_lanes = resolved.strides.last().is_some_and(|stride| *stride > 1);
    match resolved.strides.iter().any(|stride| *stride > 1) && (packed || along_lanes) {
        true => Err("strides are for 32-bit elements, and for all axes but the last".to_owned()),
        false => Ok(()),
    }
}

fn in_vmem(reference: &RefType) -> Result<(), String> {
    match (reference.space, reference.elem()) {
        (Space::Vmem, Some(_)) => Ok(()),
        (space, _) => Err(format!("vectors are loaded from and stored to VMEM, not {space}: copy with a DMA")),
    }
}

fn in_smem(reference: &RefType, resolved: &Resolved<'_>) -> Result<(), String> {
    match (reference.space, resolved.squeezed.len() == reference.dims.len()) {
        (Space::Smem, true) => Ok(()),
        (Space::Smem, false) => Err("a scalar has one position for each axis".to_owned()),
        (space, _) => Err(format!("scalars are read from and written to SMEM, not {space}")),
    }
}
