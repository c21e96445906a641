//! Names and shapes of the family's tensors, in Hugging Face checkpoints and in GGUF files.

use serde_json::json;
use torus_abi::{
    fault::Fault,
    fragment::LinearRole,
    model::{GgufAnswer, GgufQuery, Transform, WeightSpec},
};
use torus_hlo::gguf::{self, GgufFile};

use crate::config::Config;

/// The weights of the model, in the order of the forward pass.
pub fn weights(config: &Config) -> Vec<WeightSpec> {
    let Config { hidden, intermediate, vocab, heads, .. } = *config;
    let (queries, keys) = (heads.q_heads * heads.head_dim, heads.kv_heads * heads.head_dim);
    let norm = |name: String, tensor: String| WeightSpec::vector("weight", name, &[(tensor, hidden)]);
    let mut weights = vec![WeightSpec::embedding("embed", "model.embed_tokens.weight", [vocab, hidden], config.tied)];
    for i in 0..config.layers {
        let (layer, prefix) = (|name: &str| format!("layers.{i}.{name}"), format!("model.layers.{i}"));
        let attention = |name: &str, rows| (format!("{prefix}.self_attn.{name}_proj"), rows);
        let mlp = |name: &str, rows| (format!("{prefix}.mlp.{name}_proj"), rows);
        let qkv = [attention("q", queries), attention("k", keys), attention("v", keys)];
        let o = [attention("o", hidden)];
        let gate_up = [mlp("gate", intermediate), mlp("up", intermediate)];
        let down = [mlp("down", hidden)];
        weights.push(norm(layer("attention_norm"), format!("{prefix}.input_layernorm")));
        weights.push(WeightSpec::linear(LinearRole::Column, layer("qkv"), hidden, &qkv).in_units(&heads.units()));
        weights.push(WeightSpec::linear(LinearRole::Row, layer("o"), queries, &o));
        if config.attention_bias {
            weights.push(WeightSpec::vector("bias", layer("qkv_bias"), &qkv).in_units(&heads.units()));
            weights.push(WeightSpec::vector("bias", layer("o_bias"), &o));
        }
        weights.push(norm(layer("mlp_norm"), format!("{prefix}.post_attention_layernorm")));
        weights.push(WeightSpec::linear(LinearRole::Column, layer("gate_up"), hidden, &gate_up));
        weights.push(WeightSpec::linear(LinearRole::Row, layer("down"), intermediate, &down));
        if config.mlp_bias {
            weights.push(WeightSpec::vector("bias", layer("gate_up_bias"), &gate_up).in_units(&[intermediate; 2]));
            weights.push(WeightSpec::vector("bias", layer("down_bias"), &down));
        }
    }
    weights.push(norm("norm".into(), "model.norm".into()));
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

/// How a GGUF file of `general.architecture` "llama" reads.
pub fn from_gguf(query: &GgufQuery) -> Result<GgufAnswer, Fault> {
    let file = GgufFile::new(query)?;
    if file.get("attention.sliding_window").is_some() {
        return Err(file.unsupported("attention.sliding_window", "it is not implemented for this family"));
    }
    let mut config = file.config()?;
    config["architectures"] = json!(["LlamaForCausalLM"]);
    config["model_type"] = "llama".into();
    config["attention_bias"] = file.has_tensor("blk.0.attn_q.bias").into();
    config["mlp_bias"] = file.has_tensor("blk.0.ffn_gate.bias").into();

    let heads = file.integer("attention.head_count")?;
    let kv_heads = file.integer_or("attention.head_count_kv", heads)?;
    // The format stores the rows of rotary heads interleaved.
    let tensors = file.tensors(gguf::LAYER_NAMES, |name| match name {
        "attn_q" => vec![Transform::PermuteRopeRows { heads }],
        "attn_k" => vec![Transform::PermuteRopeRows { heads: kv_heads }],
        _ => vec![],
    })?;
    Ok(GgufAnswer { config, tensors, ignored_tensors: vec![] })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    fn query(change: impl FnOnce(&mut GgufQuery)) -> GgufQuery {
        let metadata = json!({
            "general.architecture": "llama", "llama.block_count": 1, "llama.attention.head_count": 4, "llama.attention.head_count_kv": 2,
            "llama.embedding_length": 32, "llama.feed_forward_length": 48, "llama.context_length": 64,
            "llama.attention.layer_norm_rms_epsilon": 1e-5, "llama.vocab_size": 9,
        });
        let mut tensors: BTreeMap<String, Vec<u64>> =
            gguf::LAYER_NAMES.iter().map(|(name, _)| (format!("blk.0.{name}.weight"), vec![32])).collect();
        tensors.insert("token_embd.weight".into(), vec![9, 32]);
        tensors.insert("output_norm.weight".into(), vec![32]);
        let mut query = GgufQuery { metadata: serde_json::from_value(metadata).unwrap(), tensors };
        change(&mut query);
        query
    }

    #[test]
    fn every_weight_of_a_gguf_file_is_mapped() {
        for tied in [true, false] {
            let answer = from_gguf(&query(|query| {
                if !tied {
                    query.tensors.insert("output.weight".into(), vec![9, 32]);
                }
            }))
            .unwrap();
            let options = torus_abi::model::ModelOptions { config: answer.config, parallel: Default::default() };
            let config = Config::new(&options).unwrap();
            assert_eq!((config.tied, config.heads.head_dim, config.heads.kv_heads), (tied, 8, 2));
            let weights = weights(&config);
            let wanted: Vec<_> = weights.iter().flat_map(|spec| &spec.sources).map(|source| &source.tensor).collect();
            assert!(wanted.iter().all(|name| answer.tensors.contains_key(*name)), "{wanted:?}");
            assert_eq!(wanted.len(), answer.tensors.len());
        }
    }

    #[test]
    fn rotary_rows_of_queries_and_keys_are_put_in_order() {
        let answer = from_gguf(&query(|_| {})).unwrap();
        let transforms = |name: &str| &answer.tensors[&format!("model.layers.0.self_attn.{name}.weight")].transforms;
        assert_eq!(transforms("q_proj")[..], [Transform::PermuteRopeRows { heads: 4 }]);
        assert_eq!(transforms("k_proj")[..], [Transform::PermuteRopeRows { heads: 2 }]);
        assert!(transforms("v_proj").is_empty() && transforms("o_proj").is_empty());
    }

    #[test]
    fn gguf_files_that_would_be_read_wrongly_are_refused() {
        let refused = |change: &dyn Fn(&mut GgufQuery)| from_gguf(&query(change)).unwrap_err().message;
        for (key, value) in [("llama.expert_count", json!(8)), ("llama.attention.sliding_window", json!(64))] {
            assert!(refused(&|q| drop(q.metadata.insert(key.into(), value.clone()))).contains(key), "{key}");
        }
    }
}
