//! The family's `config.json`.

use serde::Deserialize;
use serde_json::Value;
use torus_abi::{
    DType,
    fault::Fault,
    fragment::Activation,
    model::{ModelOptions, Parallel},
};
use torus_hlo::{Heads, hf, nn::Rope};

/// What the graph needs to know, checked.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    pub architecture: String,
    pub hidden: u64,
    pub intermediate: u64,
    pub layers: usize,
    pub heads: Heads,
    /// Over how many devices it is split, and the heads of one of them.
    pub parallel: Parallel,
    pub shard_heads: Heads,
    pub vocab: u64,
    pub context_length: u64,
    pub norm_eps: f32,
    pub rope: Rope,
    pub activation: Activation,
    /// The output projection is the embedding.
    pub tied: bool,
    pub attention_bias: bool,
    pub mlp_bias: bool,
    pub dtype: DType,
}

/// Fields as `transformers.LlamaConfig` has them, with its defaults.
#[derive(Deserialize)]
struct Fields {
    architectures: Option<Vec<String>>,
    hidden_size: u64,
    intermediate_size: u64,
    num_hidden_layers: usize,
    num_attention_heads: u64,
    num_key_value_heads: Option<u64>,
    head_dim: Option<u64>,
    vocab_size: u64,
    #[serde(default = "max_position_embeddings")]
    max_position_embeddings: u64,
    #[serde(default = "rms_norm_eps")]
    rms_norm_eps: f32,
    #[serde(default = "hidden_act")]
    hidden_act: String,
    rope_theta: Option<f64>,
    rope_scaling: Option<Value>,
    /// Where newer checkpoints keep `rope_theta` and the scaling.
    rope_parameters: Option<Value>,
    #[serde(default)]
    tie_word_embeddings: bool,
    #[serde(default)]
    attention_bias: bool,
    #[serde(default)]
    mlp_bias: bool,
    torch_dtype: Option<String>,
    dtype: Option<String>,
    partial_rotary_factor: Option<f64>,
    sliding_window: Option<u64>,
}

fn max_position_embeddings() -> u64 {
    2048
}

fn rms_norm_eps() -> f32 {
    1e-6
}

fn hidden_act() -> String {
    "silu".into()
}

impl Config {
    pub fn new(options: &ModelOptions) -> Result<Self, Fault> {
        let fields: Fields = hf::fields(options)?;
        fields.refuse_unsupported()?;
        let hidden = fields.hidden_size;
        let heads = hf::heads(fields.num_attention_heads, fields.num_key_value_heads, fields.head_dim, hidden)?;
        let context_length = fields.max_position_embeddings;
        let rope = fields.rope_parameters.as_ref().or(fields.rope_scaling.as_ref());
        Ok(Self {
            architecture: fields.architectures.as_ref().and_then(|list| list.first()).cloned().unwrap_or_default(),
            rope: hf::rope(rope, fields.rope_theta, heads.head_dim, context_length)?,
            activation: hf::activation("hidden_act", &fields.hidden_act)?,
            dtype: hf::dtype(fields.dtype.as_deref().or(fields.torch_dtype.as_deref()))?,
            hidden,
            intermediate: fields.intermediate_size,
            layers: fields.num_hidden_layers,
            heads,
            parallel: options.parallel,
            shard_heads: hf::shard(options.parallel, heads, &[("intermediate_size", fields.intermediate_size)])?,
            vocab: fields.vocab_size,
            context_length,
            norm_eps: fields.rms_norm_eps,
            tied: fields.tie_word_embeddings,
            attention_bias: fields.attention_bias,
            mlp_bias: fields.mlp_bias,
        })
    }
}

impl Fields {
    fn refuse_unsupported(&self) -> Result<(), Fault> {
        if let Some(factor) = self.partial_rotary_factor.filter(|factor| *factor != 1.0) {
            let message = format!("partial_rotary_factor {factor} is not implemented for this family");
            return Err(hf::unsupported(message));
        }
        if let Some(window) = self.sliding_window {
            return Err(hf::unsupported(format!("sliding_window {window} is not implemented for this family")));
        }
        let sizes = [
            ("hidden_size", self.hidden_size),
            ("intermediate_size", self.intermediate_size),
            ("vocab_size", self.vocab_size),
            ("max_position_embeddings", self.max_position_embeddings),
        ];
        hf::check_sizes(self.num_hidden_layers, &sizes)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    pub(crate) fn open(change: impl FnOnce(&mut Value)) -> Result<Config, Fault> {
        let mut config = json!({
            "architectures": ["LlamaForCausalLM"], "hidden_size": 12, "intermediate_size": 20,
            "num_hidden_layers": 2, "num_attention_heads": 3, "num_key_value_heads": 1, "vocab_size": 31,
        });
        change(&mut config);
        Config::new(&ModelOptions { config, parallel: Default::default() })
    }

    #[test]
    fn defaults_are_those_of_transformers() {
        let config = open(|_| {}).unwrap();
        assert_eq!((config.heads.head_dim, config.heads.kv_heads, config.context_length), (4, 1, 2048));
        assert_eq!((config.norm_eps, config.rope.theta, config.tied), (1e-6, 10_000.0, false));
    }

    #[test]
    fn rope_parameters_are_read_from_both_places() {
        let old = open(|c| {
            c["rope_theta"] = json!(5e5);
            c["rope_scaling"] = json!({"type": "linear", "factor": 2.0});
        });
        let new = open(|c| c["rope_parameters"] = json!({"rope_theta": 5e5, "rope_type": "linear", "factor": 2.0}));
        assert_eq!(old.unwrap().rope, new.unwrap().rope);
    }

    #[test]
    fn what_the_graph_does_not_do_is_named() {
        let refused = |field: &str, value: Value| open(|c| c[field] = value).unwrap_err().message;
        for (field, value) in [
            ("hidden_act", json!("mish")),
            ("partial_rotary_factor", json!(0.5)),
            ("sliding_window", json!(64)),
            ("num_hidden_layers", json!(0)),
            ("num_key_value_heads", json!(2)),
            ("rope_scaling", json!({"type": "dynamic", "factor": 2.0})),
            ("quantization_config", json!({"quant_method": "awq"})),
        ] {
            let message = refused(field, value);
            assert!(message.contains(field), "{field}: {message}");
        }
        assert!(refused("hidden_size", json!("x")).contains("config.json"));
    }
}
