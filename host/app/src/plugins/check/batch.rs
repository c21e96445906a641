//! A small ragged batch in two steps, as an engine would compute it: prompts of different lengths, then decoding, the
//! rest of a chunked prompt and a new prompt together.

use std::collections::BTreeMap;

use torus_abi::step::{StepInput, StepShape};

/// Tokens `start..start + len` of one request, computed in one step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Chunk {
    pub request: usize,
    pub start: usize,
    pub len: usize,
}

/// What is computed in each of the steps. The first request crosses from one page to the next.
pub const STEPS: [&[Chunk]; 2] = [
    &[Chunk { request: 0, start: 0, len: 15 }, Chunk { request: 1, start: 0, len: 4 }],
    &[
        Chunk { request: 0, start: 15, len: 3 },
        Chunk { request: 1, start: 4, len: 1 },
        Chunk { request: 2, start: 0, len: 9 },
    ],
];

/// Pages of each request, in the order of their tokens. Page 0 belongs to none.
const PAGES: [&[i32]; 3] = [&[3, 1], &[5], &[2]];

pub const SHAPE: StepShape = StepShape { tokens: 32, seqs: 4, page_size: 16, pages: 8, page_table: 16 };

/// What the host tells about a step.
pub fn inputs(chunks: &[Chunk]) -> BTreeMap<StepInput, Vec<i32>> {
    let mut positions = Vec::new();
    let mut token_seq = Vec::new();
    let mut kv_slot = Vec::new();
    let mut cu_q_lens = vec![0];
    let mut kv_lens = Vec::new();
    let mut page_begin = Vec::new();
    for (sequence, chunk) in chunks.iter().enumerate() {
        for position in chunk.start..chunk.start + chunk.len {
            let page_size = SHAPE.page_size as usize;
            positions.push(position as i32);
            token_seq.push(sequence as i32);
            let page = PAGES[chunk.request][position / page_size];
            kv_slot.push(page * page_size as i32 + (position % page_size) as i32);
        }
        cu_q_lens.push(positions.len() as i32);
        kv_lens.push((chunk.start + chunk.len) as i32);
        page_begin.push(PAGES[..chunk.request].iter().map(|pages| pages.len() as i32).sum());
    }
    let (tokens, seqs) = (SHAPE.tokens as usize, SHAPE.seqs as usize);
    let padded = |mut list: Vec<i32>, len: usize, value: i32| {
        list.resize(len, value);
        list
    };
    let total = positions.len() as i32;
    BTreeMap::from([
        (StepInput::TokenSrc, vec![0; tokens]),
        (StepInput::Positions, padded(positions, tokens, 0)),
        (StepInput::TokenSeq, padded(token_seq, tokens, 0)),
        (StepInput::KvSlot, padded(kv_slot, tokens, 0)),
        (StepInput::CuQLens, padded(cu_q_lens, seqs + 1, total)),
        (StepInput::KvLens, padded(kv_lens, seqs, 0)),
        (StepInput::PageBegin, padded(page_begin, seqs, 0)),
        (StepInput::NumSeqs, vec![chunks.len() as i32]),
        (StepInput::PageTable, padded(PAGES.concat(), SHAPE.page_table as usize, 0)),
    ])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_second_step_continues_the_first() {
        let inputs = inputs(STEPS[1]);
        assert_eq!(inputs[&StepInput::CuQLens], [0, 3, 4, 13, 13]);
        assert_eq!(inputs[&StepInput::KvLens], [18, 5, 9, 0]);
        assert_eq!(inputs[&StepInput::PageBegin], [0, 2, 3, 0]);
        assert_eq!(inputs[&StepInput::KvSlot][..5], [3 * 16 + 15, 16, 17, 5 * 16 + 4, 2 * 16]);
        assert_eq!(inputs[&StepInput::Positions][..5], [15, 16, 17, 4, 0]);
    }

    #[test]
    fn every_input_has_its_size() {
        for step in STEPS {
            for (input, values) in inputs(step) {
                assert_eq!(input.tensor_type(&SHAPE).elements(), Some(values.len() as u64), "{input:?}");
            }
        }
    }
}
