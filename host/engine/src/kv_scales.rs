//! The scales of caches of 8 bits: from the checkpoint, or 1, to where an attention plugin keeps them.

use torus_abi::DType;
use torus_weights::Checkpoint;

use crate::{
    blueprint::Blueprint,
    device::Preset,
    load::{StartError, invalid},
    program::ScalePart,
};

/// Whether an engine could start with this checkpoint, as far as the scales of its cache go.
///
/// # Errors
/// If the cache needs scales and the checkpoint has none, or has some and the plugin has no place for them.
pub fn check(blueprint: &Blueprint, checkpoint: &Checkpoint) -> Result<(), StartError> {
    presets(blueprint, checkpoint).map(drop)
}

/// What the parts of the pools that hold scales are set to.
///
/// # Errors
/// If the cache needs scales and the checkpoint has none, or has some and the plugin has no place for them.
pub(crate) fn presets(blueprint: &Blueprint, checkpoint: &Checkpoint) -> Result<Vec<Preset>, StartError> {
    let (arguments, description) = (blueprint.arguments()?, blueprint.description());
    let Some(kv_dtype) = blueprint.kv_dtype().filter(|dtype| matches!(dtype, DType::F8E4M3 | DType::I8)) else {
        return Ok(Vec::new());
    };
    if arguments.scales.is_empty() && kv_dtype == DType::I8 {
        // The plugin finds a scale for each token by itself.
        return Ok(Vec::new());
    }
    let plugin = blueprint.plugins()[1];
    let scales = match checkpoint.kv_scales(description.layers.len())? {
        Some(_) if arguments.scales.is_empty() => {
            let message =
                format!("plugin '{plugin}' has no place for the scales of the cache that the checkpoint brings");
            return Err(invalid("attention_backend", message));
        }
        Some(scales) => scales,
        None if kv_dtype == DType::F8E4M3 => vec![[1.0; 2]; description.layers.len()],
        None => {
            let message = format!(
                "plugin '{plugin}' keeps whole numbers that are multiplied by scales of the checkpoint (k_scale, v_scale), \
                 which has none; 'fp8_e4m3' does without"
            );
            return Err(invalid("kv_cache_dtype", message));
        }
    };
    tracing::info!(%kv_dtype, first = ?scales.first(), "scales of the KV cache");
    let preset = |ScalePart { part, layers }: &ScalePart| {
        let of_layers = layers.iter().filter_map(|layer| scales.get(*layer)).flatten();
        Preset { part: *part, bytes: of_layers.flat_map(|scale| scale.to_le_bytes()).collect() }
    };
    Ok(arguments.scales.iter().map(preset).collect())
}
