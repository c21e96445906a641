//! Carries out a [`LoadPlan`]: assembles weights and hands them over.

use std::{
    collections::VecDeque,
    io,
    thread::{self, ScopedJoinHandle},
    time::{Duration, Instant},
};

use crate::{
    AlignedBytes, Checkpoint, LoadPlan, PlannedStorage, PlannedWeight, Progress, WeightsError, pack, view::TensorView,
};

/// How many weights are being assembled at once: the second is while the first is handed over, or when it is too small
/// for all threads.
pub const WEIGHTS_IN_FLIGHT: usize = 2;

/// Why a sink could not take a weight.
pub type SinkError = Box<dyn std::error::Error + Send + Sync>;

/// Takes the weights of a model, for instance onto a device.
///
/// Both methods are called from the thread that loads, in the order of [`LoadPlan::weights`]; up to
/// [`WEIGHTS_IN_FLIGHT`] weights are reserved and not yet put.
pub trait WeightSink {
    /// Memory for a weight, of [`PlannedWeight::bytes`] bytes. All of it will be overwritten. A sink that keeps all
    /// weights in one arena gives a part of that.
    fn reserve(&mut self, weight: &PlannedWeight) -> io::Result<AlignedBytes> {
        AlignedBytes::zeroed(weight.bytes())
    }

    /// Takes a weight, as its [`PlannedStorage`] says, in the memory reserved for it. The sink may keep that
    /// memory, so that a device reads it where it is.
    fn put(&mut self, weight: &PlannedWeight, bytes: AlignedBytes) -> Result<(), SinkError>;
}

/// What was loaded.
#[derive(Clone, Debug)]
pub struct LoadReport {
    pub weights: usize,
    /// Read from the files.
    pub source_bytes: u64,
    /// Put into the sink.
    pub bytes: u64,
    pub elapsed: Duration,
}

impl LoadPlan<'_> {
    /// Loads all weights. An error leaves the sink with those that were put before.
    pub fn run(&self, sink: &mut dyn WeightSink, progress: &dyn Progress) -> Result<LoadReport, WeightsError> {
        let started = Instant::now();
        progress.begin("loading weights", self.bytes());
        let loaded = thread::scope(|scope| {
            let mut in_flight = VecDeque::with_capacity(WEIGHTS_IN_FLIGHT);
            for weight in self.weights() {
                if in_flight.len() == WEIGHTS_IN_FLIGHT {
                    hand_over(&mut in_flight, sink)?;
                }
                let bytes = reserve(sink, weight)?;
                let assembly = move || assemble(self.checkpoint, weight, bytes, progress);
                let started = thread::Builder::new().name("weights".to_owned()).spawn_scoped(scope, assembly);
                in_flight.push_back((weight, started.map_err(|source| out_of_memory(weight, source))?));
            }
            while !in_flight.is_empty() {
                hand_over(&mut in_flight, sink)?;
            }
            Ok(())
        });
        progress.finish();
        loaded?;
        let source_bytes = self.weights().iter().map(|weight| weight.source_bytes() as u64).sum();
        Ok(LoadReport { weights: self.weights().len(), source_bytes, bytes: self.bytes(), elapsed: started.elapsed() })
    }
}

type Assembly<'scope> = ScopedJoinHandle<'scope, Result<AlignedBytes, WeightsError>>;

/// Puts the oldest weight.
fn hand_over(
    in_flight: &mut VecDeque<(&PlannedWeight, Assembly<'_>)>,
    sink: &mut dyn WeightSink,
) -> Result<(), WeightsError> {
    let Some((weight, assembly)) = in_flight.pop_front() else { return Ok(()) };
    let bytes = assembly.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
    sink.put(weight, bytes).map_err(|source| WeightsError::Sink { weight: weight.name.clone(), source })
}

fn reserve(sink: &mut dyn WeightSink, weight: &PlannedWeight) -> Result<AlignedBytes, WeightsError> {
    match sink.reserve(weight) {
        Ok(memory) if memory.len() == weight.bytes() => Ok(memory),
        Ok(memory) => {
            let source = io::Error::other(format!("the sink reserved {} bytes", memory.len()));
            Err(out_of_memory(weight, source))
        }
        Err(source) => Err(out_of_memory(weight, source)),
    }
}

fn out_of_memory(weight: &PlannedWeight, source: io::Error) -> WeightsError {
    WeightsError::OutOfMemory { weight: weight.name.clone(), bytes: weight.bytes() as u64, source }
}

/// Fills `bytes` with the weight's sources, one after the other along the first axis.
fn assemble(
    checkpoint: &Checkpoint,
    weight: &PlannedWeight,
    mut bytes: AlignedBytes,
    progress: &dyn Progress,
) -> Result<AlignedBytes, WeightsError> {
    let views = weight.sources.iter().map(|source| {
        let view = TensorView::new(&source.entry.shape, source.entry.storage, checkpoint.bytes(&source.entry));
        let view = source.transforms.iter().try_fold(view, TensorView::apply).map_err(|reason| {
            // The plan tried the transforms on the shapes already.
            let reason = format!("{}: {reason}", source.tensor);
            WeightsError::Unsupported { path: checkpoint.path().to_owned(), reason }
        })?;
        Ok::<_, WeightsError>(view.cut(&source.slice))
    });
    match &weight.storage {
        PlannedStorage::Dense(dtype) => {
            let mut rest = &mut bytes[..];
            for view in views {
                let view = view?;
                let bytes = view.elements() * dtype.bytes();
                view.write(*dtype, rest.split_off_mut(..bytes).unwrap_or_default());
                progress.advance(bytes as u64);
            }
            assert!(rest.is_empty(), "{} bytes of {} would stay zero", rest.len(), weight.name);
        }
        PlannedStorage::Packed(layout) => {
            let views = views.collect::<Result<Vec<_>, _>>()?;
            pack::write(&views, layout, &mut bytes).map_err(|error| WeightsError::Unsupported {
                path: checkpoint.path().to_owned(),
                reason: format!("{}: {error}", weight.name),
            })?;
            progress.advance(weight.bytes() as u64);
        }
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests;
