//! A speculative plugin that counts up. What it does wrong is chosen by a sequence's last token.

use torus_abi::{
    author::Speculative,
    fault::Fault,
    speculative::{ProposeBatch, SpeculativeDescription, SpeculativeOptions},
};

pub struct Counting;

impl Speculative for Counting {
    fn open(options: &SpeculativeOptions) -> Result<Self, Fault> {
        match options.parameters.get("fail") {
            Some(reason) => Err(Fault::unsupported(format!("fail: {reason}"))),
            None => Ok(Self),
        }
    }

    fn describe(&self) -> SpeculativeDescription {
        SpeculativeDescription { draft_tokens: 2 }
    }

    fn propose(&mut self, batch: &mut ProposeBatch<'_>) -> Result<(), Fault> {
        for (sequence, mut draft) in batch.rows() {
            match sequence.tokens.last() {
                Some(12) => return Err(Fault::invalid("twelve")),
                Some(13) => panic!("thirteen"),
                Some(last) => draft.extend(&[last + 1, last + 2]),
                None => {}
            }
        }
        Ok(())
    }
}
