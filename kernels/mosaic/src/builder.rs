//! A kernel under construction: memories, operations, regions, and the first mistake.

use std::{cell::RefCell, panic::Location};

use crate::{
    BuildError, Kernel, Ref, Semaphore, Value,
    ir::{Block, Id, Op, OpKind, Scalar, Types},
    kernel::{Operand, Output},
    types::{Content, Elem, RefType, Space, Tensor, Type},
};

/// Collects the memories and operations of one kernel. Operations are methods of the [`Value`]s, [`Ref`]s and
/// [`Semaphore`]s that it hands out, or of itself where there is nothing to begin with.
pub struct Builder {
    name: String,
    state: RefCell<State>,
}

#[derive(Default)]
struct State {
    error: Option<BuildError>,
    types: Vec<Type>,
    /// For each value the block that defines it; it may be used while that block is open.
    blocks: Vec<u32>,
    /// The kernel's own block, then the regions that are being built, innermost last.
    open: Vec<OpenBlock>,
    next_block: u32,
    prefetched: Vec<Operand>,
    operands: Vec<Operand>,
    outputs: Vec<(Output, Option<Id>)>,
    scratch: Vec<Id>,
}

struct OpenBlock {
    number: u32,
    block: Block,
}

impl State {
    fn define(&mut self, ty: Type, block: u32) -> Id {
        self.types.push(ty);
        self.blocks.push(block);
        Id::new(self.types.len() - 1)
    }

    fn is_open(&self, id: Id) -> bool {
        self.open.iter().any(|block| block.number == self.blocks[id.index()])
    }
}

impl Kernel {
    /// Builds a kernel; `name` is what profiles show. The error is the first mistake made in `body`.
    #[track_caller]
    pub fn build(name: &str, body: impl for<'k> FnOnce(&'k Builder)) -> Result<Self, BuildError> {
        let builder = Builder { name: name.to_owned(), state: RefCell::default() };
        builder.open(Vec::new());
        body(&builder);
        if !name.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_')
            || !name.chars().all(|c| c.is_ascii_alphanumeric() || "_.".contains(c))
        {
            builder.record("kernel", Vec::new(), "its name must be an identifier of letters, digits, '_' and '.'");
        }
        builder.finish()
    }
}

impl Builder {
    /// A rank-1 or rank-2 operand that lies in SMEM before the kernel starts: lengths, page tables. All prefetched
    /// operands come before all others in the call. SMEM has 1 MiB ([`crate::Generation::smem_bytes`]).
    #[track_caller]
    pub fn prefetch(&self, tensor: Tensor) -> Ref<'_> {
        self.declare_operand(Space::Smem, tensor, true)
    }

    /// An operand. One in VMEM or SMEM is copied there before the kernel starts; one in HBM stays where it is.
    #[track_caller]
    pub fn input(&self, space: Space, tensor: Tensor) -> Ref<'_> {
        self.declare_operand(space, tensor, false)
    }

    #[track_caller]
    fn declare_operand(&self, space: Space, tensor: Tensor, prefetched: bool) -> Ref<'_> {
        let Some(id) = self.declare("input", space, &tensor) else { return Ref::poisoned(self) };
        let mut state = self.state.borrow_mut();
        let list = if prefetched { &mut state.prefetched } else { &mut state.operands };
        list.push(Operand { tensor, space, prefetched, id });
        Ref::new(self, id)
    }

    /// A result. One in VMEM or SMEM is copied to HBM after the kernel ends.
    #[track_caller]
    pub fn output(&self, space: Space, tensor: Tensor) -> Ref<'_> {
        let Some(id) = self.declare("output", space, &tensor) else { return Ref::poisoned(self) };
        self.state.borrow_mut().outputs.push((Output { tensor, space, alias: None, id }, None));
        Ref::new(self, id)
    }

    /// A result that takes over the buffer of an operand in HBM: what the kernel does not write stays. The operand and
    /// the result are the same memory.
    #[track_caller]
    pub fn output_in_place<'k>(&'k self, operand: Ref<'k>) -> Ref<'k> {
        let Some(operand_id) = operand.id() else { return Ref::poisoned(self) };
        let found = {
            let state = self.state.borrow();
            state.operands.iter().find(|o| o.id == operand_id && o.space.is_main()).cloned()
        };
        let Some(Operand { tensor, space, .. }) = found else {
            return self.fail_ref("output_in_place", &[operand_id], "only operands in HBM can be taken over");
        };
        let Some(id) = self.declare("output_in_place", space, &tensor) else { return Ref::poisoned(self) };
        self.state.borrow_mut().outputs.push((Output { tensor, space, alias: None, id }, Some(operand_id)));
        Ref::new(self, id)
    }

    /// Memory of the kernel's own. Its contents are undefined until they are written.
    #[track_caller]
    pub fn scratch(&self, space: Space, tensor: Tensor) -> Ref<'_> {
        if !matches!(space, Space::Vmem | Space::Smem) {
            return self.fail_ref("scratch", &[], format!("scratch memory lies in VMEM or SMEM, not {space}"));
        }
        let Some(id) = self.declare("scratch", space, &tensor) else { return Ref::poisoned(self) };
        self.state.borrow_mut().scratch.push(id);
        Ref::new(self, id)
    }

    /// Semaphores that the kernel itself signals and waits for; they begin at 0 and must end at 0. `dims` may be empty.
    #[track_caller]
    pub fn semaphores(&self, dims: &[usize]) -> Semaphore<'_> {
        self.declare_semaphores(Content::Semaphore, dims)
    }

    /// Semaphores that DMAs signal. `dims` may be empty.
    #[track_caller]
    pub fn dma_semaphores(&self, dims: &[usize]) -> Semaphore<'_> {
        self.declare_semaphores(Content::DmaSemaphore, dims)
    }

    fn declare_semaphores(&self, content: Content, dims: &[usize]) -> Semaphore<'_> {
        let dims = dims.iter().copied().map(Some).collect();
        let mut state = self.state.borrow_mut();
        let id = state.define(Type::Ref(RefType { content, dims, space: Space::Semaphore }), 0);
        state.scratch.push(id);
        Semaphore(Ref::new(self, id))
    }

    #[track_caller]
    fn declare(&self, operation: &'static str, space: Space, tensor: &Tensor) -> Option<Id> {
        let fits = tensor.check().and_then(|()| match space {
            Space::Semaphore => Err("semaphores are declared with `semaphores` and `dma_semaphores`".to_owned()),
            Space::Smem if !matches!(tensor.elem, Elem::I32 | Elem::F32) => {
                Err(format!("SMEM holds i32 and f32, not {}", tensor.elem))
            }
            _ => Ok(()),
        });
        if let Err(reason) = fits {
            self.record(operation, Vec::new(), reason);
            return None;
        }
        Some(self.state.borrow_mut().define(Type::Ref(RefType::data(tensor, space)), 0))
    }

    fn finish(self) -> Result<Kernel, BuildError> {
        let mut state = self.state.into_inner();
        if let Some(error) = state.error {
            return Err(error);
        }
        let mut operands = state.prefetched;
        operands.append(&mut state.operands);
        let outputs = state.outputs.into_iter().map(|(output, taken)| {
            let alias = taken.and_then(|id| operands.iter().position(|operand| operand.id == id));
            Output { alias, ..output }
        });
        let outputs = outputs.collect();
        let body = state.open.pop().map(|open| open.block).unwrap_or_default();
        let types = std::sync::Arc::new(Types(state.types));
        Ok(Kernel { name: self.name, operands, outputs, scratch: state.scratch, body, types })
    }
}

/// What operations are made with.
impl Builder {
    pub(crate) fn type_of(&self, id: Id) -> Type {
        self.state.borrow().types[id.index()].clone()
    }

    pub(crate) fn with_type<R>(&self, id: Id, read: impl FnOnce(&Type) -> R) -> R {
        read(&self.state.borrow().types[id.index()])
    }

    /// Records a mistake, unless there was one before.
    #[track_caller]
    pub(crate) fn record(&self, operation: &'static str, operands: Vec<String>, reason: impl Into<String>) {
        let location = Location::caller();
        let (kernel, reason) = (self.name.clone(), reason.into());
        let error = BuildError { kernel, location, operation, operands, reason };
        self.state.borrow_mut().error.get_or_insert(error);
    }

    #[track_caller]
    pub(crate) fn fail(&self, operation: &'static str, operands: &[Id], reason: impl Into<String>) -> Value<'_> {
        let types = operands.iter().map(|id| self.type_of(*id).to_string()).collect();
        self.record(operation, types, reason);
        Value::poisoned(self)
    }

    #[track_caller]
    pub(crate) fn fail_ref(&self, operation: &'static str, operands: &[Id], reason: impl Into<String>) -> Ref<'_> {
        self.fail(operation, operands, reason);
        Ref::poisoned(self)
    }

    /// Whether a value may be used here.
    pub(crate) fn is_visible(&self, id: Id) -> bool {
        self.state.borrow().is_open(id)
    }

    /// Adds an operation and gives its results. A missing operand is the outcome of an earlier mistake: then nothing
    /// happens. `infer` checks the operands' types and gives the results'.
    #[track_caller]
    pub(crate) fn emit(
        &self,
        kind: OpKind,
        operands: &[Option<Id>],
        regions: Vec<Block>,
        infer: impl FnOnce(&[Type]) -> Result<Vec<Type>, String>,
    ) -> Option<Vec<Id>> {
        let operands: Vec<Id> = operands.iter().copied().collect::<Option<_>>()?;
        let types: Vec<Type> = operands.iter().map(|id| self.type_of(*id)).collect();
        let escaped = operands.iter().any(|id| !self.is_visible(*id));
        let inferred = match escaped {
            true => Err("a value is used outside of the region that defines it".to_owned()),
            false => infer(&types),
        };
        match inferred {
            Ok(results) => Some(self.push(kind, operands, regions, results)),
            Err(reason) => {
                self.fail(kind.name(), &operands, reason);
                None
            }
        }
    }

    #[track_caller]
    fn push(&self, kind: OpKind, operands: Vec<Id>, regions: Vec<Block>, results: Vec<Type>) -> Vec<Id> {
        let location = Location::caller();
        let mut state = self.state.borrow_mut();
        let number = state.open.last().map_or(0, |open| open.number);
        let results: Vec<Id> = results.into_iter().map(|ty| state.define(ty, number)).collect();
        if let Some(open) = state.open.last_mut() {
            open.block.ops.push(Op { kind, operands, results: results.clone(), regions, location });
        }
        results
    }

    /// Adds an operation with one result that is a scalar or a vector.
    #[track_caller]
    pub(crate) fn value(
        &self,
        kind: OpKind,
        operands: &[Value<'_>],
        infer: impl FnOnce(&[Type]) -> Result<Type, String>,
    ) -> Value<'_> {
        let ids: Vec<_> = operands.iter().map(Value::id).collect();
        let results = self.emit(kind, &ids, Vec::new(), |types| Ok(vec![infer(types)?]));
        Value::maybe(self, results.and_then(|results| results.first().copied()))
    }

    /// Opens a region. Until [`Builder::close`], operations go into it.
    pub(crate) fn open(&self, arguments: Vec<Type>) -> Vec<Value<'_>> {
        let mut state = self.state.borrow_mut();
        let number = state.next_block;
        state.next_block += 1;
        let arguments: Vec<Id> = arguments.into_iter().map(|ty| state.define(ty, number)).collect();
        state.open.push(OpenBlock { number, block: Block { arguments: arguments.clone(), ..Block::default() } });
        arguments.into_iter().map(|id| Value::maybe(self, Some(id))).collect()
    }

    /// Closes the innermost region, which yields `yields`. Gives it if they have the types `expected`.
    #[track_caller]
    pub(crate) fn close(
        &self,
        operation: &'static str,
        yields: &[Value<'_>],
        expected: &[Option<Type>],
    ) -> Option<Block> {
        let ids: Option<Vec<Id>> = yields.iter().map(Value::id).collect();
        let usable = ids.as_ref().is_some_and(|ids| ids.iter().all(|id| self.is_visible(*id)));
        let open = self.state.borrow_mut().open.pop()?;
        let ids = ids?;
        let found: Vec<_> = ids.iter().map(|id| self.type_of(*id)).collect();
        let fits = found.len() == expected.len()
            && found.iter().zip(expected).all(|(found, expected)| expected.as_ref().is_none_or(|e| e == found));
        if !usable || !fits {
            let text = |ty: &Option<Type>| ty.as_ref().map_or("anything".to_owned(), Type::to_string);
            let expected: Vec<_> = expected.iter().map(text).collect();
            let reason = match usable {
                true => format!("the region must yield ({})", expected.join(", ")),
                false => "the region yields a value of another region".to_owned(),
            };
            self.fail(operation, &ids, reason);
            return None;
        }
        Some(Block { yields: ids, ..open.block })
    }

    /// A scalar, or a vector with the same number everywhere.
    #[track_caller]
    pub(crate) fn constant(&self, ty: Type, number: impl Into<Scalar>) -> Value<'_> {
        let number = number.into().in_type(ty.elem().unwrap_or(Elem::I32));
        self.value(OpKind::Constant(number), &[], |_| match ty.elem() {
            Some(Elem::F8E4M3 | Elem::F8E5M2) => Err("constants of 8-bit floats are made with `cast`".to_owned()),
            Some(elem) if elem.is_float() == matches!(number, Scalar::Float(_)) => Ok(ty),
            _ => Err(format!("{number:?} is no number of the type {ty}")),
        })
    }
}
