//! A plugin that make.sh builds with `panic = "abort"`.

use torus_abi::{
    author::Speculative,
    fault::Fault,
    speculative::{ProposeBatch, SpeculativeDescription, SpeculativeOptions},
};

torus_abi::export_plugin! {
    name: "panic_abort",
    description: "Its panics would end the server",
    speculative: Aborting,
}

struct Aborting;

impl Speculative for Aborting {
    fn open(_: &SpeculativeOptions) -> Result<Self, Fault> {
        panic!("the end")
    }

    fn describe(&self) -> SpeculativeDescription {
        SpeculativeDescription { draft_tokens: 1 }
    }

    fn propose(&mut self, _: &mut ProposeBatch<'_>) -> Result<(), Fault> {
        Ok(())
    }
}
