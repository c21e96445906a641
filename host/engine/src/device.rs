//! What lies on the device: weights, KV pools, and the arrays with a row for each slot.

use torus_abi::{DType, TensorType};
use torus_pjrt::{Buffer, Execution, HostCopy, LoadedExecutable, PjrtError};

use crate::{
    load::Bucket,
    program::{Arguments, LOAD_ENTRIES},
};

mod hash;
mod null;
mod target;
mod touch;

pub(crate) use null::NullDevice;
pub(crate) use target::Target;
pub use target::{Device, client_options, compile_options};

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

/// All device buffers of an engine. Each step takes the donated ones and puts their successors back. Devices that share a
/// model run each program together, each on its own buffers.
pub(crate) struct DeviceState {
    target: Target,
    arguments: Arguments,
    /// For each device.
    weights: Vec<Vec<Buffer>>,
    /// What parts of the pools hold at first instead of zeros.
    presets: Vec<Preset>,
    loaders: Loaders,
    /// For each device; `None` after a failed execution, whose donated buffers are gone.
    mutable: Option<Vec<Mutable>>,
}

/// What a part of the pools holds at first, on each device.
#[derive(Debug)]
pub(crate) struct Preset {
    /// Its place in [`Arguments::pools`].
    pub part: usize,
    pub bytes: Vec<u8>,
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
/// Arrays of many, which come before the pools.
const WORDY_ARRAYS: usize = 2;

/// The state was lost in a failed execution and not yet made anew.
fn lost() -> PjrtError {
    PjrtError::Invalid("the device's state was lost in a failed step".into())
}

fn incomplete(what: &str) -> PjrtError {
    PjrtError::Invalid(format!("{what} is incomplete"))
}

/// Runs a program on all its devices, with one list of arguments for each.
fn execute(program: &LoadedExecutable, lists: &[Vec<&Buffer>]) -> Result<Vec<Execution>, PjrtError> {
    match lists {
        [list] => Ok(vec![program.execute(list)?]),
        lists => program.execute_on_all(&lists.iter().map(Vec::as_slice).collect::<Vec<_>>()),
    }
}

/// As [`execute`], of a program with one result.
fn execute_one(program: &LoadedExecutable, lists: &[Vec<&Buffer>]) -> Result<Vec<Buffer>, PjrtError> {
    let first = |execution: Execution| execution.outputs.into_iter().next().ok_or_else(|| incomplete("a result"));
    execute(program, lists)?.into_iter().map(first).collect()
}

impl DeviceState {
    /// `weights` has the arguments of each device.
    pub fn new(
        target: Target,
        arguments: Arguments,
        weights: Vec<Vec<Buffer>>,
        presets: Vec<Preset>,
        loaders: Loaders,
    ) -> Result<Self, PjrtError> {
        let mut state = Self { target, arguments, weights, presets, loaders, mutable: None };
        state.reset()?;
        Ok(state)
    }

    /// Makes pools and rows anew, all zero but for the presets. What shares the host's memory takes none before it is used, or
    /// until there is time for that: see [`touch`].
    pub fn reset(&mut self) -> Result<(), PjrtError> {
        // The old ones go first: two generations need not fit.
        self.mutable = None;
        let nothing = vec![Vec::new(); self.weights.len()];
        let executions = execute(&self.loaders.initial_state, &nothing)?;
        let mut state = Vec::with_capacity(executions.len());
        for (device, Execution { mut outputs, done }) in executions.into_iter().enumerate() {
            done.wait()?;
            let mut large = outputs.split_off(outputs.len().min(SMALL_ARRAYS));
            if large.is_empty() {
                // The program leaves them out where they share the host's memory.
                let zeros = |tensor| self.target.zeros(tensor, device);
                let made: Vec<_> = self.arguments.large().map(zeros).collect::<Result<_, _>>()?;
                let (buffers, memory): (_, Vec<_>) = made.into_iter().unzip();
                large = buffers;
                touch::ahead(memory.into_iter().skip(WORDY_ARRAYS).collect());
            }
            let wrong = || incomplete("the initial state");
            let [last_tokens, page_table, allowed] =
                <[Buffer; SMALL_ARRAYS]>::try_from(outputs).map_err(|_| wrong())?;
            let mut large = large.into_iter();
            let (token_counts, bias) = large.next().zip(large.next()).ok_or_else(wrong)?;
            let mut pools: Vec<_> = large.collect();
            for Preset { part, bytes } in &self.presets {
                let tensor = self.arguments.pools.get(*part).ok_or_else(wrong)?;
                *pools.get_mut(*part).ok_or_else(wrong)? = self.target.upload(bytes, tensor, device)?;
            }
            state.push(Mutable { pools, last_tokens, page_table, token_counts, bias, allowed });
        }
        self.mutable = Some(state);
        Ok(())
    }

    /// Starts a step and the transfer of its result, which is the same on all devices. What failed before it started leaves
    /// the state as it was only if nothing was donated; so any error means that the state is lost.
    pub fn step(&mut self, program: &LoadedExecutable, packed: &[u8]) -> Result<HostCopy, PjrtError> {
        let tensor = TensorType::new(DType::I32, [(packed.len() / 4) as u64]);
        let upload = |device| self.target.upload(packed, &tensor, device);
        let packed = (0..self.weights.len()).map(upload).collect::<Result<Vec<_>, _>>()?;
        let state = self.mutable.take().ok_or_else(lost)?;
        let devices = self.weights.iter().zip(&state).zip(&packed);
        let lists: Vec<_> = devices.map(|((weights, state), packed)| state_arguments(weights, state, packed)).collect();
        let executions = execute(program, &lists)?;
        let (mut next, mut copy) = (Vec::with_capacity(state.len()), None);
        for (state, Execution { mut outputs, .. }) in state.into_iter().zip(executions) {
            let rest = outputs.split_off(state.pools.len());
            let [last_tokens, page_table, token_counts, result] =
                <[Buffer; 4]>::try_from(rest).map_err(|_| incomplete("a step's result"))?;
            let Mutable { bias, allowed, .. } = state;
            next.push(Mutable { pools: outputs, last_tokens, page_table, token_counts, bias, allowed });
            if copy.is_none() {
                copy = Some(result.to_host()?);
            }
        }
        self.mutable = Some(next);
        copy.ok_or_else(|| incomplete("a step's result"))
    }

    /// Sets the counts of a slot's row (see [`crate::sampling::IN_PROMPT`]) and zeroes the others.
    pub fn load_counts(&mut self, slot: u32, entries: &[(u32, i32)]) -> Result<(), PjrtError> {
        self.load_row(&Row::COUNTS, slot, entries)
    }

    /// Sets the biases of a slot's row and zeroes the others.
    pub fn load_bias(&mut self, slot: u32, entries: &[(u32, f32)]) -> Result<(), PjrtError> {
        let words: Vec<_> = entries.iter().map(|(token, bias)| (*token, bias.to_bits() as i32)).collect();
        self.load_row(&Row::BIAS, slot, &words)
    }

    fn load_row(&mut self, row: &Row, slot: u32, entries: &[(u32, i32)]) -> Result<(), PjrtError> {
        let part = self.arguments.rows.token_counts.dims[1] as u32;
        let loader = (row.loader)(&self.loaders);
        let mut state = self.mutable.take().ok_or_else(lost)?;
        // Once also for no entries: the row is cleared.
        let chunks = entries.chunks(LOAD_ENTRIES).map(Some).chain(entries.is_empty().then_some(None));
        for (i, chunk) in chunks.enumerate() {
            let (chunk, clear) = (chunk.unwrap_or_default(), i32::from(i == 0));
            let uploads = (0..state.len()).map(|device| {
                let upload = |words: &[i32], dtype, dims: &[u64]| self.target.upload_words(words, dtype, dims, device);
                let (ids, values) = padded(&part_of(chunk, device as u32, part), part as i32);
                let dims = [LOAD_ENTRIES as u64];
                let (ids, values) = (upload(&ids, DType::I32, &dims)?, upload(&values, row.dtype, &dims)?);
                Ok([upload(&[slot as i32], DType::I32, &[])?, ids, values, upload(&[clear], DType::I32, &[])?])
            });
            let uploads = uploads.collect::<Result<Vec<_>, PjrtError>>()?;
            let devices = state.iter().zip(&uploads);
            let lists: Vec<Vec<_>> =
                devices.map(|(state, rest)| [(row.array)(state)].into_iter().chain(rest).collect()).collect();
            let loaded = execute_one(loader, &lists)?;
            state.iter_mut().zip(loaded).for_each(|(state, array)| (row.set)(state, array));
        }
        self.mutable = Some(state);
        Ok(())
    }

    /// Sets entries of the page table: more of them than a step buffer holds.
    pub fn load_pages(&mut self, entries: &[(u32, i32)]) -> Result<(), PjrtError> {
        let unused = self.arguments.rows.page_table.dims[0] as i32;
        let mut state = self.mutable.take().ok_or_else(lost)?;
        for chunk in entries.chunks(LOAD_ENTRIES) {
            let (index, pages) = padded(chunk, unused);
            let dims = [LOAD_ENTRIES as u64];
            let upload = |words: &[i32], device| self.target.upload_words(words, DType::I32, &dims, device);
            let uploads = (0..state.len()).map(|device| Ok([upload(&index, device)?, upload(&pages, device)?]));
            let uploads = uploads.collect::<Result<Vec<_>, PjrtError>>()?;
            let lists: Vec<_> = state
                .iter()
                .zip(&uploads)
                .map(|(state, [index, pages])| vec![&state.page_table, index, pages])
                .collect();
            let loaded = execute_one(&self.loaders.load_pages, &lists)?;
            state.iter_mut().zip(loaded).for_each(|(state, table)| state.page_table = table);
        }
        self.mutable = Some(state);
        Ok(())
    }
}

/// The arguments of a step on one device.
fn state_arguments<'a>(weights: &'a [Buffer], state: &'a Mutable, packed: &'a Buffer) -> Vec<&'a Buffer> {
    let mut arguments: Vec<_> = weights.iter().chain(&state.pools).collect();
    let Mutable { last_tokens, page_table, token_counts, bias, allowed, .. } = state;
    arguments.extend([last_tokens, page_table, token_counts, bias, allowed, packed]);
    arguments
}

/// One of the arrays with a row for each slot and a column for each token of this device.
struct Row {
    dtype: DType,
    loader: fn(&Loaders) -> &LoadedExecutable,
    array: fn(&Mutable) -> &Buffer,
    set: fn(&mut Mutable, Buffer),
}

impl Row {
    const COUNTS: Self = Self {
        dtype: DType::I32,
        loader: |loaders| &loaders.load_counts,
        array: |state| &state.token_counts,
        set: |state, array| state.token_counts = array,
    };
    const BIAS: Self = Self {
        dtype: DType::F32,
        loader: |loaders| &loaders.load_bias,
        array: |state| &state.bias,
        set: |state, array| state.bias = array,
    };
}

/// The entries of tokens that a device holds, which are `part` from its first one on.
fn part_of(entries: &[(u32, i32)], device: u32, part: u32) -> Vec<(u32, i32)> {
    let first = device * part;
    let here = entries.iter().filter(|(token, _)| (first..first + part).contains(token));
    here.map(|(token, value)| (token - first, *value)).collect()
}

/// Indices and values of a chunk, filled up with an index that is dropped.
fn padded(entries: &[(u32, i32)], unused: i32) -> (Vec<i32>, Vec<i32>) {
    let (mut ids, mut values): (Vec<_>, Vec<_>) = entries.iter().map(|(id, value)| (*id as i32, *value)).unzip();
    ids.resize(LOAD_ENTRIES, unused);
    values.resize(LOAD_ENTRIES, 0);
    (ids, values)
}
