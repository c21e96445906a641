//! Prompt lookup: what followed the last tokens when they were seen before is likely to follow again. Summaries, code
//! edits and answers that quote repeat their prompt, and no second model is needed ("Prompt Lookup Decoding", Saxena,
//! 2023).
//!
//! Options: `ngram_max` (3) and `ngram_min` (1), how many of the last tokens must be found again; `lookback` (4096), how
//! many tokens are searched, so that a step of long sequences stays short.

#[cfg(test)]
mod tests;

use torus_plugin::{Fault, ProposeBatch, Speculative, SpeculativeDescription, SpeculativeOptions};

pub struct PromptLookup {
    ngram_min: usize,
    ngram_max: usize,
    lookback: usize,
    draft_tokens: u64,
}

torus_plugin::export_plugin! {
    name: "prompt_lookup",
    description: "Proposes what followed the last tokens before",
    speculative: PromptLookup,
}

impl Speculative for PromptLookup {
    fn open(options: &SpeculativeOptions) -> Result<Self, Fault> {
        let draft_tokens = options.max_draft_tokens;
        let mut opened = Self { ngram_min: 1, ngram_max: 3, lookback: 4096, draft_tokens };
        for (name, value) in &options.parameters {
            let number = value.as_u64().filter(|number| (1..=1 << 20).contains(number));
            let number = number.ok_or_else(|| Fault::invalid(format!("{name}: {value} is no number from 1 to 2^20")))?;
            match name.as_str() {
                "ngram_min" => opened.ngram_min = number as usize,
                "ngram_max" => opened.ngram_max = number as usize,
                "lookback" => opened.lookback = number as usize,
                _ => return Err(Fault::unsupported(format!("{name}: known are ngram_min, ngram_max and lookback"))),
            }
        }
        if opened.ngram_min > opened.ngram_max {
            return Err(Fault::invalid("ngram_min is larger than ngram_max"));
        }
        Ok(opened)
    }

    fn describe(&self) -> SpeculativeDescription {
        SpeculativeDescription { draft_tokens: self.draft_tokens }
    }

    fn propose(&mut self, batch: &mut ProposeBatch<'_>) -> Result<(), Fault> {
        for (sequence, mut draft) in batch.rows() {
            // A draft takes as many tokens as it has room for.
            draft.extend(self.continuation(sequence.tokens));
        }
        Ok(())
    }
}

impl PromptLookup {
    /// What followed the longest earlier occurrence of the last tokens, and of equally long ones the latest.
    fn continuation<'t>(&self, tokens: &'t [u32]) -> &'t [u32] {
        let tokens = &tokens[tokens.len().saturating_sub(self.lookback)..];
        let (mut longest, mut found) = (self.ngram_min - 1, tokens.len());
        for end in (1..tokens.len()).rev() {
            let pairs = tokens[..end].iter().rev().zip(tokens.iter().rev());
            let length = pairs.take(self.ngram_max).take_while(|(earlier, last)| earlier == last).count();
            if length > longest {
                (longest, found) = (length, end);
                if length == self.ngram_max {
                    break;
                }
            }
        }
        &tokens[found..]
    }
}
