//! Arguments of exported functions: tensors with a meaning.

use std::{collections::BTreeMap, panic::Location};

use torus_abi::{
    DType,
    fault::Fault,
    fragment::{Operand, WeightHandle, WeightOperand},
    model::{EmitModel, Parallel, StateHandle, WeightSpec},
    step::{StepInput, StepShape},
};

use crate::{
    Func, Shape, Value, Weight,
    axes::{PAGE_TABLE, SEQ_BOUNDS, SEQS, TOKENS},
};

/// The weights of a model in a request: the host's handles with the model's shapes, by name.
pub struct ModelWeights<'a> {
    weights: BTreeMap<String, (&'a WeightHandle, Vec<u64>)>,
}

impl<'a> ModelWeights<'a> {
    /// Checks that the request fits a model of these weights and of `kinds` kinds of layers, on one device.
    pub fn new(request: &'a EmitModel, weights: Vec<WeightSpec>, kinds: usize) -> Result<Self, Fault> {
        Self::sharded(request, weights, kinds, Parallel::default())
    }

    /// As [`ModelWeights::new`], for a shard: weights have the shapes that one of the devices holds.
    pub fn sharded(
        request: &'a EmitModel,
        weights: Vec<WeightSpec>,
        kinds: usize,
        parallel: Parallel,
    ) -> Result<Self, Fault> {
        if !matches!(request.dtype, DType::F32 | DType::Bf16) {
            return Err(Fault::unsupported(format!("activations of {} are not implemented", request.dtype)));
        }
        if request.state.len() != kinds {
            let plural = if kinds == 1 { "" } else { "s" };
            let found = request.state.len();
            return Err(Fault::invalid(format!("the model has {kinds} kind{plural} of layers, the request {found}")));
        }
        let handle = |spec: WeightSpec| match request.weights.get(&spec.name) {
            Some(handle) => match spec.shard_shape(parallel) {
                Ok(shape) => Ok((spec.name, (handle, shape))),
                Err(reason) => Err(Fault::unsupported(format!("'{}': {reason}", spec.name))),
            },
            None => Err(Fault::invalid(format!("the request has no handle for the weight '{}'", spec.name))),
        };
        Ok(Self { weights: weights.into_iter().map(handle).collect::<Result<_, _>>()? })
    }

    /// Declares all parts of a weight as arguments of an export.
    #[track_caller]
    pub fn declare<'f>(&self, f: &'f Func<'f>, name: &str) -> Weight<'f> {
        match self.weights.get(name) {
            Some((handle, shape)) => f.weight(name, handle, shape),
            None => Self::unknown(f, name),
        }
    }

    /// What stands for a weight that there is not, once that is recorded.
    #[track_caller]
    pub(crate) fn unknown<'f>(f: &'f Func<'f>, name: &str) -> Weight<'f> {
        let reason = format!("the model lists no weight '{name}'");
        let poison = f.fail(Location::caller(), "weight", Vec::new(), reason);
        let operand = WeightOperand { shape: Vec::new(), storage: String::new(), parts: 1 };
        Weight { parts: vec![poison], operand }
    }

    /// The weights whose names begin with `prefix`: what follows it, the handle, the shape.
    pub(crate) fn beginning_with<'s>(
        &'s self,
        prefix: &'s str,
    ) -> impl Iterator<Item = (&'s str, &'a WeightHandle, &'s [u64])> {
        let rest = move |(name, (handle, shape)): (&'s String, &'s (&'a WeightHandle, Vec<u64>))| {
            Some((name.strip_prefix(prefix)?, *handle, shape.as_slice()))
        };
        self.weights.iter().filter_map(rest)
    }
}

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
