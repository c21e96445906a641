//! Messages between the host and an attention plugin.
//!
//! The plugin owns the layout of the KV pages; the host owns which page belongs to which sequence.

use serde::{Deserialize, Serialize};

use crate::{
    DType, TensorType,
    model::AttentionSpec,
    step::{StepInput, StepShape},
};

/// The device a program is made for.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Target {
    /// `cpu`, `tpu` or `cuda`.
    pub platform: String,
    /// Device kind as PJRT names it: `TPU v6 lite`.
    #[serde(default)]
    pub device_kind: String,
}

/// Asks an attention plugin whether it serves layers of a kind, and with what layout.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AttentionQuery {
    pub spec: AttentionSpec,
    /// Dtype of `q`, `k`, `v` and of the result.
    pub dtype: DType,
    /// Dtype the cache is to be kept in. Of 8 bits it holds numbers divided by a scale: `f8e4m3fn` by that of
    /// [`AttentionAnswer::scales`], or 1 without it; `i8` by that, or by what the plugin keeps beside (each token's own).
    pub kv_dtype: DType,
    pub shape: StepShape,
    pub target: Target,
    /// The host sets the scales of a cache where an answer names their place ([`AttentionAnswer::scales`]). Hosts of before
    /// say nothing, and would leave them 0.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub sets_scales: bool,
}

/// What the plugin makes of an [`AttentionQuery`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AttentionAnswer {
    /// How well it serves this; 0 = not at all, plain StableHLO is 1, a kernel made for the target 100.
    pub score: u32,
    /// Why the score is 0, or a remark for the log.
    #[serde(default)]
    pub reason: String,
    /// Types of the parts of one layer's pool, for `shape.pages` pages. The host keeps them zeroed at first.
    #[serde(default)]
    pub pool: Vec<TensorType>,
    /// Bytes of one page in one layer, over all parts.
    #[serde(default)]
    pub page_bytes: u64,
    /// The step inputs that the `context` export takes, in order.
    #[serde(default)]
    pub inputs: Vec<StepInput>,
    /// Types of the parts of the context.
    #[serde(default)]
    pub context: Vec<TensorType>,
    /// The published layout that pool and context follow, if they follow one: a host with kernels for it may serve
    /// coarser imports by itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub layout: Option<String>,
    /// The part of the pool that holds the layer's scales, `f32 [2]`: what its cached keys and its cached values are
    /// multiplied by. The host sets it before the first step, and `attention` gives it back as it is. It counts for nothing
    /// in `page_bytes`. Only for queries with [`AttentionQuery::sets_scales`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scales: Option<usize>,
}

/// What [`AttentionAnswer::scales`] points to.
pub fn scales_type() -> TensorType {
    TensorType::new(DType::F32, [2])
}

impl AttentionAnswer {
    /// The answer of a plugin that cannot serve the query.
    pub fn refuse(reason: impl Into<String>) -> Self {
        Self {
            score: 0,
            reason: reason.into(),
            pool: vec![],
            page_bytes: 0,
            inputs: vec![],
            context: vec![],
            layout: None,
            scales: None,
        }
    }
}

/// Asks for the fragment that serves a query. It exports
/// - `context`: `(step inputs…) -> context…`, called once a step for each kind of layer, and
/// - `attention`: `(query, key, value, pool…, context…) -> (attended, pool…)`, called for each layer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct EmitAttention {
    /// Index of the kind of layer; symbols must differ between kinds.
    pub kind: usize,
    pub query: AttentionQuery,
}
