//! Names and shapes of the family's tensors, in Hugging Face checkpoints and in GGUF files.

use std::collections::BTreeMap;

use serde_json::{Value, json};
use torus_abi::{
    fault::Fault,
    fragment::LinearRole,
    model::{GgufAnswer, GgufQuery, GgufTensor, Transform, WeightRole, WeightSource, WeightSpec},
};

use crate::config::Config;

/// The weights of the model, in the order of the forward pass.
pub fn weights(config: &Config) -> Vec<WeightSpec> {
    let Config { hidden, intermediate, vocab, .. } = *config;
    let (queries, keys) = (config.q_heads * config.head_dim, config.kv_heads * config.head_dim);
    let matrix = |role, name: String, input: u64, sources: &[(String, u64)]| WeightSpec {
        name,
        shape: vec![sources.iter().map(|(_, rows)| rows).sum(), input],
        role: WeightRole::Linear(role),
        sources: sources.iter().map(|(tensor, rows)| source(format!("{tensor}.weight"), vec![*rows, input])).collect(),
    };
    let bias = |name: String, sources: &[(String, u64)]| WeightSpec {
        name,
        shape: vec![sources.iter().map(|(_, rows)| rows).sum()],
        role: WeightRole::Vector,
        sources: sources.iter().map(|(tensor, rows)| source(format!("{tensor}.bias"), vec![*rows])).collect(),
    };
    let norm = |name: String, tensor: String| WeightSpec {
        name,
        shape: vec![hidden],
        role: WeightRole::Vector,
        sources: vec![source(format!("{tensor}.weight"), vec![hidden])],
    };

    let embed = source("model.embed_tokens.weight".into(), vec![vocab, hidden]);
    let embed_role = if config.tied { WeightRole::EmbedAndHead } else { WeightRole::Embed };
    let mut weights =
        vec![WeightSpec { name: "embed".into(), shape: vec![vocab, hidden], role: embed_role, sources: vec![embed] }];
    for i in 0..config.layers {
        let (layer, prefix) = (|name: &str| format!("layers.{i}.{name}"), format!("model.layers.{i}"));
        let attention = |name: &str, rows| (format!("{prefix}.self_attn.{name}_proj"), rows);
        let mlp = |name: &str, rows| (format!("{prefix}.mlp.{name}_proj"), rows);
        let qkv = [attention("q", queries), attention("k", keys), attention("v", keys)];
        let o = [attention("o", hidden)];
        let gate_up = [mlp("gate", intermediate), mlp("up", intermediate)];
        let down = [mlp("down", hidden)];
        weights.push(norm(layer("attention_norm"), format!("{prefix}.input_layernorm")));
        weights.push(matrix(LinearRole::Column, layer("qkv"), hidden, &qkv));
        weights.push(matrix(LinearRole::Row, layer("o"), queries, &o));
        if config.attention_bias {
            weights.push(bias(layer("qkv_bias"), &qkv));
            weights.push(bias(layer("o_bias"), &o));
        }
        weights.push(norm(layer("mlp_norm"), format!("{prefix}.post_attention_layernorm")));
        weights.push(matrix(LinearRole::Column, layer("gate_up"), hidden, &gate_up));
        weights.push(matrix(LinearRole::Row, layer("down"), intermediate, &down));
        if config.mlp_bias {
            weights.push(bias(layer("gate_up_bias"), &gate_up));
            weights.push(bias(layer("down_bias"), &down));
        }
    }
    weights.push(norm("norm".into(), "model.norm".into()));
    if !config.tied {
        weights.push(matrix(LinearRole::Head, "head".into(), hidden, &[("lm_head".into(), vocab)]));
    }
    weights
}

fn source(tensor: String, shape: Vec<u64>) -> WeightSource {
    WeightSource { tensor, shape, transforms: Vec::new() }
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

/// From names within a layer of a GGUF file to those of Hugging Face.
const GGUF_LAYER: [(&str, &str); 9] = [
    ("attn_norm", "input_layernorm"),
    ("attn_q", "self_attn.q_proj"),
    ("attn_k", "self_attn.k_proj"),
    ("attn_v", "self_attn.v_proj"),
    ("attn_output", "self_attn.o_proj"),
    ("ffn_norm", "post_attention_layernorm"),
    ("ffn_gate", "mlp.gate_proj"),
    ("ffn_up", "mlp.up_proj"),
    ("ffn_down", "mlp.down_proj"),
];

/// How a GGUF file of `general.architecture` "llama" reads.
pub fn from_gguf(query: &GgufQuery) -> Result<GgufAnswer, Fault> {
    let metadata = Metadata(&query.metadata);
    let layers = metadata.integer("llama.block_count")?;
    let heads = metadata.integer("llama.attention.head_count")?;
    let kv_heads = metadata.integer("llama.attention.head_count_kv").unwrap_or(heads);
    if query.metadata.contains_key("llama.expert_count") {
        return Err(Fault::unsupported("GGUF: llama.expert_count: mixtures of experts are not of this family"));
    }
    let tied = !query.tensors.contains_key("output.weight");
    let mut tensors = BTreeMap::new();
    let mut map = |hugging_face: String, name: String, transforms: Vec<Transform>| {
        if query.tensors.contains_key(&name) {
            tensors.insert(hugging_face, GgufTensor { name, transforms });
        }
    };
    map("model.embed_tokens.weight".into(), "token_embd.weight".into(), vec![]);
    map("model.norm.weight".into(), "output_norm.weight".into(), vec![]);
    map("lm_head.weight".into(), "output.weight".into(), vec![]);
    for i in 0..layers {
        for (gguf, hugging_face) in GGUF_LAYER {
            for kind in ["weight", "bias"] {
                // The format stores the rows of rotary heads interleaved.
                let transforms = match gguf {
                    "attn_q" => vec![Transform::PermuteRopeRows { heads }],
                    "attn_k" => vec![Transform::PermuteRopeRows { heads: kv_heads }],
                    _ => vec![],
                };
                map(format!("model.layers.{i}.{hugging_face}.{kind}"), format!("blk.{i}.{gguf}.{kind}"), transforms);
            }
        }
    }
    let config = gguf_config(&metadata, query, tied, [layers, heads, kv_heads])?;
    Ok(GgufAnswer { config, tensors, ignored_tensors: vec![] })
}

fn gguf_config(
    metadata: &Metadata<'_>,
    query: &GgufQuery,
    tied: bool,
    [layers, heads, kv_heads]: [u64; 3],
) -> Result<Value, Fault> {
    if query.tensors.contains_key("rope_freqs.weight") {
        return Err(Fault::unsupported(
            "GGUF: rope_freqs.weight: scaled rotary frequencies are read from Hugging Face checkpoints only",
        ));
    }
    let hidden = metadata.integer("llama.embedding_length")?;
    let embedding = query.tensors.get("token_embd.weight").and_then(|shape| shape.first()).copied();
    let vocab = metadata.integer("llama.vocab_size").ok().or(embedding);
    let vocab = vocab.ok_or_else(|| Fault::invalid("GGUF: there is neither llama.vocab_size nor token_embd.weight"))?;
    let head_dim = metadata.integer("llama.attention.key_length").unwrap_or(hidden / heads.max(1));
    if metadata.integer("llama.rope.dimension_count").is_ok_and(|size| size != head_dim) {
        return Err(Fault::unsupported("GGUF: llama.rope.dimension_count: partly rotated heads are not implemented"));
    }
    let mut config = json!({
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": metadata.integer("llama.feed_forward_length")?,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "vocab_size": vocab,
        "max_position_embeddings": metadata.integer("llama.context_length")?,
        "rms_norm_eps": metadata.float("llama.attention.layer_norm_rms_epsilon")?,
        "rope_theta": metadata.float("llama.rope.freq_base").unwrap_or(10_000.0),
        "tie_word_embeddings": tied,
        "attention_bias": query.tensors.contains_key("blk.0.attn_q.bias"),
        "mlp_bias": query.tensors.contains_key("blk.0.ffn_gate.bias"),
        "torch_dtype": "bfloat16",
    });
    match query.metadata.get("llama.rope.scaling.type").and_then(Value::as_str) {
        None | Some("none") => {}
        Some("linear") => {
            let factor = metadata.float("llama.rope.scaling.factor")?;
            config["rope_scaling"] = json!({"rope_type": "linear", "factor": factor});
        }
        Some("yarn") => {
            config["rope_scaling"] = json!({
                "rope_type": "yarn",
                "factor": metadata.float("llama.rope.scaling.factor")?,
                "original_max_position_embeddings": metadata.integer("llama.rope.scaling.original_context_length")?,
            });
        }
        Some(name) => {
            return Err(Fault::unsupported(format!("GGUF: llama.rope.scaling.type '{name}' is not implemented")));
        }
    }
    Ok(config)
}

struct Metadata<'a>(&'a BTreeMap<String, Value>);

impl Metadata<'_> {
    fn integer(&self, key: &str) -> Result<u64, Fault> {
        let value = self.0.get(key).and_then(Value::as_u64);
        value.ok_or_else(|| Fault::invalid(format!("GGUF: {key} is missing or no number")))
    }

    fn float(&self, key: &str) -> Result<f64, Fault> {
        let value = self.0.get(key).and_then(Value::as_f64);
        value.ok_or_else(|| Fault::invalid(format!("GGUF: {key} is missing or no number")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn query(change: impl FnOnce(&mut GgufQuery)) -> GgufQuery {
        let metadata = json!({
            "llama.block_count": 1, "llama.attention.head_count": 4, "llama.attention.head_count_kv": 2,
            "llama.embedding_length": 32, "llama.feed_forward_length": 48, "llama.context_length": 64,
            "llama.attention.layer_norm_rms_epsilon": 1e-5, "llama.vocab_size": 9,
        });
        let mut tensors: BTreeMap<String, Vec<u64>> =
            GGUF_LAYER.iter().map(|(name, _)| (format!("blk.0.{name}.weight"), vec![32])).collect();
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
            assert_eq!((config.tied, config.head_dim, config.kv_heads), (tied, 8, 2));
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
        assert!(refused(&|q| drop(q.tensors.insert("rope_freqs.weight".into(), vec![4]))).contains("rope_freqs"));
        for (key, value) in [
            ("llama.expert_count", json!(8)),
            ("llama.rope.dimension_count", json!(4)),
            ("llama.rope.scaling.type", json!("su")),
        ] {
            assert!(refused(&|q| drop(q.metadata.insert(key.into(), value.clone()))).contains(key), "{key}");
        }
        for key in ["llama.block_count", "llama.feed_forward_length", "llama.attention.layer_norm_rms_epsilon"] {
            assert!(refused(&|q| drop(q.metadata.remove(key))).contains(key), "{key}");
        }
    }
}
