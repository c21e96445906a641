//! Asynchronous copies and semaphores.

use crate::{
    IntoValue, Ref, Semaphore, Value,
    ir::OpKind,
    types::{Content, Elem, RefType, Space, Type},
};

/// An asynchronous copy that may be started and waited for, here or elsewhere in the kernel.
#[derive(Clone, Copy)]
pub struct Dma<'k> {
    source: Ref<'k>,
    destination: Ref<'k>,
    semaphore: Semaphore<'k>,
}

impl<'k> Ref<'k> {
    /// A copy of this memory to another of the same shape. It adds the bytes copied to the semaphore when it is done.
    /// It must be waited for before the destination is read or the source is written.
    pub fn copy_to(self, destination: Ref<'k>, semaphore: Semaphore<'k>) -> Dma<'k> {
        Dma { source: self, destination, semaphore }
    }
}

impl<'k> Dma<'k> {
    #[track_caller]
    pub fn start(self) {
        let operands = [self.source.id(), self.destination.id(), self.semaphore.0.id()];
        self.source.k.emit(OpKind::DmaStart, &operands, Vec::new(), |types| {
            let (source, destination) = (reference(&types[0])?, reference(&types[1])?);
            one_semaphore(&types[2], Content::DmaSemaphore)?;
            same_box(source, destination)?;
            match source.space != Space::Semaphore && (source.space != Space::Smem || destination.space != Space::Smem)
            {
                true => Ok(Vec::new()),
                false => Err(format!("there is no DMA from {} to {}", source.space, destination.space)),
            }
        });
    }

    /// Waits until the semaphore counts as many bytes as this copy has, and takes them off. Which copies they belong to
    /// is not known: copies that share a semaphore are done when all their bytes have been waited for.
    #[track_caller]
    pub fn wait(self) {
        let operands = [self.semaphore.0.id(), self.source.id(), self.destination.id()];
        self.source.k.emit(OpKind::DmaWait, &operands, Vec::new(), |types| {
            one_semaphore(&types[0], Content::DmaSemaphore)?;
            same_box(reference(&types[1])?, reference(&types[2])?)?;
            Ok(Vec::new())
        });
    }
}

impl<'k> Semaphore<'k> {
    /// Adds to a semaphore that is not a DMA's.
    #[track_caller]
    pub fn signal(self, count: impl IntoValue<'k>) {
        self.counted(OpKind::SemaphoreSignal, count);
    }

    /// Waits until the semaphore is at least `count`, and subtracts it.
    #[track_caller]
    pub fn wait(self, count: impl IntoValue<'k>) {
        self.counted(OpKind::SemaphoreWait, count);
    }

    #[track_caller]
    fn counted(self, kind: OpKind, count: impl IntoValue<'k>) {
        let k = self.0.k;
        let count = count.into_value(k, Elem::I32);
        k.emit(kind, &[self.0.id(), count.id()], Vec::new(), |types| {
            one_semaphore(&types[0], Content::Semaphore)?;
            match types[1] {
                Type::Scalar(Elem::I32) => Ok(Vec::new()),
                _ => Err("semaphores count in i32".to_owned()),
            }
        });
    }

    /// The count now.
    #[track_caller]
    pub fn read(self) -> Value<'k> {
        let k = self.0.k;
        let results = k.emit(OpKind::SemaphoreRead, &[self.0.id()], Vec::new(), |types| {
            one_semaphore(&types[0], Content::Semaphore)?;
            Ok(vec![Type::Scalar(Elem::I32)])
        });
        Value::maybe(k, results.and_then(|results| results.first().copied()))
    }
}

fn reference(ty: &Type) -> Result<&RefType, String> {
    match ty {
        Type::Ref(reference) => Ok(reference),
        _ => Err("it is no memory".to_owned()),
    }
}

fn one_semaphore(ty: &Type, content: Content) -> Result<(), String> {
    let found = reference(ty)?;
    let kind = if content == Content::DmaSemaphore { "DMA semaphore" } else { "semaphore" };
    match found.content == content && found.dims.is_empty() {
        true => Ok(()),
        false if found.content == content => Err(format!("pick one {kind} with `at`")),
        false => Err(format!("{ty} is no {kind}")),
    }
}

fn same_box(source: &RefType, destination: &RefType) -> Result<(), String> {
    let same = |(a, b): (&Option<usize>, &Option<usize>)| a == b || a.is_none() || b.is_none();
    let fits = source.content == destination.content
        && source.dims.len() == destination.dims.len()
        && source.dims.iter().zip(&destination.dims).all(same);
    if fits { Ok(()) } else { Err("source and destination differ in shape or element type".to_owned()) }
}
