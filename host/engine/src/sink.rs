//! Hands weights to a device: each as it is assembled, or all of them packed in an arena.

use std::{collections::BTreeMap, io};

use torus_abi::DType;
use torus_pjrt::Buffer;
use torus_weights::{AlignedBytes, CacheEntry, PlannedWeight, SinkError, WeightSink};

use crate::{
    device::Target,
    handle::Shared,
    load::StartError,
    program::{Place, WeightMap},
    weight_cache::{Keeping, SharedBytes},
};

pub(crate) struct DeviceSink<'a> {
    target: &'a Target,
    device: usize,
    shared: &'a Shared,
    map: &'a WeightMap,
    /// Of weights that are arguments of their own, by the argument's number.
    buffers: BTreeMap<usize, Buffer>,
    /// Stacks that are not full yet, and how many weights they hold. Weights come layer by layer, so a whole shard of them
    /// lies in the host's memory before the first is handed over.
    stacks: BTreeMap<usize, (AlignedBytes, u64)>,
    /// What is not given out of the arena yet, and what came back of it.
    arena: Option<(AlignedBytes, AlignedBytes)>,
    vectors: Vec<u8>,
    /// Weights reserved, and put.
    reserved: usize,
    put: usize,
}

impl<'a> DeviceSink<'a> {
    /// For the shard on device number `device`.
    pub fn new(target: &'a Target, device: usize, shared: &'a Shared, map: &'a WeightMap) -> Result<Self, StartError> {
        let arena = map.arena().map(|tensor| {
            let bytes = tensor.bytes().unwrap_or(u64::MAX) as usize;
            let mut filled = AlignedBytes::zeroed(bytes).map_err(|source| no_memory(bytes, source))?;
            let free = filled.split_off(0);
            Ok::<_, StartError>((free, filled))
        });
        let arena = arena.transpose()?;
        let (buffers, stacks) = (BTreeMap::new(), BTreeMap::new());
        Ok(Self { target, device, shared, map, buffers, stacks, arena, vectors: Vec::new(), reserved: 0, put: 0 })
    }

    /// The arguments of the map, in order. Those that were packed are kept in `entry` from then on.
    pub fn finish(mut self, entry: Option<CacheEntry>) -> Result<(Vec<Buffer>, Option<Keeping>), StartError> {
        let mut buffers: Vec<_> = std::mem::take(&mut self.buffers).into_values().collect();
        if self.map.is_shared() {
            buffers.push(self.target.upload_words(&[self.device as i32], DType::I32, &[], self.device)?);
        }
        let Some((_, filled)) = self.arena else { return Ok((buffers, None)) };
        let filled = SharedBytes::new(filled);
        buffers.extend(arguments(self.target, self.map, filled.clone(), &self.vectors)?);
        Ok((buffers, entry.map(|entry| Keeping::start(entry, filled, self.vectors))))
    }
}

/// The arguments that hold packed matrices and vectors, of a model on one device.
pub(crate) fn arguments<B>(
    target: &Target,
    map: &WeightMap,
    matrices: B,
    vectors: &[u8],
) -> Result<Vec<Buffer>, StartError>
where
    B: AsRef<[u8]> + Send + 'static,
{
    let [arena, vector_argument] = map.arguments() else { return Ok(Vec::new()) };
    Ok(vec![target.give(matrices, arena, 0)?, target.upload(vectors, vector_argument, 0)?])
}

impl DeviceSink<'_> {
    /// Puts a weight into its stack, and the stack onto the device when it is full.
    fn stack(&mut self, index: usize, number: usize, bytes: &[u8]) -> Result<(), SinkError> {
        let tensor = &self.map.arguments()[index];
        let count = tensor.dims.first().copied().unwrap_or(1);
        let (mut stack, filled) = match self.stacks.remove(&index) {
            Some(begun) => begun,
            None => (AlignedBytes::zeroed(bytes.len() * count as usize)?, 0),
        };
        stack[number * bytes.len()..][..bytes.len()].copy_from_slice(bytes);
        if filled + 1 < count {
            self.stacks.insert(index, (stack, filled + 1));
        } else {
            self.buffers.insert(index, self.target.give(stack, tensor, self.device)?);
        }
        Ok(())
    }
}

fn no_memory(bytes: usize, source: io::Error) -> StartError {
    let message = format!("{bytes} bytes for the weights cannot be had: {source}");
    StartError::Config { field: "model", message }
}

impl WeightSink for DeviceSink<'_> {
    fn reserve(&mut self, weight: &PlannedWeight) -> io::Result<AlignedBytes> {
        let place = &self.map.places()[self.reserved];
        self.reserved += 1;
        match (place, &mut self.arena) {
            // Weights are asked for in the order they lie in.
            (Place::Packed { .. }, Some((free, _))) => {
                let rest = free.split_off(weight.bytes());
                Ok(std::mem::replace(free, rest))
            }
            _ => AlignedBytes::zeroed(weight.bytes()),
        }
    }

    fn put(&mut self, weight: &PlannedWeight, bytes: AlignedBytes) -> Result<(), SinkError> {
        if self.shared.is_shutting_down() {
            return Err(StartError::Cancelled.into());
        }
        let map = self.map;
        let place = &map.places()[self.put];
        self.put += 1;
        match (place, &mut self.arena) {
            (Place::Argument { index, tensor } | Place::Vocabulary { index, tensor }, _) => {
                self.buffers.insert(*index, self.target.give(bytes, tensor, self.device)?);
            }
            (Place::Stacked { index, number, .. }, _) => self.stack(*index, *number as usize, &bytes)?,
            (Place::Vector { .. }, _) => self.vectors.extend_from_slice(&bytes),
            (Place::Packed { .. }, Some((_, filled))) => {
                let misplaced = |_| format!("'{}' does not follow the weight before it", weight.name);
                filled.unsplit(bytes).map_err(misplaced)?;
            }
            (Place::Packed { .. }, None) => return Err(format!("there is no arena for '{}'", weight.name).into()),
        }
        Ok(())
    }
}
