//! The Granite family, `GraniteForCausalLM`: a Llama whose embedding, residuals and logits are scaled.
//!
//! Three files: [`config`] reads and checks `config.json`, [`weights`] names tensors, [`graph`] is the forward pass.
//! GGUF files, biases and splitting over devices are left out.

mod config;
mod graph;
mod weights;

#[cfg(test)]
mod tests;

use torus_plugin::{
    AttentionSpec, EmitModel, Fault, GgufAnswer, GgufQuery, Model, ModelDescription, ModelOptions, Package, StateKind,
};

use crate::config::Config;

/// An opened checkpoint.
pub struct GraniteModel {
    config: Config,
}

torus_plugin::export_plugin! {
    name: "granite_model",
    description: "The Granite family: GraniteForCausalLM",
    model: GraniteModel,
}

impl Model for GraniteModel {
    const ARCHITECTURES: &'static [&'static str] = &["GraniteForCausalLM"];
    const GGUF_ARCHITECTURES: &'static [&'static str] = &[];

    fn from_gguf(_: &GgufQuery) -> Result<GgufAnswer, Fault> {
        Err(Fault::unsupported("GGUF files of this family are not read"))
    }

    fn open(options: &ModelOptions) -> Result<Self, Fault> {
        Ok(Self { config: Config::new(options)? })
    }

    fn describe(&self) -> ModelDescription {
        let config = &self.config;
        ModelDescription {
            architecture: Self::ARCHITECTURES[0].to_owned(),
            hidden: config.hidden_size,
            vocab: config.vocab_size,
            context_length: config.max_position_embeddings,
            dtype: config.dtype,
            kinds: vec![StateKind::Paged(AttentionSpec {
                q_heads: config.num_attention_heads,
                kv_heads: config.kv_heads,
                head_dim: config.head_dim,
                scale: config.attention_multiplier,
                window: None,
                soft_cap: None,
            })],
            layers: vec![0; config.num_hidden_layers],
            weights: weights::weights(config),
            ignored_tensors: if config.tied { vec!["lm_head.weight".to_owned()] } else { vec![] },
        }
    }

    fn emit(&self, request: &EmitModel) -> Result<Package, Fault> {
        Ok(Package { fragment: graph::emit(&self.config, request)? })
    }
}
