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
    /// Those that occur, in the order of their first layers.
    pub kinds: Vec<Kind>,
    /// For each layer, its index into `kinds`.
    pub layers: Vec<usize>,
    pub heads: Heads,
    /// Over how many devices it is split, and the heads of one of them.
    pub parallel: Parallel,
    pub shard_heads: Heads,
    pub attention_scale: f32,
    pub attention_soft_cap: Option<f32>,
    /// Logits become `cap * tanh(logit / cap)`.
    pub final_soft_cap: Option<f32>,
    pub vocab: u64,
    pub context_length: u64,
    pub norm_eps: f32,
    pub activation: Activation,
    /// The output projection is the embedding.
    pub tied: bool,
    pub dtype: DType,
}

/// What layers of one type share.
#[derive(Clone, Debug, PartialEq)]
pub struct Kind {
    /// How many tokens are seen, the current one included; all of them if `None`.
    pub window: Option<u64>,
    pub rope: Rope,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
enum LayerType {
    SlidingAttention,
    FullAttention,
}

/// Fields as `transformers.Gemma3TextConfig` has them, with its defaults.
#[derive(Deserialize)]
struct Fields {
    architectures: Option<Vec<String>>,
    hidden_size: u64,
    intermediate_size: u64,
    num_hidden_layers: usize,
    #[serde(default = "num_attention_heads")]
    num_attention_heads: u64,
    #[serde(default = "num_key_value_heads")]
    num_key_value_heads: u64,
    #[serde(default = "head_dim")]
    head_dim: u64,
    #[serde(default = "vocab_size")]
    vocab_size: u64,
    #[serde(default = "max_position_embeddings")]
    max_position_embeddings: u64,
    #[serde(default = "rms_norm_eps")]
    rms_norm_eps: f32,
    #[serde(default = "hidden_activation")]
    hidden_activation: String,
    #[serde(default = "query_pre_attn_scalar")]
    query_pre_attn_scalar: f32,
    #[serde(default = "sliding_window")]
    sliding_window: Option<u64>,
    layer_types: Option<Vec<LayerType>>,
    /// Every so many layers one is full; older than `layer_types`.
    #[serde(alias = "_sliding_window_pattern")]
    sliding_window_pattern: Option<usize>,
    rope_theta: Option<f64>,
    rope_local_base_freq: Option<f64>,
    rope_scaling: Option<Value>,
    /// By layer type; newer than the three above.
    rope_parameters: Option<Value>,
    attn_logit_softcapping: Option<f32>,
    final_logit_softcapping: Option<f32>,
    #[serde(default = "tie_word_embeddings")]
    tie_word_embeddings: bool,
    attention_bias: Option<bool>,
    use_bidirectional_attention: Option<bool>,
    torch_dtype: Option<String>,
    dtype: Option<String>,
}

fn num_attention_heads() -> u64 {
    8
}

fn num_key_value_heads() -> u64 {
    4
}

fn head_dim() -> u64 {
    256
}

fn vocab_size() -> u64 {
    262_208
}

fn max_position_embeddings() -> u64 {
    131_072
}

fn rms_norm_eps() -> f32 {
    1e-6
}

fn hidden_activation() -> String {
    "gelu_pytorch_tanh".into()
}

fn query_pre_attn_scalar() -> f32 {
    256.0
}

fn sliding_window() -> Option<u64> {
    Some(4096)
}

fn tie_word_embeddings() -> bool {
    true
}

impl Config {
    pub fn new(options: &ModelOptions) -> Result<Self, Fault> {
        let fields: Fields = hf::fields(options)?;
        fields.refuse_unsupported()?;
        let hidden = fields.hidden_size;
        let (kv_heads, head_dim) = (Some(fields.num_key_value_heads), Some(fields.head_dim));
        let heads = hf::heads(fields.num_attention_heads, kv_heads, head_dim, hidden)?;
        let (kinds, layers) = fields.kinds()?;
        Ok(Self {
            architecture: fields.architectures.as_ref().and_then(|list| list.first()).cloned().unwrap_or_default(),
            activation: hf::activation("hidden_activation", &fields.hidden_activation)?,
            dtype: hf::dtype(fields.dtype.as_deref().or(fields.torch_dtype.as_deref()))?,
            hidden,
            intermediate: fields.intermediate_size,
            kinds,
            layers,
            heads,
            parallel: options.parallel,
            shard_heads: hf::shard(options.parallel, heads, &[("intermediate_size", fields.intermediate_size)])?,
            attention_scale: fields.query_pre_attn_scalar.sqrt().recip(),
            attention_soft_cap: fields.attn_logit_softcapping,
            final_soft_cap: fields.final_logit_softcapping,
            vocab: fields.vocab_size,
            context_length: fields.max_position_embeddings,
            norm_eps: fields.rms_norm_eps,
            tied: fields.tie_word_embeddings,
        })
    }
}

impl Fields {
    fn refuse_unsupported(&self) -> Result<(), Fault> {
        for (name, value) in
            [("attention_bias", self.attention_bias), ("use_bidirectional_attention", self.use_bidirectional_attention)]
        {
            if value == Some(true) {
                return Err(hf::unsupported(format!("{name} true is not implemented for this family")));
            }
        }
        for (name, value) in [
            ("query_pre_attn_scalar", Some(self.query_pre_attn_scalar)),
            ("attn_logit_softcapping", self.attn_logit_softcapping),
            ("final_logit_softcapping", self.final_logit_softcapping),
        ] {
            if let Some(value) = value.filter(|value| !value.is_finite() || *value <= 0.0) {
                return Err(hf::unsupported(format!("{name} {value} is not positive")));
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

    /// The kinds that occur, and that of each layer.
    fn kinds(&self) -> Result<(Vec<Kind>, Vec<usize>), Fault> {
        let types = self.layer_types()?;
        let mut occurring = types.clone();
        occurring.dedup();
        // Of two types, the second layer type that is not the first one's is the other.
        occurring.truncate(2);
        let kinds = occurring.iter().map(|layer_type| self.kind(*layer_type)).collect::<Result<_, _>>()?;
        Ok((kinds, types.iter().map(|layer_type| usize::from(*layer_type != occurring[0])).collect()))
    }

    fn layer_types(&self) -> Result<Vec<LayerType>, Fault> {
        const DEFAULT_PATTERN: usize = 6;
        if let Some(types) = &self.layer_types {
            let (types, layers) = (types.clone(), self.num_hidden_layers);
            return match types.len() == layers {
                true => Ok(types),
                false => Err(Fault::invalid(format!(
                    "config.json: layer_types has {} entries for num_hidden_layers {layers}",
                    types.len()
                ))),
            };
        }
        let pattern = self.sliding_window_pattern.unwrap_or(DEFAULT_PATTERN);
        if pattern == 0 {
            return Err(Fault::invalid("config.json: sliding_window_pattern is 0"));
        }
        let layer_type = |layer: usize| match (layer + 1).is_multiple_of(pattern) {
            true => LayerType::FullAttention,
            false => LayerType::SlidingAttention,
        };
        Ok((0..self.num_hidden_layers).map(layer_type).collect())
    }

    fn kind(&self, layer_type: LayerType) -> Result<Kind, Fault> {
        const GLOBAL_THETA: f64 = 1_000_000.0;
        const LOCAL_THETA: f64 = 10_000.0;
        let (name, theta, window) = match layer_type {
            LayerType::FullAttention => ("full_attention", self.rope_theta.unwrap_or(GLOBAL_THETA), None),
            LayerType::SlidingAttention => {
                let window = self.sliding_window.filter(|window| (1..1 << 31).contains(window));
                let reason = "config.json: sliding_window must be positive, since layers are sliding_attention";
                let window = window.ok_or_else(|| Fault::invalid(reason))?;
                ("sliding_attention", self.rope_local_base_freq.unwrap_or(LOCAL_THETA), Some(window))
            }
        };
        let parameters = match self.rope_parameters.as_ref().filter(|value| !value.is_null()) {
            Some(by_type) if by_type.get("rope_theta").is_some() || by_type.get("rope_type").is_some() => {
                return Err(hf::unsupported("rope_parameters: they must be given by layer type"));
            }
            Some(by_type) => by_type.get(name),
            // The older form scales full layers only.
            None => self.rope_scaling.as_ref().filter(|_| layer_type == LayerType::FullAttention),
        };
        let rope = hf::rope(parameters, Some(theta), self.head_dim, self.max_position_embeddings)?;
        Ok(Kind { window, rope })
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;
    use torus_hlo::nn::RopeScaling;

    use super::*;

    fn open(change: impl FnOnce(&mut Value)) -> Result<Config, Fault> {
        let mut config = json!({
            "architectures": ["Gemma3ForCausalLM"], "hidden_size": 12, "intermediate_size": 20,
            "num_hidden_layers": 7, "vocab_size": 31,
        });
        change(&mut config);
        Config::new(&ModelOptions { config, parallel: Default::default() })
    }

    #[test]
    fn defaults_are_those_of_transformers() {
        let config = open(|_| {}).unwrap();
        assert_eq!(config.heads, Heads { q_heads: 8, kv_heads: 4, head_dim: 256 });
        assert_eq!((config.attention_scale, config.norm_eps, config.tied), (1.0 / 16.0, 1e-6, true));
        assert_eq!(config.layers, [0, 0, 0, 0, 0, 1, 0]);
        let kinds: Vec<_> = config.kinds.iter().map(|kind| (kind.window, kind.rope.theta)).collect();
        assert_eq!(kinds, [(Some(4096), 10_000.0), (None, 1_000_000.0)]);
    }

    #[test]
    fn rope_parameters_are_read_from_both_places() {
        let old = open(|c| {
            c["rope_theta"] = json!(5e5);
            c["rope_local_base_freq"] = json!(2e4);
            c["rope_scaling"] = json!({"rope_type": "linear", "factor": 8.0});
        });
        let new = open(|c| {
            c["rope_parameters"] = json!({
                "full_attention": {"rope_theta": 5e5, "rope_type": "linear", "factor": 8.0},
                "sliding_attention": {"rope_theta": 2e4, "rope_type": "default"},
            });
        });
        let old = old.unwrap();
        assert_eq!(old, new.unwrap());
        assert_eq!(old.kinds[0].rope.scaling, RopeScaling::Default);
        assert_eq!(old.kinds[1].rope.scaling, RopeScaling::Linear { factor: 8.0 });
    }

    #[test]
    fn layer_types_come_from_the_list_or_the_pattern() {
        let types = |kinds: &[&str]| {
            let types: Vec<_> = kinds.iter().map(|kind| format!("{kind}_attention")).collect();
            open(|c| {
                c["num_hidden_layers"] = json!(types.len());
                c["layer_types"] = json!(types);
            })
            .unwrap()
        };
        let config = types(&["full", "full", "sliding", "full"]);
        assert_eq!((&config.layers[..], config.kinds[0].window, config.kinds.len()), (&[0, 0, 1, 0][..], None, 2));
        let config = types(&["sliding", "sliding"]);
        assert_eq!((&config.layers[..], config.kinds.len()), (&[0, 0][..], 1));
        let config = open(|c| c["sliding_window_pattern"] = json!(2)).unwrap();
        assert_eq!(config.layers, [0, 1, 0, 1, 0, 1, 0]);
    }

    #[test]
    fn what_the_graph_does_not_do_is_named() {
        for (field, value) in [
            ("hidden_activation", json!("mish")),
            ("attention_bias", json!(true)),
            ("use_bidirectional_attention", json!(true)),
            ("num_hidden_layers", json!(0)),
            ("num_key_value_heads", json!(3)),
            ("sliding_window", json!(0)),
            ("sliding_window_pattern", json!(0)),
            ("layer_types", json!(["full_attention"])),
            ("final_logit_softcapping", json!(0.0)),
            ("query_pre_attn_scalar", json!(-1.0)),
            ("rope_scaling", json!({"type": "dynamic", "factor": 2.0})),
            ("rope_parameters", json!({"rope_theta": 1e4})),
            ("quantization_config", json!({"quant_method": "awq"})),
        ] {
            let message = open(|c| c[field] = value).unwrap_err().message;
            assert!(message.contains(field), "{field}: {message}");
        }
    }
}
