//! Program fragments: functions with signatures, what they import and what they export.
//!
//! The host concatenates the functions of all fragments into one module and compares signatures; it never parses a
//! body. A fragment does not contain its heavy operations: it *imports* them, and the host links in whichever
//! implementation fits the target.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::{DType, TensorType};

/// Functions in StableHLO text and how they fit together.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Fragment {
    pub functions: Vec<Function>,
    #[serde(default)]
    pub imports: Vec<Import>,
    /// What the host may call, by name (`hidden`, `head`, `attention`, `context`).
    pub exports: BTreeMap<String, Export>,
}

/// One `func.func`. `text` is the whole private function in generic form; its symbol carries the plugin's prefix.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Function {
    pub symbol: String,
    pub arguments: Vec<TensorType>,
    pub results: Vec<TensorType>,
    /// Symbols that the body calls: functions of this fragment or its imports.
    #[serde(default)]
    pub calls: Vec<String>,
    /// Kernels of the plugin ([`crate::kernel::Kernel`]) that the body calls, each as the target `"{ns}.name"` of a
    /// `stablehlo.custom_call`. The linker puts the plugin's namespace for `{ns}`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub kernels: Vec<String>,
    pub text: String,
}

/// An exported function and the meaning of its arguments and results, in order.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Export {
    pub symbol: String,
    pub arguments: Vec<Operand>,
    pub results: Vec<Operand>,
}

/// The meaning of one argument or result of an export.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Operand {
    /// `i32 [tokens]`: token ids, already resolved.
    Tokens,
    /// `i32 [tokens]`.
    Positions,
    /// `[tokens, hidden]` from `hidden`; `[rows, hidden]` into `head`.
    Hidden,
    /// `f32 [rows, vocab]`.
    Logits,
    /// Part `part` of the weight `name`.
    Weight { name: String, part: usize },
    /// Part `part` of the KV pool of layer `layer`; among the results, the updated one.
    Pool { layer: usize, part: usize },
    /// Part `part` of what the attention plugin's `context` export made for layers of kind `kind`.
    Context { kind: usize, part: usize },
    /// `[tokens, hidden]`: the hidden state after layer `layer`, captured for drafters or embeddings.
    Captured { layer: usize },
    /// `[tokens, q_heads, head_dim]`.
    Query,
    /// `[tokens, kv_heads, head_dim]`.
    Key,
    /// `[tokens, kv_heads, head_dim]`.
    Value,
    /// `[tokens, q_heads, head_dim]`: result of `attention`.
    Attended,
    /// One of the step's inputs.
    Step(crate::step::StepInput),
}

/// An operation that the host supplies. `symbol` is what the fragment calls.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Import {
    pub symbol: String,
    pub operation: Operation,
    pub arguments: Vec<TensorType>,
    pub results: Vec<TensorType>,
    /// A function of this fragment with the same signature that does the same in terms of finer imports. The host
    /// calls it where it has no implementation of the whole.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub default: Option<String>,
}

/// What an import does. Arguments come in the order of the docs; `weight…` stands for all parts of a weight.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "snake_case")]
pub enum Operation {
    /// `(tokens i32 [tokens], weight…) -> [tokens, hidden]`: rows of a `[vocab, hidden]` weight.
    Embed { weight: WeightOperand, result: DType },
    /// `(x [rows, in], weight…, bias…?, residual [rows, out]?) -> [rows, out]`: `x · weightᵀ + bias + residual`.
    Linear { weight: WeightOperand, role: LinearRole, bias: Option<WeightOperand>, residual: bool, result: DType },
    /// `(x [tokens, hidden], norm…, gate_up…, down…, post_norm…?) -> [tokens, hidden]`:
    /// `x + down · (act(gate · n) * (up · n))` with `n = rms_norm(x) * norm`; with `post_norm`, what is added to `x` is
    /// normalized first.
    GatedMlp {
        norm: WeightOperand,
        gate_up: WeightOperand,
        down: WeightOperand,
        activation: Activation,
        norm_eps: f32,
        /// For hosts with [`block_norms`](crate::model::HostImports::block_norms).
        #[serde(default, skip_serializing_if = "Option::is_none")]
        post_norm: Option<WeightOperand>,
    },
    /// `(q, k, v, pool…, context…) -> ([tokens, q_heads, head_dim], pool…)`: attention over the cached sequence,
    /// with the new K and V written into the pool.
    Attention { kind: usize, pool_parts: usize, context_parts: usize },
    /// `(x [tokens, hidden], norm…, qkv…, bias…?, o…, cos [tokens, head_dim/2], sin, (q_norm…, k_norm…)?, o_bias…?,
    /// post_norm…?, pool…, context…) -> ([tokens, hidden], pool…)`: `x + o · attention(rotary(qkv · rms_norm(x)))`. With
    /// `head_norms`, each head of queries and keys is normalized before it turns; with `post_norm`, what is added to `x`.
    AttentionBlock {
        norm: WeightOperand,
        qkv: WeightOperand,
        qkv_bias: Option<WeightOperand>,
        o: WeightOperand,
        kind: usize,
        pool_parts: usize,
        context_parts: usize,
        norm_eps: f32,
        /// `[head_dim]` each, of queries and of keys. For hosts with
        /// [`block_norms`](crate::model::HostImports::block_norms), as the following.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        head_norms: Option<Box<[WeightOperand; 2]>>,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        o_bias: Option<WeightOperand>,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        post_norm: Option<WeightOperand>,
    },
}

/// A weight as an import sees it: opaque parts with a logical shape.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct WeightOperand {
    /// Logical shape: `[out, in]` of a linear, `[vocab, hidden]` of an embedding, `[n]` of a vector.
    pub shape: Vec<u64>,
    /// How the host stores it ([`WeightHandle::storage`]).
    pub storage: String,
    pub parts: usize,
}

/// How a linear's output is used, which decides how it is sharded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LinearRole {
    /// Output features are split between devices.
    Column,
    /// Input features are split between devices; the results are summed.
    Row,
    /// The output projection onto the vocabulary.
    Head,
    /// The same on every device.
    Replicated,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Activation {
    Silu,
    /// GELU in the tanh approximation.
    GeluTanh,
    Gelu,
    Relu,
}

/// A weight as the host hands it to a model: an opaque tuple of tensors.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct WeightHandle {
    /// Types of the tensors that stand for the weight in a program.
    pub parts: Vec<TensorType>,
    /// Names the storage. Handles of equal parts and storage may share a function; nothing else may be read from it.
    pub storage: String,
}

/// The answer to an `emit` request.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Package {
    pub fragment: Fragment,
}
