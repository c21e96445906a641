//! Names and shapes of the family's tensors, in Hugging Face checkpoints and in GGUF files.

use serde_json::json;
use torus_abi::{
    fault::Fault,
    fragment::LinearRole,
    model::{GgufAnswer, GgufQuery, WeightSpec},
};
use torus_hlo::gguf::{self, GgufFile};

use crate::config::{Config, Generation};

/// The weights of the model, in the order of the forward pass.
pub fn weights(config: &Config) -> Vec<WeightSpec> {
    let Config { hidden, intermediate, vocab, heads, .. } = *config;
    let (queries, keys) = (heads.q_heads * heads.head_dim, heads.kv_heads * heads.head_dim);
    let norm = |name: String, tensor: String, size| WeightSpec::vector("weight", name, &[(tensor, size)]);
    let mut weights = vec![WeightSpec::embedding("embed", "model.embed_tokens.weight", [vocab, hidden], config.tied)];
    for i in 0..config.layers {
        let (layer, prefix) = (|name: &str| format!("layers.{i}.{name}"), format!("model.layers.{i}"));
        let attention = |name: &str, rows| (format!("{prefix}.self_attn.{name}_proj"), rows);
        let mlp = |name: &str, rows| (format!("{prefix}.mlp.{name}_proj"), rows);
        let qkv = [attention("q", queries), attention("k", keys), attention("v", keys)];
        let o = [attention("o", hidden)];
        weights.push(norm(layer("attention_norm"), format!("{prefix}.input_layernorm"), hidden));
        weights.push(WeightSpec::linear(LinearRole::Column, layer("qkv"), hidden, &qkv).in_units(&heads.units()));
        if config.qkv_bias {
            weights.push(WeightSpec::vector("bias", layer("qkv_bias"), &qkv).in_units(&heads.units()));
        }
        if config.qk_norm() {
            weights.push(norm(layer("q_norm"), format!("{prefix}.self_attn.q_norm"), heads.head_dim));
            weights.push(norm(layer("k_norm"), format!("{prefix}.self_attn.k_norm"), heads.head_dim));
        }
        weights.push(WeightSpec::linear(LinearRole::Row, layer("o"), queries, &o));
        if config.o_bias {
            weights.push(WeightSpec::vector("bias", layer("o_bias"), &o));
        }
        let gate_up = [mlp("gate", intermediate), mlp("up", intermediate)];
        weights.push(norm(layer("mlp_norm"), format!("{prefix}.post_attention_layernorm"), hidden));
        weights.push(WeightSpec::linear(LinearRole::Column, layer("gate_up"), hidden, &gate_up));
        weights.push(WeightSpec::linear(LinearRole::Row, layer("down"), intermediate, &[mlp("down", hidden)]));
    }
    weights.push(norm("norm".into(), "model.norm".into(), hidden));
    if !config.tied {
        weights.push(WeightSpec::linear(LinearRole::Head, "head", hidden, &[("lm_head".into(), vocab)]));
    }
    weights
}

/// Tensors that checkpoints carry and the graph computes itself, and the copy of a tied embedding.
pub fn ignored(config: &Config) -> Vec<String> {
    let mut ignored: Vec<_> =
        (0..config.layers).map(|i| format!("model.layers.{i}.self_attn.rotary_emb.inv_freq")).collect();
    if config.tied {
        ignored.push("lm_head.weight".into());
    }
    ignored
}

/// How a GGUF file of `general.architecture` "qwen2" or "qwen3" reads. Its rotary heads have the rows of Hugging Face.
pub fn from_gguf(query: &GgufQuery) -> Result<GgufAnswer, Fault> {
    let file = GgufFile::new(query)?;
    let generation = match file.architecture {
        "qwen2" => Generation::Qwen2,
        "qwen3" => Generation::Qwen3,
        name => return Err(Fault::unsupported(format!("GGUF: general.architecture '{name}' is not of this family"))),
    };
    if file.get("attention.sliding_window").is_some() {
        return Err(file.unsupported("attention.sliding_window", "it is not implemented for this family"));
    }
    if file.get("attention.causal") == Some(&json!(false)) {
        return Err(file.unsupported("attention.causal", "attention to later tokens is not implemented"));
    }
    let mut config = file.config()?;
    config["architectures"] = json!([generation.architecture()]);
    config["model_type"] = file.architecture.into();
    config["attention_bias"] = file.has_tensor("blk.0.attn_q.bias").into();
    let norms = [("attn_q_norm", "self_attn.q_norm"), ("attn_k_norm", "self_attn.k_norm")];
    let tensors = file.tensors(gguf::LAYER_NAMES.into_iter().chain(norms), |_| Vec::new())?;
    Ok(GgufAnswer { config, tensors, ignored_tensors: vec![] })
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use super::*;

    /// A file of one layer, of heads of six.
    fn query(architecture: &str, change: impl FnOnce(&mut GgufQuery)) -> GgufQuery {
        let keys = json!({
            "block_count": 1, "attention.head_count": 4, "attention.head_count_kv": 2, "attention.key_length": 6,
            "attention.value_length": 6, "embedding_length": 32, "feed_forward_length": 48, "context_length": 64,
            "attention.layer_norm_rms_epsilon": 1e-5, "rope.freq_base": 1e6,
        });
        let keys = keys.as_object().unwrap().clone().into_iter();
        let mut metadata: BTreeMap<_, _> = keys.map(|(key, value)| (format!("{architecture}.{key}"), value)).collect();
        metadata.insert("general.architecture".into(), architecture.into());
        let mut names = vec!["token_embd.weight".to_owned(), "output_norm.weight".into()];
        names.extend(gguf::LAYER_NAMES.map(|(name, _)| format!("blk.0.{name}.weight")));
        match architecture {
            "qwen2" => names.extend(["q", "k", "v"].map(|name| format!("blk.0.attn_{name}.bias"))),
            _ => names.extend(["q", "k"].map(|name| format!("blk.0.attn_{name}_norm.weight"))),
        }
        let tensors = names.into_iter().map(|name| (name, vec![9, 32])).collect();
        let mut query = GgufQuery { metadata, tensors };
        change(&mut query);
        query
    }

    #[test]
    fn every_weight_of_a_gguf_file_is_mapped() {
        for (architecture, tied) in [("qwen2", true), ("qwen2", false), ("qwen3", true), ("qwen3", false)] {
            let query = query(architecture, |query| {
                if !tied {
                    query.tensors.insert("output.weight".into(), vec![9, 32]);
                }
            });
            let answer = from_gguf(&query).unwrap();
            let options = torus_abi::model::ModelOptions { config: answer.config, parallel: Default::default() };
            let config = Config::new(&options).unwrap();
            assert_eq!((config.tied, config.heads.head_dim, config.rope.theta), (tied, 6, 1e6));
            assert_eq!((config.qk_norm(), config.qkv_bias), (architecture == "qwen3", architecture == "qwen2"));

            let weights = weights(&config);
            let wanted: BTreeSet<_> =
                weights.iter().flat_map(|spec| &spec.sources).map(|source| &source.tensor).collect();
            assert_eq!(wanted, answer.tensors.keys().collect());
            let taken: BTreeSet<_> = answer.tensors.values().map(|tensor| &tensor.name).collect();
            assert_eq!(taken, query.tensors.keys().collect());
            assert!(answer.tensors.values().all(|tensor| tensor.transforms.is_empty()));
        }
    }

    #[test]
    fn gguf_files_that_would_be_read_wrongly_are_refused() {
        let refused = |architecture: &str, key: &str, value| {
            let query = query(architecture, |query| drop(query.metadata.insert(key.into(), value)));
            let message = from_gguf(&query).unwrap_err().message;
            assert!(message.contains(key), "{message}");
        };
        refused("qwen2", "qwen2.attention.sliding_window", json!(4096));
        refused("qwen2", "qwen2.attention.causal", json!(false));
        refused("qwen3", "qwen3.expert_count", json!(8));
        refused("qwen3", "general.architecture", json!("qwen3moe"));
    }
}
