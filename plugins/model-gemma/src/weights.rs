//! Names and shapes of the family's tensors, in Hugging Face checkpoints and in GGUF files.

use serde_json::json;
use torus_abi::{
    fault::Fault,
    fragment::LinearRole,
    model::{GgufAnswer, GgufQuery, Transform, WeightSpec},
};
use torus_hlo::gguf::GgufFile;

use crate::config::Config;

/// The weights of the model, in the order of the forward pass.
pub fn weights(config: &Config) -> Vec<WeightSpec> {
    let Config { hidden, intermediate, vocab, heads, .. } = *config;
    let (queries, keys) = (heads.q_heads * heads.head_dim, heads.kv_heads * heads.head_dim);
    let mut weights = vec![WeightSpec::embedding("embed", "model.embed_tokens.weight", [vocab, hidden], config.tied)];
    for i in 0..config.layers.len() {
        let (layer, prefix) = (|name: &str| format!("layers.{i}.{name}"), format!("model.layers.{i}"));
        let attention = |name: &str, rows| (format!("{prefix}.self_attn.{name}_proj"), rows);
        let mlp = |name: &str, rows| (format!("{prefix}.mlp.{name}_proj"), rows);
        let qkv = [attention("q", queries), attention("k", keys), attention("v", keys)];
        let gate_up = [mlp("gate", intermediate), mlp("up", intermediate)];
        weights.extend([
            norm(layer("attention_norm"), format!("{prefix}.input_layernorm"), hidden),
            WeightSpec::linear(LinearRole::Column, layer("qkv"), hidden, &qkv).in_units(&heads.units()),
            norm(layer("q_norm"), format!("{prefix}.self_attn.q_norm"), heads.head_dim),
            norm(layer("k_norm"), format!("{prefix}.self_attn.k_norm"), heads.head_dim),
            WeightSpec::linear(LinearRole::Row, layer("o"), queries, &[attention("o", hidden)]),
            norm(layer("attention_post_norm"), format!("{prefix}.post_attention_layernorm"), hidden),
            norm(layer("mlp_norm"), format!("{prefix}.pre_feedforward_layernorm"), hidden),
            WeightSpec::linear(LinearRole::Column, layer("gate_up"), hidden, &gate_up),
            WeightSpec::linear(LinearRole::Row, layer("down"), intermediate, &[mlp("down", hidden)]),
            norm(layer("mlp_post_norm"), format!("{prefix}.post_feedforward_layernorm"), hidden),
        ]);
    }
    weights.push(norm("norm".into(), "model.norm".into(), hidden));
    if !config.tied {
        weights.push(WeightSpec::linear(LinearRole::Head, "head", hidden, &[("lm_head".into(), vocab)]));
    }
    weights
}

/// The scale of a norm. Checkpoints hold what is to be added to 1.
fn norm(name: String, tensor: String, size: u64) -> WeightSpec {
    let mut spec = WeightSpec::vector("weight", name, &[(tensor, size)]);
    spec.sources[0].transforms.push(Transform::AddConstant(1.0));
    spec
}

/// The copy of a tied embedding.
pub fn ignored(config: &Config) -> Vec<String> {
    if config.tied { vec!["lm_head.weight".into()] } else { vec![] }
}

/// From names within a layer of a GGUF file to those of Hugging Face.
const GGUF_LAYER: [(&str, &str); 13] = [
    ("attn_norm", "input_layernorm"),
    ("attn_q", "self_attn.q_proj"),
    ("attn_k", "self_attn.k_proj"),
    ("attn_v", "self_attn.v_proj"),
    ("attn_q_norm", "self_attn.q_norm"),
    ("attn_k_norm", "self_attn.k_norm"),
    ("attn_output", "self_attn.o_proj"),
    ("post_attention_norm", "post_attention_layernorm"),
    ("ffn_norm", "pre_feedforward_layernorm"),
    ("ffn_gate", "mlp.gate_proj"),
    ("ffn_up", "mlp.up_proj"),
    ("ffn_down", "mlp.down_proj"),
    ("post_ffw_norm", "post_feedforward_layernorm"),
];

/// How a GGUF file of `general.architecture` "gemma3" reads.
pub fn from_gguf(query: &GgufQuery) -> Result<GgufAnswer, Fault> {
    const GLOBAL_THETA: f64 = 1_000_000.0;
    const LOCAL_THETA: f64 = 10_000.0;
    let file = GgufFile::new(query)?;
    let mut config = file.config()?;
    config["architectures"] = json!(["Gemma3ForCausalLM"]);
    config["model_type"] = "gemma3_text".into();
    config["query_pre_attn_scalar"] = query_pre_attn_scalar(&file)?.into();
    config["sliding_window"] = file.integer("attention.sliding_window")?.into();
    config["sliding_window_pattern"] = file.integer_or("attention.sliding_window_pattern", 6)?.into();
    config["rope_theta"] = file.float_or("rope.freq_base", GLOBAL_THETA)?.into();
    config["rope_local_base_freq"] = file.float_or("rope.freq_base_swa", LOCAL_THETA)?.into();
    for key in ["attn_logit_softcapping", "final_logit_softcapping"] {
        if file.get(key).is_some() {
            config[key] = file.float(key)?.into();
        }
    }
    // The format stores norms with the 1 already added.
    let tensors = file.tensors(GGUF_LAYER, |name| match name.ends_with("norm") {
        true => vec![Transform::AddConstant(-1.0)],
        false => vec![],
    })?;
    Ok(GgufAnswer { config, tensors, ignored_tensors: vec![] })
}

/// The format does not say it: of the published sizes, only the one of 62 layers (27B) divides by the width of a head's
/// share of the hidden state instead of the head's size.
fn query_pre_attn_scalar(file: &GgufFile) -> Result<u64, Fault> {
    const LAYERS_OF_27B: u64 = 62;
    let share = file.integer("embedding_length")? / file.integer("attention.head_count")?.max(1);
    match file.integer("block_count")? {
        LAYERS_OF_27B => Ok(share),
        _ => file.integer_or("attention.key_length", share),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use torus_abi::model::ModelOptions;

    use super::*;

    fn query(change: impl FnOnce(&mut GgufQuery)) -> GgufQuery {
        let metadata = json!({
            "general.architecture": "gemma3", "gemma3.block_count": 1, "gemma3.attention.head_count": 4,
            "gemma3.attention.head_count_kv": 2, "gemma3.attention.key_length": 16, "gemma3.attention.value_length": 16,
            "gemma3.embedding_length": 32, "gemma3.feed_forward_length": 48, "gemma3.context_length": 64,
            "gemma3.attention.layer_norm_rms_epsilon": 1e-6, "gemma3.attention.sliding_window": 8,
        });
        let mut tensors: BTreeMap<String, Vec<u64>> =
            GGUF_LAYER.iter().map(|(name, _)| (format!("blk.0.{name}.weight"), vec![32])).collect();
        tensors.insert("token_embd.weight".into(), vec![9, 32]);
        tensors.insert("output_norm.weight".into(), vec![32]);
        let mut query = GgufQuery { metadata: serde_json::from_value(metadata).unwrap(), tensors };
        change(&mut query);
        query
    }

    fn config(change: impl FnOnce(&mut GgufQuery)) -> Config {
        let config = from_gguf(&query(change)).unwrap().config;
        Config::new(&ModelOptions { config, parallel: Default::default() }).unwrap()
    }

    #[test]
    fn every_weight_of_a_gguf_file_is_mapped() {
        let answer = from_gguf(&query(|_| {})).unwrap();
        let config = config(|_| {});
        assert_eq!((config.tied, config.heads.head_dim, config.attention_scale), (true, 16, 0.25));
        assert_eq!((config.kinds[0].window, config.kinds[0].rope.theta), (Some(8), 10_000.0));
        let weights = weights(&config);
        let wanted: Vec<_> = weights.iter().flat_map(|spec| &spec.sources).map(|source| &source.tensor).collect();
        assert!(wanted.iter().all(|name| answer.tensors.contains_key(*name)), "{wanted:?}");
        assert_eq!(wanted.len(), answer.tensors.len());
    }

    #[test]
    fn the_one_that_gguf_adds_to_norms_is_taken_off() {
        let answer = from_gguf(&query(|_| {})).unwrap();
        for spec in weights(&config(|_| {})) {
            let Some(added) = spec.sources[0].transforms.first() else { continue };
            assert_eq!(*added, Transform::AddConstant(1.0));
            let tensor = &answer.tensors[&spec.sources[0].tensor];
            assert_eq!(tensor.transforms, [Transform::AddConstant(-1.0)], "{}", spec.name);
        }
        assert_eq!(answer.tensors.values().filter(|tensor| !tensor.transforms.is_empty()).count(), 7);
    }

    #[test]
    fn the_largest_size_has_a_scale_of_its_own() {
        let config = config(|q| drop(q.metadata.insert("gemma3.block_count".into(), json!(62))));
        assert_eq!(config.attention_scale, 8f32.sqrt().recip());
        let full: Vec<_> = (0..62).filter(|layer| config.layers[*layer] == 1).collect();
        assert_eq!(full, (0..10).map(|i| 6 * i + 5).collect::<Vec<_>>());
    }

    #[test]
    fn keys_that_are_needed_are_named() {
        for key in ["gemma3.attention.sliding_window", "gemma3.block_count"] {
            let message = from_gguf(&query(|q| drop(q.metadata.remove(key)))).unwrap_err().message;
            assert!(message.contains(key), "{message}");
        }
    }
}
