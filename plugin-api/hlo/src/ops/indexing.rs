//! Reading and writing at computed places. Index tensors are integers; several of them are broadcast by name.

use torus_abi::DType;

use super::elementwise::align_axes;
use crate::{
    Axis, Shape, Value,
    func::OpSpec,
    infer::indexing as infer,
    ir::{Attribute, Region},
};

/// The axis that holds the components of an index.
const COMPONENT: Axis = Axis("index component");

/// What a scatter does with an element that is there already.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ScatterMode {
    Set,
    Add,
    Max,
}

/// How to scatter. The promises let the compiler do it in any order; a broken one is undefined behaviour.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Scatter {
    pub mode: ScatterMode,
    pub indices_are_sorted: bool,
    pub indices_are_unique: bool,
}

impl Scatter {
    /// Overwrites; of equal indices, one wins.
    pub fn set() -> Self {
        Self { mode: ScatterMode::Set, indices_are_sorted: false, indices_are_unique: false }
    }

    pub fn add() -> Self {
        Self { mode: ScatterMode::Add, ..Self::set() }
    }

    pub fn max() -> Self {
        Self { mode: ScatterMode::Max, ..Self::set() }
    }

    pub fn sorted(mut self) -> Self {
        self.indices_are_sorted = true;
        self
    }

    pub fn unique(mut self) -> Self {
        self.indices_are_unique = true;
        self
    }
}

impl<'f> Value<'f> {
    /// Replaces an axis by the axes of `indices`: rows of a table `[vocab, hidden]` at `indices [tokens]` along
    /// `vocab` are `[tokens, hidden]`. Indices outside are moved to the nearest element.
    #[track_caller]
    pub fn take(self, axis: Axis, indices: Value<'f>) -> Self {
        let picked = self.gather(&[(axis, indices)]);
        let index = indices.shape();
        let order: Vec<_> = self
            .shape()
            .names()
            .flat_map(|name| if name == axis { index.names().collect() } else { vec![name] })
            .collect();
        if picked.id().is_none() { picked } else { picked.transpose(&order) }
    }

    /// Picks along an axis, where `indices` shares other axes with this tensor: from `[rows, vocab]` at
    /// `[rows, top]` along `vocab` comes `[rows, top]`. Indices outside are moved to the nearest element.
    #[track_caller]
    pub fn take_along(self, axis: Axis, indices: Value<'f>) -> Self {
        let mut places = vec![(axis, indices)];
        for (shared, size) in indices.shape().axes {
            if shared != axis && self.shape().has(shared) {
                places.push((shared, self.func.iota(indices.dtype(), shared, size)));
            }
        }
        self.gather(&places)
    }

    /// Picks at places given for some axes. The result has the axes of the indices, then this tensor's other axes.
    /// Indices outside are moved to the nearest element.
    #[track_caller]
    pub fn gather(self, places: &[(Axis, Value<'f>)]) -> Self {
        let spec = OpSpec::new("stablehlo.gather");
        let Some((indices, plan)) = self.plan(&spec, places) else { return self.func.poison() };
        let numbers = format!(
            "#stablehlo.gather<offset_dims = {:?}, collapsed_slice_dims = {:?}, start_index_map = {:?}, \
             index_vector_dim = {}>",
            plan.window(),
            plan.indexed_sorted(),
            plan.indexed,
            plan.index_rank
        );
        let spec = spec
            .with("dimension_numbers", Attribute::Verbatim(numbers))
            .with("indices_are_sorted", Attribute::Bool(false))
            .array("slice_sizes", plan.sizes);
        self.func.emit(spec, &[self, indices], |_| Ok(plan.picked))
    }

    /// Writes `updates` at places given for some axes. Their axes are those of the indices and this tensor's other
    /// axes, in any order. Updates whose place is outside are dropped.
    #[track_caller]
    pub fn scatter(self, places: &[(Axis, Value<'f>)], updates: Value<'f>, how: Scatter) -> Self {
        let spec = OpSpec::new("stablehlo.scatter");
        let Some((indices, plan)) = self.plan(&spec, places) else { return self.func.poison() };
        let shape = updates.shape();
        let fits = self.func.check(&spec, &[self, updates], || {
            let same_axes =
                shape.rank() == plan.picked.rank() && plan.picked.axes.iter().all(|a| shape.axes.contains(a));
            if same_axes && shape.dtype == plan.picked.dtype {
                return Ok(());
            }
            Err(format!("the updates are not {}", plan.picked))
        });
        if fits.is_none() {
            return self.func.poison();
        }
        let updates = updates.transpose(&plan.picked.names().collect::<Vec<_>>());
        let Some(region) = self.combiner(&spec, how.mode) else { return self.func.poison() };
        let numbers = format!(
            "#stablehlo.scatter<update_window_dims = {:?}, inserted_window_dims = {:?}, \
             scatter_dims_to_operand_dims = {:?}, index_vector_dim = {}>",
            plan.window(),
            plan.indexed_sorted(),
            plan.indexed,
            plan.index_rank
        );
        let spec = spec
            .with("scatter_dimension_numbers", Attribute::Verbatim(numbers))
            .with("indices_are_sorted", Attribute::Bool(how.indices_are_sorted))
            .with("unique_indices", Attribute::Bool(how.indices_are_unique))
            .region(region);
        self.func.emit(spec, &[self, indices, updates], |shapes| Ok(shapes[0].clone()))
    }

    #[track_caller]
    fn combiner(self, spec: &OpSpec, mode: ScatterMode) -> Option<Region> {
        let scalar = Shape::scalar(self.dtype());
        let arguments = self.func.open_region(&[scalar.clone(), scalar.clone()]);
        let combined = match mode {
            ScatterMode::Set => arguments[1],
            ScatterMode::Add => arguments[0] + arguments[1],
            ScatterMode::Max => arguments[0].max(arguments[1]),
        };
        self.func.close_region(spec, &[combined], &[scalar])
    }

    /// One tensor that holds all indices, components innermost, and the plan of the walk.
    #[track_caller]
    fn plan(self, spec: &OpSpec, places: &[(Axis, Value<'f>)]) -> Option<(Value<'f>, infer::Plan)> {
        let (axes, indices): (Vec<_>, Vec<_>) = places.iter().copied().unzip();
        let (indices, index_axes) = align_axes(spec, &indices);
        let shape = self.shape();
        let operands: Vec<_> = std::iter::once(self).chain(indices.iter().copied()).collect();
        let plan = self.func.check(spec, &operands, || {
            if indices.is_empty() {
                return Err("no axis is indexed".to_owned());
            }
            indices.iter().try_for_each(|index| infer::index_dtype(&index.shape()))?;
            infer::plan(&shape, &axes, &index_axes)
        })?;
        let component: Vec<_> = index_axes.iter().copied().chain([(COMPONENT, 1)]).collect();
        let mut components = Vec::with_capacity(indices.len());
        for index in indices {
            components.push(index.reshape(&component));
        }
        Some((self.func.concatenate(COMPONENT, &components), plan))
    }

    /// The piece that starts at scalar `i32` places: `(axis, start, size)`; other axes are taken whole. A piece that
    /// would reach outside is moved inside.
    #[track_caller]
    pub fn dynamic_slice(self, pieces: &[(Axis, Value<'f>, u64)]) -> Self {
        let spec = OpSpec::new("stablehlo.dynamic_slice");
        let sizes: Vec<_> = pieces.iter().map(|(axis, _, size)| (*axis, *size)).collect();
        let shape = self.shape();
        let result = self.func.check(&spec, &[self], || infer::dynamic_slice(&shape, &sizes));
        let Some(result) = result else { return self.func.poison() };
        let starts = self.starts(&pieces.iter().map(|(axis, start, _)| (*axis, *start)).collect::<Vec<_>>());
        let spec = spec.array("slice_sizes", result.dims().map(|size| size as usize));
        let operands: Vec<_> = std::iter::once(self).chain(starts).collect();
        self.func.emit(spec, &operands, |shapes| {
            shapes[1..].iter().try_for_each(infer::start)?;
            Ok(result)
        })
    }

    /// This tensor with `update` written at scalar `i32` places; axes without a place start at 0. An update that
    /// would reach outside is moved inside.
    #[track_caller]
    pub fn dynamic_update_slice(self, update: Value<'f>, places: &[(Axis, Value<'f>)]) -> Self {
        let operands: Vec<_> = [self, update].into_iter().chain(self.starts(places)).collect();
        let shape = self.shape();
        self.func.emit(OpSpec::new("stablehlo.dynamic_update_slice"), &operands, |shapes| {
            let known = places.iter().find(|(axis, _)| !shape.has(*axis));
            known.map_or(Ok(()), |(axis, _)| Err(format!("{shape} has no axis '{axis}'")))?;
            infer::dynamic_update_slice(&shapes[0], &shapes[1], &shapes[2..])
        })
    }

    /// One start for each axis, 0 where none is given.
    #[track_caller]
    fn starts(self, places: &[(Axis, Value<'f>)]) -> Vec<Value<'f>> {
        let mut starts = Vec::new();
        for name in self.shape().names() {
            let given = places.iter().find(|(axis, _)| *axis == name).map(|(_, start)| *start);
            starts.push(given.unwrap_or_else(|| self.func.scalar(DType::I32, 0)));
        }
        starts
    }
}

impl infer::Plan {
    /// Positions in the picked tensor of the axes taken whole.
    fn window(&self) -> Vec<usize> {
        (self.index_rank..self.picked.rank()).collect()
    }

    fn indexed_sorted(&self) -> Vec<usize> {
        let mut sorted = self.indexed.clone();
        sorted.sort_unstable();
        sorted
    }
}
