//! The kernels timed beside what bounds them, in turns, for the memory of a machine with neighbours is fast now and slow
//! then: a plain sum over the same bytes, and the instruction that multiplies, alone in registers.

use std::{
    hint::black_box,
    sync::atomic::{AtomicU64, Ordering},
    time::{Duration, Instant},
};

use half::bf16;
use torus_abi::kernel::{parallel_for, threads};

use crate::{
    Epilogue, Level, PackError,
    attention::{Inputs, Params, PoolShape, Rows, Step, attention},
    level, linear,
    packed::{Format, Layout, PackedMatrix, RowSource, Segment, SourceType, pack},
    workspace::Buffer,
};

mod layers;
mod memory;
mod peak;

pub use layers::{Sizes, whole_layers};
pub use memory::Memory;
pub use peak::{Arithmetic, peak};

/// How long a kernel took, and how long what bounds it.
#[derive(Clone, Copy, Debug)]
pub struct Timing {
    /// Seconds, in the middle of the rounds.
    pub median: f64,
    /// Seconds of the best round.
    pub best: f64,
    /// Seconds of a plain sum over the bytes that the kernel reads, in the middle of the rounds.
    pub sum: f64,
    /// Seconds of its operations at the best rate of the instruction; 0 where that rate is not known.
    pub arithmetic: f64,
    pub bytes: usize,
    pub operations: f64,
}

impl Timing {
    /// Seconds that it must take: those of the slower bound.
    pub fn limit(&self) -> f64 {
        self.sum.max(self.arithmetic)
    }

    /// Whether memory bounds it, else arithmetic.
    pub fn is_bound_by_memory(&self) -> bool {
        self.sum >= self.arithmetic
    }

    /// Times `run` beside a sum over `bytes` of it, in turns.
    fn of<T>(
        rounds: usize,
        operations: f64,
        arithmetic: Arithmetic,
        state: &mut T,
        mut run: impl FnMut(&mut T),
        bytes: impl Fn(&T) -> &[u8],
    ) -> Self {
        let [mut times, mut sums] = [const { Vec::<Duration>::new() }; 2];
        let mut rate = 0.0f64;
        run(state);
        for _ in 0..rounds.max(1) {
            times.push(time(|| run(state)));
            sums.push(time(|| _ = black_box(sum(bytes(state)))));
            rate = rate.max(peak(arithmetic).unwrap_or(0.0));
        }
        times.sort_unstable();
        sums.sort_unstable();
        Self {
            median: times[times.len() / 2].as_secs_f64(),
            best: times[0].as_secs_f64(),
            sum: sums[sums.len() / 2].as_secs_f64(),
            arithmetic: if rate > 0.0 { operations / rate } else { 0.0 },
            bytes: bytes(state).len(),
            operations,
        }
    }
}

fn time(body: impl FnOnce()) -> Duration {
    let start = Instant::now();
    body();
    start.elapsed()
}

/// All threads add up the words of their parts.
pub fn sum(bytes: &[u8]) -> u64 {
    let (words, _) = bytes.as_chunks::<256>();
    let (parts, total) = (threads(), AtomicU64::new(0));
    parallel_for(parts, |part| {
        let own = &words[words.len() * part / parts..words.len() * (part + 1) / parts];
        total.fetch_add(memory::sum(own), Ordering::Relaxed);
    });
    total.into_inner()
}

/// Products of `rows` rows with matrices `(columns, rows)`, one after the other.
///
/// # Errors
/// If a matrix cannot be packed in this format.
pub fn linear_layers(
    format: Format,
    shapes: &[(usize, usize)],
    rows: usize,
    rounds: usize,
) -> Result<Timing, PackError> {
    let layout = |&(columns, rows): &(usize, usize)| Layout::new(columns, vec![Segment { format, rows }]);
    let layouts: Vec<Layout> = shapes.iter().map(layout).collect::<Result<_, _>>()?;
    let mut memory = Memory::zeroed(layouts.iter().map(Layout::bytes).sum());
    let (mut starts, mut at) = (Vec::new(), 0);
    for layout in &layouts {
        let end = at + layout.bytes();
        pack(layout, &Noise::new(format, layout.columns()), &mut memory[at..end])?;
        starts.push(std::mem::replace(&mut at, end));
    }
    let widest = |side: fn(&(usize, usize)) -> usize| shapes.iter().map(side).max().unwrap_or(0);
    let x = vec![bf16::from_f32(0.25); rows * widest(|shape| shape.0)];
    let mut y = vec![bf16::ZERO; rows * widest(|shape| shape.1)];
    let operations: f64 = shapes.iter().map(|(columns, outputs)| 2.0 * (rows * columns * outputs) as f64).sum();
    let memory = &memory[..];
    let parse = |start: &usize| PackedMatrix::parse(&memory[*start..]);
    let mut matrices: Vec<_> = starts.iter().map(parse).collect::<Result<_, _>>()?;
    let run = |matrices: &mut Vec<PackedMatrix<'_>>| {
        for w in matrices {
            linear(&x[..rows * w.columns()], w, Epilogue::NONE, &mut y[..rows * w.rows()]);
        }
    };
    Ok(Timing::of(rounds, operations, Arithmetic::of(format, rows), &mut matrices, run, |_| memory))
}

/// Rows of blocks or floats from a small generator.
struct Noise {
    source: SourceType,
    bytes: Vec<u8>,
    row: usize,
}

impl Noise {
    /// Rows that there are; then they come again.
    const ROWS: usize = 64;

    fn new(format: Format, columns: usize) -> Self {
        let source = match format {
            Format::Q8 => SourceType::Q8_0,
            Format::Q4 => SourceType::Q4_0,
            Format::Q4Min => SourceType::Q4_1,
            Format::Q5 => SourceType::Q5_0,
            Format::Q5Min => SourceType::Q5_1,
            Format::Q6 => SourceType::Q6K,
            _ => SourceType::F32,
        };
        let row = source.row_bytes(columns).unwrap_or(0);
        // Bytes whose pairs are small numbers of f16, and fours of f32.
        let bytes = (0..row * Self::ROWS).map(|i| if i % 2 == 1 { 0x20 } else { (i * 37 % 251) as u8 }).collect();
        Self { source, bytes, row }
    }
}

impl RowSource for Noise {
    fn source(&self, _segment: usize) -> SourceType {
        self.source
    }

    fn row(&self, _segment: usize, row: usize) -> &[u8] {
        &self.bytes[row % Self::ROWS * self.row..][..self.row]
    }
}

/// Sequences of the same length that attend together, and others beside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AttentionCase {
    pub sequences: usize,
    /// Tokens of each that are the step's.
    pub new: usize,
    /// Tokens of each, with those.
    pub len: usize,
    /// How many sequences of how many tokens decode one beside, before them.
    pub beside: (usize, usize),
}

impl AttentionCase {
    /// New tokens and tokens of each sequence.
    fn sequences(self) -> impl Iterator<Item = (usize, usize)> {
        let beside = std::iter::repeat_n((1, self.beside.1), self.beside.0);
        beside.chain(std::iter::repeat_n((self.new, self.len), self.sequences))
    }

    /// Pages that hold something.
    fn pages(self, page_size: usize) -> usize {
        self.sequences().map(|(_, len)| len.div_ceil(page_size)).sum()
    }

    /// Operations of attention: each new token sees those before it and itself.
    fn operations(self, params: &Params, layers: usize) -> f64 {
        let pairs: usize = self.sequences().flat_map(|(new, len)| (0..new).map(move |token| len - token)).sum();
        (layers * pairs * 4 * params.q_heads * params.head_dim) as f64
    }
}

/// Attention of a case in so many layers, over bf16 pages that lie scattered.
///
/// # Errors
/// If the sizes are not served.
pub fn attention_layers(params: &Params, layers: usize, case: AttentionCase, rounds: usize) -> Result<Timing, String> {
    params.supports()?;
    let world = World::new(params, case);
    let page = PoolShape::new(params).page_elements();
    let layer = world.pages * page;
    let mut memory = Memory::zeroed(layers * layer * size_of::<bf16>());
    let tokens = world.kv_slot.len();
    let width = (params.q_heads + 2 * params.kv_heads) * params.head_dim;
    let rows: Vec<f32> = (0..tokens * width).map(|index| (index * 37 % 101) as f32 / 50.0 - 1.0).collect();
    let part = |from: usize| Rows { data: &rows[from * params.head_dim..], stride: width };
    let inputs = Inputs { q: part(0), k: part(params.q_heads), v: part(params.q_heads + params.kv_heads) };
    let mut out = Buffer::<f32>::take(tokens * params.q_heads * params.head_dim);
    let operations = case.operations(params, layers);
    let read = layers * case.pages(params.page_size) * page * size_of::<bf16>();
    let mut outcome = Ok(());
    let run = |memory: &mut Memory| {
        for pool in memory.elements_mut::<bf16>().chunks_exact_mut(layer) {
            let done = attention(params, &world.step(), &inputs, pool, &mut [], &mut out);
            outcome = std::mem::replace(&mut outcome, Ok(())).and(done);
        }
    };
    let timing = Timing::of(rounds, operations, Arithmetic::Bf16, &mut memory, run, |memory| &memory[..read]);
    outcome.map(|()| timing)
}

/// A step's metadata.
struct World {
    kv_slot: Vec<i32>,
    cu_q_lens: Vec<i32>,
    kv_lens: Vec<i32>,
    page_begin: Vec<i32>,
    page_table: Vec<i32>,
    pages: usize,
}

impl World {
    fn new(params: &Params, case: AttentionCase) -> Self {
        let sequences: Vec<_> = case.sequences().collect();
        let each = case.len.max(case.beside.1).div_ceil(params.page_size);
        let pages = (sequences.len() * each).next_power_of_two();
        // An odd factor visits every page once.
        let page_table: Vec<i32> = (0..sequences.len() * each).map(|index| (index * 5 % pages) as i32).collect();
        let slot = |sequence: usize, position: usize| {
            let page = page_table[sequence * each + position / params.page_size];
            page * params.page_size as i32 + (position % params.page_size) as i32
        };
        let tokens_of = |(index, (new, len)): (usize, &(usize, usize))| (len - new..*len).map(move |at| (index, at));
        let mut cu_q_lens = vec![0];
        cu_q_lens.extend(sequences.iter().scan(0, |total, (new, _)| {
            *total += *new as i32;
            Some(*total)
        }));
        Self {
            kv_slot: sequences
                .iter()
                .enumerate()
                .flat_map(tokens_of)
                .map(|(sequence, at)| slot(sequence, at))
                .collect(),
            cu_q_lens,
            kv_lens: sequences.iter().map(|(_, len)| *len as i32).collect(),
            page_begin: (0..sequences.len()).map(|sequence| (sequence * each) as i32).collect(),
            page_table,
            pages,
        }
    }

    fn step(&self) -> Step<'_> {
        Step {
            kv_slot: &self.kv_slot,
            cu_q_lens: &self.cu_q_lens,
            kv_lens: &self.kv_lens,
            page_begin: &self.page_begin,
            page_table: &self.page_table,
            num_seqs: self.kv_lens.len(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_case_is_timed_with_its_bounds() {
        for format in [Format::Bf16, Format::Q8, Format::Q4Min] {
            let timing = linear_layers(format, &[(64, 96), (96, 32)], 3, 2).unwrap();
            assert!(timing.best > 0.0 && timing.median >= timing.best && timing.limit() > 0.0, "{format:?}");
            assert_eq!(timing.operations, 3.0 * 2.0 * (64 * 96 + 96 * 32) as f64);
        }
        let params =
            Params { q_heads: 4, kv_heads: 2, head_dim: 32, page_size: 16, scale: 0.2, window: None, soft_cap: None };
        let case = AttentionCase { sequences: 3, new: 2, len: 40, beside: (0, 0) };
        let timing = attention_layers(&params, 2, case, 1).unwrap();
        // Three pages of each sequence, in both layers, of two heads with keys and values.
        assert_eq!(timing.bytes, 2 * 3 * 3 * 2 * 2 * 16 * 32 * 2);
        assert_eq!(timing.operations, (2 * 3 * (40 + 39) * 4 * 4 * 32) as f64);
        let beside = attention_layers(&params, 2, AttentionCase { beside: (4, 50), ..case }, 1).unwrap();
        assert_eq!(beside.bytes, timing.bytes + 2 * 4 * 4 * 2 * 2 * 16 * 32 * 2);
        assert_eq!(beside.operations, timing.operations + (2 * 4 * 50 * 4 * 4 * 32) as f64);
        let sizes = Sizes { hidden: 64, intermediate: 96, layers: 2 };
        let params = Params { q_heads: 2, kv_heads: 1, ..params };
        let timing = whole_layers(Format::Q8, &params, sizes, case, 1).unwrap();
        let products = 64 * (4 * 32) + 64 * 64 + 3 * 64 * 96;
        assert_eq!(timing.operations, (2 * 6 * (2 * products) + 2 * 3 * (40 + 39) * 4 * 2 * 32) as f64);
        assert!(timing.bytes > 2 * products && timing.best > 0.0);
        let odd = Params { head_dim: 24, ..params };
        assert!(attention_layers(&odd, 1, case, 1).is_err());
    }
}
