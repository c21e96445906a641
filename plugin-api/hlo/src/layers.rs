//! The layers of a model, one after the other: each a call of its own, or many in a loop where the host asks for that
//! ([`EmitModel::loops`]).
//!
//! A loop has one body for all its layers, and takes what is the layer's own from stacks of it. Layers that are the same
//! program follow one another (a *run*), and runs may follow one another periodically, as the local and the global layers of
//! a model do: that is a loop whose body has a loop for each run.

use std::{collections::BTreeMap, panic::Location};

use torus_abi::{
    DType,
    fragment::{Operand, WeightHandle, WeightOperand},
    model::{EmitModel, LayerLoops, StateHandle},
};

use crate::{Axis, Func, ModelWeights, Shape, Value, Weight};

mod period;

use period::{Segment, segments};

const LAYERS: Axis = Axis("layers");

/// What [`Func::layers`] runs.
pub struct Layers<'a> {
    pub request: &'a EmitModel,
    pub weights: &'a ModelWeights<'a>,
    /// The kind of each layer.
    pub kinds: &'a [usize],
    /// Layers whose output is also a result; none can be where layers run in loops.
    pub capture: &'a [usize],
}

/// What one layer is given, or each layer of a loop.
pub struct LayerInputs<'a, 'f> {
    pub kind: usize,
    from: Given<'a, 'f>,
}

enum Given<'a, 'f> {
    /// Arguments of the export.
    Layer {
        f: &'f Func<'f>,
        layers: &'a Layers<'a>,
        index: usize,
    },
    Loop {
        f: &'f Func<'f>,
        weights: BTreeMap<&'a str, Weight<'f>>,
        pool: Vec<Value<'f>>,
    },
}

impl<'f> LayerInputs<'_, 'f> {
    /// The weight `layers.{i}.{name}`.
    #[track_caller]
    pub fn weight(&self, name: &str) -> Weight<'f> {
        match &self.from {
            Given::Layer { f, layers, index } => layers.weights.declare(f, &format!("layers.{index}.{name}")),
            Given::Loop { f, weights, .. } => {
                weights.get(name).cloned().unwrap_or_else(|| ModelWeights::unknown(f, name))
            }
        }
    }

    /// The layer's pool.
    #[track_caller]
    pub fn pool(&self) -> Vec<Value<'f>> {
        match &self.from {
            Given::Layer { f, layers, index } => f.pool(*index, &layers.request.state[self.kind]),
            Given::Loop { pool, .. } => pool.clone(),
        }
    }
}

/// Applies a layer to the hidden state; gives the next one and the updated pool.
type Apply<'a, 'f> = &'a dyn Fn(&LayerInputs<'_, 'f>, Value<'f>) -> (Value<'f>, Vec<Value<'f>>);

impl<'f> Func<'f> {
    /// Runs all layers on the hidden state `x`, by way of `apply`. Gives the last state, and what the export then has to give
    /// beside it: the pools, and the captured states.
    #[track_caller]
    pub fn layers(
        &'f self,
        layers: &Layers<'_>,
        x: Value<'f>,
        apply: impl Fn(&LayerInputs<'_, 'f>, Value<'f>) -> (Value<'f>, Vec<Value<'f>>),
    ) -> (Value<'f>, Vec<(Operand, Value<'f>)>) {
        match &layers.request.loops {
            None => self.call_layers(layers, x, &apply),
            Some(_) if !layers.capture.is_empty() => {
                let reason = "the state after a layer cannot be captured where layers run in loops";
                (self.fail(Location::caller(), "layers", Vec::new(), reason), Vec::new())
            }
            Some(loops) => Loops { f: self, layers, loops, apply: &apply }.run(x),
        }
    }

    #[track_caller]
    fn call_layers(
        &'f self,
        layers: &Layers<'_>,
        mut x: Value<'f>,
        apply: Apply<'_, 'f>,
    ) -> (Value<'f>, Vec<(Operand, Value<'f>)>) {
        let mut results = Vec::new();
        for (index, kind) in layers.kinds.iter().enumerate() {
            let from = Given::Layer { f: self, layers, index };
            let (next, pool) = apply(&LayerInputs { kind: *kind, from }, x);
            x = next;
            let part = |(part, value)| (Operand::Pool { layer: index, part }, value);
            results.extend(pool.into_iter().enumerate().map(part));
            if layers.capture.contains(&index) {
                results.push((Operand::Captured { layer: index }, x));
            }
        }
        (x, results)
    }
}

struct Loops<'a, 'f> {
    f: &'f Func<'f>,
    layers: &'a Layers<'a>,
    loops: &'a LayerLoops,
    apply: Apply<'a, 'f>,
}

/// What goes from layer to layer.
#[derive(Clone)]
struct Carried<'f> {
    x: Value<'f>,
    /// For each kind, the parts of its pool that are no layer's own.
    pools: Vec<Vec<Value<'f>>>,
}

impl<'f> Carried<'f> {
    fn values(&self) -> Vec<Value<'f>> {
        std::iter::once(self.x).chain(self.pools.iter().flatten().copied()).collect()
    }

    /// The same with other values, in the order of [`Carried::values`].
    fn with(&self, values: &[Value<'f>]) -> Self {
        let mut values = values.iter().copied();
        let x = values.next().unwrap_or(self.x);
        let pools = self.pools.iter().map(|pool| values.by_ref().take(pool.len()).collect()).collect();
        Self { x, pools }
    }
}

/// A tensor that a layer is given.
#[derive(Clone, Copy)]
enum Part<'f> {
    /// One for all layers of the run.
    Shared(Value<'f>),
    /// `[layers, …]`
    Stack(Value<'f>),
}

impl<'f> Part<'f> {
    /// What layer number `number` of the run is given.
    fn at(self, number: Value<'f>) -> Value<'f> {
        match self {
            Self::Shared(value) => value,
            Self::Stack(stack) => stack.dynamic_slice(&[(LAYERS, number, 1)]).squeeze(LAYERS),
        }
    }
}

/// What the layers of a run are given, in all its repetitions.
struct Stacks<'a, 'f> {
    kind: usize,
    weights: Vec<(&'a str, WeightOperand, Vec<Part<'f>>)>,
    /// Of the pool, the parts that are the layer's own, with their numbers.
    pool: Vec<(usize, Part<'f>)>,
}

impl<'a, 'f> Loops<'a, 'f> {
    fn run(&self, x: Value<'f>) -> (Value<'f>, Vec<(Operand, Value<'f>)>) {
        let kinds = 0..self.layers.request.state.len();
        let first: Vec<_> = kinds.map(|kind| self.layers.kinds.iter().position(|found| *found == kind)).collect();
        let meanings = |kind: usize| {
            let layer = first[kind];
            let part = move |part| layer.map(|layer| Operand::Pool { layer, part });
            self.shared_parts(kind).into_iter().filter_map(part)
        };
        let declare = |(kind, state): (usize, &StateHandle)| {
            let part = |(meaning, part): (Operand, usize)| self.f.input(meaning, Shape::opaque(&state.pool[part]));
            meanings(kind).zip(self.shared_parts(kind)).map(part).collect()
        };
        let pools = self.layers.request.state.iter().enumerate().map(declare).collect();
        let mut carried = Carried { x, pools };
        for segment in segments(&self.classes()) {
            carried = self.segment(&segment, carried);
        }
        let pools = carried.pools.iter().enumerate();
        let results = pools.flat_map(|(kind, pool)| meanings(kind).zip(pool.iter().copied()));
        (carried.x, results.collect())
    }

    /// The numbers of a pool's parts that are no layer's own.
    fn shared_parts(&self, kind: usize) -> Vec<usize> {
        let own = self.loops.pools.get(kind).map_or(&[][..], Vec::as_slice);
        (0..self.layers.request.state[kind].pool.len()).filter(|part| !own.contains(part)).collect()
    }

    /// For each layer a number; those of one number are the same program.
    fn classes(&self) -> Vec<usize> {
        type Of<'a> = (usize, Vec<(String, &'a WeightHandle, Vec<u64>, Option<&'a Vec<usize>>)>);
        let mut known: Vec<Of<'_>> = Vec::new();
        let class = |(index, kind): (usize, &usize)| {
            let prefix = format!("layers.{index}.");
            let weight = |(name, handle, shape): (&str, &'a WeightHandle, &[u64])| {
                (name.to_owned(), handle, shape.to_vec(), self.loops.weights.get(&format!("{prefix}{name}")))
            };
            let found = (*kind, self.layers.weights.beginning_with(&prefix).map(weight).collect());
            known.iter().position(|known| *known == found).unwrap_or_else(|| {
                known.push(found);
                known.len() - 1
            })
        };
        self.layers.kinds.iter().enumerate().map(class).collect()
    }

    fn segment(&self, segment: &Segment, carried: Carried<'f>) -> Carried<'f> {
        let runs: Vec<_> = (0..segment.runs.len()).map(|run| (segment.runs[run], segment.layers(run))).collect();
        let prefixes: Vec<_> = runs.iter().map(|(_, layers)| format!("layers.{}.", layers[0])).collect();
        let stacks = runs.iter().zip(&prefixes).map(|((_, layers), prefix)| self.stacks(layers, prefix));
        let stacks: Vec<_> = stacks.collect();
        self.repeat(segment.repeats, carried, &|repetition, mut carried| {
            for ((len, _), stacks) in runs.iter().zip(&stacks) {
                carried = self.repeat(*len, carried, &|place, carried| {
                    let number = match (repetition, place) {
                        (Some(repetition), Some(place)) => repetition * *len as i32 + place,
                        (one, other) => one.or(other).unwrap_or_else(|| self.f.scalar(DType::I32, 0)),
                    };
                    self.layer(stacks, number, carried)
                });
            }
            carried
        })
    }

    /// Runs `body` so many times, in a loop if it is more than once. Only then it is told how many times it ran before.
    fn repeat(
        &self,
        count: usize,
        carried: Carried<'f>,
        body: &dyn Fn(Option<Value<'f>>, Carried<'f>) -> Carried<'f>,
    ) -> Carried<'f> {
        if count == 1 {
            return body(None, carried);
        }
        let start: Vec<_> = std::iter::once(self.f.scalar(DType::I32, 0)).chain(carried.values()).collect();
        let end = self.f.while_loop(
            &start,
            |values| values[0].lt(count as i32),
            |values| {
                let next = body(Some(values[0]), carried.with(&values[1..]));
                std::iter::once(values[0] + 1).chain(next.values()).collect()
            },
        );
        carried.with(&end[1..])
    }

    fn layer(&self, stacks: &Stacks<'_, 'f>, number: Value<'f>, mut carried: Carried<'f>) -> Carried<'f> {
        let at = |parts: &[Part<'f>]| parts.iter().map(|part| part.at(number)).collect();
        let weight = |(name, operand, parts): &(_, WeightOperand, Vec<Part<'f>>)| {
            (*name, Weight { parts: at(parts), operand: operand.clone() })
        };
        let shared = self.shared_parts(stacks.kind);
        let mut pool: Vec<_> = shared.iter().copied().zip(carried.pools[stacks.kind].iter().copied()).collect();
        pool.extend(stacks.pool.iter().map(|(part, value)| (*part, value.at(number))));
        pool.sort_by_key(|(part, _)| *part);
        let pool = pool.into_iter().map(|(_, value)| value).collect();
        let from = Given::Loop { f: self.f, weights: stacks.weights.iter().map(weight).collect(), pool };
        let (x, pool) = (self.apply)(&LayerInputs { kind: stacks.kind, from }, carried.x);
        carried.x = x;
        carried.pools[stacks.kind] = shared.iter().filter_map(|part| pool.get(*part).copied()).collect();
        carried
    }

    /// Declares what the layers of a run are given, and stacks what is their own. `prefix` begins the names of the first
    /// one's weights.
    fn stacks<'p>(&self, layers: &[usize], prefix: &'p str) -> Stacks<'p, 'f>
    where
        'a: 'p,
    {
        let kind = self.layers.kinds[layers[0]];
        let weight = |(name, handle, shape): (&'p str, &'a WeightHandle, &[u64])| {
            let own = self.loops.weights.get(&format!("{prefix}{name}"));
            let part = |part: usize| {
                let meaning = |layer: &usize| Operand::Weight { name: format!("layers.{layer}.{name}"), part };
                let is_own = own.is_some_and(|own| own.contains(&part));
                self.part(layers, is_own, &Shape::opaque(&handle.parts[part]), &meaning)
            };
            let parts: Vec<_> = (0..handle.parts.len()).map(part).collect();
            let operand = WeightOperand { shape: shape.to_vec(), storage: handle.storage.clone(), parts: parts.len() };
            (name, operand, parts)
        };
        let weights = self.layers.weights.beginning_with(prefix).map(weight).collect();
        let shared = self.shared_parts(kind);
        let pool = self.layers.request.state[kind].pool.iter().enumerate().filter(|(part, _)| !shared.contains(part));
        let pool = pool.map(|(part, tensor)| {
            let meaning = |layer: &usize| Operand::Pool { layer: *layer, part };
            (part, self.part(layers, true, &Shape::opaque(tensor), &meaning))
        });
        Stacks { kind, weights, pool: pool.collect() }
    }

    /// Declares a part: that of the first layer if all share it, else those of all.
    fn part(&self, layers: &[usize], is_own: bool, shape: &Shape, meaning: &dyn Fn(&usize) -> Operand) -> Part<'f> {
        let declare = |layer: &usize| self.f.input(meaning(layer), shape.clone());
        match layers {
            [first, ..] if !is_own => Part::Shared(declare(first)),
            [only] => Part::Shared(declare(only)),
            layers => {
                let row: Vec<_> = std::iter::once((LAYERS, 1)).chain(shape.axes.iter().copied()).collect();
                let rows: Vec<_> = layers.iter().map(|layer| declare(layer).reshape(&row)).collect();
                Part::Stack(self.f.concatenate(LAYERS, &rows))
            }
        }
    }
}
