//! What lies on the device: weights, KV pools, and the arrays with a row for each slot.

use std::sync::Arc;

use torus_abi::{DType, TensorType};
use torus_pjrt::{Buffer, Execution, HostCopy, LoadedExecutable, PjrtError};

use crate::{
    load::Bucket,
    program::{Arguments, LOAD_ENTRIES},
};

mod hash;
mod null;
mod target;

pub(crate) use null::NullDevice;
pub use target::Device;
pub(crate) use target::Target;

/// What steps run on.
pub(crate) enum StepDevice {
    Pjrt(Box<DeviceState>),
    Null(NullDevice),
}

/// The result of a step, which may still be on its way.
pub(crate) enum Pending {
    Copy(HostCopy),
    Ready(Vec<u8>),
}

impl Pending {
    /// Waits for the result.
    pub fn wait(self) -> Result<Vec<u8>, PjrtError> {
        match self {
            Self::Copy(copy) => copy.wait(),
            Self::Ready(result) => Ok(result),
        }
    }
}

impl StepDevice {
    /// As [`DeviceState::step`].
    pub fn step(&mut self, bucket: &Bucket, packed: &[u8]) -> Result<Pending, PjrtError> {
        match (self, &bucket.executable) {
            (Self::Pjrt(state), Some(program)) => state.step(program, packed).map(Pending::Copy),
            (Self::Null(device), _) => device.step(&bucket.layout, packed).map(Pending::Ready),
            (Self::Pjrt(_), None) => Err(PjrtError::Invalid("this step has no program".into())),
        }
    }

    /// As [`DeviceState::reset`].
    pub fn reset(&mut self) -> Result<(), PjrtError> {
        self.state().map_or(Ok(()), DeviceState::reset)
    }

    /// As [`DeviceState::load_counts`].
    pub fn load_counts(&mut self, slot: u32, entries: &[(u32, i32)]) -> Result<(), PjrtError> {
        self.state().map_or(Ok(()), |state| state.load_counts(slot, entries))
    }

    /// As [`DeviceState::load_bias`].
    pub fn load_bias(&mut self, slot: u32, entries: &[(u32, f32)]) -> Result<(), PjrtError> {
        self.state().map_or(Ok(()), |state| state.load_bias(slot, entries))
    }

    /// As [`DeviceState::load_pages`].
    pub fn load_pages(&mut self, entries: &[(u32, i32)]) -> Result<(), PjrtError> {
        self.state().map_or(Ok(()), |state| state.load_pages(entries))
    }

    fn state(&mut self) -> Option<&mut DeviceState> {
        match self {
            Self::Pjrt(state) => Some(state),
            Self::Null(_) => None,
        }
    }
}

/// The programs beside the step.
pub(crate) struct Loaders {
    pub initial_state: LoadedExecutable,
    pub load_counts: LoadedExecutable,
    pub load_bias: LoadedExecutable,
    pub load_pages: LoadedExecutable,
}

/// All device buffers of an engine. Each step takes the donated ones and puts their successors back.
pub(crate) struct DeviceState {
    target: Target,
    arguments: Arguments,
    weights: Arc<[Buffer]>,
    loaders: Arc<Loaders>,
    /// `None` after a failed execution, whose donated buffers are gone.
    mutable: Option<Mutable>,
}

struct Mutable {
    pools: Vec<Buffer>,
    last_tokens: Buffer,
    page_table: Buffer,
    token_counts: Buffer,
    bias: Buffer,
    allowed: Buffer,
}

/// Arrays of a few words for each slot.
const SMALL_ARRAYS: usize = 3;

/// The state was lost in a failed execution and not yet made anew.
fn lost() -> PjrtError {
    PjrtError::Invalid("the device's state was lost in a failed step".into())
}

fn take_first(execution: Execution) -> Result<Buffer, PjrtError> {
    let first = execution.outputs.into_iter().next();
    first.ok_or_else(|| PjrtError::Invalid("a program gave no result".into()))
}

impl DeviceState {
    pub fn new(
        target: Target,
        arguments: Arguments,
        weights: Arc<[Buffer]>,
        loaders: Arc<Loaders>,
    ) -> Result<Self, PjrtError> {
        let mut state = Self { target, arguments, weights, loaders, mutable: None };
        state.reset()?;
        Ok(state)
    }

    /// Makes pools and rows anew, all zero. What shares the host's memory takes none before it is used.
    pub fn reset(&mut self) -> Result<(), PjrtError> {
        // The old ones go first: two generations need not fit.
        self.mutable = None;
        let Execution { mut outputs, done } = self.loaders.initial_state.execute(&[])?;
        done.wait()?;
        let incomplete = || PjrtError::Invalid("the initial state is incomplete".into());
        let mut large = outputs.split_off(outputs.len().min(SMALL_ARRAYS));
        if large.is_empty() {
            // The program leaves them out where they share the host's memory.
            large = self.arguments.large().map(|tensor| self.target.zeros(tensor)).collect::<Result<_, _>>()?;
        }
        let [last_tokens, page_table, allowed] =
            <[Buffer; SMALL_ARRAYS]>::try_from(outputs).map_err(|_| incomplete())?;
        let mut large = large.into_iter();
        let (token_counts, bias) = large.next().zip(large.next()).ok_or_else(incomplete)?;
        let pools = large.collect();
        self.mutable = Some(Mutable { pools, last_tokens, page_table, token_counts, bias, allowed });
        Ok(())
    }

    /// Starts a step and the transfer of its result. What failed before it started leaves the state as it was only if
    /// nothing was donated; so any error means that the state is lost.
    pub fn step(&mut self, program: &LoadedExecutable, packed: &[u8]) -> Result<HostCopy, PjrtError> {
        let words = (packed.len() / 4) as u64;
        let packed = self.target.upload(packed, &TensorType::new(DType::I32, [words]))?;
        let state = self.mutable.take().ok_or_else(lost)?;
        let mut arguments: Vec<&Buffer> = self.weights.iter().collect();
        arguments.extend(&state.pools);
        arguments.extend([
            &state.last_tokens,
            &state.page_table,
            &state.token_counts,
            &state.bias,
            &state.allowed,
            &packed,
        ]);
        let Execution { mut outputs, .. } = program.execute(&arguments)?;
        let rest = outputs.split_off(state.pools.len());
        let [last_tokens, page_table, token_counts, result] =
            <[Buffer; 4]>::try_from(rest).map_err(|_| PjrtError::Invalid("a step's results are incomplete".into()))?;
        let Mutable { bias, allowed, .. } = state;
        self.mutable = Some(Mutable { pools: outputs, last_tokens, page_table, token_counts, bias, allowed });
        result.to_host()
    }

    /// Sets the counts of a slot's row (see [`crate::sampling::IN_PROMPT`]) and zeroes the others.
    pub fn load_counts(&mut self, slot: u32, entries: &[(u32, i32)]) -> Result<(), PjrtError> {
        let words: Vec<_> = entries.to_vec();
        let mut state = self.mutable.take().ok_or_else(lost)?;
        state.token_counts = self.load_row(&self.loaders.load_counts, state.token_counts, DType::I32, slot, &words)?;
        self.mutable = Some(state);
        Ok(())
    }

    /// Sets the biases of a slot's row and zeroes the others.
    pub fn load_bias(&mut self, slot: u32, entries: &[(u32, f32)]) -> Result<(), PjrtError> {
        let words: Vec<_> = entries.iter().map(|(token, bias)| (*token, bias.to_bits() as i32)).collect();
        let mut state = self.mutable.take().ok_or_else(lost)?;
        state.bias = self.load_row(&self.loaders.load_bias, state.bias, DType::F32, slot, &words)?;
        self.mutable = Some(state);
        Ok(())
    }

    fn load_row(
        &self,
        loader: &LoadedExecutable,
        mut array: Buffer,
        dtype: DType,
        slot: u32,
        entries: &[(u32, i32)],
    ) -> Result<Buffer, PjrtError> {
        let vocab = self.arguments.rows.token_counts.dims[1] as i32;
        // Once also for no entries: the row is cleared.
        let chunks = entries.chunks(LOAD_ENTRIES).map(Some).chain(entries.is_empty().then_some(None));
        for (i, chunk) in chunks.enumerate() {
            let chunk = chunk.unwrap_or_default();
            let (ids, values) = padded(chunk, vocab);
            let slot = self.target.upload_words(&[slot as i32], DType::I32, &[])?;
            let ids = self.target.upload_words(&ids, DType::I32, &[LOAD_ENTRIES as u64])?;
            let values = self.target.upload_words(&values, dtype, &[LOAD_ENTRIES as u64])?;
            let clear = self.target.upload_words(&[i32::from(i == 0)], DType::I32, &[])?;
            array = take_first(loader.execute(&[&array, &slot, &ids, &values, &clear])?)?;
        }
        Ok(array)
    }

    /// Sets entries of the page table: more of them than a step buffer holds.
    pub fn load_pages(&mut self, entries: &[(u32, i32)]) -> Result<(), PjrtError> {
        let unused = self.arguments.rows.page_table.dims[0] as i32;
        let mut state = self.mutable.take().ok_or_else(lost)?;
        for chunk in entries.chunks(LOAD_ENTRIES) {
            let (index, pages) = padded(chunk, unused);
            let index = self.target.upload_words(&index, DType::I32, &[LOAD_ENTRIES as u64])?;
            let pages = self.target.upload_words(&pages, DType::I32, &[LOAD_ENTRIES as u64])?;
            let loaded = self.loaders.load_pages.execute(&[&state.page_table, &index, &pages])?;
            state.page_table = take_first(loaded)?;
        }
        self.mutable = Some(state);
        Ok(())
    }
}

/// Indices and values of a chunk, filled up with an index that is dropped.
fn padded(entries: &[(u32, i32)], unused: i32) -> (Vec<i32>, Vec<i32>) {
    let (mut ids, mut values): (Vec<_>, Vec<_>) = entries.iter().map(|(id, value)| (*id as i32, *value)).unzip();
    ids.resize(LOAD_ENTRIES, unused);
    values.resize(LOAD_ENTRIES, 0);
    (ids, values)
}
