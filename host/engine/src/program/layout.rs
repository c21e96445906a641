//! The packed step buffer: every input of a step that comes from the host, in one `i32` array and one transfer.
//!
//! [`StepLayout`] says where each field lies. The program slices the buffer by it and the host fills it by it, so the
//! two cannot disagree. Floats travel as their bits.

use std::ops::Range;

use torus_abi::step::StepShape;

/// The step's fields in the order they lie in the buffer. Attention metadata first, then bookkeeping, then sampling.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Field {
    /// `[tokens]`; see [`torus_abi::step::StepInput::TokenSrc`].
    TokenSrc,
    /// `[tokens]`
    Positions,
    /// `[tokens]`
    TokenSeq,
    /// `[tokens]`
    KvSlot,
    /// `[seqs + 1]`
    CuQLens,
    /// `[seqs]`
    KvLens,
    /// `[seqs]`
    PageBegin,
    /// `[]`
    NumSeqs,
    /// `[deltas]`: entries of the page table that this step adds; padding points at the last entry, which no sequence
    /// uses.
    DeltaIndex,
    /// `[deltas]`
    DeltaPage,
    /// `[rows]`: the token whose logits row `r` is.
    LogitRows,
    /// `[rows]`: the slot of the request that row `r` samples for; the trash slot if it samples nothing.
    Slots,
    /// `[]`: tokens that are no padding.
    NumTokens,
    /// `[]`: logit rows that are no padding.
    NumRows,
    /// `[]`: which optional parts run, a union of [`flag`]s.
    Flags,
    /// `[rows]`, f32 bits; 0 = greedy.
    Temperature,
    /// `[rows]`; the vocabulary size = all.
    TopK,
    /// `[rows]`, f32 bits.
    TopP,
    /// `[rows]`, f32 bits.
    MinP,
    /// `[rows]`, f32 bits.
    RepetitionPenalty,
    /// `[rows]`, f32 bits.
    FrequencyPenalty,
    /// `[rows]`, f32 bits.
    PresencePenalty,
    /// `[rows]`
    SeedLow,
    /// `[rows]`
    SeedHigh,
    /// `[rows]`: position in the sequence of the token that is sampled: the counter of its random numbers.
    SamplePosition,
    /// `[rows]`: the slot whose biases apply to row `r`; the trash slot, which has none, if none do.
    BiasSlots,
    /// `[rows]`: a token whose logprob is wanted instead of the sampled one's, or -1.
    Target,
}

/// Optional parts of a step. They are behind conditionals: a flag that is off costs nothing.
pub mod flag {
    /// Some row has a repetition, frequency or presence penalty.
    pub const PENALTIES: i32 = 1;
    /// Some row has biased tokens (`logit_bias`, `min_tokens`).
    pub const BIAS: i32 = 2;
    /// Some row may only choose from allowed tokens.
    pub const MASK: i32 = 4;
    /// Some row is not greedy.
    pub const SAMPLE: i32 = 8;
    /// Some row has a top-k below the vocabulary.
    pub const TOP_K: i32 = 16;
    /// Some row has a top-p below 1.
    pub const TOP_P: i32 = 32;
    /// Some row wants logprobs.
    pub const LOGPROBS: i32 = 64;
    /// Some row wants the likeliest alternatives.
    pub const TOP_LOGPROBS: i32 = 128;
}

/// Which program of a bucket: what its logit rows are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Rows {
    /// One for each sequence: the rows that sample.
    Sampled,
    /// One for each token: logprobs of prompt tokens.
    All,
}

const FIELDS: [Field; 27] = [
    Field::TokenSrc,
    Field::Positions,
    Field::TokenSeq,
    Field::KvSlot,
    Field::CuQLens,
    Field::KvLens,
    Field::PageBegin,
    Field::NumSeqs,
    Field::DeltaIndex,
    Field::DeltaPage,
    Field::LogitRows,
    Field::Slots,
    Field::NumTokens,
    Field::NumRows,
    Field::Flags,
    Field::Temperature,
    Field::TopK,
    Field::TopP,
    Field::MinP,
    Field::RepetitionPenalty,
    Field::FrequencyPenalty,
    Field::PresencePenalty,
    Field::SeedLow,
    Field::SeedHigh,
    Field::SamplePosition,
    Field::BiasSlots,
    Field::Target,
];

/// Where the fields of one program's step buffer lie.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StepLayout {
    pub shape: StepShape,
    /// Logit rows.
    pub rows: usize,
    /// Page-table entries a step can add.
    pub deltas: usize,
    starts: [usize; FIELDS.len()],
    len: usize,
}

impl StepLayout {
    pub fn new(shape: StepShape, rows: Rows) -> Self {
        let (tokens, seqs) = (shape.tokens as usize, shape.seqs as usize);
        let rows = match rows {
            Rows::Sampled => seqs,
            Rows::All => tokens,
        };
        // A sequence that computes n tokens takes at most ceil(n / page) new pages.
        let deltas = tokens / shape.page_size as usize + seqs;
        let mut layout = Self { shape, rows, deltas, starts: [0; FIELDS.len()], len: 0 };
        for (i, field) in FIELDS.into_iter().enumerate() {
            layout.starts[i] = layout.len;
            layout.len += layout.size(field);
        }
        layout
    }

    fn size(&self, field: Field) -> usize {
        match field {
            Field::TokenSrc | Field::Positions | Field::TokenSeq | Field::KvSlot => self.shape.tokens as usize,
            Field::CuQLens => self.shape.seqs as usize + 1,
            Field::KvLens | Field::PageBegin => self.shape.seqs as usize,
            Field::NumSeqs | Field::NumTokens | Field::NumRows | Field::Flags => 1,
            Field::DeltaIndex | Field::DeltaPage => self.deltas,
            _ => self.rows,
        }
    }

    /// Where a field lies, in `i32` words.
    pub fn range(&self, field: Field) -> Range<usize> {
        let start = self.starts[field as usize];
        start..start + self.size(field)
    }

    /// Words in the whole buffer.
    pub fn len(&self) -> usize {
        self.len
    }
}

/// The memory of step buffers.
#[derive(Debug, Default)]
pub struct StepBytes {
    words: Vec<i32>,
    bytes: Vec<u8>,
}

impl StepBytes {
    /// The bytes to transfer, of the buffer that was filled last.
    pub fn bytes(&mut self) -> &[u8] {
        self.bytes.resize(self.words.len() * size_of::<i32>(), 0);
        for (bytes, word) in self.bytes.as_chunks_mut().0.iter_mut().zip(&self.words) {
            *bytes = word.to_le_bytes();
        }
        &self.bytes
    }
}

/// A step buffer being filled. Starts as a step without tokens: all padding.
#[derive(Debug)]
pub struct StepBuffer<'a> {
    /// In the order of [`FIELDS`].
    fields: [&'a mut [i32]; FIELDS.len()],
}

impl<'a> StepBuffer<'a> {
    /// `trash_slot` is the slot that no request has.
    pub fn new(layout: &StepLayout, memory: &'a mut StepBytes, trash_slot: i32, vocab: i32) -> Self {
        memory.words.clear();
        memory.words.resize(layout.len(), 0);
        let mut rest = memory.words.as_mut_slice();
        let fields = FIELDS.map(|field| {
            let (words, after) = std::mem::take(&mut rest).split_at_mut(layout.size(field));
            rest = after;
            words
        });
        let mut buffer = Self { fields };
        let unused_entry = layout.shape.page_table as i32 - 1;
        buffer.field(Field::DeltaIndex).fill(unused_entry);
        buffer.field(Field::Slots).fill(trash_slot);
        buffer.field(Field::BiasSlots).fill(trash_slot);
        buffer.field(Field::TopK).fill(vocab);
        buffer.field(Field::TopP).fill(1f32.to_bits() as i32);
        buffer.field(Field::RepetitionPenalty).fill(1f32.to_bits() as i32);
        buffer.field(Field::Target).fill(-1);
        buffer
    }

    pub fn field(&mut self, field: Field) -> &mut [i32] {
        self.fields[field as usize]
    }

    pub fn set(&mut self, field: Field, index: usize, value: i32) {
        self.field(field)[index] = value;
    }

    pub fn set_f32(&mut self, field: Field, index: usize, value: f32) {
        self.set(field, index, value.to_bits() as i32);
    }

    pub fn raise(&mut self, flag: i32) {
        self.field(Field::Flags)[0] |= flag;
    }
}

/// Words of one row of a step's result: `i32 [rows, RESULT_WIDTH]`.
pub mod result {
    use crate::api::TOP_LOGPROBS_MAX;

    /// The sampled token.
    pub const TOKEN: usize = 0;
    /// f32 bits: logprob of the target if there is one, else of the sampled token.
    pub const LOGPROB: usize = 1;
    /// Not 0: the row's logits are not numbers.
    pub const BAD: usize = 2;
    /// The likeliest tokens.
    pub const TOP_TOKENS: usize = 3;
    /// f32 bits: their logprobs.
    pub const TOP_LOGPROBS: usize = TOP_TOKENS + TOP;
    pub const WIDTH: usize = TOP_LOGPROBS + TOP;
    pub const TOP: usize = TOP_LOGPROBS_MAX as usize;
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHAPE: StepShape = StepShape { tokens: 32, seqs: 8, page_size: 16, pages: 100, page_table: 65 };

    #[test]
    fn fields_are_listed_in_order_and_do_not_overlap() {
        for (i, field) in FIELDS.into_iter().enumerate() {
            assert_eq!(field as usize, i);
        }
        for rows in [Rows::Sampled, Rows::All] {
            let layout = StepLayout::new(SHAPE, rows);
            let mut end = 0;
            for field in FIELDS {
                assert_eq!(layout.range(field).start, end);
                end = layout.range(field).end;
            }
            assert_eq!(end, layout.len());
        }
    }

    #[test]
    fn an_empty_step_is_all_padding() {
        let layout = StepLayout::new(SHAPE, Rows::Sampled);
        let mut memory = StepBytes::default();
        // What another step left does not show.
        StepBuffer::new(&layout, &mut memory, 8, 1000).fields.iter_mut().for_each(|field| field.fill(77));
        let mut buffer = StepBuffer::new(&layout, &mut memory, 8, 1000);
        assert!(buffer.field(Field::Slots).iter().all(|slot| *slot == 8));
        assert!(buffer.field(Field::DeltaIndex).iter().all(|index| *index == 64));
        assert_eq!(buffer.field(Field::DeltaIndex).len(), 2 + 8);
        for field in FIELDS {
            buffer.field(field).fill(field as i32);
        }
        let bytes = memory.bytes();
        assert_eq!(bytes.len(), layout.len() * 4);
        for field in FIELDS {
            let words = &bytes.as_chunks().0[layout.range(field)];
            assert!(words.iter().all(|word| i32::from_le_bytes(*word) == field as i32));
        }
    }
}
