//! What a step must move and compute at least, and how long a chip needs for it.
//!
//! Counted are the bytes that HBM cannot be spared (each weight once, the KV that is attended to once, the new KV), the
//! products of matrices and of attention, and the sums over the devices that share a model. Not counted: activations that
//! go through HBM, norms and other elementwise work, sampling, what starting a program costs. So times are lower bounds:
//! [`StepTime::seconds`] is the longer of moving all bytes and computing everything, where transfers from HBM overlap with
//! all else, and the matrix units wait for sums over devices (XLA for TPU has no asynchronous all-reduce).

mod chip;
mod topology;

use serde::Serialize;

pub use chip::{CHIPS, Chip};
pub use topology::{Group, Topology, UnknownTopology};

/// What a step computes: sequences that are alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Work {
    pub sequences: u64,
    /// New tokens of each: 1 in decoding, the chunk in prefill.
    pub new_tokens: u64,
    /// Tokens of each in the cache before the step.
    pub cached_tokens: u64,
}

/// What the program of a step computes, padding included.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Padded {
    pub tokens: u64,
    /// Rows of logits.
    pub rows: u64,
}

/// What one device holds and does of a model, as far as costs go.
#[derive(Clone, Debug, PartialEq)]
pub struct Shard {
    /// Bytes of the weights that each step reads whole.
    pub weight_bytes: u64,
    /// Bytes of a row of the embedding.
    pub embedding_row_bytes: u64,
    /// Elements of the matrices that every token is multiplied with.
    pub matrix_elements: u64,
    /// Elements of the matrix that every row of logits comes from.
    pub head_elements: u64,
    pub layers: Vec<Attention>,
    /// Sums over the devices in a step, and the elements of each for one token.
    pub sums: u64,
    pub sum_elements: u64,
    /// Size of an element of activations.
    pub activation_bytes: u64,
}

/// The attention of one layer on one device.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Attention {
    pub q_heads: u64,
    pub head_dim: u64,
    pub window: Option<u64>,
    /// Of keys and values of one token.
    pub kv_bytes: u64,
}

/// What a step moves and computes on each device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct StepCost {
    pub weight_bytes: f64,
    pub kv_read_bytes: f64,
    pub kv_written_bytes: f64,
    pub matrix_flops: f64,
    pub attention_flops: f64,
    /// Sums over the devices, and the bytes on each device that are summed.
    pub sums: u64,
    pub summed_bytes: f64,
}

/// What a step takes longest for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Bound {
    Hbm,
    Mxu,
    Interconnect,
}

/// Lower bounds, in seconds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct StepTime {
    pub hbm_s: f64,
    pub mxu_s: f64,
    pub interconnect_s: f64,
    pub bound: Bound,
}

impl Shard {
    /// What a step of this work costs each device. Products with matrices compute the padding too; attention does not.
    pub fn cost(&self, work: Work, padded: Padded) -> StepCost {
        let tokens = (work.sequences * work.new_tokens) as f64;
        let (padded_tokens, padded_rows) = (padded.tokens as f64, padded.rows as f64);
        let sequences = work.sequences as f64;
        let mut cost = StepCost {
            weight_bytes: self.weight_bytes as f64 + tokens * self.embedding_row_bytes as f64,
            matrix_flops: 2.0 * (padded_tokens * self.matrix_elements as f64 + padded_rows * self.head_elements as f64),
            sums: self.sums,
            summed_bytes: padded_tokens * (self.sum_elements * self.activation_bytes) as f64,
            ..StepCost::default()
        };
        for layer in &self.layers {
            cost.kv_read_bytes += sequences * (layer.reads(work) * layer.kv_bytes) as f64;
            cost.kv_written_bytes += tokens * layer.kv_bytes as f64;
            // Scores and their sums over values.
            let per_pair = 4.0 * (layer.q_heads * layer.head_dim) as f64;
            cost.attention_flops += sequences * layer.pairs(work) as f64 * per_pair;
        }
        cost
    }
}

impl Attention {
    /// Tokens of a sequence whose KV is read: those in the cache that a new token sees, and in decoding the new one, which
    /// is written first. A chunk's own KV is still at hand.
    fn reads(&self, work: Work) -> u64 {
        let own = u64::from(work.new_tokens == 1);
        // The first new token looks back farthest.
        let seen = self.window.map_or(work.cached_tokens, |window| work.cached_tokens.min(window.saturating_sub(1)));
        seen + own
    }

    /// Pairs of a new token and one that it sees, itself included.
    fn pairs(&self, work: Work) -> u64 {
        let last = work.cached_tokens + work.new_tokens;
        let whole = |up_to: u64| up_to * (up_to + 1) / 2;
        match self.window {
            None => whole(last) - whole(work.cached_tokens),
            Some(window) => {
                // Tokens up to the window see all before them.
                let (first_full, last_full) = (work.cached_tokens.min(window), last.min(window));
                whole(last_full) - whole(first_full) + (last - last_full.max(work.cached_tokens)) * window
            }
        }
    }
}

impl StepCost {
    pub fn hbm_bytes(&self) -> f64 {
        self.weight_bytes + self.kv_read_bytes + self.kv_written_bytes
    }

    pub fn flops(&self) -> f64 {
        self.matrix_flops + self.attention_flops
    }

    /// How long the devices of a group need.
    pub fn time(&self, chip: &Chip, group: &Group) -> StepTime {
        let hbm_s = self.hbm_bytes() / chip.hbm_bytes_per_s;
        let mxu_s = self.flops() / chip.bf16_flops_per_s;
        let interconnect_s = group.all_reduce_s(self.sums, self.summed_bytes);
        let bound = match () {
            () if hbm_s >= mxu_s + interconnect_s => Bound::Hbm,
            () if mxu_s >= interconnect_s => Bound::Mxu,
            () => Bound::Interconnect,
        };
        StepTime { hbm_s, mxu_s, interconnect_s, bound }
    }
}

impl StepTime {
    /// Of the whole step.
    pub fn seconds(&self) -> f64 {
        self.hbm_s.max(self.mxu_s + self.interconnect_s)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LAYER: Attention = Attention { q_heads: 8, head_dim: 128, window: None, kv_bytes: 1024 };

    fn shard(layers: Vec<Attention>) -> Shard {
        Shard {
            weight_bytes: 2_000_000,
            embedding_row_bytes: 100,
            matrix_elements: 900_000,
            head_elements: 100_000,
            layers,
            sums: 5,
            sum_elements: 250,
            activation_bytes: 2,
        }
    }

    fn work(sequences: u64, new_tokens: u64, cached_tokens: u64) -> Work {
        Work { sequences, new_tokens, cached_tokens }
    }

    #[test]
    fn a_decode_step_reads_weights_once_and_all_kv() {
        let cost = shard(vec![LAYER, LAYER]).cost(work(3, 1, 99), Padded { tokens: 4, rows: 4 });
        assert_eq!((cost.weight_bytes, cost.kv_read_bytes), (2_000_300.0, 3.0 * 100.0 * 1024.0 * 2.0));
        assert_eq!(cost.kv_written_bytes, 3.0 * 1024.0 * 2.0);
        assert_eq!(cost.matrix_flops, 2.0 * 4.0 * 1_000_000.0);
        assert_eq!(cost.attention_flops, 3.0 * 100.0 * 4.0 * 8.0 * 128.0 * 2.0);
        assert_eq!((cost.sums, cost.summed_bytes), (5, 2000.0));
    }

    #[test]
    fn a_chunk_makes_logits_for_few_rows() {
        let cost = shard(vec![LAYER]).cost(work(1, 10, 90), Padded { tokens: 16, rows: 2 });
        assert_eq!(cost.matrix_flops, 2.0 * (16.0 * 900_000.0 + 2.0 * 100_000.0));
        assert_eq!((cost.kv_read_bytes, cost.kv_written_bytes), (90.0 * 1024.0, 10.0 * 1024.0));
    }

    /// Against counting one by one.
    #[test]
    fn windows_limit_what_is_seen_and_read() {
        for window in [None, Some(1), Some(4), Some(7), Some(100)] {
            let layer = Attention { window, ..LAYER };
            for (new, cached) in [(1, 0), (1, 3), (1, 50), (5, 0), (5, 2), (5, 4), (5, 50), (20, 6)] {
                let work = work(1, new, cached);
                let first_seen = |position: u64| window.map_or(0, |window| (position + 1).saturating_sub(window));
                let pairs: u64 = (cached..cached + new).map(|position| position + 1 - first_seen(position)).sum();
                assert_eq!(layer.pairs(work), pairs, "{window:?} {new} {cached}");
                let of_cache = cached.saturating_sub(first_seen(cached));
                assert_eq!(layer.reads(work), of_cache + u64::from(new == 1), "{window:?} {new} {cached}");
            }
        }
    }

    #[test]
    fn the_bound_is_what_takes_longest() {
        let topology: Topology = "v6e:2x2".parse().unwrap();
        let group = topology.group(4).unwrap();
        let cost = StepCost { weight_bytes: 1640e9, matrix_flops: 459e12, sums: 0, ..StepCost::default() };
        let time = cost.time(topology.chip, &group);
        assert_eq!((time.hbm_s, time.mxu_s, time.seconds(), time.bound), (1.0, 0.5, 1.0, Bound::Hbm));
        // Arithmetic and sums follow each other.
        let cost = StepCost { summed_bytes: 180e9 / 1.5 * 0.6, ..cost };
        let time = cost.time(topology.chip, &group);
        assert!((time.seconds() - 1.1).abs() < 1e-9 && time.bound == Bound::Interconnect, "{time:?}");
        let cost = StepCost { matrix_flops: 918e12, ..cost };
        assert_eq!(cost.time(topology.chip, &group).bound, Bound::Mxu);
    }
}
