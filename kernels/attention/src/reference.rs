//! Attention in plain loops, in `f32`: what kernels are checked against.

use half::bf16;

use crate::{
    layout::{LANES, Layout, Part},
    spec::{KvFormat, Spec},
};

/// The new tokens of one sequence, and all keys and values it has.
pub struct Sequence<'a> {
    /// `[new tokens, q_heads, head_dim]`.
    pub query: &'a [f32],
    /// `[tokens, kv_heads, head_dim]`, the new ones last.
    pub keys: &'a [f32],
    pub values: &'a [f32],
    /// The score of each query head's sink.
    pub sinks: Option<&'a [f32]>,
    /// Whether the new token `.0` sees the new token `.1`; `None`: those before it and itself.
    pub sees: Option<&'a dyn Fn(usize, usize) -> bool>,
}

impl Sequence<'_> {
    /// `[new tokens, q_heads, head_dim]`.
    pub fn attend(&self, spec: &Spec) -> Vec<f32> {
        let Spec { q_heads, kv_heads, head_dim, .. } = *spec;
        let new = self.query.len() / (q_heads * head_dim);
        let tokens = self.keys.len() / (kv_heads * head_dim);
        let old = tokens - new;
        let mut out = Vec::with_capacity(self.query.len());
        for (token, rows) in self.query.chunks(q_heads * head_dim).enumerate() {
            let position = old + token;
            let first = spec.window.map_or(0, |window| (position + 1).saturating_sub(window));
            let seen = |at: usize| match self.sees {
                Some(sees) if at >= old => sees(token, at - old),
                _ => at <= position,
            };
            let seen: Vec<_> = (first..tokens).filter(|at| seen(*at)).collect();
            for (head, query) in rows.chunks(head_dim).enumerate() {
                let row = |part: &[f32], at: usize| {
                    let from = (at * kv_heads + head / spec.group()) * head_dim;
                    part[from..from + head_dim].to_vec()
                };
                let scores = seen.iter().map(|at| score(spec, query, &row(self.keys, *at)));
                let sink = self.sinks.map(|sinks| sinks[head]);
                let weights = softmax(&scores.collect::<Vec<_>>(), sink);
                let mut sum = vec![0.0; head_dim];
                for (at, weight) in seen.iter().zip(weights) {
                    sum.iter_mut().zip(row(self.values, *at)).for_each(|(sum, value)| *sum += weight * value);
                }
                out.extend(sum);
            }
        }
        out
    }
}

fn score(spec: &Spec, query: &[f32], key: &[f32]) -> f32 {
    let score = query.iter().zip(key).map(|(q, k)| q * k).sum::<f32>() * spec.scale;
    spec.soft_cap.map_or(score, |cap| cap * (score / cap).tanh())
}

fn softmax(scores: &[f32], sink: Option<f32>) -> Vec<f32> {
    let max = scores.iter().copied().chain(sink).fold(f32::MIN, f32::max);
    let weights: Vec<_> = scores.iter().map(|score| (score - max).exp()).collect();
    let total = weights.iter().sum::<f32>() + sink.map_or(0.0, |sink| (sink - max).exp());
    weights.into_iter().map(|weight| weight / total).collect()
}

impl KvFormat {
    fn scale(self, part: Part) -> f32 {
        match self {
            Self::Bf16 => 1.0,
            Self::Fp8 { scales } | Self::Int8 { scales } => scales.of(part),
        }
    }

    /// The bits that a number is kept as, in the lowest bits of the result.
    pub fn encode(self, part: Part, number: f32) -> u32 {
        let scaled = number * self.scale(part).recip();
        match self {
            Self::Bf16 => bf16::from_f32(number).to_bits().into(),
            Self::Fp8 { .. } => encode_fp8(scaled),
            Self::Int8 { .. } => (scaled.round_ties_even().clamp(-127.0, 127.0) as i32 & 0xFF) as u32,
        }
    }

    /// The number that bits stand for.
    pub fn decode(self, part: Part, bits: u32) -> f32 {
        let signed = |magnitude: f32| if bits & 0x80 != 0 { -magnitude } else { magnitude };
        let number = match self {
            Self::Bf16 => return bf16::from_bits(bits as u16).to_f32(),
            Self::Int8 { .. } => f32::from(bits as i8),
            Self::Fp8 { .. } => match (bits >> 3) & 0xF {
                0 => 0.0,
                exponent => signed(f32::from_bits(((exponent + 120) << 23) | ((bits & 7) << 20))),
            },
        };
        number * self.scale(part)
    }
}

/// The nearest `f8E4M3FN`, halves to even, within its range; what is less than its smallest normal number, 2^-6, is 0.
fn encode_fp8(number: f32) -> u32 {
    const LARGEST: f32 = 448.0;
    const LEAST_EXPONENT: u32 = 127 - 6;
    let sign = (number.to_bits() >> 31) << 7;
    let bits = number.abs().min(LARGEST).to_bits();
    // Cuts the mantissa to three bits.
    let rounded = (bits + 0x0007_FFFF + ((bits >> 20) & 1)) >> 20;
    match rounded >> 3 {
        exponent if exponent < LEAST_EXPONENT => sign,
        exponent => sign | ((exponent - 120) << 3) | (rounded & 7),
    }
}

impl Layout {
    /// A token's words in each unit and plane, `[units, planes, 128]`, from its keys and values, `[kv_heads, head_dim]`
    /// each.
    pub fn token_words(&self, kv: KvFormat, keys: &[f32], values: &[f32]) -> Vec<i32> {
        let mut words = vec![0u32; self.units * self.planes * LANES];
        for (part, numbers) in [(Part::Key, keys), (Part::Value, values)] {
            for (i, number) in numbers.iter().enumerate() {
                let place = self.place(i / self.head_dim, part, i % self.head_dim);
                let word = (place.unit * self.planes + place.plane) * LANES + place.lane;
                words[word] |= kv.encode(part, *number) << place.shift;
            }
        }
        words.into_iter().map(|word| word as i32).collect()
    }
}
