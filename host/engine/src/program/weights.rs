//! Where the weights of a model lie among the arguments of its programs.
//!
//! On most devices each weight is an argument of its own. For the CPU's kernels, matrices lie packed in one *arena*
//! argument and vectors in another: XLA spends about 2 us a step on each argument of a program, and a model has
//! hundreds of weights. A packed matrix is then three tensors to a model: the arena, its place in it, and how many rows
//! of activations are real, so that the kernels leave the padding of a bucket out.
//!
//! Where devices share a model, a last argument is the device's number. The embedding has it as a second part.
//!
//! Where layers run in loops ([`torus_abi::model::LayerLoops`]), weights that are alike in several layers lie in one argument
//! for each, `[layers, …]`. A matrix is then that *stack* and its number there; packed matrices and vectors stay in their
//! arenas.

use std::{collections::BTreeMap, ops::Range};

use torus_abi::{
    DType, TensorType,
    fragment::{Operand, WeightHandle},
    model::{Parallel, WeightRole, WeightSpec},
};
use torus_cpu::packed::{ALIGNMENT, GROUP, Layout};
use torus_hlo::{Axis, Func, Shape, Value};
use torus_weights::{PlannedStorage, PlannedWeight};

/// What [`WeightHandle::storage`] says of a packed matrix.
pub(crate) const PACKED: &str = "packed";
/// As [`PACKED`]; its first half of rows can be computed side by side with the second.
pub(crate) const PACKED_HALVES: &str = "packed-halves";

/// Begins what it says of a vocabulary that devices share: the second part is the device's number.
pub(crate) const SHARED: &str = "shared-";

/// Begins what it says of a matrix in a stack: the second part is its number there.
pub(crate) const STACKED: &str = "stacked-";

/// The arguments that hold a model's weights, and where each weight lies in them.
#[derive(Clone, Debug)]
pub(crate) struct WeightMap {
    names: Vec<String>,
    places: Vec<Place>,
    arguments: Vec<TensorType>,
    /// Bytes of the weights that a step reads whole.
    bytes_per_step: u64,
    /// The argument that is the device's number.
    shard: Option<usize>,
}

#[derive(Clone, Debug)]
pub(crate) enum Place {
    /// A tensor of its own.
    Argument { index: usize, tensor: TensorType },
    /// The same, of a vocabulary that devices share.
    Vocabulary { index: usize, tensor: TensorType },
    /// A tensor in a stack of those of several layers.
    Stacked { index: usize, number: u64, tensor: TensorType, is_vector: bool },
    /// Elements of the argument that holds all vectors.
    Vector { elements: Range<u64> },
    /// Bytes of the arena.
    Packed { bytes: Range<u64>, storage: &'static str },
}

impl Place {
    fn handle(&self, arguments: &[TensorType]) -> WeightHandle {
        match self {
            Self::Argument { tensor, .. } | Self::Stacked { tensor, is_vector: true, .. } => {
                WeightHandle { parts: vec![tensor.clone()], storage: format!("dense-{}", tensor.dtype) }
            }
            Self::Stacked { index, tensor, .. } => WeightHandle {
                parts: vec![arguments[*index].clone(), TensorType::scalar(DType::I32)],
                storage: format!("{STACKED}{}", tensor.dtype),
            },
            Self::Vocabulary { tensor, .. } => WeightHandle {
                parts: vec![tensor.clone(), TensorType::scalar(DType::I32)],
                storage: format!("{SHARED}{}", tensor.dtype),
            },
            Self::Vector { elements } => WeightHandle {
                parts: vec![TensorType::new(DType::F32, [elements.end - elements.start])],
                storage: format!("dense-{}", DType::F32),
            },
            Self::Packed { storage, .. } => WeightHandle {
                parts: vec![arguments[0].clone(), TensorType::scalar(DType::I32), TensorType::scalar(DType::I32)],
                storage: (*storage).to_owned(),
            },
        }
    }

    /// The part that differs from layer to layer, where layers share the others.
    fn own_part(&self) -> usize {
        match self {
            Self::Packed { .. } | Self::Stacked { is_vector: false, .. } => 1,
            _ => 0,
        }
    }
}

/// The part of a packed matrix that says how many rows of activations are real.
const ROWS_PART: usize = 2;

const LAYERS: Axis = Axis("layers");
const BYTES: Axis = Axis("bytes");
const ELEMENTS: Axis = Axis("elements");

impl WeightMap {
    /// `specs` are those the weights were planned from, `weights` what one of the devices holds; `in_loops` says whether
    /// layers run in loops.
    pub fn new(weights: &[PlannedWeight], specs: &[WeightSpec], parallel: Parallel, in_loops: bool) -> Self {
        let is_packed = |weight: &PlannedWeight| matches!(weight.storage, PlannedStorage::Packed(_));
        let mut map = match weights.iter().any(is_packed) {
            true => Self::packed(weights),
            false if in_loops => Self::stacked(weights, specs),
            false => Self::separate(weights),
        };
        let read_whole = weights.iter().zip(specs).filter(|(_, spec)| spec.role != WeightRole::Embed);
        map.bytes_per_step = read_whole.map(|(weight, _)| weight.bytes() as u64).sum();
        map.names = weights.iter().map(|weight| weight.name.clone()).collect();
        if parallel.tensor > 1 {
            map.share_vocabulary(specs);
        }
        map
    }

    fn share_vocabulary(&mut self, specs: &[WeightSpec]) {
        self.shard = Some(self.arguments.len());
        self.arguments.push(TensorType::scalar(DType::I32));
        for (place, spec) in self.places.iter_mut().zip(specs) {
            let embeds = matches!(spec.role, WeightRole::Embed | WeightRole::EmbedAndHead);
            if let (Place::Argument { index, tensor }, true) = (&*place, embeds) {
                *place = Place::Vocabulary { index: *index, tensor: tensor.clone() };
            }
        }
    }

    fn separate(weights: &[PlannedWeight]) -> Self {
        let arguments: Vec<_> = weights.iter().map(PlannedWeight::tensor_type).collect();
        let place = |(index, tensor): (usize, &TensorType)| Place::Argument { index, tensor: tensor.clone() };
        let places = arguments.iter().enumerate().map(place).collect();
        Self { names: Vec::new(), places, arguments, bytes_per_step: 0, shard: None }
    }

    /// Layers' weights of one name, type and role in one argument, if they are several.
    fn stacked(weights: &[PlannedWeight], specs: &[WeightSpec]) -> Self {
        let is_vector = |at: usize| specs.get(at).is_some_and(|spec| spec.role == WeightRole::Vector);
        let key = |at: usize| {
            let weight: &PlannedWeight = &weights[at];
            let name = name_in_layer(&weight.name);
            (name.unwrap_or(&weight.name), name.is_some(), weight.tensor_type(), is_vector(at))
        };
        let mut stacks: Vec<Vec<usize>> = Vec::new();
        for at in 0..weights.len() {
            match stacks.iter_mut().find(|stack| key(stack[0]) == key(at) && key(at).1) {
                Some(stack) => stack.push(at),
                None => stacks.push(vec![at]),
            }
        }
        let mut places = vec![None; weights.len()];
        let mut arguments = Vec::with_capacity(stacks.len());
        for (index, stack) in stacks.iter().enumerate() {
            let tensor = weights[stack[0]].tensor_type();
            if let [only] = stack[..] {
                places[only] = Some(Place::Argument { index, tensor: tensor.clone() });
                arguments.push(tensor);
                continue;
            }
            for (number, at) in stack.iter().enumerate() {
                let (number, is_vector) = (number as u64, is_vector(*at));
                places[*at] = Some(Place::Stacked { index, number, tensor: tensor.clone(), is_vector });
            }
            let dims: Vec<_> = std::iter::once(stack.len() as u64).chain(tensor.dims.iter().copied()).collect();
            arguments.push(TensorType::new(tensor.dtype, dims));
        }
        let places = places.into_iter().flatten().collect();
        Self { names: Vec::new(), places, arguments, bytes_per_step: 0, shard: None }
    }

    fn packed(weights: &[PlannedWeight]) -> Self {
        let (mut vectors, mut arena) = (0, 0);
        let mut places = Vec::new();
        for weight in weights {
            places.push(match &weight.storage {
                PlannedStorage::Dense(_) => {
                    let start = vectors;
                    vectors += weight.shape.iter().product::<u64>();
                    Place::Vector { elements: start..vectors }
                }
                PlannedStorage::Packed(layout) => {
                    let start = arena;
                    arena += layout.bytes() as u64;
                    let storage = if splits_in_halves(layout) { PACKED_HALVES } else { PACKED };
                    Place::Packed { bytes: start..arena, storage }
                }
            });
        }
        let arguments = vec![TensorType::new(DType::U8, [arena]), TensorType::new(DType::F32, [vectors])];
        Self { names: Vec::new(), places, arguments, bytes_per_step: 0, shard: None }
    }

    /// The arguments' types.
    pub fn arguments(&self) -> &[TensorType] {
        &self.arguments
    }

    /// The argument that packed matrices lie in, if there is one.
    pub fn arena(&self) -> Option<&TensorType> {
        let is_packed = self.places.iter().any(|place| matches!(place, Place::Packed { .. }));
        self.arguments.first().filter(|_| is_packed)
    }

    pub fn places(&self) -> &[Place] {
        &self.places
    }

    pub fn bytes_per_step(&self) -> u64 {
        self.bytes_per_step
    }

    /// What models are handed for each weight, by name.
    pub fn handles(&self) -> impl Iterator<Item = (&str, WeightHandle)> {
        let handle = |place: &Place| place.handle(&self.arguments);
        self.names.iter().map(String::as_str).zip(self.places.iter().map(handle))
    }

    /// For each weight of a layer, the parts that are the layer's own, where layers run in loops.
    pub fn own_parts(&self) -> BTreeMap<String, Vec<usize>> {
        let of_layers = self.names.iter().zip(&self.places).filter(|(name, _)| name_in_layer(name).is_some());
        of_layers.map(|(name, place)| (name.clone(), vec![place.own_part()])).collect()
    }

    /// The parts that say how many rows of activations are real.
    pub fn rows_parts(&self) -> impl Iterator<Item = Operand> {
        let packed = self.names.iter().zip(&self.places).filter(|(_, place)| matches!(place, Place::Packed { .. }));
        packed.map(|(name, _)| Operand::Weight { name: name.clone(), part: ROWS_PART })
    }

    /// The device's number, i32 `[]`, where devices share the model.
    pub fn shard<'f>(&self, arguments: &[Value<'f>]) -> Option<Value<'f>> {
        self.shard.map(|index| arguments[index])
    }

    /// Whether the last argument is the device's number.
    pub fn is_shared(&self) -> bool {
        self.shard.is_some()
    }

    /// Declares the arguments.
    pub fn declare<'f>(&self, func: &'f Func<'f>) -> Vec<Value<'f>> {
        self.arguments.iter().map(|tensor| func.argument(Shape::opaque(tensor))).collect()
    }

    /// The value of each part of each weight, for activations of so many rows.
    pub fn values<'f>(
        &self,
        func: &'f Func<'f>,
        arguments: &[Value<'f>],
        rows: Value<'f>,
    ) -> Vec<(Operand, Value<'f>)> {
        let mut values = Vec::new();
        for (name, place) in self.names.iter().zip(&self.places) {
            let mut set = |part, value| values.push((Operand::Weight { name: name.clone(), part }, value));
            match place {
                Place::Argument { index, .. } => set(0, arguments[*index]),
                Place::Stacked { index, number, tensor, is_vector: true } => {
                    let axes: Vec<_> = Shape::opaque(tensor).axes;
                    let names: Vec<_> = std::iter::once(LAYERS).chain(axes.iter().map(|(axis, _)| *axis)).collect();
                    let row = arguments[*index].named(&names).slice(LAYERS, *number..*number + 1);
                    set(0, row.squeeze(LAYERS));
                }
                Place::Stacked { index, number, .. } => {
                    set(0, arguments[*index]);
                    set(1, func.scalar(DType::I32, *number as i32));
                }
                Place::Vocabulary { index, .. } => {
                    set(0, arguments[*index]);
                    self.shard(arguments).into_iter().for_each(|shard| set(1, shard));
                }
                Place::Vector { elements } => {
                    set(0, arguments[1].named(&[ELEMENTS]).slice(ELEMENTS, elements.clone()));
                }
                Place::Packed { bytes, .. } => {
                    set(0, arguments[0].named(&[BYTES]));
                    set(1, func.scalar(DType::I32, (bytes.start / ALIGNMENT as u64) as i32));
                    set(ROWS_PART, rows);
                }
            }
        }
        values
    }
}

/// What a weight of a layer is called there: `qkv` for `layers.3.qkv`.
fn name_in_layer(name: &str) -> Option<&str> {
    let (layer, name) = name.strip_prefix("layers.")?.split_once('.')?;
    layer.parse::<usize>().is_ok().then_some(name)
}

/// Whether rows `i` and `rows / 2 + i` lie in the same lanes of two groups.
fn splits_in_halves(layout: &Layout) -> bool {
    match layout.segments() {
        [first, second] => first.rows == second.rows,
        [whole] => whole.rows.is_multiple_of(2 * GROUP),
        _ => false,
    }
}
