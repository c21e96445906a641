//! The products of attention in plain Rust.

use super::{
    pages::{Compute, GROUP, key_at, value_at},
    tile::{BLOCK_TOKENS, Next},
};

pub(super) fn scores<C: Compute>(q: &[C], rows: usize, head_dim: usize, groups: &[&[C]], _: &Next, out: &mut [f32]) {
    for (q, out) in q.chunks_exact(head_dim).zip(out.chunks_exact_mut(BLOCK_TOKENS)).take(rows) {
        for (group, out) in groups.iter().zip(out.chunks_exact_mut(GROUP)) {
            out.fill(0.0);
            for (d, q) in q.iter().enumerate() {
                for (t, out) in out.iter_mut().enumerate() {
                    *out += q.to_f32() * group[key_at(C::PAIRS, t, d)].to_f32();
                }
            }
        }
    }
}

pub(super) fn weighted<C: Compute>(
    weights: &[C],
    rows: usize,
    head_dim: usize,
    groups: &[&[C]],
    _: &Next,
    sums: &mut [f32],
) {
    for (weights, sums) in weights.chunks_exact(BLOCK_TOKENS).zip(sums.chunks_exact_mut(head_dim)).take(rows) {
        for (group, weights) in groups.iter().zip(weights.chunks_exact(GROUP)) {
            let values = &group[GROUP * head_dim..];
            for (t, weight) in weights.iter().enumerate() {
                for (d, sum) in sums.iter_mut().enumerate() {
                    *sum += weight.to_f32() * values[value_at(C::PAIRS, t, d)].to_f32();
                }
            }
        }
    }
}
