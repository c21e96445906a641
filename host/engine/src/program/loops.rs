//! Layers in loops: what differs in a program whose layers are not calls one after the other.
//!
//! The weights of layers lie in stacks ([`super::WeightMap`]), and the KV of all layers of a kind in one pool: layer number
//! `n` of the kind has the pages from `n * pages` on, of which the first is its trash page. A pool that was cut into layers
//! would be copied in each of them. An attention plugin knows nothing of it: it is asked for a pool of so many pages, and its
//! `context` is computed in each layer, from inputs that name that layer's pages.
//!
//! Scales of caches, of which a plugin's pool has those of one layer, lie there for all of them, and each layer takes its own.
//!
//! To the model, the layer's number is the last part of the pool, and the context are the inputs of the plugin's `context`.

use std::collections::BTreeSet;

use torus_abi::{
    DType, TensorType,
    attention::{AttentionAnswer, AttentionQuery},
    fragment::{Fragment, Operand},
    model::StateHandle,
    step::{StepInput, StepShape},
};
use torus_hlo::{Axis, Func, Shape, Value};
use torus_plugins::LinkError;

use super::assemble::{AssembleError, Assembler, Parts, Scope};

/// What a model is told of a kind's state. `pool` are the types of its parts.
pub(super) fn state(pool: Vec<TensorType>, (query, answer): &(AttentionQuery, AttentionAnswer)) -> StateHandle {
    StateHandle {
        pool: pool.into_iter().chain([TensorType::scalar(DType::I32)]).collect(),
        context: answer.inputs.iter().map(|input| input.tensor_type(&query.shape)).collect(),
    }
}

/// The parts of each kind's pool that are the layer's own: its number.
pub(super) fn own_pool_parts(answers: &[(AttentionQuery, AttentionAnswer)]) -> Vec<Vec<usize>> {
    answers.iter().map(|(_, answer)| vec![answer.pool.len()]).collect()
}

/// A step's input for layer number `number`, which has `pages` pages.
pub(super) fn of_layer<'f>(
    input: StepInput,
    value: Value<'f>,
    number: Value<'f>,
    pages: u64,
    shape: &StepShape,
) -> Value<'f> {
    match input {
        StepInput::PageTable => value + number * pages as i32,
        StepInput::KvSlot => value + number * (pages * shape.page_size) as i32,
        _ => value,
    }
}

/// Of the scales of all layers, those of one.
fn scales_of_layer<'f>(scales: Value<'f>, number: Value<'f>) -> Value<'f> {
    const LAYERS: Axis = Axis("layers");
    scales.named(&[LAYERS, Axis("key_or_value")]).dynamic_slice(&[(LAYERS, number, 1)]).squeeze(LAYERS)
}

impl Assembler {
    /// The layers that pools belong to, and their kinds: all, or the first of each kind.
    pub(super) fn pool_owners(&self) -> Vec<(usize, usize)> {
        let layers = self.description.layers.iter().copied().enumerate();
        if !self.in_loops {
            return layers.collect();
        }
        let mut seen = BTreeSet::new();
        let mut owners: Vec<_> = layers.filter(|(_, kind)| seen.insert(*kind)).collect();
        owners.sort_by_key(|(_, kind)| *kind);
        owners
    }

    /// The shape of a step for the attention plugin, which has all layers' pages in one pool.
    pub(super) fn pool_of_all_layers(&self, kind: usize, shape: StepShape) -> StepShape {
        StepShape { pages: shape.pages * self.layers_of(kind).len().max(1) as u64, ..shape }
    }

    /// The layers of a kind.
    pub(super) fn layers_of(&self, kind: usize) -> Vec<usize> {
        let layers = self.description.layers.iter().enumerate();
        layers.filter(|(_, found)| **found == kind).map(|(layer, _)| layer).collect()
    }

    /// Types of the parts of a pool as programs have it: where layers run in loops, with the scales of all of them.
    pub(super) fn pool_types(&self, kind: usize, answer: &AttentionAnswer) -> Vec<TensorType> {
        let mut pool = answer.pool.clone();
        if let Some(scales) = answer.scales.filter(|_| self.in_loops).and_then(|part| pool.get_mut(part)) {
            scales.dims.insert(0, self.layers_of(kind).len() as u64);
        }
        pool
    }

    /// A plugin that knows of no loops asks for the pool of every layer.
    pub(super) fn check_loops(&self, hidden: &Fragment) -> Result<(), AssembleError> {
        let owners: Vec<_> = self.pool_owners().into_iter().map(|(layer, _)| layer).collect();
        let results = hidden.exports.get("hidden").map_or(&[][..], |export| &export.results);
        let is_strange = |result: &Operand| matches!(result, Operand::Pool { layer, .. } if !owners.contains(layer));
        match results.iter().any(is_strange) {
            true => Err(AssembleError::NoLoops(self.model.unit(hidden).plugin.to_owned())),
            false => Ok(()),
        }
    }
}

impl Parts<'_> {
    /// The pages of one layer, where layers run in loops.
    pub(super) fn pages_in_loops(&self) -> Option<u64> {
        self.assembler.in_loops.then_some(self.layout.shape.pages)
    }

    /// Sets the number of each layer within its kind: the last part of its pool.
    pub(super) fn number_layers<'f>(&self, func: &'f Func<'f>, scope: &mut Scope<'f>) {
        let mut counts = vec![0; self.answers.len()];
        for (layer, kind) in self.assembler.description.layers.iter().enumerate() {
            let part = self.answers[*kind].1.pool.len();
            scope.set(Operand::Pool { layer, part }, func.scalar(DType::I32, counts[*kind]));
            counts[*kind] += 1;
        }
    }

    /// Sets the inputs of each kind's context as what the model passes on for it.
    pub(super) fn pass_inputs(&self, scope: &mut Scope<'_>) {
        for (kind, (_, answer)) in self.answers.iter().enumerate() {
            for (part, input) in answer.inputs.iter().enumerate() {
                if let Some(value) = scope.get(&Operand::Step(*input)) {
                    scope.set(Operand::Context { kind, part }, value);
                }
            }
        }
    }

    /// Attention of layers of a kind in the pool of all of them:
    /// `(query, key, value, pool…, number, inputs…) -> (attended, pool…, number)`.
    pub(super) fn attention_in_pool<'f>(&self, f: &'f Func<'f>, kind: usize) -> Result<Vec<Value<'f>>, LinkError> {
        let (query, answer) = &self.answers[kind];
        let (unit, shape, mut scope) = (self.attention[kind], &query.shape, Scope { known: Vec::new() });
        let spec = &query.spec;
        let heads = [(Operand::Query, spec.q_heads), (Operand::Key, spec.kv_heads), (Operand::Value, spec.kv_heads)];
        for (meaning, heads) in heads {
            let tensor = TensorType::new(query.dtype, [shape.tokens, heads, spec.head_dim]);
            scope.set(meaning, f.argument(Shape::opaque(&tensor)));
        }
        let pool = |part| Operand::Pool { layer: 0, part };
        let types = self.assembler.pool_types(kind, answer);
        let pools: Vec<_> = types.iter().map(|tensor| f.argument(Shape::opaque(tensor))).collect();
        let number = f.argument(Shape::scalar(DType::I32));
        let are_scales = |part| answer.scales == Some(part);
        for (part, value) in pools.iter().copied().enumerate() {
            scope.set(pool(part), if are_scales(part) { scales_of_layer(value, number) } else { value });
        }
        for input in &answer.inputs {
            let value = f.argument(Shape::opaque(&input.tensor_type(shape)));
            let value = of_layer(*input, value, number, self.layout.shape.pages, shape);
            scope.set(Operand::Step(*input), value);
        }
        self.call_context(f, &mut scope, kind)?;
        scope.call(f, unit, "attention")?;
        let mut results = vec![scope.require(Operand::Attended, unit, "attention")?];
        for (part, value) in pools.into_iter().enumerate() {
            let result = scope.require(pool(part), unit, "attention")?;
            results.push(if are_scales(part) { value } else { result });
        }
        results.push(number);
        Ok(results)
    }
}
