//! Attention written down plainly, in f64: what every backend must compute.

use torus_abi::model::AttentionSpec;

use crate::step::{Chunk, Schedule};

/// The new tokens of one step, padding left out or not. Rows are tokens.
pub struct Rows<'a> {
    /// `[tokens, q_heads, head_dim]`
    pub queries: &'a [f32],
    /// `[tokens, kv_heads, head_dim]`
    pub keys: &'a [f32],
    /// `[tokens, kv_heads, head_dim]`
    pub values: &'a [f32],
}

/// Keys and values of each sequence so far.
pub struct Oracle<'a> {
    spec: &'a AttentionSpec,
    schedule: &'a Schedule,
    /// By sequence, then position: key and value, each `[kv_heads, head_dim]`.
    history: Vec<Vec<[Vec<f32>; 2]>>,
}

impl<'a> Oracle<'a> {
    pub fn new(spec: &'a AttentionSpec, schedule: &'a Schedule) -> Self {
        Self { spec, schedule, history: vec![Vec::new(); schedule.sequences.len()] }
    }

    /// Attention of a step's tokens, `[tokens, q_heads, head_dim]`.
    pub fn step(&mut self, chunks: &[Chunk], rows: &Rows<'_>) -> Vec<f32> {
        let spec = self.spec;
        let (q_row, kv_row) = ((spec.q_heads * spec.head_dim) as usize, (spec.kv_heads * spec.head_dim) as usize);
        let mut token = 0;
        let mut attended = Vec::new();
        for chunk in chunks {
            self.begin(chunk);
            for _ in 0..chunk.len {
                let row = |rows: &[f32]| rows[token * kv_row..][..kv_row].to_vec();
                self.history[chunk.sequence].push([row(rows.keys), row(rows.values)]);
                attended.extend(self.attend(chunk.sequence, &rows.queries[token * q_row..][..q_row]));
                token += 1;
            }
        }
        attended
    }

    /// Takes over what the sequence shares.
    fn begin(&mut self, chunk: &Chunk) {
        if let Some((other, pages)) = self.schedule.sequences[chunk.sequence].shares
            && self.history[chunk.sequence].is_empty()
        {
            self.history[chunk.sequence] = self.history[other][..pages * self.schedule.page_size].to_vec();
        }
    }

    /// Attention of one token, the last of its sequence so far.
    fn attend(&self, sequence: usize, query: &[f32]) -> Vec<f32> {
        let spec = self.spec;
        let history = &self.history[sequence];
        let first = spec.window.map_or(0, |window| history.len().saturating_sub(window as usize));
        let (dim, group) = (spec.head_dim as usize, (spec.q_heads / spec.kv_heads) as usize);
        let mut attended = Vec::with_capacity(query.len());
        for (head, query) in query.chunks(dim).enumerate() {
            let kv = head / group * dim..(head / group + 1) * dim;
            let scores: Vec<f64> =
                history[first..].iter().map(|[key, _]| score(spec, query, &key[kv.clone()])).collect();
            let highest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let weights: Vec<f64> = scores.iter().map(|score| (score - highest).exp()).collect();
            let total: f64 = weights.iter().sum();
            attended.extend(kv.map(|column| {
                let seen = weights.iter().zip(&history[first..]);
                (seen.map(|(weight, [_, value])| weight * f64::from(value[column])).sum::<f64>() / total) as f32
            }));
        }
        attended
    }
}

fn score(spec: &AttentionSpec, query: &[f32], key: &[f32]) -> f64 {
    let dot: f64 = query.iter().zip(key).map(|(q, k)| f64::from(*q) * f64::from(*k)).sum();
    let score = dot * f64::from(spec.scale);
    spec.soft_cap.map_or(score, |cap| f64::from(cap) * (score / f64::from(cap)).tanh())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(window: Option<u64>) -> AttentionSpec {
        AttentionSpec { q_heads: 2, kv_heads: 1, head_dim: 1, scale: 1.0, window, soft_cap: None }
    }

    /// Two tokens whose keys are alike, so that values are averaged; the queries do not matter then.
    fn step(spec: &AttentionSpec) -> Vec<f32> {
        let schedule = Schedule::new(4, &[&[2]]);
        let rows = Rows { queries: &[1.0, 2.0, 3.0, 4.0], keys: &[0.5, 0.5], values: &[2.0, 4.0] };
        Oracle::new(spec, &schedule).step(&schedule.steps[0], &rows)
    }

    #[test]
    fn a_token_sees_those_before_it() {
        assert_eq!(step(&spec(None)), [2.0, 2.0, 3.0, 3.0]);
    }

    #[test]
    fn a_window_of_one_sees_only_itself() {
        assert_eq!(step(&spec(Some(1))), [2.0, 2.0, 4.0, 4.0]);
    }

    #[test]
    fn sequences_go_on_where_they_were_and_see_of_others_only_what_they_share() {
        let mut schedule = Schedule::new(1, &[&[2, 0], &[1, 1]]);
        schedule.push(Some((0, 1)), &[0, 1]);
        let spec = spec(None);
        let mut oracle = Oracle::new(&spec, &schedule);
        let first = Rows { queries: &[0.0; 6], keys: &[0.0; 3], values: &[1.0, 3.0, 10.0] };
        assert_eq!(oracle.step(&schedule.steps[0], &first), [1.0, 1.0, 2.0, 2.0, 10.0, 10.0]);
        let second = Rows { queries: &[0.0; 4], keys: &[0.0; 2], values: &[20.0, 5.0] };
        assert_eq!(oracle.step(&schedule.steps[1], &second), [15.0, 15.0, 3.0, 3.0]);
    }

    #[test]
    fn scores_are_capped() {
        let spec = AttentionSpec { soft_cap: Some(2.0), ..spec(None) };
        assert!((score(&spec, &[100.0], &[1.0]) - 2.0).abs() < 1e-9);
    }
}
