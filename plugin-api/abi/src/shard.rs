//! How weights are split over the devices that share a model: what follows from a weight's role, for host and plugins
//! alike.
//!
//! A linear split by `Column`, the embedding and the output projection are cut along their rows, one split by `Row` along
//! its columns, and vectors are the same everywhere, unless [`WeightSource::units`] says how their rows are cut.

use std::ops::Range;

use crate::{
    fragment::LinearRole,
    model::{Parallel, Transform, WeightRole, WeightSource, WeightSpec},
};

/// One of the devices that share a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Shard {
    pub index: u32,
    pub parallel: Parallel,
}

impl Shard {
    /// The whole model on one device.
    pub const WHOLE: Self = Self { index: 0, parallel: Parallel { tensor: 1 } };

    /// All devices that share a model.
    pub fn all(parallel: Parallel) -> impl Iterator<Item = Self> {
        (0..parallel.tensor).map(move |index| Self { index, parallel })
    }

    /// This device's part of `total`, if it divides.
    fn part(self, total: u64) -> Option<Range<u64>> {
        let count = u64::from(self.parallel.tensor);
        let part = total / count.max(1);
        let start = part * u64::from(self.index);
        total.is_multiple_of(count).then_some(start..start + part)
    }
}

/// What a device holds of a tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Slice {
    /// Of the first axis.
    pub rows: Range<u64>,
    /// Of the second axis of a matrix; `None` = whole rows.
    pub columns: Option<Range<u64>>,
    /// Rows of zeros that follow, so that all devices hold the same number.
    pub padding: u64,
}

impl Slice {
    /// The shape of what is left of a tensor, with the padding.
    pub fn shape(&self, whole: &[u64]) -> Vec<u64> {
        let mut shape = whole.to_vec();
        if let Some(rows) = shape.first_mut() {
            *rows = self.rows.end - self.rows.start + self.padding;
        }
        if let (Some(columns), Some(size)) = (&self.columns, shape.get_mut(1)) {
            *size = columns.end - columns.start;
        }
        shape
    }
}

impl Parallel {
    /// Tokens of the vocabulary for each device: the last ones may hold less than that, and padding.
    pub fn vocab(self, vocab: u64) -> u64 {
        vocab.div_ceil(u64::from(self.tensor.max(1)))
    }
}

impl Transform {
    /// The shape that it leaves, or why it cannot be applied.
    pub fn shape_after(&self, shape: &[u64]) -> Result<Vec<u64>, String> {
        let rows = || shape.first().copied().ok_or_else(|| format!("{self:?} needs rows, not a scalar"));
        match self {
            Self::Transpose => match shape {
                [rows, columns] => Ok(vec![*columns, *rows]),
                _ => Err(format!("Transpose needs a matrix, not {shape:?}")),
            },
            Self::Rows { start, len } => match start.checked_add(*len) {
                Some(end) if end <= rows()? => Ok([&[*len], &shape[1..]].concat()),
                _ => Err(format!("rows {start} to {start} + {len} of {shape:?}")),
            },
            Self::PermuteRopeRows { heads } => {
                let is_even = |rows: u64| rows.checked_rem(*heads) == Some(0) && (rows / heads).is_multiple_of(2);
                match rows()? {
                    rows if is_even(rows) => Ok(shape.to_vec()),
                    rows => Err(format!("{rows} rows are no {heads} heads of an even size")),
                }
            }
            Self::AddConstant(constant) if constant.is_finite() => Ok(shape.to_vec()),
            Self::AddConstant(constant) => Err(format!("AddConstant({constant})")),
        }
    }
}

impl WeightSource {
    /// The shape after all transforms.
    fn loaded_shape(&self) -> Result<Vec<u64>, String> {
        self.transforms.iter().try_fold(self.shape.clone(), |shape, transform| transform.shape_after(&shape))
    }
}

impl WeightSpec {
    /// What a device holds of one of the weight's sources, whose shape after its transforms is `shape`.
    ///
    /// # Errors
    /// In words that name the number that does not divide.
    pub fn slice(&self, source: &WeightSource, shape: &[u64], shard: Shard) -> Result<Slice, String> {
        let (count, rows) = (u64::from(shard.parallel.tensor), shape.first().copied().unwrap_or(1));
        let whole = Slice { rows: 0..rows, columns: None, padding: 0 };
        if count <= 1 {
            return Ok(whole);
        }
        let uneven = |what: &str, size: u64| format!("{size} {what} do not divide over {count} devices");
        match self.role {
            WeightRole::Linear(LinearRole::Replicated) => Ok(whole),
            WeightRole::Vector if source.units.is_none() => Ok(whole),
            WeightRole::Linear(LinearRole::Row) => {
                let columns = shape.get(1).copied().ok_or("a linear layer is a matrix")?;
                Ok(Slice { columns: Some(shard.part(columns).ok_or_else(|| uneven("columns", columns))?), ..whole })
            }
            WeightRole::Linear(LinearRole::Column) | WeightRole::Vector => {
                let rows = in_units(rows, source.units.unwrap_or(rows), shard);
                Ok(Slice { rows: rows.map_err(|(what, size)| uneven(what, size))?, ..whole })
            }
            WeightRole::Embed | WeightRole::EmbedAndHead | WeightRole::Linear(LinearRole::Head) => {
                if self.sources.len() != 1 {
                    return Err("a vocabulary of several tensors cannot be split over devices".to_owned());
                }
                let part = shard.parallel.vocab(rows);
                let bound = |index: u32| (part * u64::from(index)).min(rows);
                let rows = bound(shard.index)..bound(shard.index + 1);
                Ok(Slice { padding: part - (rows.end - rows.start), rows, ..whole })
            }
        }
    }

    /// The logical shape on each of the devices: all hold the same.
    ///
    /// # Errors
    /// As [`WeightSpec::slice`].
    pub fn shard_shape(&self, parallel: Parallel) -> Result<Vec<u64>, String> {
        if parallel.tensor <= 1 {
            return Ok(self.shape.clone());
        }
        let mut joined: Option<Vec<u64>> = None;
        for source in &self.sources {
            let whole = source.loaded_shape()?;
            let part = self.slice(source, &whole, Shard { index: 0, parallel })?.shape(&whole);
            match (&mut joined, part.first()) {
                (Some(joined), Some(rows)) => joined[0] += rows,
                _ => joined = Some(part),
            }
        }
        joined.ok_or_else(|| "it has no source".to_owned())
    }
}

/// The rows of a device, where units must not be cut; with fewer units than devices, neighbours hold the same one.
fn in_units(rows: u64, units: u64, shard: Shard) -> Result<Range<u64>, (&'static str, u64)> {
    let count = u64::from(shard.parallel.tensor);
    if units == 0 || !rows.is_multiple_of(units) {
        return Err(("rows", rows));
    }
    let height = rows / units;
    if units < count && count.is_multiple_of(units) {
        let unit = u64::from(shard.index) * units / count;
        return Ok(unit * height..(unit + 1) * height);
    }
    let part = shard.part(units).ok_or((if height == 1 { "rows" } else { "heads" }, units))?;
    Ok(part.start * height..part.end * height)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parallel(tensor: u32) -> Parallel {
        Parallel { tensor }
    }

    fn slices(spec: &WeightSpec, source: usize, devices: u32) -> Vec<Slice> {
        let source = &spec.sources[source];
        Shard::all(parallel(devices)).map(|shard| spec.slice(source, &source.shape, shard).unwrap()).collect()
    }

    fn rows(spec: &WeightSpec, source: usize, devices: u32) -> Vec<Range<u64>> {
        slices(spec, source, devices).into_iter().map(|slice| slice.rows).collect()
    }

    fn qkv(role: WeightRole) -> WeightSpec {
        let stems = [("q".to_owned(), 16), ("k".to_owned(), 8), ("v".to_owned(), 8)];
        let spec = match role {
            WeightRole::Vector => WeightSpec::vector("bias", "qkv", &stems),
            _ => WeightSpec::linear(LinearRole::Column, "qkv", 12, &stems),
        };
        spec.in_units(&[4, 2, 2])
    }

    #[test]
    fn heads_stay_whole_and_those_of_keys_go_to_several_devices() {
        for spec in [qkv(WeightRole::Linear(LinearRole::Column)), qkv(WeightRole::Vector)] {
            assert_eq!(rows(&spec, 0, 4), [0..4, 4..8, 8..12, 12..16]);
            assert_eq!(rows(&spec, 1, 2), [0..4, 4..8]);
            assert_eq!(rows(&spec, 1, 4), [0..4, 0..4, 4..8, 4..8]);
            assert_eq!(spec.shard_shape(parallel(4)).unwrap()[0], 4 + 4 + 4);
            assert_eq!(spec.shard_shape(parallel(1)).unwrap(), spec.shape);
            let error = spec.shard_shape(parallel(3)).unwrap_err();
            assert_eq!(error, "4 heads do not divide over 3 devices");
        }
    }

    #[test]
    fn rows_of_sums_and_vectors_stay_whole() {
        let down = WeightSpec::linear(LinearRole::Row, "down", 6, &[("down".to_owned(), 5)]);
        let columns: Vec<_> = slices(&down, 0, 3).into_iter().map(|slice| (slice.rows, slice.columns)).collect();
        assert_eq!(columns, [(0..5, Some(0..2)), (0..5, Some(2..4)), (0..5, Some(4..6))]);
        assert_eq!(down.shard_shape(parallel(3)).unwrap(), [5, 2]);
        assert_eq!(down.shard_shape(parallel(4)).unwrap_err(), "6 columns do not divide over 4 devices");
        let norm = WeightSpec::vector("weight", "norm", &[("norm".to_owned(), 5)]);
        assert_eq!(rows(&norm, 0, 2), [0..5, 0..5]);
    }

    #[test]
    fn a_vocabulary_is_padded() {
        let embedding = WeightSpec::embedding("embed", "e", [5, 3], true);
        let parts: Vec<_> = slices(&embedding, 0, 4).into_iter().map(|slice| (slice.rows, slice.padding)).collect();
        assert_eq!(parts, [(0..2, 0), (2..4, 0), (4..5, 1), (5..5, 2)]);
        assert_eq!(embedding.shard_shape(parallel(4)).unwrap(), [2, 3]);
        assert_eq!(parallel(4).vocab(5), 2);
    }

    #[test]
    fn transformed_sources_are_cut_as_they_are_loaded() {
        let mut spec = WeightSpec::linear(LinearRole::Column, "w", 4, &[("w".to_owned(), 6)]);
        spec.sources[0] = WeightSource::new("w.weight", [4, 9]);
        spec.sources[0].transforms = vec![Transform::Transpose, Transform::Rows { start: 3, len: 6 }];
        assert_eq!(spec.shard_shape(parallel(2)).unwrap(), [3, 4]);
    }
}
