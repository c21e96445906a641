//! Names and shapes of the family's tensors.

use torus_plugin::{LinearRole, WeightRole, WeightSource, WeightSpec};

use crate::config::Config;

/// The weights of the model, in the order of the forward pass. A weight with several sources stacks their rows.
pub fn weights(config: &Config) -> Vec<WeightSpec> {
    let (hidden, intermediate, vocab) = (config.hidden_size, config.intermediate_size, config.vocab_size);
    let (queries, keys) = (config.num_attention_heads * config.head_dim, config.kv_heads * config.head_dim);
    let embed = if config.tied { WeightRole::EmbedAndHead } else { WeightRole::Embed };
    let mut weights = vec![matrix("embed", embed, hidden, &[("model.embed_tokens", vocab)])];
    for i in 0..config.num_hidden_layers {
        let name = |name: &str| format!("layers.{i}.{name}");
        let tensor = |name: &str| format!("model.layers.{i}.{name}");
        let linear = |role, weight: &str, input: u64, sources: &[(&str, u64)]| {
            let sources: Vec<_> = sources.iter().map(|(source, rows)| (tensor(source), *rows)).collect();
            let sources: Vec<_> = sources.iter().map(|(source, rows)| (source.as_str(), *rows)).collect();
            matrix(&name(weight), WeightRole::Linear(role), input, &sources)
        };
        let qkv = [("self_attn.q_proj", queries), ("self_attn.k_proj", keys), ("self_attn.v_proj", keys)];
        let gate_up = [("mlp.gate_proj", intermediate), ("mlp.up_proj", intermediate)];
        weights.extend([
            norm(&name("attention_norm"), &tensor("input_layernorm"), hidden),
            linear(LinearRole::Column, "qkv", hidden, &qkv),
            linear(LinearRole::Row, "o", queries, &[("self_attn.o_proj", hidden)]),
            norm(&name("mlp_norm"), &tensor("post_attention_layernorm"), hidden),
            linear(LinearRole::Column, "gate_up", hidden, &gate_up),
            linear(LinearRole::Row, "down", intermediate, &[("mlp.down_proj", hidden)]),
        ]);
    }
    weights.push(norm("norm", "model.norm", hidden));
    if !config.tied {
        weights.push(matrix("head", WeightRole::Linear(LinearRole::Head), hidden, &[("lm_head", vocab)]));
    }
    weights
}

fn matrix(name: &str, role: WeightRole, input: u64, sources: &[(&str, u64)]) -> WeightSpec {
    WeightSpec {
        name: name.to_owned(),
        shape: vec![sources.iter().map(|(_, rows)| rows).sum(), input],
        role,
        sources: sources.iter().map(|(tensor, rows)| source(tensor, vec![*rows, input])).collect(),
    }
}

fn norm(name: &str, tensor: &str, size: u64) -> WeightSpec {
    let sources = vec![source(tensor, vec![size])];
    WeightSpec { name: name.to_owned(), shape: vec![size], role: WeightRole::Vector, sources }
}

fn source(tensor: &str, shape: Vec<u64>) -> WeightSource {
    WeightSource { tensor: format!("{tensor}.weight"), shape, transforms: Vec::new() }
}
