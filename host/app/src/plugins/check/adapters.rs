//! Loaded plugins as the test kit sees them.

use torus_abi::{
    attention::{AttentionAnswer, AttentionQuery, EmitAttention},
    fragment::Package,
    model::{EmitModel, ModelDescription, ModelOptions},
    speculative::{Sequence, SpeculativeOptions},
};
use torus_plugins::{
    AttentionInterface, ModelInterface, OpenModel, SpeculativeInterface, Speculator,
    link::{self, Unit},
};
use torus_testkit::{attention::Backend, model::Opened, speculative::Proposer};

fn words(error: impl std::fmt::Display) -> String {
    error.to_string()
}

/// The fragment with the whole names of the kernels it calls, as the linker writes them.
fn bound(unit: Unit<'_>) -> Result<Package, String> {
    Ok(Package { fragment: link::bind(unit).map_err(words)? })
}

pub struct Attention<'a>(pub &'a AttentionInterface);

impl Backend for Attention<'_> {
    fn query(&self, query: &AttentionQuery) -> Result<AttentionAnswer, String> {
        self.0.query(query).map_err(words)
    }

    fn emit(&self, request: &EmitAttention) -> Result<Package, String> {
        bound(self.0.unit(&self.0.emit(request).map_err(words)?.fragment))
    }
}

struct Model(OpenModel);

pub fn open_model(interface: &ModelInterface, config: &serde_json::Value) -> Result<Box<dyn Opened>, String> {
    let options = ModelOptions { config: config.clone(), parallel: Default::default() };
    Ok(Box::new(Model(interface.open(&options).map_err(words)?)))
}

impl Opened for Model {
    fn describe(&self) -> Result<ModelDescription, String> {
        self.0.describe().map_err(words)
    }

    fn emit(&self, request: &EmitModel) -> Result<Package, String> {
        bound(self.0.unit(&self.0.emit(request).map_err(words)?.fragment))
    }
}

struct Algorithm(Speculator);

pub fn open_speculator(
    interface: &SpeculativeInterface,
    options: &SpeculativeOptions,
) -> Result<Box<dyn Proposer>, String> {
    Ok(Box::new(Algorithm(interface.open(options).map_err(words)?)))
}

impl Proposer for Algorithm {
    fn draft_tokens(&self) -> u64 {
        self.0.description().draft_tokens
    }

    fn propose(&mut self, sequences: &[(Sequence<'_>, u32)]) -> Result<Vec<Vec<u32>>, String> {
        let drafts = self.0.propose(sequences.iter().copied()).map_err(words)?;
        Ok((0..sequences.len()).map(|row| drafts.row(row).to_vec()).collect())
    }

    fn forget(&mut self, id: u64) {
        self.0.forget(id);
    }
}
