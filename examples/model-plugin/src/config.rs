//! The family's `config.json`.

use torus_plugin::{
    DType, Fault, ModelOptions,
    hlo::nn::{Rope, RopeScaling},
    serde::Deserialize,
    serde_json::{self, Value},
};

/// Fields as `transformers.GraniteConfig` has them, with its defaults.
#[derive(Deserialize)]
#[serde(crate = "torus_plugin::serde", default)]
struct Fields {
    hidden_size: u64,
    intermediate_size: u64,
    num_hidden_layers: usize,
    num_attention_heads: u64,
    num_key_value_heads: Option<u64>,
    vocab_size: u64,
    max_position_embeddings: u64,
    rms_norm_eps: f32,
    rope_theta: Option<f64>,
    rope_parameters: Option<Value>,
    rope_scaling: Option<Value>,
    embedding_multiplier: f32,
    attention_multiplier: f32,
    residual_multiplier: f32,
    logits_scaling: f32,
    tie_word_embeddings: bool,
    hidden_act: String,
    attention_bias: bool,
    mlp_bias: bool,
    torch_dtype: Option<String>,
    dtype: Option<String>,
}

impl Default for Fields {
    fn default() -> Self {
        Self {
            hidden_size: 0,
            intermediate_size: 0,
            num_hidden_layers: 0,
            num_attention_heads: 0,
            num_key_value_heads: None,
            vocab_size: 0,
            max_position_embeddings: 2048,
            rms_norm_eps: 1e-6,
            rope_theta: None,
            rope_parameters: None,
            rope_scaling: None,
            embedding_multiplier: 1.0,
            attention_multiplier: 1.0,
            residual_multiplier: 1.0,
            logits_scaling: 1.0,
            tie_word_embeddings: false,
            hidden_act: "silu".to_owned(),
            attention_bias: false,
            mlp_bias: false,
            torch_dtype: None,
            dtype: None,
        }
    }
}

/// What the graph needs to know, checked.
pub struct Config {
    pub hidden_size: u64,
    pub intermediate_size: u64,
    pub num_hidden_layers: usize,
    pub num_attention_heads: u64,
    pub kv_heads: u64,
    pub head_dim: u64,
    pub vocab_size: u64,
    pub max_position_embeddings: u64,
    pub norm_eps: f32,
    pub rope: Rope,
    pub embedding_multiplier: f32,
    pub attention_multiplier: f32,
    pub residual_multiplier: f32,
    pub logits_scaling: f32,
    pub tied: bool,
    pub dtype: DType,
}

impl Config {
    pub fn new(options: &ModelOptions) -> Result<Self, Fault> {
        let fields: Fields = serde_json::from_value(options.config.clone())
            .map_err(|error| Fault::invalid(format!("config.json: {error}")))?;
        refuse_unsupported(&fields, options)?;
        let kv_heads = fields.num_key_value_heads.unwrap_or(fields.num_attention_heads);
        let (heads, hidden) = (fields.num_attention_heads, fields.hidden_size);
        if kv_heads == 0 || heads % kv_heads != 0 || hidden % (2 * heads) != 0 {
            let sizes = format!("num_attention_heads {heads}, num_key_value_heads {kv_heads}, hidden_size {hidden}");
            return Err(Fault::invalid(format!("config.json: heads do not divide evenly: {sizes}")));
        }
        let parameters = fields.rope_parameters.as_ref().unwrap_or(&Value::Null);
        let theta = parameters["rope_theta"].as_f64().or(fields.rope_theta).unwrap_or(10_000.0);
        let (head_dim, max_length) = (hidden / heads, fields.max_position_embeddings);
        Ok(Self {
            hidden_size: hidden,
            intermediate_size: fields.intermediate_size,
            num_hidden_layers: fields.num_hidden_layers,
            num_attention_heads: heads,
            kv_heads,
            head_dim,
            vocab_size: fields.vocab_size,
            max_position_embeddings: max_length,
            norm_eps: fields.rms_norm_eps,
            rope: Rope { rotary_dim: head_dim, theta, scaling: RopeScaling::Default, max_length },
            embedding_multiplier: fields.embedding_multiplier,
            attention_multiplier: fields.attention_multiplier,
            residual_multiplier: fields.residual_multiplier,
            logits_scaling: fields.logits_scaling,
            tied: fields.tie_word_embeddings,
            dtype: dtype(fields.dtype.or(fields.torch_dtype).as_deref().unwrap_or("float32"))?,
        })
    }
}

/// A field that the graph does not implement is an error that names it.
fn refuse_unsupported(fields: &Fields, options: &ModelOptions) -> Result<(), Fault> {
    let refuse = |what: &str| Err(Fault::unsupported(format!("config.json: {what}")));
    if options.parallel.tensor != 1 {
        return Err(Fault::unsupported("this model cannot be split over devices: use --tp-size 1"));
    }
    if fields.attention_bias || fields.mlp_bias {
        return refuse("attention_bias and mlp_bias are not implemented");
    }
    if fields.hidden_act != "silu" {
        return refuse(&format!("hidden_act '{}' is not implemented", fields.hidden_act));
    }
    let kind = fields.rope_parameters.as_ref().and_then(|parameters| parameters["rope_type"].as_str());
    if fields.rope_scaling.is_some() || kind.is_some_and(|kind| kind != "default") {
        return refuse("rope_scaling is not implemented");
    }
    let sizes = [
        ("hidden_size", fields.hidden_size),
        ("intermediate_size", fields.intermediate_size),
        ("num_hidden_layers", fields.num_hidden_layers as u64),
        ("num_attention_heads", fields.num_attention_heads),
        ("vocab_size", fields.vocab_size),
    ];
    match sizes.iter().find(|(_, size)| !(1..=1 << 24).contains(size)) {
        Some((name, size)) => refuse(&format!("{name} {size} is missing or out of range")),
        None => Ok(()),
    }
}

fn dtype(name: &str) -> Result<DType, Fault> {
    match name {
        "float32" => Ok(DType::F32),
        "bfloat16" => Ok(DType::Bf16),
        "float16" => Ok(DType::F16),
        _ => Err(Fault::unsupported(format!("config.json: torch_dtype '{name}' is not implemented"))),
    }
}
