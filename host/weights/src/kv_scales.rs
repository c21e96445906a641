//! Scales of a KV cache of 8 bits, which some checkpoints bring beside their weights: for each layer one number that its
//! cached keys are multiplied by, and one for its values.
//!
//! Names are those that quantizers give (`model.layers.3.self_attn.k_proj.k_scale`, `….self_attn.attn.v_scale`): a layer's
//! number after `layers.`, and `k_scale`, `v_scale` or, for both, `kv_scale` at the end. No model plugin knows of them.
//!
//! Not here: scales of single heads or tokens.

use std::fmt;

use crate::{Checkpoint, StorageType, TensorEntry, WeightsError, elements};

/// What a scale is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Part {
    Key,
    Value,
    Both,
}

/// The scale that a tensor of this name is, and of which layer.
fn parse(name: &str) -> Option<(usize, Part)> {
    let (place, last) = name.rsplit_once('.')?;
    let part = match last {
        "k_scale" => Part::Key,
        "v_scale" => Part::Value,
        "kv_scale" => Part::Both,
        _ => return None,
    };
    let mut words = place.split('.').skip_while(|word| *word != "layers").skip(1);
    Some((words.next()?.parse().ok()?, part))
}

pub(crate) fn is_kv_scale(name: &str) -> bool {
    parse(name).is_some()
}

impl Checkpoint {
    /// The scales of keys and of values of each of `layers` layers; `None` if there are none at all.
    ///
    /// # Errors
    /// If one is not a single positive number, or if a layer lacks one that others have.
    pub fn kv_scales(&self, layers: usize) -> Result<Option<Vec<[f32; 2]>>, WeightsError> {
        let mut found = vec![[None; 2]; layers];
        let mut any = false;
        for (name, entry) in self.tensors() {
            let Some((layer, part)) = parse(name) else { continue };
            let scale = self.scale(name, entry)?;
            // Layers past the last belong to no part of the model that is served (drafts of further tokens).
            let Some(scales) = found.get_mut(layer) else { continue };
            any = true;
            match part {
                Part::Key => scales[0] = Some(scale),
                Part::Value => scales[1] = Some(scale),
                // Its own scale of a part goes before that of both.
                Part::Both => scales.iter_mut().for_each(|of| *of = of.or(Some(scale))),
            }
        }
        let whole = |(layer, scales): (usize, &[Option<f32>; 2])| match *scales {
            [Some(keys), Some(values)] => Ok([keys, values]),
            [keys, _] => {
                let missing = if keys.is_none() { "k_scale" } else { "v_scale" };
                Err(self.unusable(format_args!("layer {layer} has no {missing}, and others have one")))
            }
        };
        any.then(|| found.iter().enumerate().map(whole).collect()).transpose()
    }

    fn scale(&self, name: &str, entry: &TensorEntry) -> Result<f32, WeightsError> {
        let mut scale = [0.0];
        let read = match entry.storage {
            StorageType::F32 => elements::read_f32,
            StorageType::F16 => elements::read_f16,
            StorageType::Bf16 => elements::read_bf16,
            other => return Err(self.unusable(format_args!("{name} is stored as {other}; a scale is a float"))),
        };
        if entry.shape.iter().product::<u64>() != 1 {
            let shape = &entry.shape;
            return Err(self.unusable(format_args!("{name} is {shape:?}; a layer's cache has one scale for all heads")));
        }
        read(self.bytes(entry), &mut scale);
        match scale[0] {
            scale if scale.is_finite() && scale > 0.0 => Ok(scale),
            scale => Err(self.unusable(format_args!("{name} is {scale}, and a scale is above 0"))),
        }
    }

    fn unusable(&self, reason: fmt::Arguments<'_>) -> WeightsError {
        let reason = format!("{reason}; leave out --kv-cache-dtype, or take another checkpoint");
        WeightsError::Unsupported { path: self.path().to_owned(), reason }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{folder, safetensors_file};

    fn scales(tensors: &[(&str, &[f32])], layers: usize) -> Result<Option<Vec<[f32; 2]>>, String> {
        let shapes: Vec<_> = tensors.iter().map(|(_, values)| [values.len() as u64]).collect();
        let tensors: Vec<_> =
            tensors.iter().zip(&shapes).map(|((name, values), shape)| (*name, &shape[..], *values)).collect();
        let folder = folder(&[("model.safetensors", &safetensors_file(&tensors))]);
        Checkpoint::open_folder(folder.path()).unwrap().kv_scales(layers).map_err(|error| error.to_string())
    }

    #[test]
    fn scales_are_found_under_the_names_of_quantizers() {
        let found = scales(
            &[
                ("model.layers.0.self_attn.k_proj.k_scale", &[0.5]),
                ("model.layers.0.self_attn.v_proj.v_scale", &[0.25]),
                ("model.layers.1.self_attn.attn.kv_scale", &[3.0]),
                ("model.layers.1.self_attn.attn.v_scale", &[2.0]),
                ("model.layers.2.self_attn.k_scale", &[9.0]),
                ("model.layers.0.self_attn.k_proj.weight_scale", &[7.0]),
            ],
            2,
        );
        assert_eq!(found, Ok(Some(vec![[0.5, 0.25], [3.0, 2.0]])));
        assert_eq!(scales(&[("model.layers.0.mlp.weight", &[1.0])], 1), Ok(None));
    }

    #[test]
    fn what_is_no_scale_is_said() {
        let (key, value) = ("model.layers.0.self_attn.k_scale", "model.layers.0.self_attn.v_scale");
        let refused = |tensors: &[(&str, &[f32])], layers| scales(tensors, layers).unwrap_err();
        assert!(refused(&[(key, &[0.5]), (value, &[0.5])], 2).contains("layer 1 has no k_scale"));
        assert!(refused(&[(key, &[0.5])], 1).contains("layer 0 has no v_scale"));
        assert!(refused(&[(key, &[0.5, 0.5]), (value, &[0.5])], 1).contains("k_scale is [2]; a layer's cache"));
        for wrong in [0.0, -1.0, f32::NAN] {
            assert!(refused(&[(key, &[wrong]), (value, &[0.5])], 1).contains("and a scale is above 0"));
        }
    }
}
