//! What a plugin's author implements. [`crate::export_plugin!`] turns it into the tables that cross the boundary.

use crate::{
    attention::{AttentionAnswer, AttentionQuery, EmitAttention},
    fault::Fault,
    fragment::Package,
    model::{EmitModel, GgufAnswer, GgufQuery, ModelDescription, ModelOptions},
    speculative::{ProposeBatch, SpeculativeDescription, SpeculativeOptions},
};

/// A model family. A value is one opened checkpoint.
pub trait Model: Sized + Send + Sync + 'static {
    /// The architectures of a `config.json` that this family serves: `LlamaForCausalLM`.
    const ARCHITECTURES: &'static [&'static str];
    /// The values of `general.architecture` in GGUF files that it reads: `llama`.
    const GGUF_ARCHITECTURES: &'static [&'static str];

    /// How a GGUF file of this family reads as a Hugging Face checkpoint.
    fn from_gguf(query: &GgufQuery) -> Result<GgufAnswer, Fault>;

    /// Checks the config. A field that the graph does not implement is an error that names it.
    fn open(options: &ModelOptions) -> Result<Self, Fault>;

    fn describe(&self) -> ModelDescription;

    /// Emits one part for one step shape. The same request gives the same bytes.
    fn emit(&self, request: &EmitModel) -> Result<Package, Fault>;
}

/// An attention backend. It has no state: what it emits depends on the request alone.
pub trait Attention: Send + Sync + 'static {
    /// Whether and how it serves a kind of layer. "Cannot" is a score of 0 with the reason, not a fault.
    fn query(query: &AttentionQuery) -> Result<AttentionAnswer, Fault>;

    /// Emits the fragment for a query it scored above 0.
    fn emit(request: &EmitAttention) -> Result<Package, Fault>;
}

/// A speculative algorithm that proposes on the host. A value serves one engine, whose thread alone calls it.
///
/// Proposals are only guesses: the engine computes the target model's own choice at every proposed position and keeps
/// the tokens up to the first that differs. So what is proposed decides how fast tokens come, never which.
pub trait Speculative: Sized + Send + 'static {
    fn open(options: &SpeculativeOptions) -> Result<Self, Fault>;

    fn describe(&self) -> SpeculativeDescription;

    /// Proposes continuations of running sequences. Runs in every step: it should not allocate, and must not wait.
    fn propose(&mut self, batch: &mut ProposeBatch<'_>) -> Result<(), Fault>;

    /// A sequence has ended. What is kept about it under its id is of no more use.
    fn forget(&mut self, _id: u64) {}
}
