//! The inputs of a step program: one closed, append-only list.
//!
//! The host packs all of them into one buffer and transfers it once a step. A plugin names the ones it wants
//! ([`crate::attention::AttentionAnswer::inputs`]) and receives them as tensors of the types given here.

use serde::{Deserialize, Serialize};

use crate::{DType, TensorType};

/// The static sizes of one step program. Every program of a bucket is emitted for one of these.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct StepShape {
    /// Padded number of tokens of all sequences together.
    pub tokens: u64,
    /// Rows of the sequence arrays: the smaller of `tokens` and the most requests that may run at once.
    pub seqs: u64,
    /// Tokens in a page of KV.
    pub page_size: u64,
    /// Pages in the pool of each layer, the trash page 0 included.
    pub pages: u64,
    /// Entries of the page table that stays on the device.
    pub page_table: u64,
}

/// What a step program is given about its tokens and sequences. All are `i32`.
///
/// Padding: tokens past the last real one have position 0, belong to sequence 0 and write their K/V to page 0, which
/// no sequence owns. Sequences past the last real one have no tokens and a KV length of 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StepInput {
    /// `[tokens]`: a token id, or `-k-1` for the token last sampled in slot `k`, which is still on the device.
    TokenSrc,
    /// `[tokens]`: position of each token in its sequence.
    Positions,
    /// `[seqs + 1]`: offset of each sequence's first token; entries past the last sequence repeat the total.
    CuQLens,
    /// `[seqs]`: tokens of each sequence in the cache once this step has written its own.
    KvLens,
    /// `[page_table]`: page numbers; the pages of one sequence are consecutive.
    PageTable,
    /// `[seqs]`: where in `page_table` each sequence's pages begin.
    PageBegin,
    /// `[]`: number of real sequences.
    NumSeqs,
    /// `[tokens]`: the sequence each token belongs to.
    TokenSeq,
    /// `[tokens]`: the slot, page times page size plus offset, where the token's K/V is written.
    KvSlot,
}

impl StepInput {
    /// The type of this input in a program of the given shape.
    pub fn tensor_type(self, shape: &StepShape) -> TensorType {
        let dims = match self {
            StepInput::TokenSrc | StepInput::Positions | StepInput::TokenSeq | StepInput::KvSlot => vec![shape.tokens],
            StepInput::CuQLens => vec![shape.seqs + 1],
            StepInput::KvLens | StepInput::PageBegin => vec![shape.seqs],
            StepInput::PageTable => vec![shape.page_table],
            StepInput::NumSeqs => vec![],
        };
        TensorType::new(DType::I32, dims)
    }
}
