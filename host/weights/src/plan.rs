//! Holds a model's description against a checkpoint: which tensors make up which weight, and everything that is wrong,
//! before anything is read.

use std::collections::{BTreeMap, BTreeSet, HashSet};

use torus_abi::{
    DType, TensorType,
    model::{GgufAnswer, ModelDescription, Parallel, Transform, WeightSource, WeightSpec},
    shard::{Shard, Slice},
};

use torus_cpu::{
    PackError,
    packed::{Format, Layout, SEGMENTS_MAX, Segment},
};

use crate::{
    Checkpoint, Problem, StorageDType, StorageType, Target, TensorEntry, WeightsError, kv_scales::is_kv_scale,
};

/// How each weight of a model is made of a checkpoint's tensors.
#[derive(Debug)]
pub struct LoadPlan<'a> {
    pub(crate) checkpoint: &'a Checkpoint,
    weights: Vec<PlannedWeight>,
    ignored: Vec<String>,
    storage_types: BTreeMap<StorageType, usize>,
}

/// A weight and the tensors it is made of.
#[derive(Clone, Debug)]
pub struct PlannedWeight {
    pub name: String,
    pub shape: Vec<u64>,
    pub storage: PlannedStorage,
    pub(crate) sources: Vec<PlannedSource>,
}

/// How a weight lies in memory once loaded.
#[derive(Clone, Debug, PartialEq)]
pub enum PlannedStorage {
    /// Row-major elements.
    Dense(StorageDType),
    /// A packed matrix.
    Packed(Layout),
}

#[derive(Clone, Debug)]
pub(crate) struct PlannedSource {
    pub tensor: String,
    pub entry: TensorEntry,
    pub transforms: Vec<Transform>,
    /// What of it, after the transforms, this device holds.
    pub slice: Slice,
}

impl PlannedWeight {
    /// A weight of which only the shape is known: what a checkpoint of floating-point numbers would make of it on each of the
    /// devices.
    pub fn of_shape(spec: &WeightSpec, dtype: StorageDType, parallel: Parallel) -> Result<Self, WeightsError> {
        let shape =
            spec.shard_shape(parallel).map_err(|reason| WeightsError::Split { weight: spec.name.clone(), reason })?;
        Ok(Self { name: spec.name.clone(), shape, storage: PlannedStorage::Dense(dtype), sources: Vec::new() })
    }

    /// The tensor it is once loaded; a packed matrix is bytes.
    pub fn tensor_type(&self) -> TensorType {
        match &self.storage {
            PlannedStorage::Dense(dtype) => TensorType::new(dtype.dtype(), self.shape.as_slice()),
            PlannedStorage::Packed(layout) => TensorType::new(DType::U8, [layout.bytes() as u64]),
        }
    }

    /// Size once loaded.
    pub fn bytes(&self) -> usize {
        match &self.storage {
            PlannedStorage::Dense(dtype) => self.shape.iter().product::<u64>() as usize * dtype.bytes(),
            PlannedStorage::Packed(layout) => layout.bytes(),
        }
    }

    /// Size of its tensors in the files.
    pub fn source_bytes(&self) -> usize {
        self.sources.iter().map(|source| source.entry.bytes()).sum()
    }
}

impl<'a> LoadPlan<'a> {
    /// [`LoadPlan::for_shard`] of a model on one device.
    pub fn new<T: Into<Target>>(
        checkpoint: &'a Checkpoint,
        description: &ModelDescription,
        gguf: Option<&GgufAnswer>,
        target: impl Fn(&WeightSpec) -> T,
    ) -> Result<Self, WeightsError> {
        Self::for_shard(checkpoint, description, gguf, target, Shard::WHOLE)
    }

    /// The weights that one of the devices holds which share a model. `gguf` is what the model's plugin answered, if the
    /// checkpoint is a GGUF file; `target` decides what each weight becomes.
    ///
    /// Tensors that are missing, unknown to the model (and not ignored by it), misshapen or unreadable are all named in
    /// one [`WeightsError::Mismatch`].
    pub fn for_shard<T: Into<Target>>(
        checkpoint: &'a Checkpoint,
        description: &ModelDescription,
        gguf: Option<&GgufAnswer>,
        target: impl Fn(&WeightSpec) -> T,
        shard: Shard,
    ) -> Result<Self, WeightsError> {
        if checkpoint.is_gguf() && gguf.is_none() {
            return Err(WeightsError::NoGgufReading { path: checkpoint.path().to_owned() });
        }
        let mut planner = Planner { checkpoint, gguf, shard, taken: BTreeSet::new(), problems: Vec::new() };
        let mut names = HashSet::new();
        let mut weights = Vec::with_capacity(description.weights.len());
        for spec in &description.weights {
            if !names.insert(&spec.name) {
                planner.problems.push(Problem::DuplicateWeight { weight: spec.name.clone() });
            }
            weights.extend(planner.weight(spec, target(spec).into()));
        }
        let ignored = planner.leftovers(description);
        let Planner { taken, problems, .. } = planner;
        if !problems.is_empty() {
            let (path, architecture) = (checkpoint.path().to_owned(), description.architecture.clone());
            return Err(WeightsError::Mismatch { path, architecture, problems });
        }
        let mut storage_types = BTreeMap::new();
        for name in taken {
            *storage_types.entry(checkpoint.tensors()[name].storage).or_default() += 1;
        }
        Ok(Self { checkpoint, weights, ignored, storage_types })
    }

    /// In the order in which they will be put into the sink: the description's.
    pub fn weights(&self) -> &[PlannedWeight] {
        &self.weights
    }

    /// Tensors of the checkpoint that the model knows and does not need, and scales of a KV cache.
    pub fn ignored(&self) -> &[String] {
        &self.ignored
    }

    /// How many of the tensors taken are stored how.
    pub fn storage_types(&self) -> &BTreeMap<StorageType, usize> {
        &self.storage_types
    }

    /// Size of all weights once loaded.
    pub fn bytes(&self) -> u64 {
        self.weights.iter().map(|weight| weight.bytes() as u64).sum()
    }
}

struct Planner<'a, 'd> {
    checkpoint: &'a Checkpoint,
    gguf: Option<&'d GgufAnswer>,
    shard: Shard,
    /// Tensors of the checkpoint that some weight is made of.
    taken: BTreeSet<&'a str>,
    problems: Vec<Problem>,
}

impl<'a> Planner<'a, '_> {
    /// `None` if something is wrong with it, which `problems` then says.
    fn weight(&mut self, spec: &WeightSpec, target: Target) -> Option<PlannedWeight> {
        let sources: Vec<_> = spec.sources.iter().map(|source| self.source(spec, source)).collect();
        let sources = sources.into_iter().collect::<Option<Vec<_>>>()?;
        let shapes: Vec<_> = sources.iter().map(|(_, shape)| shape.clone()).collect();
        if concatenated(&shapes).as_ref() != Some(&spec.shape) {
            let (weight, declared) = (spec.name.clone(), spec.shape.clone());
            self.problems.push(Problem::Assembly { weight, declared, assembled: shapes });
            return None;
        }
        let (sources, shapes) = self.cut(spec, sources)?;
        let shape = concatenated(&shapes)?;
        let storage = match target {
            Target::Dense(dtype) => PlannedStorage::Dense(dtype),
            Target::Packed { floats, keep_quantized } => {
                let parts: Vec<_> = sources.iter().zip(&shapes).collect();
                match packed_layout(&parts, floats, keep_quantized) {
                    Ok(layout) => PlannedStorage::Packed(layout),
                    Err(error) => {
                        let (tensor, reason) = (spec.name.clone(), error.to_string());
                        self.problems.push(Problem::Transform { tensor, reason });
                        return None;
                    }
                }
            }
        };
        Some(PlannedWeight { name: spec.name.clone(), shape, storage, sources })
    }

    /// What this device holds of each source, and the shapes of that.
    fn cut(
        &mut self,
        spec: &WeightSpec,
        sources: Vec<(PlannedSource, Vec<u64>)>,
    ) -> Option<(Vec<PlannedSource>, Vec<Vec<u64>>)> {
        let (mut parts, mut shapes) = (Vec::new(), Vec::new());
        for ((mut planned, shape), source) in sources.into_iter().zip(&spec.sources) {
            match spec.slice(source, &shape, self.shard) {
                Ok(slice) => {
                    shapes.push(slice.shape(&shape));
                    planned.slice = slice;
                    parts.push(planned);
                }
                Err(reason) => {
                    self.problems.push(Problem::Split { weight: spec.name.clone(), reason });
                    return None;
                }
            }
        }
        Some((parts, shapes))
    }

    /// The tensor, everything to be done to it, and the shape it then has.
    fn source(&mut self, spec: &WeightSpec, source: &WeightSource) -> Option<(PlannedSource, Vec<u64>)> {
        let checkpoint = self.checkpoint;
        let (name, own_transforms) = match self.gguf {
            None => (Some(source.tensor.as_str()), [].as_slice()),
            Some(answer) => match answer.tensors.get(&source.tensor) {
                Some(tensor) => (Some(tensor.name.as_str()), tensor.transforms.as_slice()),
                None => (None, [].as_slice()),
            },
        };
        let Some((name, entry)) = name.and_then(|name| checkpoint.tensors().get_key_value(name)) else {
            let place = name.filter(|name| *name != source.tensor).map(str::to_owned);
            let (tensor, weight) = (source.tensor.clone(), spec.name.clone());
            self.problems.push(Problem::Missing { tensor, weight, place });
            return None;
        };
        self.taken.insert(name);
        let problem = match self.shapes(entry, own_transforms, source) {
            Ok(_) if !entry.storage.is_readable() => {
                Problem::Storage { tensor: name.to_owned(), storage: entry.storage }
            }
            Ok(shape) => {
                let transforms = [own_transforms, &source.transforms].concat();
                let (tensor, entry) = (name.to_owned(), entry.clone());
                let slice = Slice { rows: 0..shape.first().copied().unwrap_or(1), columns: None, padding: 0 };
                return Some((PlannedSource { tensor, entry, transforms, slice }, shape));
            }
            Err(problem) => problem,
        };
        self.problems.push(problem);
        None
    }

    /// The shape after all transforms. In between, what the file's own leave must be what the model expects.
    fn shapes(&self, entry: &TensorEntry, own: &[Transform], source: &WeightSource) -> Result<Vec<u64>, Problem> {
        let impossible = |reason| Problem::Transform { tensor: source.tensor.clone(), reason };
        let apply = |shape: Vec<u64>, transform: &Transform| transform.shape_after(&shape);
        if entry.shape.contains(&0) {
            return Err(impossible(format!("it is empty: {:?}", entry.shape)));
        }
        let found = own.iter().try_fold(entry.shape.clone(), apply).map_err(impossible)?;
        if found != source.shape {
            let (tensor, expected) = (source.tensor.clone(), source.shape.clone());
            return Err(Problem::Shape { tensor, expected, found });
        }
        source.transforms.iter().try_fold(found, apply).map_err(impossible)
    }

    /// Sorts the tensors that no weight takes into ignored ones, which are returned, and problems.
    fn leftovers(&mut self, description: &ModelDescription) -> Vec<String> {
        let by_model = |name: &str| matches_any(&description.ignored_tensors, name) || is_kv_scale(name);
        // What the model ignores, it ignores under the Hugging Face name.
        let renamed = self.gguf.iter().flat_map(|answer| &answer.tensors).filter(|(name, _)| by_model(name));
        let renamed: BTreeSet<&str> = renamed.map(|(_, tensor)| tensor.name.as_str()).collect();
        let is_ignored = |name: &str| match self.gguf {
            None => by_model(name),
            Some(answer) => renamed.contains(name) || matches_any(&answer.ignored_tensors, name),
        };
        let left = self.checkpoint.tensors().iter().filter(|(name, _)| !self.taken.contains(name.as_str()));
        let (ignored, extra): (Vec<_>, Vec<_>) = left.partition(|(name, _)| is_ignored(name));
        let extra = extra.into_iter().map(|(name, entry)| (name.clone(), entry.shape.clone()));
        self.problems.extend(extra.map(|(tensor, shape)| Problem::Extra { tensor, shape }));
        ignored.into_iter().map(|(name, _)| name.clone()).collect()
    }
}

/// One segment for each source, so that a product over several projections can tell them apart; where they are too
/// many, neighbours that are stored alike share one.
fn packed_layout(
    parts: &[(&PlannedSource, &Vec<u64>)],
    floats: Format,
    keep_quantized: bool,
) -> Result<Layout, PackError> {
    let columns = parts.first().map_or(0, |(_, shape)| shape.iter().skip(1).product::<u64>() as usize);
    let format = |source: &PlannedSource| {
        let is_cut = source.slice.columns.is_some() || source.slice.padding > 0;
        let is_plain = !is_cut && !source.transforms.iter().any(Transform::changes_elements);
        let kept = source.entry.storage.packed_as().filter(|_| keep_quantized && is_plain);
        kept.map_or(floats, |(format, _)| format)
    };
    let mut segments: Vec<Segment> = Vec::new();
    let mut before = None;
    for (source, shape) in parts {
        let (format, rows) = (format(source), shape.first().map_or(1, |rows| *rows as usize));
        let joins = parts.len() > SEGMENTS_MAX && before.replace(source.entry.storage) == Some(source.entry.storage);
        match segments.last_mut() {
            Some(last) if joins && last.format == format => last.rows += rows,
            _ => segments.push(Segment { format, rows }),
        }
    }
    Layout::new(columns, segments)
}

/// The shape of tensors joined along the first axis; `None` if their other axes differ.
fn concatenated(shapes: &[Vec<u64>]) -> Option<Vec<u64>> {
    if let [scalar_or_whole] = shapes {
        return Some(scalar_or_whole.clone());
    }
    let (_, row) = shapes.first()?.split_first()?;
    let rows_of = |shape: &Vec<u64>| shape.split_first().filter(|(_, other)| *other == row).map(|(rows, _)| *rows);
    let rows = shapes.iter().try_fold(0u64, |sum, shape| sum.checked_add(rows_of(shape)?))?;
    Some([&[rows], row].concat())
}

/// A pattern is a name, or the start of names followed by `*`.
fn matches_any(patterns: &[String], name: &str) -> bool {
    let matches = |pattern: &String| match pattern.strip_suffix('*') {
        Some(start) => name.starts_with(start),
        None => name == pattern,
    };
    patterns.iter().any(matches)
}

#[cfg(test)]
mod tests;
