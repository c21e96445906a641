//! Rotary position embeddings (Su et al., "RoFormer", 2021), in the half-split order of Hugging Face checkpoints.

use std::ops::Range;

use torus_abi::kernel::{parallel_for, threads};

use crate::{
    activations::{Element, for_levels, rms_norm},
    level::Level,
    shared::Shared,
    workspace::Buffer,
};

/// Elements from which the work is spread over threads.
const PARALLEL_ELEMENTS: usize = 1 << 12;

/// Which heads of a row turn.
#[derive(Clone, Debug)]
pub struct Heads<'a> {
    /// Head `h` of a row begins at `h * head_dim`.
    pub range: Range<usize>,
    pub head_dim: usize,
    pub norms: Option<HeadNorms<'a>>,
}

/// Before they turn, heads are scaled to a root mean square of 1 and multiplied with weights `[head_dim]`: of the first
/// heads with those of queries, of the others with those of keys.
#[derive(Clone, Copy, Debug)]
pub struct HeadNorms<'a> {
    pub queries: &'a [f32],
    pub keys: &'a [f32],
    /// How many of the heads are queries'.
    pub q_heads: usize,
    pub eps: f32,
}

/// Turns heads in place. `rows` are `[tokens, width]`; `tables` are cosines and sines `[tokens, rotary]`. Dimension
/// `i < rotary` turns with dimension `i + rotary`, the others stay.
///
/// # Panics
/// If `rotary` is more than half of a head, or a slice is too short.
pub fn rotate<X: Element>(
    level: Level,
    rows: &mut [X],
    width: usize,
    heads: &Heads<'_>,
    tables: [&[f32]; 2],
    rotary: usize,
) {
    let head_dim = heads.head_dim;
    assert!(2 * rotary <= head_dim, "{rotary} pairs of dimensions do not fit a head of {head_dim}");
    let tokens = rows.len() / width;
    let chunk = if rows.len() < PARALLEL_ELEMENTS { tokens } else { tokens.div_ceil(2 * threads()) }.max(1);
    let (begin, len) = (heads.range.start * head_dim, heads.range.len() * head_dim);
    let shared = Shared::new(rows);
    parallel_for(tokens.div_ceil(chunk), |index| {
        let mut values = Buffer::<f32>::take(len);
        for token in index * chunk..((index + 1) * chunk).min(tokens) {
            let begin = token * width + begin;
            // SAFETY: each token is one index's alone.
            let row = unsafe { shared.part(begin..begin + len) };
            let [cos, sin] = tables.map(|table| &table[token * rotary..][..rotary]);
            X::load(level, row, &mut values);
            if let Some(norms) = &heads.norms {
                norms.apply(level, &mut values, head_dim);
            }
            turn(level, &mut values, head_dim, cos, sin);
            X::store(level, &values, row);
        }
    });
}

impl HeadNorms<'_> {
    fn apply(&self, level: Level, row: &mut [f32], head_dim: usize) {
        for (index, head) in row.chunks_exact_mut(head_dim).enumerate() {
            rms_norm(level, head, if index < self.q_heads { self.queries } else { self.keys }, self.eps);
        }
    }
}

for_levels! {
    /// Turns all heads of a row by the same angles.
    fn turn(row: &mut [f32], head_dim: usize, cos: &[f32], sin: &[f32]) {
        let rotary = cos.len();
        for head in row.chunks_exact_mut(head_dim) {
            let (first, second) = head[..2 * rotary].split_at_mut(rotary);
            for ((a, b), (cos, sin)) in first.iter_mut().zip(second).zip(cos.iter().zip(sin)) {
                (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use rand::{RngExt, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    use super::*;

    #[test]
    fn pairs_turn_by_their_angle_and_the_rest_stays() {
        let angles = [0.3f32, 1.2];
        let (cos, sin) = (angles.map(f32::cos), angles.map(f32::sin));
        // One pair a head of three dimensions, two heads of which the second turns, then one element more.
        let mut rows: Vec<f32> = (0..14).map(|i| i as f32).collect();
        let heads = Heads { range: 1..2, head_dim: 3, norms: None };
        rotate(Level::Portable, &mut rows, 7, &heads, [&cos, &sin], 1);
        for token in 0..2 {
            let (a, b) = ((token * 7 + 3) as f32, (token * 7 + 4) as f32);
            assert_eq!(rows[token * 7 + 3], a * cos[token] - b * sin[token]);
            assert_eq!(rows[token * 7 + 4], b * cos[token] + a * sin[token]);
            for stays in [0, 1, 2, 5, 6] {
                assert_eq!(rows[token * 7 + stays], (token * 7 + stays) as f32);
            }
        }
    }

    #[test]
    fn heads_are_normalized_before_they_turn() {
        const HEADS: [usize; 2] = [3, 2];
        const DIM: usize = 36;
        let random = &mut ChaCha8Rng::seed_from_u64(5);
        let mut values = |len: usize| (0..len).map(|_| random.random_range(-2f32..2.0)).collect::<Vec<_>>();
        let (tokens, width, rotary) = (4, (HEADS[0] + HEADS[1] + 1) * DIM, DIM / 2);
        let (rows, queries, keys) = (values(tokens * width), values(DIM), values(DIM));
        let angles = values(tokens * rotary);
        let tables: [Vec<f32>; 2] = [f32::cos, f32::sin].map(|of| angles.iter().map(|angle| of(*angle)).collect());
        let norms = HeadNorms { queries: &queries, keys: &keys, q_heads: HEADS[0], eps: 1e-3 };
        let heads = Heads { range: 0..HEADS[0] + HEADS[1], head_dim: DIM, norms: Some(norms) };
        for level in Level::available() {
            let mut turned = rows.clone();
            rotate(level, &mut turned, width, &heads, [&tables[0], &tables[1]], rotary);
            for (index, (found, head)) in turned.chunks(DIM).zip(rows.chunks(DIM)).enumerate() {
                let (token, head_index) = (index / (width / DIM), index % (width / DIM));
                let norm = if head_index < HEADS[0] { &queries } else { &keys };
                let square: f64 = head.iter().map(|value| f64::from(*value).powi(2)).sum();
                let scale = 1.0 / (square / DIM as f64 + 1e-3).sqrt();
                let normed = |at: usize| f64::from(head[at]) * scale * f64::from(norm[at]);
                for (at, found) in found.iter().enumerate() {
                    let (sin, cos) = f64::from(angles[token * rotary + at % rotary]).sin_cos();
                    let expected = match at {
                        _ if head_index == HEADS[0] + HEADS[1] => f64::from(head[at]),
                        _ if at < rotary => normed(at) * cos - normed(at + rotary) * sin,
                        _ => normed(at) * cos + normed(at - rotary) * sin,
                    };
                    let error = (f64::from(*found) - expected).abs();
                    assert!(error < 1e-5, "{level} token {token} head {head_index} {at}: {found} is not {expected}");
                }
            }
        }
    }
}
