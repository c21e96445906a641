//! Messages between the host and a speculative plugin, and the plugin's view of a step.

use std::{collections::BTreeMap, marker::PhantomData, mem::offset_of};

use serde::{Deserialize, Serialize};

use crate::table::{ProposeInput, ProposeOutput};

/// Opens a speculator for one engine.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SpeculativeOptions {
    /// Size of the vocabulary; proposed tokens are below it.
    pub vocab: u64,
    /// Longest sequence, prompt and output together.
    pub context_length: u64,
    /// Sequences that run at once at most.
    pub max_sequences: u64,
    /// Tokens that the engine can verify for one sequence in a step, beside the one it computes anyway.
    pub max_draft_tokens: u64,
    /// The algorithm's own options, as the command line names them: `ngram_max`.
    #[serde(default)]
    pub parameters: BTreeMap<String, serde_json::Value>,
}

/// What a speculator asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SpeculativeDescription {
    /// Most tokens it proposes for one sequence in a step, at most [`SpeculativeOptions::max_draft_tokens`].
    pub draft_tokens: u64,
}

/// The sequences of one step and room for what is proposed for them.
pub struct ProposeBatch<'a> {
    input: &'a ProposeInput,
    output: &'a mut ProposeOutput,
}

/// A running sequence.
#[derive(Clone, Copy, Debug)]
pub struct Sequence<'a> {
    /// Stays the same as long as the sequence runs.
    pub id: u64,
    /// All tokens so far, prompt and output; at least one. They only grow from step to step.
    pub tokens: &'a [u32],
}

/// The tokens proposed for one sequence, each following the one before; the first follows the sequence's last.
pub struct Draft<'a> {
    tokens: &'a mut [u32],
    count: &'a mut u32,
}

impl Draft<'_> {
    /// Tokens that can still be proposed.
    pub fn room(&self) -> usize {
        self.tokens.len() - *self.count as usize
    }

    /// Appends a token. False, and nothing happens, if there is no more room.
    pub fn push(&mut self, token: u32) -> bool {
        let Some(place) = self.tokens.get_mut(*self.count as usize) else { return false };
        *place = token;
        *self.count += 1;
        true
    }

    /// Appends tokens as far as there is room.
    pub fn extend(&mut self, tokens: &[u32]) {
        tokens.iter().all(|token| self.push(*token));
    }
}

impl<'a> ProposeBatch<'a> {
    /// Sets all counts to 0. `None` if either struct is shorter than this version's, which no host makes.
    ///
    /// # Safety
    /// Both point to live structs headed by their sizes; their pointers are valid for the arrays that the fields'
    /// docs say, for `'a`, and nothing else writes to those of `output`. Each sequence has at least one token.
    pub unsafe fn new(input: *const ProposeInput, output: *mut ProposeOutput) -> Option<Self> {
        // SAFETY: both begin with their size (caller's promise).
        let sizes = unsafe { (input.cast::<usize>().read(), output.cast::<usize>().read()) };
        let input_bytes = offset_of!(ProposeInput, limits) + size_of::<*const u32>();
        let output_bytes = offset_of!(ProposeOutput, counts) + size_of::<*mut u32>();
        if sizes.0 < input_bytes || sizes.1 < output_bytes {
            return None;
        }
        // SAFETY: both are at least as long as this version's structs, and live (caller's promise).
        let batch = unsafe { Self { input: &*input, output: &mut *output } };
        for row in 0..batch.input.rows {
            // SAFETY: `counts` has an element for each row.
            unsafe { batch.output.counts.add(row).write(0) };
        }
        Some(batch)
    }

    /// Each sequence with its still empty draft.
    pub fn rows(&mut self) -> Rows<'_> {
        Rows {
            input: self.input,
            stride: self.output.stride,
            tokens: self.output.tokens,
            counts: self.output.counts,
            next: 0,
            _batch: PhantomData,
        }
    }
}

/// Iterates over the rows of a [`ProposeBatch`].
pub struct Rows<'b> {
    input: &'b ProposeInput,
    stride: usize,
    tokens: *mut u32,
    counts: *mut u32,
    next: usize,
    _batch: PhantomData<&'b mut ()>,
}

impl<'b> Iterator for Rows<'b> {
    type Item = (Sequence<'b>, Draft<'b>);

    fn next(&mut self) -> Option<Self::Item> {
        let (row, input) = (self.next, self.input);
        if row >= input.rows {
            return None;
        }
        self.next += 1;
        // SAFETY: the arrays have an element for each row (promised to `ProposeBatch::new`); rows do not overlap in the
        // output, and each is handed out once while the batch is borrowed.
        unsafe {
            let tokens = std::slice::from_raw_parts(*input.tokens.add(row), *input.lengths.add(row));
            let room = (*input.limits.add(row) as usize).min(self.stride);
            let draft = std::slice::from_raw_parts_mut(self.tokens.add(row * self.stride), room);
            let count = &mut *self.counts.add(row);
            *count = 0;
            Some((Sequence { id: *input.ids.add(row), tokens }, Draft { tokens: draft, count }))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_seen_and_written_within_their_limits() {
        let sequences = [vec![1u32, 2, 3], vec![9]];
        let (ids, lengths, limits) = ([7u64, 8], [3usize, 1], [2u32, 5]);
        let pointers = sequences.each_ref().map(|tokens| tokens.as_ptr());
        let input = ProposeInput {
            struct_size: size_of::<ProposeInput>(),
            rows: 2,
            ids: ids.as_ptr(),
            tokens: pointers.as_ptr(),
            lengths: lengths.as_ptr(),
            limits: limits.as_ptr(),
        };
        let (mut tokens, mut counts) = ([0u32; 8], [99u32; 2]);
        let mut output = ProposeOutput {
            struct_size: size_of::<ProposeOutput>(),
            stride: 4,
            tokens: tokens.as_mut_ptr(),
            counts: counts.as_mut_ptr(),
        };
        // SAFETY: all arrays live to the end of the test and are as long as `rows` and `stride` say.
        let mut batch = unsafe { ProposeBatch::new(&input, &mut output) }.unwrap();
        for (sequence, mut draft) in batch.rows() {
            assert_eq!(draft.room(), if sequence.id == 7 { 2 } else { 4 });
            let last = sequence.tokens[sequence.tokens.len() - 1];
            draft.extend(&[last + 1, last + 2, last + 3]);
        }
        assert_eq!((counts, &tokens[..7]), ([2, 3], &[4, 5, 0, 0, 10, 11, 12][..]));
    }

    #[test]
    fn structs_of_an_impossible_older_version_are_refused() {
        let input = ProposeInput {
            struct_size: 8,
            rows: 0,
            ids: std::ptr::null(),
            tokens: std::ptr::null(),
            lengths: std::ptr::null(),
            limits: std::ptr::null(),
        };
        let mut output = ProposeOutput {
            struct_size: size_of::<ProposeOutput>(),
            stride: 0,
            tokens: std::ptr::null_mut(),
            counts: std::ptr::null_mut(),
        };
        // SAFETY: both structs are live; with no rows no array is read.
        assert!(unsafe { ProposeBatch::new(&input, &mut output) }.is_none());
    }
}
