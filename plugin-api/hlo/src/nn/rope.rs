//! Rotary position embeddings: pairs of a head's dimensions turn with the position, each pair at its own frequency.
//!
//! Pairs are `(i, i + rotary/2 …)`, the two halves of the rotated dimensions, as Hugging Face checkpoints have them.
//! How frequencies are stretched for long contexts follows `modeling_rope_utils.py` of `transformers`; field names are
//! those of `rope_scaling` (`rope_parameters`) in `config.json`, so that [`RopeScaling`] reads from it.

use std::f64::consts::PI;

use serde::Deserialize;
use torus_abi::DType;

use crate::{
    Func, Value,
    axes::{HEAD_DIM, ROTARY},
};

/// Which dimensions turn, and how fast.
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    /// The first dimensions of a head, which turn; even. The others pass unchanged.
    pub rotary_dim: u64,
    pub theta: f64,
    pub scaling: RopeScaling,
    /// Longest sequence that is to be served. It selects the table of [`RopeScaling::Longrope`], see there.
    pub max_length: u64,
}

/// How frequencies are stretched beyond the length of pre-training.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(tag = "rope_type", rename_all = "lowercase")]
pub enum RopeScaling {
    #[default]
    Default,
    Linear {
        factor: f64,
    },
    Llama3 {
        factor: f64,
        low_freq_factor: f64,
        high_freq_factor: f64,
        original_max_position_embeddings: u64,
    },
    Yarn(Yarn),
    Longrope(LongRope),
}

/// YaRN: interpolates slow pairs, keeps fast ones, blends between.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct Yarn {
    /// Ratio of new to original length.
    pub factor: f64,
    pub original_max_position_embeddings: u64,
    /// Factor on cos and sin; by default from `factor` and the two `mscale`s.
    #[serde(default)]
    pub attention_factor: Option<f64>,
    /// Turns over the original length above which a pair is kept; 32 by default.
    #[serde(default)]
    pub beta_fast: Option<f64>,
    /// Turns below which it is interpolated; 1 by default.
    #[serde(default)]
    pub beta_slow: Option<f64>,
    #[serde(default)]
    pub mscale: Option<f64>,
    #[serde(default)]
    pub mscale_all_dim: Option<f64>,
    /// Whether the blend begins and ends at whole pairs.
    #[serde(default = "truncate")]
    pub truncate: bool,
}

/// LongRoPE: a factor for each pair, in two versions. The reference takes the long ones once any sequence of a batch
/// exceeds the original length, which makes a result depend on the neighbours and reads cached keys with other
/// frequencies than they were written with. Here the choice is made once: the long ones if sequences longer than the
/// original are served at all ([`Rope::max_length`]).
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct LongRope {
    pub short_factor: Vec<f64>,
    pub long_factor: Vec<f64>,
    pub original_max_position_embeddings: u64,
    /// Ratio of new to original length.
    pub factor: f64,
    /// Factor on cos and sin; by default from `factor`.
    #[serde(default)]
    pub attention_factor: Option<f64>,
}

fn truncate() -> bool {
    true
}

/// What [`Rope`] comes down to.
#[derive(Clone, Debug, PartialEq)]
pub struct Frequencies {
    /// Radians a position, for each pair.
    pub radians: Vec<f32>,
    /// Factor on cos and sin.
    pub attention_factor: f32,
}

impl Rope {
    /// Computed in f32 where the reference does, because checkpoints are trained with its roundings.
    pub fn frequencies(&self) -> Frequencies {
        let dim = self.rotary_dim as f32;
        let theta = self.theta as f32;
        let wavelengths: Vec<f32> = (0..self.rotary_dim / 2).map(|pair| theta.powf(2.0 * pair as f32 / dim)).collect();
        let plain = wavelengths.iter().map(|length| 1.0 / length);
        let mut attention_factor = 1.0;
        let radians = match &self.scaling {
            RopeScaling::Default => plain.collect(),
            RopeScaling::Linear { factor } => plain.map(|radians| radians / *factor as f32).collect(),
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position_embeddings } => {
                let length = *original_max_position_embeddings as f64;
                let llama3 = |radians| llama3(radians, *factor, *low_freq_factor, *high_freq_factor, length);
                plain.map(llama3).collect()
            }
            RopeScaling::Yarn(yarn) => {
                attention_factor = yarn.attention_factor();
                yarn.radians(self.theta, self.rotary_dim, &wavelengths)
            }
            RopeScaling::Longrope(long) => {
                attention_factor = long.attention_factor();
                let factors = long.factors(self.max_length);
                wavelengths.iter().zip(factors).map(|(length, factor)| 1.0 / (*factor as f32 * length)).collect()
            }
        };
        Frequencies { radians, attention_factor: attention_factor as f32 }
    }
}

/// Llama 3.1: pairs that turn slowly over the original length are slowed by `factor`, fast ones are kept.
fn llama3(radians: f32, factor: f64, low: f64, high: f64, original_length: f64) -> f32 {
    let wavelength = (2.0 * PI) as f32 / radians;
    let (length, factor) = (original_length as f32, factor as f32);
    if wavelength > (original_length / low) as f32 {
        radians / factor
    } else if wavelength < (original_length / high) as f32 {
        radians
    } else {
        let smooth = (length / wavelength - low as f32) / (high - low) as f32;
        (1.0 - smooth) * radians / factor + smooth * radians
    }
}

impl Yarn {
    fn attention_factor(&self) -> f64 {
        let scale = |mscale: f64| if self.factor <= 1.0 { 1.0 } else { 0.1 * mscale * self.factor.ln() + 1.0 };
        let nonzero = |mscale: Option<f64>| mscale.filter(|mscale| *mscale != 0.0);
        self.attention_factor.unwrap_or_else(|| match (nonzero(self.mscale), nonzero(self.mscale_all_dim)) {
            (Some(mscale), Some(all_dim)) => scale(mscale) / scale(all_dim),
            _ => scale(1.0),
        })
    }

    fn radians(&self, theta: f64, dim: u64, wavelengths: &[f32]) -> Vec<f32> {
        let (low, high) = self.blend(theta, dim as f64);
        let interpolate = |(pair, length): (usize, &f32)| {
            let ramp = ((pair as f32 - low as f32) / (high - low) as f32).clamp(0.0, 1.0);
            // As the reference: the weight of the original frequency, and its complement, each rounded.
            let keep = 1.0 - ramp;
            1.0 / (self.factor as f32 * length) * (1.0 - keep) + 1.0 / length * keep
        };
        wavelengths.iter().enumerate().map(interpolate).collect()
    }

    /// The pairs between which frequencies blend: those that make `beta_fast` and `beta_slow` turns over the original
    /// length.
    fn blend(&self, theta: f64, dim: f64) -> (f64, f64) {
        let length = self.original_max_position_embeddings as f64;
        let pair = |turns: f64| dim * (length / (turns * 2.0 * PI)).ln() / (2.0 * theta.ln());
        let or_default = |beta: Option<f64>, default| beta.filter(|beta| *beta != 0.0).unwrap_or(default);
        let (mut low, mut high) = (pair(or_default(self.beta_fast, 32.0)), pair(or_default(self.beta_slow, 1.0)));
        if self.truncate {
            (low, high) = (low.floor(), high.ceil());
        }
        (low, high) = (low.max(0.0), high.min(dim - 1.0));
        // A ramp of no width would divide by zero.
        if low == high { (low, high + 0.001) } else { (low, high) }
    }
}

impl LongRope {
    fn attention_factor(&self) -> f64 {
        let original = self.original_max_position_embeddings as f64;
        let inferred = if self.factor <= 1.0 { 1.0 } else { (1.0 + self.factor.ln() / original.ln()).sqrt() };
        self.attention_factor.unwrap_or(inferred)
    }

    fn factors(&self, max_length: u64) -> &[f64] {
        if max_length > self.original_max_position_embeddings { &self.long_factor } else { &self.short_factor }
    }
}

impl<'f> Func<'f> {
    /// Cosines and sines for positions: from `i32 [tokens]` to two tables `f32 [tokens, rotary]`.
    #[track_caller]
    pub fn rotary_tables(&'f self, positions: Value<'f>, rope: &Rope) -> (Value<'f>, Value<'f>) {
        let Frequencies { radians, attention_factor } = rope.frequencies();
        let radians = self.array(&[(ROTARY, rope.rotary_dim / 2)], &radians);
        let angles = positions.convert(DType::F32) * radians;
        let (cos, sin) = (angles.cos(), angles.sin());
        if attention_factor == 1.0 { (cos, sin) } else { (cos * attention_factor, sin * attention_factor) }
    }
}

impl<'f> Value<'f> {
    /// Turns the first `2 * rotary` dimensions of heads `[tokens, …, head_dim]` by tables `[tokens, rotary]`.
    #[track_caller]
    pub fn rotary(self, cos: Value<'f>, sin: Value<'f>) -> Self {
        let (pairs, dim) = (cos.size(ROTARY), self.size(HEAD_DIM));
        let first = self.slice(HEAD_DIM, 0..pairs).rename(HEAD_DIM, ROTARY).convert(DType::F32);
        let second = self.slice(HEAD_DIM, pairs..2 * pairs).rename(HEAD_DIM, ROTARY).convert(DType::F32);
        let turned = [first * cos - second * sin, second * cos + first * sin];
        let mut parts = turned.map(|part| part.convert(self.dtype()).rename(ROTARY, HEAD_DIM)).to_vec();
        if 2 * pairs < dim {
            parts.push(self.slice(HEAD_DIM, 2 * pairs..dim));
        }
        self.func.concatenate(HEAD_DIM, &parts)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Deserialize)]
    struct Golden {
        name: String,
        rotary_dim: u64,
        theta: f64,
        scaling: RopeScaling,
        max_length: u64,
        radians: Vec<f32>,
        attention_factor: f64,
    }

    #[test]
    fn frequencies_agree_with_transformers() {
        let goldens: Vec<Golden> = serde_json::from_str(include_str!("../../testdata/rope.json")).unwrap();
        assert_eq!(goldens.len(), 14);
        for Golden { name, rotary_dim, theta, scaling, max_length, radians, attention_factor } in goldens {
            let found = Rope { rotary_dim, theta, scaling, max_length }.frequencies();
            assert_eq!(found.radians.len(), radians.len(), "{name}");
            assert!((found.attention_factor as f64 - attention_factor).abs() < 1e-7, "{name}: {found:?}");
            for (found, expected) in found.radians.iter().zip(&radians) {
                assert!((found - expected).abs() <= 3e-7 * expected.abs(), "{name}: {found} {expected}");
            }
        }
    }
}
