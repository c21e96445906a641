//! Steps over ragged batches, told as a host tells them.

use std::collections::BTreeMap;

use rand::{SeedableRng, seq::SliceRandom};
use rand_chacha::ChaCha8Rng;
use torus_abi::step::{StepInput, StepShape};

use crate::{Tensor, numbers::integers};

/// Tokens `start..start + len` of one sequence, computed in one step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Chunk {
    pub sequence: usize,
    pub start: usize,
    pub len: usize,
}

/// A sequence over all steps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sequence {
    pub tokens: usize,
    /// Another sequence, and how many of its first pages are this one's too: their first tokens are the same, and this
    /// sequence begins after them.
    pub shares: Option<(usize, usize)>,
}

/// Sequences, their pages, and what is computed of them in each step.
#[derive(Clone, Debug)]
pub struct Schedule {
    pub page_size: usize,
    pub sequences: Vec<Sequence>,
    pub steps: Vec<Vec<Chunk>>,
}

impl Schedule {
    /// One sequence after the other with so many tokens in each of its steps; a 0 leaves a step out. All but the last
    /// sequences may end early.
    pub fn new(page_size: usize, plan: &[&[usize]]) -> Self {
        let mut schedule = Self { page_size, sequences: Vec::new(), steps: Vec::new() };
        for tokens in plan {
            schedule.push(None, tokens);
        }
        schedule
    }

    /// A sequence that computes `tokens[i]` tokens in step `i`, after the `shares.1` pages of sequence `shares.0`.
    pub fn push(&mut self, shares: Option<(usize, usize)>, tokens: &[usize]) {
        let sequence = self.sequences.len();
        let mut start = shares.map_or(0, |(_, pages)| pages * self.page_size);
        self.steps.resize(self.steps.len().max(tokens.len()), Vec::new());
        for (step, len) in self.steps.iter_mut().zip(tokens).filter(|(_, len)| **len > 0) {
            step.push(Chunk { sequence, start, len: *len });
            start += len;
        }
        self.sequences.push(Sequence { tokens: start, shares });
    }

    /// A shape that every step fits into, with padding tokens, a padding sequence and pages that nobody owns.
    pub fn shape(&self) -> StepShape {
        let tokens = self.steps.iter().map(|step| step.iter().map(|chunk| chunk.len).sum::<usize>()).max().unwrap_or(0);
        let seqs = self.steps.iter().map(Vec::len).max().unwrap_or(0);
        let entries: usize = self.sequences.iter().map(|sequence| sequence.tokens.div_ceil(self.page_size)).sum();
        let tokens = (tokens + 1).next_multiple_of(8);
        StepShape {
            tokens: tokens as u64,
            seqs: (seqs + 1).next_power_of_two().min(tokens) as u64,
            page_size: self.page_size as u64,
            pages: (entries + 3).next_multiple_of(8) as u64,
            page_table: (entries + 1).next_multiple_of(8) as u64,
        }
    }

    /// The pages of each sequence, in an order drawn from `seed`. Page 0 belongs to none.
    pub fn tables(&self, shape: &StepShape, seed: u64) -> Vec<Vec<i32>> {
        let mut free: Vec<i32> = (1..shape.pages as i32).collect();
        free.shuffle(&mut ChaCha8Rng::seed_from_u64(seed));
        let mut tables: Vec<Vec<i32>> = Vec::new();
        for sequence in &self.sequences {
            let mut pages = sequence.shares.map_or(vec![], |(other, pages)| tables[other][..pages].to_vec());
            let missing = sequence.tokens.div_ceil(self.page_size) - pages.len();
            pages.extend(free.split_off(free.len().saturating_sub(missing)));
            tables.push(pages);
        }
        tables
    }
}

/// What the host tells about a step. Page tables lie one after the other in the order of the sequences.
pub fn inputs(shape: &StepShape, tables: &[Vec<i32>], chunks: &[Chunk]) -> BTreeMap<StepInput, Tensor> {
    let (mut positions, mut token_seq, mut kv_slot) = (Vec::new(), Vec::new(), Vec::new());
    let (mut cu_q_lens, mut kv_lens, mut page_begin) = (vec![0], Vec::new(), Vec::new());
    let page_size = shape.page_size as usize;
    for (row, chunk) in chunks.iter().enumerate() {
        for position in chunk.start..chunk.start + chunk.len {
            positions.push(position as i32);
            token_seq.push(row as i32);
            let page = tables[chunk.sequence][position / page_size] as usize;
            kv_slot.push((page * page_size + position % page_size) as i32);
        }
        cu_q_lens.push(positions.len() as i32);
        kv_lens.push((chunk.start + chunk.len) as i32);
        page_begin.push(tables[..chunk.sequence].iter().map(|pages| pages.len() as i32).sum());
    }
    let total = positions.len() as i32;
    let lists = [
        (StepInput::TokenSrc, vec![], 0),
        (StepInput::Positions, positions, 0),
        (StepInput::TokenSeq, token_seq, 0),
        (StepInput::KvSlot, kv_slot, 0),
        (StepInput::CuQLens, cu_q_lens, total),
        (StepInput::KvLens, kv_lens, 0),
        (StepInput::PageBegin, page_begin, 0),
        (StepInput::NumSeqs, vec![chunks.len() as i32], 0),
        (StepInput::PageTable, tables.concat(), 0),
    ];
    let tensor = |(input, mut values, padding): (StepInput, Vec<i32>, i32)| {
        let ty = input.tensor_type(shape);
        values.resize(ty.elements().unwrap_or(0) as usize, padding);
        (input, integers(ty, &values))
    };
    lists.map(tensor).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values(tensor: &Tensor) -> Vec<i32> {
        tensor.bytes.as_chunks::<4>().0.iter().map(|bytes| i32::from_le_bytes(*bytes)).collect()
    }

    #[test]
    fn steps_are_told_as_the_docs_of_the_inputs_say() {
        let mut schedule = Schedule::new(4, &[&[6, 3], &[2, 1]]);
        schedule.push(Some((0, 1)), &[0, 3]);
        assert_eq!(schedule.steps[1][2], Chunk { sequence: 2, start: 4, len: 3 });
        let shape = schedule.shape();
        assert_eq!((shape.tokens, shape.seqs, shape.pages, shape.page_table), (16, 4, 16, 8));
        let tables = vec![vec![5, 3, 9], vec![4], vec![5, 7]];
        let inputs = inputs(&shape, &tables, &schedule.steps[1]);
        let of = |input| values(&inputs[&input]);
        assert_eq!(of(StepInput::Positions), [6, 7, 8, 2, 4, 5, 6, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(of(StepInput::TokenSeq)[..8], [0, 0, 0, 1, 2, 2, 2, 0]);
        assert_eq!(of(StepInput::KvSlot)[..8], [14, 15, 36, 18, 28, 29, 30, 0]);
        assert_eq!(of(StepInput::CuQLens), [0, 3, 4, 7, 7]);
        assert_eq!(of(StepInput::KvLens), [9, 3, 7, 0]);
        assert_eq!(of(StepInput::PageBegin), [0, 3, 4, 0]);
        assert_eq!(of(StepInput::NumSeqs), [3]);
        assert_eq!(of(StepInput::PageTable), [5, 3, 9, 4, 5, 7, 0, 0]);
    }

    #[test]
    fn pages_are_shared_only_where_the_schedule_says() {
        let mut schedule = Schedule::new(4, &[&[9], &[1]]);
        schedule.push(Some((0, 2)), &[3]);
        let tables = schedule.tables(&schedule.shape(), 1);
        assert_eq!(tables[2][..2], tables[0][..2]);
        let mut pages = tables.concat();
        pages.sort_unstable();
        pages.dedup();
        assert_eq!(pages.len(), 3 + 1 + 1);
        assert!(pages[0] > 0);
    }
}
