//! The family's `config.json`.

use serde::Deserialize;
use serde_json::Value;
use torus_abi::{DType, fault::Fault, fragment::Activation, model::ModelOptions};
use torus_hlo::nn::{Rope, RopeScaling};

/// What the graph needs to know, checked.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    pub architecture: String,
    pub hidden: u64,
    pub intermediate: u64,
    pub layers: usize,
    pub q_heads: u64,
    pub kv_heads: u64,
    pub head_dim: u64,
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
    quantization_config: Option<Value>,
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

/// Most layers that a config may ask for; a larger number is taken for a mistake before anything is built for it.
const LAYERS_MAX: usize = 1000;

impl Config {
    pub fn new(options: &ModelOptions) -> Result<Self, Fault> {
        let fields: Fields = serde_json::from_value(options.config.clone())
            .map_err(|error| Fault::invalid(format!("config.json: {error}")))?;
        refuse_unsupported(&fields, options)?;
        let heads = check_heads(&fields)?;
        let [q_heads, kv_heads, head_dim] = heads;
        Ok(Self {
            architecture: fields.architectures.as_ref().and_then(|list| list.first()).cloned().unwrap_or_default(),
            rope: rope(&fields, head_dim)?,
            activation: activation(&fields.hidden_act)?,
            dtype: dtype(fields.dtype.as_deref().or(fields.torch_dtype.as_deref()))?,
            hidden: fields.hidden_size,
            intermediate: fields.intermediate_size,
            layers: fields.num_hidden_layers,
            q_heads,
            kv_heads,
            head_dim,
            vocab: fields.vocab_size,
            context_length: fields.max_position_embeddings,
            norm_eps: fields.rms_norm_eps,
            tied: fields.tie_word_embeddings,
            attention_bias: fields.attention_bias,
            mlp_bias: fields.mlp_bias,
        })
    }
}

fn refuse_unsupported(fields: &Fields, options: &ModelOptions) -> Result<(), Fault> {
    let refuse = |what: String| Err(Fault::unsupported(format!("config.json: {what}")));
    if options.parallel.tensor != 1 {
        return Err(Fault::unsupported("this model cannot be split over devices yet: use --tp-size 1"));
    }
    if let Some(factor) = fields.partial_rotary_factor.filter(|factor| *factor != 1.0) {
        return refuse(format!("partial_rotary_factor {factor} is not implemented for this family"));
    }
    if let Some(window) = fields.sliding_window {
        return refuse(format!("sliding_window {window} is not implemented for this family"));
    }
    if fields.quantization_config.is_some() {
        return refuse("quantization_config: quantized checkpoints are read from GGUF only".into());
    }
    if !(1..=LAYERS_MAX).contains(&fields.num_hidden_layers) {
        return refuse(format!("num_hidden_layers {} is not between 1 and {LAYERS_MAX}", fields.num_hidden_layers));
    }
    let sizes = [
        ("hidden_size", fields.hidden_size),
        ("intermediate_size", fields.intermediate_size),
        ("vocab_size", fields.vocab_size),
        ("max_position_embeddings", fields.max_position_embeddings),
    ];
    match sizes.iter().find(|(_, size)| !(1..=1 << 31).contains(size)) {
        Some((name, size)) => refuse(format!("{name} {size} is out of range")),
        None => Ok(()),
    }
}

/// Query heads, KV heads and the size of a head.
fn check_heads(fields: &Fields) -> Result<[u64; 3], Fault> {
    let invalid = |message: String| Err(Fault::invalid(format!("config.json: {message}")));
    let q_heads = fields.num_attention_heads;
    let kv_heads = fields.num_key_value_heads.unwrap_or(q_heads);
    if q_heads == 0 || kv_heads == 0 || q_heads % kv_heads != 0 {
        return invalid(format!("num_attention_heads {q_heads} is no multiple of num_key_value_heads {kv_heads}"));
    }
    let head_dim = match fields.head_dim {
        Some(size) => size,
        None if fields.hidden_size.is_multiple_of(q_heads) => fields.hidden_size / q_heads,
        None => {
            let hidden = fields.hidden_size;
            return invalid(format!("hidden_size {hidden} is no multiple of num_attention_heads {q_heads}"));
        }
    };
    if head_dim == 0 || !head_dim.is_multiple_of(2) || head_dim > 1 << 16 {
        return invalid(format!("head_dim {head_dim} must be even and positive"));
    }
    Ok([q_heads, kv_heads, head_dim])
}

fn rope(fields: &Fields, head_dim: u64) -> Result<Rope, Fault> {
    const DEFAULT_THETA: f64 = 10_000.0;
    let parameters = fields.rope_parameters.as_ref().or(fields.rope_scaling.as_ref());
    let parameters = parameters.filter(|value| !value.is_null());
    let theta = parameters.and_then(|value| value["rope_theta"].as_f64()).or(fields.rope_theta);
    let scaling = match parameters {
        None => RopeScaling::Default,
        Some(value) => scaling(value)?,
    };
    Ok(Rope {
        rotary_dim: head_dim,
        theta: theta.unwrap_or(DEFAULT_THETA),
        scaling,
        max_length: fields.max_position_embeddings,
    })
}

fn scaling(parameters: &Value) -> Result<RopeScaling, Fault> {
    let mut parameters = parameters.clone();
    // Older checkpoints say `type`; the name of the field is the only difference.
    let name = parameters["rope_type"].as_str().or(parameters["type"].as_str()).unwrap_or("default").to_owned();
    parameters["rope_type"] = name.clone().into();
    serde_json::from_value(parameters)
        .map_err(|error| Fault::unsupported(format!("config.json: rope_scaling '{name}': {error}")))
}

fn activation(name: &str) -> Result<Activation, Fault> {
    match name {
        "silu" | "swish" => Ok(Activation::Silu),
        "gelu" => Ok(Activation::Gelu),
        "gelu_new" | "gelu_pytorch_tanh" => Ok(Activation::GeluTanh),
        "relu" => Ok(Activation::Relu),
        _ => Err(Fault::unsupported(format!("config.json: hidden_act '{name}' is not implemented"))),
    }
}

fn dtype(name: Option<&str>) -> Result<DType, Fault> {
    match name.unwrap_or("float32") {
        "float32" | "float" => Ok(DType::F32),
        "bfloat16" => Ok(DType::Bf16),
        "float16" | "half" => Ok(DType::F16),
        name => Err(Fault::unsupported(format!("config.json: torch_dtype '{name}' is not implemented"))),
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
        assert_eq!((config.head_dim, config.kv_heads, config.context_length), (4, 1, 2048));
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
