//! An algorithm of this process, called as a host calls one.

use torus_abi::{
    author::Speculative,
    speculative::{ProposeBatch, Sequence, SpeculativeOptions},
    table::{ProposeInput, ProposeOutput},
};

use super::Proposer;

struct InProcess<S> {
    speculator: S,
    draft_tokens: u64,
}

pub(crate) fn open<S: Speculative>(options: &SpeculativeOptions) -> Result<Box<dyn Proposer>, String> {
    let speculator = S::open(options).map_err(|fault| fault.to_string())?;
    let draft_tokens = speculator.describe().draft_tokens;
    Ok(Box::new(InProcess { speculator, draft_tokens }))
}

impl<S: Speculative> Proposer for InProcess<S> {
    fn draft_tokens(&self) -> u64 {
        self.draft_tokens
    }

    fn propose(&mut self, sequences: &[(Sequence<'_>, u32)]) -> Result<Vec<Vec<u32>>, String> {
        let stride = self.draft_tokens as usize;
        let rows = || sequences.iter().map(|(sequence, _)| sequence);
        let ids: Vec<_> = rows().map(|sequence| sequence.id).collect();
        let tokens: Vec<_> = rows().map(|sequence| sequence.tokens.as_ptr()).collect();
        let lengths: Vec<_> = rows().map(|sequence| sequence.tokens.len()).collect();
        let limits: Vec<_> = sequences.iter().map(|(_, limit)| (*limit).min(stride as u32)).collect();
        let input = ProposeInput {
            struct_size: size_of::<ProposeInput>(),
            rows: sequences.len(),
            ids: ids.as_ptr(),
            tokens: tokens.as_ptr(),
            lengths: lengths.as_ptr(),
            limits: limits.as_ptr(),
        };
        let mut drafts = vec![0; sequences.len() * stride];
        let mut counts = vec![0; sequences.len()];
        let mut output = ProposeOutput {
            struct_size: size_of::<ProposeOutput>(),
            stride,
            tokens: drafts.as_mut_ptr(),
            counts: counts.as_mut_ptr(),
        };
        // SAFETY: all arrays are as long as `rows` and `stride` say and outlive the batch; no sequence is empty.
        let batch = unsafe { ProposeBatch::new(&input, &mut output) };
        self.speculator.propose(&mut batch.ok_or("the batch is malformed")?).map_err(|fault| fault.to_string())?;
        Ok(counts.iter().enumerate().map(|(row, count)| drafts[row * stride..][..*count as usize].to_vec()).collect())
    }

    fn forget(&mut self, id: u64) {
        self.speculator.forget(id);
    }
}
