//! The `config.json` of both generations.

use serde::Deserialize;
use serde_json::Value;
use torus_abi::{
    DType,
    fault::Fault,
    fragment::Activation,
    model::{ModelOptions, Parallel},
};
use torus_hlo::{Heads, hf, nn::Rope};

/// Which of the two architectures a checkpoint is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Generation {
    Qwen2,
    Qwen3,
}

impl Generation {
    pub fn architecture(self) -> &'static str {
        match self {
            Generation::Qwen2 => "Qwen2ForCausalLM",
            Generation::Qwen3 => "Qwen3ForCausalLM",
        }
    }

    /// The first of the config's `architectures` that is of this family.
    fn of(architectures: &[String]) -> Result<Self, Fault> {
        let known = [Generation::Qwen2, Generation::Qwen3];
        let named = |name: &String| known.into_iter().find(|generation| generation.architecture() == name);
        architectures.iter().find_map(named).ok_or_else(|| {
            hf::unsupported(format!(
                "architectures {architectures:?}: none is {} or {}",
                known[0].architecture(),
                known[1].architecture()
            ))
        })
    }
}

/// What the graph needs to know, checked.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    pub generation: Generation,
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
    pub qkv_bias: bool,
    pub o_bias: bool,
    pub dtype: DType,
}

/// Fields as `transformers.Qwen2Config` and `Qwen3Config` have them, with their defaults.
#[derive(Deserialize)]
struct Fields {
    #[serde(default)]
    architectures: Vec<String>,
    hidden_size: u64,
    intermediate_size: u64,
    num_hidden_layers: usize,
    num_attention_heads: u64,
    #[serde(default = "num_key_value_heads")]
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
    partial_rotary_factor: Option<f64>,
    #[serde(default)]
    tie_word_embeddings: bool,
    /// Of Qwen3 alone: Qwen2 has biases on queries, keys and values and none on the output, whatever this says.
    #[serde(default)]
    attention_bias: bool,
    #[serde(default)]
    use_sliding_window: bool,
    #[serde(default = "sliding_window")]
    sliding_window: Option<u64>,
    #[serde(default = "max_window_layers")]
    max_window_layers: usize,
    layer_types: Option<Vec<String>>,
    #[serde(default = "is_causal")]
    is_causal: bool,
    /// Of the checkpoints for a million tokens; `transformers` does not read it.
    dual_chunk_attention_config: Option<Value>,
    torch_dtype: Option<String>,
    dtype: Option<String>,
}

fn num_key_value_heads() -> Option<u64> {
    Some(32)
}

/// Of Qwen3; Qwen2 divides `hidden_size` by the heads.
const QWEN3_HEAD_DIM: u64 = 128;

fn max_position_embeddings() -> u64 {
    32_768
}

fn rms_norm_eps() -> f32 {
    1e-6
}

fn hidden_act() -> String {
    "silu".into()
}

fn sliding_window() -> Option<u64> {
    Some(4096)
}

fn max_window_layers() -> usize {
    28
}

fn is_causal() -> bool {
    true
}

impl Config {
    pub fn new(options: &ModelOptions) -> Result<Self, Fault> {
        let fields: Fields = hf::fields(options)?;
        fields.refuse_unsupported()?;
        let generation = Generation::of(&fields.architectures)?;
        let default_head_dim = (generation == Generation::Qwen3).then_some(QWEN3_HEAD_DIM);
        let head_dim = fields.head_dim.or(default_head_dim);
        let hidden = fields.hidden_size;
        let heads = hf::heads(fields.num_attention_heads, fields.num_key_value_heads, head_dim, hidden)?;
        let context_length = fields.max_position_embeddings;
        let rope = fields.rope_parameters.as_ref().or(fields.rope_scaling.as_ref());
        Ok(Self {
            generation,
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
            qkv_bias: generation == Generation::Qwen2 || fields.attention_bias,
            o_bias: generation == Generation::Qwen3 && fields.attention_bias,
        })
    }

    /// Queries and keys of each head are normalized before they turn.
    pub fn qk_norm(&self) -> bool {
        self.generation == Generation::Qwen3
    }
}

impl Fields {
    fn refuse_unsupported(&self) -> Result<(), Fault> {
        let refuse = |message: String| Err(hf::unsupported(message));
        if let Some(factor) = self.partial_rotary_factor.filter(|factor| *factor != 1.0) {
            return refuse(format!("partial_rotary_factor {factor} is not implemented for this family"));
        }
        if !self.is_causal {
            return refuse("is_causal: attention to later tokens is not implemented".into());
        }
        if self.dual_chunk_attention_config.is_some() {
            return refuse(
                "dual_chunk_attention_config is not implemented: remove it to serve with full attention".into(),
            );
        }
        match &self.layer_types {
            Some(types) => {
                if let Some(name) = types.iter().find(|name| *name != "full_attention") {
                    return refuse(format!("layer_types: '{name}' is not implemented for this family"));
                }
            }
            // The layers from `max_window_layers` on slide.
            None => {
                let window = self.sliding_window.filter(|_| self.use_sliding_window);
                if let Some(window) = window.filter(|_| self.max_window_layers < self.num_hidden_layers) {
                    return refuse(format!("use_sliding_window: a window of {window} tokens is not implemented"));
                }
            }
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

    fn open(architecture: &str, change: impl FnOnce(&mut Value)) -> Result<Config, Fault> {
        let mut config = json!({
            "architectures": [architecture], "hidden_size": 64, "intermediate_size": 20,
            "num_hidden_layers": 2, "num_attention_heads": 32, "vocab_size": 31,
        });
        change(&mut config);
        Config::new(&ModelOptions { config, parallel: Default::default() })
    }

    fn qwen2(change: impl FnOnce(&mut Value)) -> Result<Config, Fault> {
        open("Qwen2ForCausalLM", change)
    }

    fn qwen3(change: impl FnOnce(&mut Value)) -> Result<Config, Fault> {
        open("Qwen3ForCausalLM", change)
    }

    #[test]
    fn defaults_are_those_of_transformers() {
        for config in [qwen2(|_| {}).unwrap(), qwen3(|_| {}).unwrap()] {
            assert_eq!((config.heads.q_heads, config.heads.kv_heads, config.context_length), (32, 32, 32_768));
            assert_eq!((config.norm_eps, config.rope.theta, config.tied), (1e-6, 10_000.0, false));
            assert_eq!((config.activation, config.dtype), (Activation::Silu, DType::F32));
        }
        assert_eq!(qwen2(|_| {}).unwrap().heads.head_dim, 2);
        assert_eq!(qwen3(|_| {}).unwrap().heads.head_dim, 128);
        assert_eq!(qwen2(|c| c["num_key_value_heads"] = Value::Null).unwrap().heads.kv_heads, 32);
    }

    #[test]
    fn the_generations_differ_in_biases_and_norms() {
        let of = |config: Result<Config, Fault>| {
            let config = config.unwrap();
            [config.qkv_bias, config.o_bias, config.qk_norm()]
        };
        let biased = |config: &mut Value| config["attention_bias"] = json!(true);
        assert_eq!(of(qwen2(|_| {})), [true, false, false]);
        assert_eq!(of(qwen2(biased)), [true, false, false]);
        assert_eq!(of(qwen3(|_| {})), [false, false, true]);
        assert_eq!(of(qwen3(biased)), [true, true, true]);
    }

    #[test]
    fn windows_that_no_layer_has_are_accepted() {
        let off = |c: &mut Value| c["sliding_window"] = json!(64);
        let beyond_the_last = |c: &mut Value| {
            c["use_sliding_window"] = json!(true);
            c["max_window_layers"] = json!(2);
        };
        let listed = |c: &mut Value| c["layer_types"] = json!(["full_attention", "full_attention"]);
        for change in [off, beyond_the_last, listed] {
            assert_eq!(qwen3(change).unwrap(), qwen3(|_| {}).unwrap());
        }
    }

    #[test]
    fn what_the_graph_does_not_do_is_named() {
        for (field, value) in [
            ("architectures", json!(["Qwen2MoeForCausalLM"])),
            ("dual_chunk_attention_config", json!({"chunk_size": 262144})),
            ("hidden_act", json!("mish")),
            ("is_causal", json!(false)),
            ("layer_types", json!(["full_attention", "sliding_attention"])),
            ("num_hidden_layers", json!(0)),
            ("num_key_value_heads", json!(5)),
            ("partial_rotary_factor", json!(0.5)),
            ("quantization_config", json!({"quant_method": "awq"})),
            ("rope_scaling", json!({"type": "dynamic", "factor": 2.0})),
            ("torch_dtype", json!("float8_e4m3fn")),
        ] {
            let refused = qwen2(|c| c[field] = value).unwrap_err().message;
            assert!(refused.contains(field), "{field}: {refused}");
        }
        let window = qwen2(|c| {
            c["use_sliding_window"] = json!(true);
            c["max_window_layers"] = json!(1);
        });
        let message = window.unwrap_err().message;
        assert!(message.contains("use_sliding_window") && message.contains("4096"), "{message}");
    }
}
