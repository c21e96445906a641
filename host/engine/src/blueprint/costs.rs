//! What the costs of a model's steps are made of, from its description and the shapes of its weights.

use torus_abi::{
    DType,
    attention::AttentionAnswer,
    fragment::LinearRole,
    model::{ModelDescription, StateKind, WeightRole},
};
use torus_weights::PlannedWeight;

use crate::roofline::{Attention, Shard};

/// `weights` are those of the description as one device holds them, `answers` one for each kind of layers.
pub(super) fn shard(
    description: &ModelDescription,
    weights: &[PlannedWeight],
    answers: &[AttentionAnswer],
    page_size: u64,
    activations: DType,
) -> Shard {
    let mut shard = Shard {
        weight_bytes: 0,
        embedding_row_bytes: 0,
        matrix_elements: 0,
        head_elements: 0,
        layers: description
            .layers
            .iter()
            .map(|kind| layer(&description.kinds[*kind], &answers[*kind], page_size))
            .collect(),
        sums: 0,
        sum_elements: 0,
        activation_bytes: activations.bytes() as u64,
    };
    for (spec, weight) in description.weights.iter().zip(weights) {
        let (bytes, elements) = (weight.bytes() as u64, weight.shape.iter().product::<u64>());
        let rows = weight.shape.first().copied().unwrap_or(1).max(1);
        if matches!(spec.role, WeightRole::Embed | WeightRole::EmbedAndHead) {
            shard.embedding_row_bytes += bytes / rows;
        }
        match spec.role {
            WeightRole::EmbedAndHead | WeightRole::Linear(LinearRole::Head) => shard.head_elements += elements,
            WeightRole::Linear(_) => shard.matrix_elements += elements,
            WeightRole::Embed | WeightRole::Vector => {}
        }
        if spec.role != WeightRole::Embed {
            shard.weight_bytes += bytes;
        }
        // Products over a part of the input, and embeddings of a part of the vocabulary, are summed over the devices.
        let summed = match spec.role {
            WeightRole::Linear(LinearRole::Row) => rows,
            WeightRole::Embed | WeightRole::EmbedAndHead => elements / rows,
            WeightRole::Linear(_) | WeightRole::Vector => 0,
        };
        if description.parallel.tensor > 1 && summed > 0 {
            shard.sums += 1;
            shard.sum_elements += summed;
        }
    }
    shard
}

fn layer(kind: &StateKind, answer: &AttentionAnswer, page_size: u64) -> Attention {
    let StateKind::Paged(spec) = kind;
    Attention {
        q_heads: spec.q_heads,
        head_dim: spec.head_dim,
        window: spec.window,
        kv_bytes: answer.page_bytes / page_size.max(1),
    }
}
