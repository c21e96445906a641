//! Rotary position embeddings (Su et al., "RoFormer", 2021), in the half-split order of Hugging Face checkpoints.

use std::ops::Range;

use torus_abi::kernel::{parallel_for, threads};

use crate::{
    activations::{Element, for_levels},
    level::Level,
    shared::Shared,
    workspace::Buffer,
};

/// Elements from which the work is spread over threads.
const PARALLEL_ELEMENTS: usize = 1 << 15;

/// Turns heads in place. `rows` are `[tokens, width]`, in which head `h` begins at `h * head_dim`; `tables` are cosines
/// and sines `[tokens, rotary]`. Dimension `i < rotary` turns with dimension `i + rotary`, the others stay.
///
/// # Panics
/// If `rotary` is more than half of a head, or a slice is too short.
pub fn rotate<X: Element>(
    level: Level,
    rows: &mut [X],
    width: usize,
    heads: Range<usize>,
    head_dim: usize,
    tables: [&[f32]; 2],
    rotary: usize,
) {
    assert!(2 * rotary <= head_dim, "{rotary} pairs of dimensions do not fit a head of {head_dim}");
    let tokens = rows.len() / width;
    let chunk = if rows.len() < PARALLEL_ELEMENTS { tokens } else { tokens.div_ceil(2 * threads()) }.max(1);
    let (begin, len) = (heads.start * head_dim, heads.len() * head_dim);
    let shared = Shared::new(rows);
    parallel_for(tokens.div_ceil(chunk), |index| {
        let mut values = Buffer::<f32>::take(len);
        for token in index * chunk..((index + 1) * chunk).min(tokens) {
            let begin = token * width + begin;
            // SAFETY: each token is one index's alone.
            let row = unsafe { shared.part(begin..begin + len) };
            let [cos, sin] = tables.map(|table| &table[token * rotary..][..rotary]);
            X::load(level, row, &mut values);
            turn(level, &mut values, head_dim, cos, sin);
            X::store(level, &values, row);
        }
    });
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
    use super::*;

    #[test]
    fn pairs_turn_by_their_angle_and_the_rest_stays() {
        let angles = [0.3f32, 1.2];
        let (cos, sin) = (angles.map(f32::cos), angles.map(f32::sin));
        // One pair a head of three dimensions, two heads of which the second turns, then one element more.
        let mut rows: Vec<f32> = (0..14).map(|i| i as f32).collect();
        rotate(Level::Portable, &mut rows, 7, 1..2, 3, [&cos, &sin], 1);
        for token in 0..2 {
            let (a, b) = ((token * 7 + 3) as f32, (token * 7 + 4) as f32);
            assert_eq!(rows[token * 7 + 3], a * cos[token] - b * sin[token]);
            assert_eq!(rows[token * 7 + 4], b * cos[token] + a * sin[token]);
            for stays in [0, 1, 2, 5, 6] {
                assert_eq!(rows[token * 7 + stays], (token * 7 + stays) as f32);
            }
        }
    }
}
