//! The Llama family: `LlamaForCausalLM` with grouped queries, tied embeddings, scaled rotary frequencies, and biases
//! where the config has them. From Hugging Face checkpoints and GGUF files.
//!
//! Three files: [`config`] reads and checks `config.json`, [`weights`] names tensors, [`graph`] is the forward pass.

#![forbid(unsafe_code)]

mod config;
mod graph;
mod weights;

use torus_abi::{
    author::Model,
    fault::Fault,
    fragment::Package,
    model::{AttentionSpec, EmitModel, GgufAnswer, GgufQuery, ModelDescription, ModelOptions, StateKind},
};

pub use config::Config;

/// An opened checkpoint.
pub struct Llama {
    config: Config,
}

torus_abi::declare_plugin! {
    name: "llama",
    description: "The Llama family: LlamaForCausalLM",
    model: Llama,
}

impl Model for Llama {
    const ARCHITECTURES: &'static [&'static str] = &["LlamaForCausalLM"];
    const GGUF_ARCHITECTURES: &'static [&'static str] = &["llama"];

    fn from_gguf(query: &GgufQuery) -> Result<GgufAnswer, Fault> {
        weights::from_gguf(query)
    }

    fn open(options: &ModelOptions) -> Result<Self, Fault> {
        Ok(Self { config: Config::new(options)? })
    }

    fn describe(&self) -> ModelDescription {
        let config = &self.config;
        ModelDescription {
            architecture: config.architecture.clone(),
            hidden: config.hidden,
            vocab: config.vocab,
            context_length: config.context_length,
            dtype: config.dtype,
            kinds: vec![StateKind::Paged(AttentionSpec {
                q_heads: config.shard_heads.q_heads,
                kv_heads: config.shard_heads.kv_heads,
                head_dim: config.shard_heads.head_dim,
                scale: (config.heads.head_dim as f32).sqrt().recip(),
                window: None,
                soft_cap: None,
            })],
            layers: vec![0; config.layers],
            weights: weights::weights(config),
            ignored_tensors: weights::ignored(config),
            parallel: config.parallel,
        }
    }

    fn emit(&self, request: &EmitModel) -> Result<Package, Fault> {
        Ok(Package { fragment: graph::emit(&self.config, request)? })
    }
}
