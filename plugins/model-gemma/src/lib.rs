//! The Gemma family: `Gemma3ForCausalLM`, the text models of Gemma 3. Layers that see a window of the past alternate with
//! layers that see all of it, each with rotary frequencies of its own. From Hugging Face checkpoints and GGUF files.
//!
//! Three files: [`config`] reads and checks `config.json`, [`weights`] names tensors, [`graph`] is the forward pass.
//! Images, biases and attention to later tokens (embedding models) are not implemented and refused.

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
pub struct Gemma {
    config: Config,
}

torus_abi::declare_plugin! {
    name: "gemma",
    description: "The Gemma family: Gemma3ForCausalLM",
    model: Gemma,
}

impl Model for Gemma {
    const ARCHITECTURES: &'static [&'static str] = &["Gemma3ForCausalLM"];
    const GGUF_ARCHITECTURES: &'static [&'static str] = &["gemma3"];

    fn from_gguf(query: &GgufQuery) -> Result<GgufAnswer, Fault> {
        weights::from_gguf(query)
    }

    fn open(options: &ModelOptions) -> Result<Self, Fault> {
        Ok(Self { config: Config::new(options)? })
    }

    fn describe(&self) -> ModelDescription {
        let config = &self.config;
        let paged = |kind: &config::Kind| {
            StateKind::Paged(AttentionSpec {
                q_heads: config.shard_heads.q_heads,
                kv_heads: config.shard_heads.kv_heads,
                head_dim: config.shard_heads.head_dim,
                scale: config.attention_scale,
                window: kind.window,
                soft_cap: config.attention_soft_cap,
            })
        };
        ModelDescription {
            architecture: config.architecture.clone(),
            hidden: config.hidden,
            vocab: config.vocab,
            context_length: config.context_length,
            dtype: config.dtype,
            kinds: config.kinds.iter().map(paged).collect(),
            layers: config.layers.clone(),
            weights: weights::weights(config),
            ignored_tensors: weights::ignored(config),
            parallel: config.parallel,
        }
    }

    fn emit(&self, request: &EmitModel) -> Result<Package, Fault> {
        Ok(Package { fragment: graph::emit(&self.config, request)? })
    }
}
