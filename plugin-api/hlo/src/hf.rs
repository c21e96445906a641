//! What every family reads in the same way from a Hugging Face `config.json`. A family declares its own fields, with
//! its own defaults, and hands their values to these functions; what they refuse is named after the field.

use serde::de::DeserializeOwned;
use serde_json::Value;
use torus_abi::{
    DType,
    fault::Fault,
    fragment::Activation,
    model::{ModelOptions, Parallel},
};

use crate::{
    Heads,
    nn::{Rope, RopeScaling},
};

/// Most layers that a config may ask for; a larger number is taken for a mistake before anything is built for it.
const LAYERS_MAX: usize = 1000;

/// The fields of the config as a family declares them. Quantized checkpoints are refused.
pub fn fields<T: DeserializeOwned>(options: &ModelOptions) -> Result<T, Fault> {
    if options.config.get("quantization_config").is_some_and(|value| !value.is_null()) {
        return Err(unsupported("quantization_config: quantized checkpoints are read from GGUF only"));
    }
    serde_json::from_value(options.config.clone()).map_err(|error| Fault::invalid(format!("config.json: {error}")))
}

/// That a field of the config asks for what the family does not do.
pub fn unsupported(message: impl std::fmt::Display) -> Fault {
    Fault::unsupported(format!("config.json: {message}"))
}

/// Refuses a number of layers or a size, given with the name of its field, that cannot be meant.
pub fn check_sizes(layers: usize, sizes: &[(&str, u64)]) -> Result<(), Fault> {
    if !(1..=LAYERS_MAX).contains(&layers) {
        return Err(unsupported(format!("num_hidden_layers {layers} is not between 1 and {LAYERS_MAX}")));
    }
    match sizes.iter().find(|(_, size)| !(1..=1 << 31).contains(size)) {
        Some((name, size)) => Err(unsupported(format!("{name} {size} is out of range"))),
        None => Ok(()),
    }
}

/// Head counts and size: as many KV heads as query heads, and heads that divide `hidden`, unless given.
pub fn heads(q_heads: u64, kv_heads: Option<u64>, head_dim: Option<u64>, hidden: u64) -> Result<Heads, Fault> {
    let invalid = |message: String| Err(Fault::invalid(format!("config.json: {message}")));
    let kv_heads = kv_heads.unwrap_or(q_heads);
    if !(1..=1 << 16).contains(&q_heads) || kv_heads == 0 || !q_heads.is_multiple_of(kv_heads) {
        return invalid(format!("num_attention_heads {q_heads} is no multiple of num_key_value_heads {kv_heads}"));
    }
    let head_dim = match head_dim {
        Some(size) => size,
        None if hidden.is_multiple_of(q_heads) => hidden / q_heads,
        None => return invalid(format!("hidden_size {hidden} is no multiple of num_attention_heads {q_heads}")),
    };
    if head_dim == 0 || !head_dim.is_multiple_of(2) || head_dim > 1 << 16 {
        return invalid(format!("head_dim {head_dim} must be even and positive"));
    }
    Ok(Heads { q_heads, kv_heads, head_dim })
}

/// The heads of one of the devices that share a model. Keys' and values' go to several if there are fewer than devices.
/// `split` are the other sizes that are cut, with the names of their fields.
pub fn shard(parallel: Parallel, heads: Heads, split: &[(&str, u64)]) -> Result<Heads, Fault> {
    let devices = u64::from(parallel.tensor);
    let refused = |name: &str, size: u64| {
        let fitting: Vec<_> = (1..=size.min(64)).filter(|n| size.is_multiple_of(*n)).map(|n| n.to_string()).collect();
        let fitting = fitting.join(", ");
        Err(unsupported(format!("{name} {size} does not divide over {devices} devices; give a --tp-size of {fitting}")))
    };
    if devices == 0 {
        return Err(Fault::invalid("a model needs a device: --tp-size is 0"));
    }
    let Heads { q_heads, kv_heads, head_dim } = heads;
    let uneven = |(_, size): &&(&str, u64)| !size.is_multiple_of(devices);
    if let Some((name, size)) = [("num_attention_heads", q_heads)].iter().chain(split).find(uneven) {
        return refused(name, *size);
    }
    if !kv_heads.is_multiple_of(devices) && !devices.is_multiple_of(kv_heads) {
        return refused("num_key_value_heads", kv_heads);
    }
    Ok(Heads { q_heads: q_heads / devices, kv_heads: (kv_heads / devices).max(1), head_dim })
}

/// Rotary embeddings of whole heads. `parameters` is the object `rope_parameters`, or the older `rope_scaling`, which
/// has its `rope_theta` beside it: `theta`.
pub fn rope(parameters: Option<&Value>, theta: Option<f64>, head_dim: u64, max_length: u64) -> Result<Rope, Fault> {
    const DEFAULT_THETA: f64 = 10_000.0;
    let parameters = parameters.filter(|value| !value.is_null());
    let theta = parameters.and_then(|value| value["rope_theta"].as_f64()).or(theta).unwrap_or(DEFAULT_THETA);
    let scaling = parameters.map_or(Ok(RopeScaling::Default), |value| rope_scaling(value, max_length))?;
    Ok(Rope { rotary_dim: head_dim, theta, scaling, max_length })
}

fn rope_scaling(parameters: &Value, max_length: u64) -> Result<RopeScaling, Fault> {
    let Some(mut fields) = parameters.as_object().cloned() else {
        return Err(Fault::invalid("config.json: rope_scaling is no object"));
    };
    if let Some((name, _)) = fields.iter().find(|(_, value)| value.is_object()) {
        return Err(unsupported(format!("rope_parameters.{name}: layers that differ are not implemented")));
    }
    if let Some(factor) = parameters["partial_rotary_factor"].as_f64().filter(|factor| *factor != 1.0) {
        return Err(unsupported(format!("partial_rotary_factor {factor} is not implemented")));
    }
    // Older checkpoints say `type`; the name of the field is the only difference.
    let name = parameters["rope_type"].as_str().or(parameters["type"].as_str()).unwrap_or("default").to_owned();
    fields.insert("rope_type".into(), name.clone().into());
    fields.entry("original_max_position_embeddings").or_insert(max_length.into());
    serde_json::from_value(fields.into()).map_err(|error| unsupported(format!("rope_scaling '{name}': {error}")))
}

/// The activation function that the value of `field` names.
pub fn activation(field: &str, name: &str) -> Result<Activation, Fault> {
    match name {
        "silu" | "swish" => Ok(Activation::Silu),
        "gelu" => Ok(Activation::Gelu),
        "gelu_new" | "gelu_pytorch_tanh" => Ok(Activation::GeluTanh),
        "relu" => Ok(Activation::Relu),
        _ => Err(unsupported(format!("{field} '{name}' is not implemented"))),
    }
}

/// The value of `dtype`, or of the older `torch_dtype`.
pub fn dtype(name: Option<&str>) -> Result<DType, Fault> {
    match name.unwrap_or("float32") {
        "float32" | "float" => Ok(DType::F32),
        "bfloat16" => Ok(DType::Bf16),
        "float16" | "half" => Ok(DType::F16),
        name => Err(unsupported(format!("torch_dtype '{name}' is not implemented"))),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn rope_is_read_from_both_forms() {
        let old = rope(Some(&json!({"type": "linear", "factor": 2.0})), Some(5e5), 8, 64);
        let new = rope(Some(&json!({"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5})), None, 8, 64);
        assert_eq!(old, new);
        let plain = Rope { rotary_dim: 8, theta: 10_000.0, scaling: RopeScaling::Default, max_length: 64 };
        assert_eq!(rope(Some(&Value::Null), None, 8, 64).unwrap(), plain);
    }

    #[test]
    fn the_original_length_is_the_longest_unless_given() {
        let original = |parameters: Value| match rope(Some(&parameters), None, 8, 64).unwrap().scaling {
            RopeScaling::Yarn(yarn) => yarn.original_max_position_embeddings,
            other => panic!("{other:?}"),
        };
        assert_eq!(original(json!({"rope_type": "yarn", "factor": 2.0})), 64);
        assert_eq!(original(json!({"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32})), 32);
    }

    #[test]
    fn rope_that_would_be_read_wrongly_is_refused() {
        let refused = |parameters: Value| rope(Some(&parameters), None, 8, 64).unwrap_err().message;
        assert!(refused(json!({"type": "dynamic", "factor": 2.0})).contains("rope_scaling 'dynamic'"));
        assert!(refused(json!({"full_attention": {"rope_theta": 1e6}})).contains("full_attention"));
        assert!(refused(json!({"partial_rotary_factor": 0.5})).contains("partial_rotary_factor"));
        assert!(refused(json!("yarn")).contains("rope_scaling"));
    }

    #[test]
    fn heads_are_shared_out_or_the_numbers_are_named() {
        let heads = Heads { q_heads: 12, kv_heads: 2, head_dim: 8 };
        let shared = |tensor| shard(Parallel { tensor }, heads, &[("intermediate_size", 20)]);
        let counts = |tensor| shared(tensor).map(|heads| (heads.q_heads, heads.kv_heads));
        assert_eq!((counts(1), counts(2), counts(4)), (Ok((12, 2)), Ok((6, 1)), Ok((3, 1))));
        let refused = |tensor| shared(tensor).unwrap_err().message;
        let message =
            "config.json: num_attention_heads 12 does not divide over 5 devices; give a --tp-size of 1, 2, 3, 4, 6, 12";
        assert_eq!(refused(5), message);
        assert!(refused(3).contains("intermediate_size 20 does not divide over 3 devices"), "{}", refused(3));
        let odd = shard(Parallel { tensor: 3 }, heads, &[]).unwrap_err().message;
        assert!(odd.contains("num_key_value_heads 2 does not divide over 3 devices"), "{odd}");
        assert!(refused(0).contains("--tp-size"));
    }

    #[test]
    fn head_sizes_follow_from_the_hidden_size_unless_given() {
        assert_eq!(heads(4, None, None, 32), Ok(Heads { q_heads: 4, kv_heads: 4, head_dim: 8 }));
        assert_eq!(heads(4, Some(2), Some(6), 31), Ok(Heads { q_heads: 4, kv_heads: 2, head_dim: 6 }));
        for (q_heads, kv_heads, head_dim) in [(4, Some(3), None), (0, None, None), (4, None, Some(7)), (5, None, None)]
        {
            assert!(heads(q_heads, kv_heads, head_dim, 32).is_err(), "{q_heads} {kv_heads:?} {head_dim:?}");
        }
    }
}
