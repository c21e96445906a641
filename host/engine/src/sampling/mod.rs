//! Sampling as a part of the step program: from logits to tokens and logprobs, on the device.
//!
//! The steps, for each row: penalties, bias, allowed tokens; for greedy rows the largest logit; else temperature, then
//! top-k, top-p over what is left, min-p, and one draw by the Gumbel-max method with numbers from [`random`]. What no
//! row of the batch needs is skipped by conditionals on flags of the step buffer.
//!
//! top-k and top-p find their threshold by bisection over the bits of the logits instead of sorting the vocabulary:
//! 32 passes over the row, exact, ties included.
//!
//! Where devices share the vocabulary ([`Vocabulary`]), each works on its part of the logits, which are never put together:
//! they exchange a maximum, a sum or the best candidates of each row.
//!
//! On a CPU one native kernel does the same ([`sample_natively`]).

mod graph;
mod native;
mod random;
#[cfg(test)]
mod tests;
mod threshold;
mod vocab;

pub(crate) use graph::{RowParameters, Sampled, SamplingInputs, sample};
pub(crate) use native::sample_natively;
pub(crate) use vocab::Vocabulary;

/// The count word of a token in a slot's row of `token_counts`: occurrences in the output below this bit, and this
/// bit if the token is in the prompt.
pub(crate) const IN_PROMPT: i32 = 1 << 24;
