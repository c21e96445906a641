//! The family's `config.json`.

use serde::Deserialize;
use serde_json::{Value, json};
use torus_abi::{DType, fault::Fault, model::ModelOptions};
use torus_hlo::nn::{Rope, RopeScaling};

/// Fields as `transformers.GraniteConfig` has them, with its defaults.
#[derive(Deserialize)]
pub struct Config {
    pub hidden_size: u64,
    pub intermediate_size: u64,
    pub num_hidden_layers: usize,
    num_attention_heads: u64,
    num_key_value_heads: Option<u64>,
    head_dim: Option<u64>,
    pub vocab_size: u64,
    #[serde(default = "max_position_embeddings")]
    pub max_position_embeddings: u64,
    #[serde(default = "rms_norm_eps")]
    pub rms_norm_eps: f32,
    rope_theta: Option<f64>,
    /// Where newer checkpoints keep `rope_theta`.
    #[serde(default)]
    rope_parameters: Value,
    #[serde(default)]
    pub tie_word_embeddings: bool,
    /// `dtype`, or `torch_dtype` in older checkpoints.
    #[serde(skip, default = "float32")]
    pub dtype: DType,
    /// On what comes out of the embedding.
    #[serde(default = "one")]
    pub embedding_multiplier: f32,
    /// On the scores of attention, in place of `1 / sqrt(head_dim)`.
    #[serde(default = "one")]
    pub attention_multiplier: f32,
    /// On what attention and MLP add to the hidden state.
    #[serde(default = "one")]
    pub residual_multiplier: f32,
    /// Logits are divided by it.
    #[serde(default = "one")]
    pub logits_scaling: f32,
}

fn max_position_embeddings() -> u64 {
    2048
}

fn rms_norm_eps() -> f32 {
    1e-6
}

fn float32() -> DType {
    DType::F32
}

fn one() -> f32 {
    1.0
}

impl Config {
    pub fn new(options: &ModelOptions) -> Result<Self, Fault> {
        refuse_unsupported(options)?;
        let invalid = |message: String| Fault::invalid(format!("config.json: {message}"));
        let mut config = Self::deserialize(&options.config).map_err(|error| invalid(error.to_string()))?;
        config.dtype = dtype(&options.config)?;
        for (field, size, max) in [
            ("hidden_size", config.hidden_size, 1 << 24),
            ("intermediate_size", config.intermediate_size, 1 << 24),
            ("num_hidden_layers", config.num_hidden_layers as u64, 1000),
            ("num_attention_heads", config.q_heads(), 1 << 16),
            ("num_key_value_heads", config.kv_heads(), 1 << 16),
            ("vocab_size", config.vocab_size, 1 << 24),
            ("max_position_embeddings", config.max_position_embeddings, 1 << 31),
            ("head_dim", config.head_dim(), 1 << 16),
        ] {
            if !(1..=max).contains(&size) {
                return Err(invalid(format!("{field} {size} is not between 1 and {max}")));
            }
        }
        if !config.q_heads().is_multiple_of(config.kv_heads()) {
            return Err(invalid("num_attention_heads is no multiple of num_key_value_heads".into()));
        }
        if !config.head_dim().is_multiple_of(2) {
            return Err(invalid(format!("head_dim {} is odd", config.head_dim())));
        }
        Ok(config)
    }

    pub fn q_heads(&self) -> u64 {
        self.num_attention_heads
    }

    pub fn kv_heads(&self) -> u64 {
        self.num_key_value_heads.unwrap_or(self.num_attention_heads)
    }

    pub fn head_dim(&self) -> u64 {
        self.head_dim.unwrap_or(self.hidden_size / self.num_attention_heads.max(1))
    }

    pub fn rope(&self) -> Rope {
        Rope {
            rotary_dim: self.head_dim(),
            theta: self.rope_parameters["rope_theta"].as_f64().or(self.rope_theta).unwrap_or(10_000.0),
            scaling: RopeScaling::Default,
            max_length: self.max_position_embeddings,
        }
    }
}

fn dtype(config: &Value) -> Result<DType, Fault> {
    match config["dtype"].as_str().or(config["torch_dtype"].as_str()) {
        None | Some("float32") => Ok(DType::F32),
        Some("bfloat16") => Ok(DType::Bf16),
        Some("float16") => Ok(DType::F16),
        Some(name) => Err(Fault::unsupported(format!("config.json: dtype '{name}' is not implemented"))),
    }
}

/// A field that would change the result, with a value that the graph is not made for, is an error that names it.
fn refuse_unsupported(options: &ModelOptions) -> Result<(), Fault> {
    if options.parallel.tensor != 1 {
        return Err(Fault::unsupported("this model cannot be split over devices: use --tp-size 1"));
    }
    for (field, implemented) in [
        ("hidden_act", json!("silu")),
        ("attention_bias", json!(false)),
        ("mlp_bias", json!(false)),
        ("rope_scaling", json!(null)),
        ("rope_parameters/rope_type", json!("default")),
        ("quantization_config", json!(null)),
    ] {
        let value = options.config.pointer(&format!("/{field}")).unwrap_or(&Value::Null);
        if !value.is_null() && *value != implemented {
            let message = format!("config.json: {field} {value} is not implemented, only {implemented}");
            return Err(Fault::unsupported(message));
        }
    }
    Ok(())
}
