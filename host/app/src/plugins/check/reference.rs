//! Attention written down plainly: what every backend must compute.

use torus_abi::model::AttentionSpec;

use super::batch::Chunk;

/// Keys and values of each request so far.
#[derive(Default)]
pub struct Reference {
    /// By request, then position: `[kv_heads, head_dim]`.
    keys: Vec<Vec<Vec<f32>>>,
    values: Vec<Vec<Vec<f32>>>,
}

/// The new tokens of one step, padding left out. Rows are tokens.
pub struct Tokens<'a> {
    /// `[tokens, q_heads, head_dim]`
    pub queries: &'a [f32],
    /// `[tokens, kv_heads, head_dim]`
    pub keys: &'a [f32],
    /// `[tokens, kv_heads, head_dim]`
    pub values: &'a [f32],
}

impl Reference {
    /// Attention of a step's tokens, `[tokens, q_heads, head_dim]`.
    pub fn step(&mut self, spec: &AttentionSpec, chunks: &[Chunk], tokens: &Tokens<'_>) -> Vec<f32> {
        let (q_row, kv_row) = ((spec.q_heads * spec.head_dim) as usize, (spec.kv_heads * spec.head_dim) as usize);
        let mut rows = tokens.queries.chunks(q_row).zip(tokens.keys.chunks(kv_row).zip(tokens.values.chunks(kv_row)));
        let mut attended = Vec::new();
        for chunk in chunks {
            let requests = self.keys.len().max(chunk.request + 1);
            self.keys.resize(requests, Vec::new());
            self.values.resize(requests, Vec::new());
            for (query, (key, value)) in rows.by_ref().take(chunk.len) {
                self.keys[chunk.request].push(key.to_vec());
                self.values[chunk.request].push(value.to_vec());
                attended.extend(self.attend(spec, chunk.request, query));
            }
        }
        attended
    }

    /// Attention of one token, the last of its request so far.
    fn attend(&self, spec: &AttentionSpec, request: usize, query: &[f32]) -> Vec<f32> {
        let (keys, values) = (&self.keys[request], &self.values[request]);
        let first = spec.window.map_or(0, |window| keys.len().saturating_sub(window as usize));
        let dim = spec.head_dim as usize;
        let queries_per_kv = (spec.q_heads / spec.kv_heads) as usize;
        let heads = query.chunks(dim).enumerate().flat_map(|(head, query)| {
            let kv = head / queries_per_kv * dim..(head / queries_per_kv + 1) * dim;
            let scores: Vec<f64> = keys[first..].iter().map(|key| score(spec, query, &key[kv.clone()])).collect();
            let highest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let weights: Vec<f64> = scores.iter().map(|score| (score - highest).exp()).collect();
            let total: f64 = weights.iter().sum();
            kv.map(|column| {
                let weighted = weights.iter().zip(&values[first..]).map(|(w, value)| w * f64::from(value[column]));
                (weighted.sum::<f64>() / total) as f32
            })
            .collect::<Vec<_>>()
        });
        heads.collect()
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

    /// Two tokens whose keys are alike, so that values are averaged; the second head's query does not matter then.
    fn step(spec: &AttentionSpec) -> Vec<f32> {
        let chunks = [Chunk { request: 0, start: 0, len: 2 }];
        let tokens = Tokens { queries: &[1.0, 2.0, 3.0, 4.0], keys: &[0.5, 0.5], values: &[2.0, 4.0] };
        Reference::default().step(spec, &chunks, &tokens)
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
    fn requests_do_not_see_each_other_and_go_on_where_they_were() {
        let mut reference = Reference::default();
        let spec = spec(None);
        let first = [Chunk { request: 0, start: 0, len: 1 }, Chunk { request: 1, start: 0, len: 1 }];
        let tokens = Tokens { queries: &[0.0; 4], keys: &[0.0; 2], values: &[1.0, 10.0] };
        assert_eq!(reference.step(&spec, &first, &tokens), [1.0, 1.0, 10.0, 10.0]);
        let second = [Chunk { request: 1, start: 1, len: 1 }];
        let tokens = Tokens { queries: &[0.0; 2], keys: &[0.0], values: &[20.0] };
        assert_eq!(reference.step(&spec, &second, &tokens), [15.0, 15.0]);
    }

    #[test]
    fn scores_are_capped() {
        let spec = AttentionSpec { soft_cap: Some(2.0), ..spec(None) };
        assert!((score(&spec, &[100.0], &[1.0]) - 2.0).abs() < 1e-9);
    }
}
