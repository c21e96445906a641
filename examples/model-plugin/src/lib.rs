//! The Granite family, `GraniteForCausalLM`: a Llama whose embedding, residuals, attention scores and logits are scaled.
//!
//! [`config`] reads and checks `config.json`, [`weights`] says where tensors come from, [`graph`] is the forward pass.
//! Left out: GGUF files, biases, stretched rotary embeddings, and splitting over devices.

mod config;
mod graph;
#[cfg(test)]
mod tests;
mod weights;

use torus_plugin::{
    AttentionSpec, EmitModel, Fault, GgufAnswer, GgufQuery, Model, ModelDescription, ModelOptions, Package, Parallel,
    StateKind,
};

use crate::config::Config;

/// An opened checkpoint.
struct GraniteModel {
    config: Config,
}

torus_plugin::export_plugin! {
    name: "granite_model",
    description: "The Granite family: GraniteForCausalLM (example)",
    model: GraniteModel,
}

impl Model for GraniteModel {
    const ARCHITECTURES: &'static [&'static str] = &["GraniteForCausalLM"];
    const GGUF_ARCHITECTURES: &'static [&'static str] = &[];

    fn from_gguf(_: &GgufQuery) -> Result<GgufAnswer, Fault> {
        Err(Fault::unsupported("GGUF files of this family are not implemented"))
    }

    fn open(options: &ModelOptions) -> Result<Self, Fault> {
        Ok(Self { config: Config::new(options)? })
    }

    fn describe(&self) -> ModelDescription {
        let config = &self.config;
        ModelDescription {
            architecture: "GraniteForCausalLM".into(),
            hidden: config.hidden,
            vocab: config.vocab,
            context_length: config.context_length,
            dtype: config.dtype,
            // One kind of layers, and all are of it: a model with sliding windows in some layers has two.
            kinds: vec![StateKind::Paged(AttentionSpec {
                q_heads: config.q_heads,
                kv_heads: config.kv_heads,
                head_dim: config.head_dim,
                scale: config.attention_multiplier,
                window: None,
                soft_cap: None,
            })],
            layers: vec![0; config.layers],
            weights: weights::weights(config),
            ignored_tensors: weights::ignored(config),
            parallel: Parallel::default(),
        }
    }

    fn emit(&self, request: &EmitModel) -> Result<Package, Fault> {
        Ok(Package { fragment: graph::emit(&self.config, request)? })
    }
}
