//! Hands weights to the device: each as it is assembled, or all of them packed in an arena.

use std::io;

use torus_pjrt::Buffer;
use torus_weights::{AlignedBytes, PlannedWeight, SinkError, WeightSink};

use crate::{
    device::Target,
    handle::Shared,
    load::StartError,
    program::{Place, WeightMap},
};

pub(crate) struct DeviceSink<'a> {
    target: &'a Target,
    shared: &'a Shared,
    map: &'a WeightMap,
    /// Of weights that are arguments of their own.
    buffers: Vec<Buffer>,
    /// What is not given out of the arena yet, and what came back of it.
    arena: Option<(AlignedBytes, AlignedBytes)>,
    vectors: Vec<u8>,
    /// Weights reserved, and put.
    reserved: usize,
    put: usize,
}

impl<'a> DeviceSink<'a> {
    pub fn new(target: &'a Target, shared: &'a Shared, map: &'a WeightMap) -> Result<Self, StartError> {
        let arena = map.arena().map(|tensor| {
            let bytes = tensor.bytes().unwrap_or(u64::MAX) as usize;
            let mut filled = AlignedBytes::zeroed(bytes).map_err(|source| no_memory(bytes, source))?;
            let free = filled.split_off(0);
            Ok::<_, StartError>((free, filled))
        });
        let arena = arena.transpose()?;
        Ok(Self { target, shared, map, buffers: Vec::new(), arena, vectors: Vec::new(), reserved: 0, put: 0 })
    }

    /// The arguments of the map, in order.
    pub fn finish(mut self) -> Result<Vec<Buffer>, StartError> {
        let Some((_, filled)) = self.arena else { return Ok(self.buffers) };
        if let [arena, vectors] = self.map.arguments() {
            self.buffers.push(self.target.give(filled, arena)?);
            self.buffers.push(self.target.upload(&self.vectors, vectors)?);
        }
        Ok(self.buffers)
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
        let place = &self.map.places()[self.put];
        self.put += 1;
        match (place, &mut self.arena) {
            (Place::Argument { tensor, .. }, _) => self.buffers.push(self.target.give(bytes, tensor)?),
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
