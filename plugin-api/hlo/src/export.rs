//! Arguments of exported functions: tensors with a meaning.

use torus_abi::{
    fragment::{Operand, WeightHandle, WeightOperand},
    model::StateHandle,
    step::{StepInput, StepShape},
};

use crate::{
    Func, Shape, Value, Weight,
    axes::{PAGE_TABLE, SEQ_BOUNDS, SEQS, TOKENS},
};

impl<'f> Func<'f> {
    /// Declares the next argument of an export and what it means.
    #[track_caller]
    pub fn input(&'f self, meaning: Operand, shape: Shape) -> Value<'f> {
        self.note_input(meaning);
        self.argument(shape)
    }

    /// Declares all parts of the weight `name` as arguments of an export. `shape` is its logical shape in this shard.
    #[track_caller]
    pub fn weight(&'f self, name: &str, handle: &WeightHandle, shape: &[u64]) -> Weight<'f> {
        let part = |(part, tensor)| {
            let meaning = Operand::Weight { name: name.to_owned(), part };
            self.input(meaning, Shape::opaque(tensor))
        };
        let parts: Vec<_> = handle.parts.iter().enumerate().map(part).collect();
        let operand = WeightOperand { shape: shape.to_vec(), storage: handle.storage.clone(), parts: parts.len() };
        Weight { parts, operand }
    }

    /// Declares the pool of a layer as arguments of an export.
    #[track_caller]
    pub fn pool(&'f self, layer: usize, state: &StateHandle) -> Vec<Value<'f>> {
        let part = |(part, tensor)| self.input(Operand::Pool { layer, part }, Shape::opaque(tensor));
        state.pool.iter().enumerate().map(part).collect()
    }

    /// Declares the context of a kind of layers as arguments of an export.
    #[track_caller]
    pub fn context(&'f self, kind: usize, state: &StateHandle) -> Vec<Value<'f>> {
        let part = |(part, tensor)| self.input(Operand::Context { kind, part }, Shape::opaque(tensor));
        state.context.iter().enumerate().map(part).collect()
    }

    /// Declares one of the step's inputs as an argument of an export, under the axis names of this project.
    #[track_caller]
    pub fn step(&'f self, input: StepInput, shape: &StepShape) -> Value<'f> {
        let axis = match input {
            StepInput::TokenSrc | StepInput::Positions | StepInput::TokenSeq | StepInput::KvSlot => Some(TOKENS),
            StepInput::CuQLens => Some(SEQ_BOUNDS),
            StepInput::KvLens | StepInput::PageBegin => Some(SEQS),
            StepInput::PageTable => Some(PAGE_TABLE),
            StepInput::NumSeqs => None,
        };
        let tensor = input.tensor_type(shape);
        let axes: Vec<_> = axis.into_iter().zip(tensor.dims).collect();
        self.input(Operand::Step(input), Shape::new(tensor.dtype, axes))
    }
}
