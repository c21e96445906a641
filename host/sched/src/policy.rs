//! In which order waiting requests are admitted.

use std::collections::HashMap;

use torus_cache::{NodeId, PrefixCache};

use crate::{RequestId, sequences::Sequences};

/// The order of the queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Policy {
    /// First come, first served.
    Fcfs,
    /// Longest cached prefix first.
    Lpm,
    /// Requests below the heaviest branches of the prefix tree first, branch by branch.
    DfsWeight,
    /// Any order, from a seed.
    Random { seed: u64 },
}

/// Others that may be admitted before a request that came earlier. Then it goes first.
pub const OVERTAKEN_MAX: u32 = 256;

/// Requests at the head of the queue that a policy looks at; the others keep their order. Matching each against the
/// tree at every step must not cost more the longer the queue is.
pub(crate) const LOOKAHEAD: usize = 128;

/// The order in which to try to admit what waits in `queue`, as indices into it.
pub(crate) fn order(
    policy: Policy,
    queue: &[RequestId],
    sequences: &Sequences,
    cache: &PrefixCache,
    step: u64,
) -> Vec<usize> {
    let mut order: Vec<usize> = (0..queue.len()).collect();
    let sequence = |index: &usize| sequences.get(queue[*index]);
    let path = |index: &usize| -> (usize, Vec<NodeId>) {
        sequence(index).map_or((0, Vec::new()), |s| cache.peek(&s.request.namespace, &s.request.prompt))
    };
    match policy {
        Policy::Fcfs => {}
        Policy::Lpm => order.sort_by_cached_key(|index| std::cmp::Reverse(path(index).0)),
        Policy::DfsWeight => {
            let paths: Vec<_> = order.iter().map(|index| path(index).1).collect();
            let mut weights: HashMap<NodeId, usize> = HashMap::new();
            for node in paths.iter().flatten() {
                *weights.entry(*node).or_default() += 1;
            }
            // Comparing paths node by node, heavier first, is the order of a walk that enters heavy branches first.
            let key = |index: &usize| -> Vec<_> {
                paths[*index].iter().map(|node| (std::cmp::Reverse(weights[node]), *node)).collect()
            };
            order.sort_by(|a, b| {
                let (a, b) = (key(a), key(b));
                // A longer path is deeper in the same branch and goes before what ends above it.
                a.iter().zip(&b).map(|(a, b)| a.cmp(b)).find(|found| found.is_ne()).unwrap_or(b.len().cmp(&a.len()))
            });
        }
        Policy::Random { seed } => {
            let mix = |index: &usize| splitmix(seed ^ splitmix(step ^ splitmix(queue[*index].0)));
            order.sort_by_cached_key(mix);
        }
    }
    let waited = |index: &usize| sequence(index).is_some_and(|s| s.overtaken >= OVERTAKEN_MAX);
    // Stable: those that waited too long keep the queue's order among themselves.
    let mut patient: Vec<_> = (0..queue.len()).filter(waited).collect();
    order.retain(|index| !waited(index));
    patient.append(&mut order);
    patient
}

/// SplitMix64 (Steele, Lea and Flood, OOPSLA 2014).
fn splitmix(x: u64) -> u64 {
    let x = x.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    x ^ (x >> 31)
}
