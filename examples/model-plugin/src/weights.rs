//! Names and shapes of the family's tensors.

use torus_plugin::{LinearRole, WeightRole, WeightSource, WeightSpec};

use crate::config::Config;

/// The weights of the model, in the order of the forward pass. Projections of the same input are joined, row after
/// row, so that each layer reads it once.
pub fn weights(config: &Config) -> Vec<WeightSpec> {
    let Config { hidden, intermediate, vocab, .. } = *config;
    let (queries, keys) = (config.q_heads * config.head_dim, config.kv_heads * config.head_dim);
    let (column, row) = (WeightRole::Linear(LinearRole::Column), WeightRole::Linear(LinearRole::Row));
    let embed = if config.tied { WeightRole::EmbedAndHead } else { WeightRole::Embed };

    let mut weights = vec![matrix("embed", embed, hidden, &[("model.embed_tokens", vocab)])];
    for i in 0..config.layers {
        let qkv = [("self_attn.q_proj", queries), ("self_attn.k_proj", keys), ("self_attn.v_proj", keys)];
        let gate_up = [("mlp.gate_proj", intermediate), ("mlp.up_proj", intermediate)];
        let layer = [
            norm("attention_norm", "input_layernorm", hidden),
            matrix("qkv", column, hidden, &qkv),
            matrix("o", row, queries, &[("self_attn.o_proj", hidden)]),
            norm("mlp_norm", "post_attention_layernorm", hidden),
            matrix("gate_up", column, hidden, &gate_up),
            matrix("down", row, intermediate, &[("mlp.down_proj", hidden)]),
        ];
        weights.extend(layer.map(|spec| of_layer(i, spec)));
    }
    weights.push(norm("norm", "model.norm", hidden));
    if !config.tied {
        weights.push(matrix("head", WeightRole::Linear(LinearRole::Head), hidden, &[("lm_head", vocab)]));
    }
    weights
}

/// A checkpoint may carry a copy of a tied embedding.
pub fn ignored(config: &Config) -> Vec<String> {
    if config.tied { vec!["lm_head.weight".into()] } else { vec![] }
}

/// `[out, input]`, where `out` is the rows of all `sources`.
fn matrix(name: &str, role: WeightRole, input: u64, sources: &[(&str, u64)]) -> WeightSpec {
    let shape = vec![sources.iter().map(|(_, rows)| rows).sum(), input];
    let sources = sources.iter().map(|(tensor, rows)| source(tensor, vec![*rows, input])).collect();
    WeightSpec { name: name.into(), shape, role, sources }
}

fn norm(name: &str, tensor: &str, size: u64) -> WeightSpec {
    let sources = vec![source(tensor, vec![size])];
    WeightSpec { name: name.into(), shape: vec![size], role: WeightRole::Vector, sources }
}

fn source(tensor: &str, shape: Vec<u64>) -> WeightSource {
    WeightSource::new(format!("{tensor}.weight"), shape)
}

fn of_layer(index: usize, mut spec: WeightSpec) -> WeightSpec {
    spec.name = format!("layers.{index}.{}", spec.name);
    for source in &mut spec.sources {
        source.tensor = format!("model.layers.{index}.{}", source.tensor);
    }
    spec
}
