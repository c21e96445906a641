//! Messages between the host and a model plugin.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::{
    DType, TensorType,
    fragment::{LinearRole, WeightHandle},
    step::StepShape,
};

/// Opens a model: which checkpoint, split how.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ModelOptions {
    /// The checkpoint's Hugging Face `config.json`, or what [`GgufAnswer::config`] said.
    pub config: serde_json::Value,
    #[serde(default)]
    pub parallel: Parallel,
}

/// Over how many devices the program is split.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Parallel {
    pub tensor: u32,
}

impl Default for Parallel {
    fn default() -> Self {
        Self { tensor: 1 }
    }
}

/// What a model is, as far as the host must know.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ModelDescription {
    /// The architecture as the checkpoint names it: `LlamaForCausalLM`.
    pub architecture: String,
    pub hidden: u64,
    pub vocab: u64,
    /// Longest sequence the model was made for.
    pub context_length: u64,
    /// The dtype the checkpoint's config asks for.
    pub dtype: DType,
    /// State kinds; layers of one kind share a page table and an attention function.
    pub kinds: Vec<StateKind>,
    /// For each layer, its index into `kinds`.
    pub layers: Vec<usize>,
    pub weights: Vec<WeightSpec>,
    /// Tensors of the checkpoint that the model knows and does not need (`rotary_emb.inv_freq`); a trailing `*`
    /// matches any ending. Others that no weight takes are an error.
    #[serde(default)]
    pub ignored_tensors: Vec<String>,
    /// Over how many devices the plugin has split it: what it was opened with ([`ModelOptions::parallel`]), or one if it
    /// does not split models. Attention is that of one shard; weights are described whole, and the host cuts them
    /// ([`crate::shard`]).
    #[serde(default)]
    pub parallel: Parallel,
}

/// What a layer keeps between steps. Per-sequence slots (recurrent state) and latent caches come as new variants.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "snake_case")]
pub enum StateKind {
    /// Keys and values of past tokens, in pages.
    Paged(AttentionSpec),
}

/// The attention of one kind of layer, for one shard.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AttentionSpec {
    pub q_heads: u64,
    pub kv_heads: u64,
    pub head_dim: u64,
    /// Factor on the scores, usually `1 / sqrt(head_dim)`.
    pub scale: f32,
    /// Only the last `window` tokens are seen, the current one included.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub window: Option<u64>,
    /// Scores become `cap * tanh(score / cap)`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub soft_cap: Option<f32>,
}

/// A weight of the model: its logical shape and where it comes from in a checkpoint.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct WeightSpec {
    /// The model's own name for it, unique: `layers.3.qkv`.
    pub name: String,
    pub shape: Vec<u64>,
    pub role: WeightRole,
    /// The tensors it is made of, concatenated along the first axis after their own transforms.
    pub sources: Vec<WeightSource>,
}

impl WeightSpec {
    /// A matrix `[rows, input]` of the tensors `{stem}.weight`, given as stems with their rows, below one another.
    pub fn linear(role: LinearRole, name: impl Into<String>, input: u64, stems: &[(String, u64)]) -> Self {
        let source = |(stem, rows): &(String, u64)| WeightSource::new(format!("{stem}.weight"), [*rows, input]);
        Self {
            name: name.into(),
            shape: vec![stems.iter().map(|(_, rows)| rows).sum(), input],
            role: WeightRole::Linear(role),
            sources: stems.iter().map(source).collect(),
        }
    }

    /// A vector of the tensors `{stem}.{kind}` one after the other; `kind` is `weight` (of a norm) or `bias`.
    pub fn vector(kind: &str, name: impl Into<String>, stems: &[(String, u64)]) -> Self {
        let source = |(stem, size): &(String, u64)| WeightSource::new(format!("{stem}.{kind}"), [*size]);
        Self {
            name: name.into(),
            shape: vec![stems.iter().map(|(_, size)| size).sum()],
            role: WeightRole::Vector,
            sources: stems.iter().map(source).collect(),
        }
    }

    /// With the [units](WeightSource::units) of each of its sources.
    pub fn in_units(mut self, units: &[u64]) -> Self {
        for (source, units) in self.sources.iter_mut().zip(units) {
            source.units = Some(*units);
        }
        self
    }

    /// The embedding `[vocab, hidden]` in one tensor; `tied` if the output projection is the same.
    pub fn embedding(name: impl Into<String>, tensor: impl Into<String>, shape: [u64; 2], tied: bool) -> Self {
        let role = if tied { WeightRole::EmbedAndHead } else { WeightRole::Embed };
        Self { name: name.into(), shape: shape.to_vec(), role, sources: vec![WeightSource::new(tensor, shape)] }
    }
}

/// What a weight is used as, which decides how the host may store and split it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WeightRole {
    Embed,
    Linear(LinearRole),
    /// An embedding that is also the output projection.
    EmbedAndHead,
    /// Norm scales and biases: kept as a plain tensor in one part of dtype `f32`.
    Vector,
}

/// One tensor of a checkpoint and what to do with it on load.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct WeightSource {
    /// Name in the checkpoint: `model.layers.3.self_attn.q_proj.weight`.
    pub tensor: String,
    /// Shape in the checkpoint, in Hugging Face order (`[out, in]`).
    pub shape: Vec<u64>,
    #[serde(default)]
    pub transforms: Vec<Transform>,
    /// Its rows, after the transforms, come in so many units (heads) that are not cut where devices share the model; of
    /// fewer units than devices, each goes to several. `None` = rows are cut anywhere, and those of a vector not at all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub units: Option<u64>,
}

impl WeightSource {
    /// A tensor as it is.
    pub fn new(tensor: impl Into<String>, shape: impl Into<Vec<u64>>) -> Self {
        Self { tensor: tensor.into(), shape: shape.into(), transforms: Vec::new(), units: None }
    }
}

/// What is done to a tensor on load, in order. The cast to the storage dtype comes last and is the host's.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Transform {
    /// Swaps the two axes of a matrix.
    Transpose,
    /// Takes rows `start..start + len` of the first axis (a fused tensor is split so).
    Rows { start: u64, len: u64 },
    /// Undoes the pair-interleaved row order of rotary heads (GGUF's Llama layout): within each head of
    /// `rows / heads` rows, row `2i + j` goes to `j * half + i`.
    PermuteRopeRows { heads: u64 },
    /// Adds a constant to every element.
    AddConstant(f32),
}

impl Transform {
    /// Whether it does more than choose and order rows, so that quantized blocks cannot stay as they are.
    pub fn changes_elements(&self) -> bool {
        matches!(self, Self::Transpose | Self::AddConstant(_))
    }
}

/// Asks a model plugin whether and how it reads a GGUF file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct GgufQuery {
    /// All metadata but the tokenizer's arrays, as JSON values under their GGUF keys.
    pub metadata: BTreeMap<String, serde_json::Value>,
    /// Names and shapes of the tensors, in Hugging Face order (outermost axis first).
    pub tensors: BTreeMap<String, Vec<u64>>,
}

/// How a GGUF file reads as a Hugging Face checkpoint.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct GgufAnswer {
    /// The `config.json` that the file stands for.
    pub config: serde_json::Value,
    /// From the Hugging Face tensor name to the file's tensor and what undoes the file's own conventions. These
    /// transforms run before those of the [`WeightSource`].
    pub tensors: BTreeMap<String, GgufTensor>,
    /// Tensors of the file that are not needed (`rope_freqs.weight`); a trailing `*` matches any ending.
    #[serde(default)]
    pub ignored_tensors: Vec<String>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct GgufTensor {
    pub name: String,
    #[serde(default)]
    pub transforms: Vec<Transform>,
}

/// What layers of one kind are given in a program, all of it opaque to the model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StateHandle {
    /// Types of the parts of one layer's pool.
    pub pool: Vec<TensorType>,
    /// Types of the parts of the kind's context, made once a step by the attention plugin.
    pub context: Vec<TensorType>,
}

/// Asks a model for a fragment.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct EmitModel {
    pub part: ModelPart,
    /// Dtype of activations between operations: `f32` or `bf16`.
    pub dtype: DType,
    pub weights: BTreeMap<String, WeightHandle>,
    /// One for each of [`ModelDescription::kinds`].
    pub state: Vec<StateHandle>,
    /// What the host's imports know beyond those of its first release; hosts of before say nothing.
    #[serde(default)]
    pub imports: HostImports,
    /// Layers are to run in loops. A model that was built before there were any never sees it; the host notices that its
    /// fragment takes more pools than there are.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub loops: Option<LayerLoops>,
}

/// What imports know that hosts once did not. A host takes a field of an [`Operation`] that it does not know for one that
/// is not there, so a model asks for none that the host has not named here, and computes it by itself instead.
///
/// [`Operation`]: crate::fragment::Operation
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostImports {
    /// `head_norms`, `o_bias` and `post_norm` of an attention block, `post_norm` of a gated MLP.
    #[serde(default)]
    pub block_norms: bool,
}

/// How the layers of a model run in loops: a program of one body for many layers, which compiles in a time that hardly
/// depends on how many there are.
///
/// Layers of one kind whose weights have equal handles can run in one loop. Weights of layer `i` are then named
/// `layers.{i}.{name}`, the same names in each layer. Of each weight and pool, some parts are of the *layer's own*; all others
/// are one value for all layers of the loop, and only those of the first are taken. The pool of a kind of layers is one for
/// all of them: the export takes and gives the parts that are not the layer's own under the number of the kind's first layer,
/// and hands them on from layer to layer.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct LayerLoops {
    /// For each weight that has any, the numbers of its own parts.
    pub weights: BTreeMap<String, Vec<usize>>,
    /// For each kind of layers, the numbers of the pool's parts that are the layer's own. They come back as they are.
    pub pools: Vec<Vec<usize>>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ModelPart {
    /// Exports `hidden`: from tokens and positions to the normalized last hidden state `[tokens, hidden]`.
    Hidden {
        shape: StepShape,
        /// Layers whose output is also returned.
        #[serde(default)]
        capture: Vec<usize>,
    },
    /// Exports `head`: from `[rows, hidden]` to logits `f32 [rows, vocab]`.
    Head { rows: u64 },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_are_made_of_their_tensors_in_order() {
        let stems = [("a".to_owned(), 4), ("b".to_owned(), 2)];
        let matrix = WeightSpec::linear(LinearRole::Column, "ab", 3, &stems);
        assert_eq!((matrix.shape, matrix.role), (vec![6, 3], WeightRole::Linear(LinearRole::Column)));
        assert_eq!(matrix.sources, [WeightSource::new("a.weight", [4, 3]), WeightSource::new("b.weight", [2, 3])]);
        let bias = WeightSpec::vector("bias", "ab_bias", &stems);
        assert_eq!((bias.shape, bias.role), (vec![6], WeightRole::Vector));
        assert_eq!(bias.sources, [WeightSource::new("a.bias", [4]), WeightSource::new("b.bias", [2])]);
        let roles = [true, false].map(|tied| WeightSpec::embedding("embed", "e", [5, 3], tied).role);
        assert_eq!(roles, [WeightRole::EmbedAndHead, WeightRole::Embed]);
    }
}
