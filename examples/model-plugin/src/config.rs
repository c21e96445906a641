//! The family's `config.json`.

use torus_plugin::{
    DType, Fault, ModelOptions,
    hlo::nn::{Rope, RopeScaling},
    serde_json::{Value, json},
};

/// What the graph needs to know, checked.
pub struct Config {
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
    pub dtype: DType,
    /// The output projection is the embedding.
    pub tied: bool,
    /// On what comes out of the embedding.
    pub embedding_multiplier: f32,
    /// On the scores of attention, in place of `1 / sqrt(head_dim)`.
    pub attention_multiplier: f32,
    /// On what attention and MLP add to the hidden state.
    pub residual_multiplier: f32,
    /// Logits are divided by it.
    pub logits_scaling: f32,
}

impl Config {
    /// Reads the fields of `transformers.GraniteConfig`, with its defaults.
    pub fn new(options: &ModelOptions) -> Result<Self, Fault> {
        refuse_unsupported(options)?;
        let json = &options.config;
        let size = |field: &str, default: Option<u64>, max: u64| {
            let size = if json[field].is_null() { default } else { json[field].as_u64() };
            size.filter(|size| (1..=max).contains(size))
                .ok_or_else(|| invalid(format!("{field} must be between 1 and {max}, and is {}", json[field])))
        };
        let float = |field: &str, default: f64| {
            let float = if json[field].is_null() { Some(default) } else { json[field].as_f64() };
            float.ok_or_else(|| invalid(format!("{field} must be a number, and is {}", json[field])))
        };

        let hidden = size("hidden_size", None, 1 << 24)?;
        let q_heads = size("num_attention_heads", None, 1 << 16)?;
        let kv_heads = size("num_key_value_heads", Some(q_heads), q_heads)?;
        let head_dim = size("head_dim", Some(hidden / q_heads), 1 << 16)?;
        if !q_heads.is_multiple_of(kv_heads) || !head_dim.is_multiple_of(2) {
            let heads = format!("num_attention_heads {q_heads}, num_key_value_heads {kv_heads}, head_dim {head_dim}");
            return Err(invalid(format!("{heads}: query heads come in groups, and a head's dimensions in pairs")));
        }
        let context_length = size("max_position_embeddings", Some(2048), 1 << 31)?;
        // Newer checkpoints have it in `rope_parameters`.
        let theta = json["rope_parameters"]["rope_theta"].as_f64().map_or_else(|| float("rope_theta", 1e4), Ok)?;
        Ok(Self {
            hidden,
            intermediate: size("intermediate_size", None, 1 << 24)?,
            layers: size("num_hidden_layers", None, 1000)? as usize,
            q_heads,
            kv_heads,
            head_dim,
            vocab: size("vocab_size", None, 1 << 24)?,
            context_length,
            norm_eps: float("rms_norm_eps", 1e-6)? as f32,
            rope: Rope { rotary_dim: head_dim, theta, scaling: RopeScaling::Default, max_length: context_length },
            dtype: dtype(json)?,
            tied: json["tie_word_embeddings"] == true,
            embedding_multiplier: float("embedding_multiplier", 1.0)? as f32,
            attention_multiplier: float("attention_multiplier", 1.0)? as f32,
            residual_multiplier: float("residual_multiplier", 1.0)? as f32,
            logits_scaling: float("logits_scaling", 1.0)? as f32,
        })
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

fn dtype(json: &Value) -> Result<DType, Fault> {
    match json["dtype"].as_str().or(json["torch_dtype"].as_str()).unwrap_or("float32") {
        "float32" => Ok(DType::F32),
        "bfloat16" => Ok(DType::Bf16),
        "float16" => Ok(DType::F16),
        name => Err(Fault::unsupported(format!("config.json: dtype '{name}' is not implemented"))),
    }
}

fn invalid(message: String) -> Fault {
    Fault::invalid(format!("config.json: {message}"))
}
