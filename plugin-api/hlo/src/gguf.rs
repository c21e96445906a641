//! What every family reads in the same way from a GGUF file: the fields of the `config.json` that the file stands for, and
//! which of its tensors are which.

use std::collections::BTreeMap;

use serde_json::{Value, json};
use torus_abi::{
    fault::Fault,
    model::{GgufQuery, GgufTensor, Transform},
};

/// Names within a layer that most families share, from GGUF to Hugging Face.
pub const LAYER_NAMES: [(&str, &str); 9] = [
    ("attn_norm", "input_layernorm"),
    ("attn_q", "self_attn.q_proj"),
    ("attn_k", "self_attn.k_proj"),
    ("attn_v", "self_attn.v_proj"),
    ("attn_output", "self_attn.o_proj"),
    ("ffn_norm", "post_attention_layernorm"),
    ("ffn_gate", "mlp.gate_proj"),
    ("ffn_up", "mlp.up_proj"),
    ("ffn_down", "mlp.down_proj"),
];

/// A GGUF file of one architecture. Keys are given without the architecture, which they begin with in the file.
pub struct GgufFile<'a> {
    pub architecture: &'a str,
    pub query: &'a GgufQuery,
}

impl<'a> GgufFile<'a> {
    /// The file under the architecture that it names.
    pub fn new(query: &'a GgufQuery) -> Result<Self, Fault> {
        let architecture = query.metadata.get("general.architecture").and_then(Value::as_str);
        let architecture = architecture.ok_or_else(|| Fault::invalid("GGUF: general.architecture is missing"))?;
        Ok(Self { architecture, query })
    }

    pub fn get(&self, key: &str) -> Option<&'a Value> {
        self.query.metadata.get(&format!("{}.{key}", self.architecture))
    }

    pub fn has_tensor(&self, name: &str) -> bool {
        self.query.tensors.contains_key(name)
    }

    pub fn integer(&self, key: &str) -> Result<u64, Fault> {
        self.integer_or(key, None)
    }

    /// An integer that may be missing; a value of another type is an error all the same.
    pub fn integer_or(&self, key: &str, default: impl Into<Option<u64>>) -> Result<u64, Fault> {
        self.get(key).map_or(default.into(), Value::as_u64).ok_or_else(|| self.no_number(key))
    }

    pub fn float(&self, key: &str) -> Result<f64, Fault> {
        self.float_or(key, None)
    }

    pub fn float_or(&self, key: &str, default: impl Into<Option<f64>>) -> Result<f64, Fault> {
        self.get(key).map_or(default.into(), Value::as_f64).ok_or_else(|| self.no_number(key))
    }

    fn no_number(&self, key: &str) -> Fault {
        Fault::invalid(format!("GGUF: {}.{key} is missing or no number", self.architecture))
    }

    /// That a key asks for what the family does not do.
    pub fn unsupported(&self, key: &str, why: &str) -> Fault {
        Fault::unsupported(format!("GGUF: {}.{key}: {why}", self.architecture))
    }

    /// The fields of `config.json` that all families of dense decoders have; a family adds its own. Key-value heads
    /// are the same in all layers, and heads turn as a whole.
    pub fn config(&self) -> Result<Value, Fault> {
        if self.get("expert_count").is_some() {
            return Err(self.unsupported("expert_count", "mixtures of experts are not of this family"));
        }
        if self.has_tensor("rope_freqs.weight") {
            let message =
                "GGUF: rope_freqs.weight: scaled rotary frequencies are read from Hugging Face checkpoints only";
            return Err(Fault::unsupported(message));
        }
        let hidden = self.integer("embedding_length")?;
        let heads = self.integer("attention.head_count")?;
        let head_dim = self.integer_or("attention.key_length", hidden / heads.max(1))?;
        if self.integer_or("rope.dimension_count", head_dim)? != head_dim {
            return Err(self.unsupported("rope.dimension_count", "partly rotated heads are not implemented"));
        }
        if self.integer_or("attention.value_length", head_dim)? != head_dim {
            return Err(self.unsupported("attention.value_length", "values must be as long as keys"));
        }
        let embedding = self.query.tensors.get("token_embd.weight").and_then(|shape| shape.first());
        Ok(json!({
            "hidden_size": hidden,
            "intermediate_size": self.integer("feed_forward_length")?,
            "num_hidden_layers": self.integer("block_count")?,
            "num_attention_heads": heads,
            "num_key_value_heads": self.integer_or("attention.head_count_kv", heads)?,
            "head_dim": head_dim,
            "vocab_size": self.integer_or("vocab_size", embedding.copied())?,
            "max_position_embeddings": self.integer("context_length")?,
            "rms_norm_eps": self.float("attention.layer_norm_rms_epsilon")?,
            "rope_theta": self.float_or("rope.freq_base", 10_000.0)?,
            "rope_scaling": self.rope_scaling()?,
            "tie_word_embeddings": !self.has_tensor("output.weight"),
            "torch_dtype": "bfloat16",
        }))
    }

    fn rope_scaling(&self) -> Result<Value, Fault> {
        let name = self.get("rope.scaling.type").map(|name| name.as_str().unwrap_or_default());
        match name {
            None | Some("none") => Ok(Value::Null),
            Some("linear") => Ok(json!({"rope_type": "linear", "factor": self.float("rope.scaling.factor")?})),
            Some("yarn") => self.yarn(),
            Some(name) => Err(self.unsupported("rope.scaling.type", &format!("'{name}' is not implemented"))),
        }
    }

    fn yarn(&self) -> Result<Value, Fault> {
        for key in ["rope.scaling.yarn_ext_factor", "rope.scaling.attn_factor"] {
            if self.float_or(key, 1.0)? != 1.0 {
                return Err(self.unsupported(key, "only 1 is implemented"));
            }
        }
        if self.float_or("rope.scaling.yarn_log_multiplier", 0.0)? != 0.0 {
            return Err(self.unsupported("rope.scaling.yarn_log_multiplier", "only 0 is implemented"));
        }
        let mut yarn = json!({
            "rope_type": "yarn",
            "factor": self.float("rope.scaling.factor")?,
            "original_max_position_embeddings": self.integer("rope.scaling.original_context_length")?,
        });
        for (key, field) in
            [("yarn_attn_factor", "attention_factor"), ("yarn_beta_fast", "beta_fast"), ("yarn_beta_slow", "beta_slow")]
        {
            let key = format!("rope.scaling.{key}");
            if self.get(&key).is_some() {
                yarn[field] = self.float(&key)?.into();
            }
        }
        Ok(yarn)
    }

    /// The file's tensors under their Hugging Face names: the embedding, the last norm, the head, and in each layer the
    /// weights and biases of `names`, with the transforms that undo the file's conventions for a GGUF name. Tensors that
    /// the file lacks are left out: whether they are needed is for the weights of the model to say.
    pub fn tensors<'n>(
        &self,
        names: impl IntoIterator<Item = (&'n str, &'n str), IntoIter: Clone>,
        transforms: impl Fn(&str) -> Vec<Transform>,
    ) -> Result<BTreeMap<String, GgufTensor>, Fault> {
        let mut tensors = BTreeMap::new();
        let mut map = |gguf: &str, name: String, hugging_face: String| {
            if self.has_tensor(&name) {
                tensors.insert(hugging_face, GgufTensor { name, transforms: transforms(gguf) });
            }
        };
        for (gguf, hugging_face) in
            [("token_embd", "model.embed_tokens"), ("output_norm", "model.norm"), ("output", "lm_head")]
        {
            map(gguf, format!("{gguf}.weight"), format!("{hugging_face}.weight"));
        }
        let names = names.into_iter();
        for layer in 0..self.integer("block_count")? {
            for (gguf, hugging_face) in names.clone() {
                for kind in ["weight", "bias"] {
                    map(
                        gguf,
                        format!("blk.{layer}.{gguf}.{kind}"),
                        format!("model.layers.{layer}.{hugging_face}.{kind}"),
                    );
                }
            }
        }
        Ok(tensors)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn query(change: impl FnOnce(&mut GgufQuery)) -> GgufQuery {
        let metadata = json!({
            "general.architecture": "toy", "toy.block_count": 2, "toy.attention.head_count": 4,
            "toy.embedding_length": 32, "toy.feed_forward_length": 48, "toy.context_length": 64,
            "toy.attention.layer_norm_rms_epsilon": 1e-5,
        });
        let tensors = BTreeMap::from([("token_embd.weight".into(), vec![9, 32])]);
        let mut query = GgufQuery { metadata: serde_json::from_value(metadata).unwrap(), tensors };
        change(&mut query);
        query
    }

    fn config(change: impl FnOnce(&mut GgufQuery)) -> Result<Value, Fault> {
        GgufFile::new(&query(change))?.config()
    }

    #[test]
    fn what_a_file_leaves_out_follows_from_the_rest() {
        let config = config(|_| {}).unwrap();
        assert_eq!((&config["vocab_size"], &config["head_dim"]), (&json!(9), &json!(8)));
        assert_eq!((&config["num_key_value_heads"], &config["rope_theta"]), (&json!(4), &json!(1e4)));
        assert_eq!((&config["tie_word_embeddings"], &config["rope_scaling"]), (&json!(true), &Value::Null));
    }

    #[test]
    fn yarn_is_read_whole() {
        let config = config(|query| {
            let keys = json!({
                "type": "yarn", "factor": 4.0, "original_context_length": 16, "yarn_attn_factor": 1.5,
                "yarn_beta_fast": 20.0, "yarn_ext_factor": 1.0,
            });
            let keys = keys.as_object().unwrap().clone();
            query.metadata.extend(keys.into_iter().map(|(key, value)| (format!("toy.rope.scaling.{key}"), value)));
        });
        let expected = json!({
            "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "attention_factor": 1.5,
            "beta_fast": 20.0,
        });
        assert_eq!(config.unwrap()["rope_scaling"], expected);
    }

    #[test]
    fn files_that_would_be_read_wrongly_are_refused() {
        for (key, value) in [
            ("toy.expert_count", json!(8)),
            ("toy.rope.dimension_count", json!(4)),
            ("toy.attention.value_length", json!(4)),
            ("toy.attention.head_count_kv", json!([4, 2])),
            ("toy.rope.scaling.type", json!("longrope")),
        ] {
            let refused = config(|query| drop(query.metadata.insert(key.into(), value))).unwrap_err().message;
            assert!(refused.contains(key), "{refused}");
        }
        for key in ["toy.block_count", "toy.attention.layer_norm_rms_epsilon", "general.architecture"] {
            let refused = config(|query| drop(query.metadata.remove(key))).unwrap_err().message;
            assert!(refused.contains(key), "{refused}");
        }
        let refused = config(|query| drop(query.tensors.insert("rope_freqs.weight".into(), vec![4]))).unwrap_err();
        assert!(refused.message.contains("rope_freqs"));
        assert!(config(|query| query.tensors.clear()).unwrap_err().message.contains("vocab_size"));
    }

    #[test]
    fn tensors_are_named_layer_by_layer() {
        let query = query(|query| {
            for name in ["blk.0.attn_q.weight", "blk.1.attn_q.bias", "blk.2.attn_q.weight", "output.weight"] {
                query.tensors.insert(name.into(), vec![1]);
            }
        });
        let permute = |name: &str| match name {
            "attn_q" => vec![Transform::PermuteRopeRows { heads: 4 }],
            _ => vec![],
        };
        let tensors = GgufFile::new(&query).unwrap().tensors(LAYER_NAMES, permute).unwrap();
        let found: Vec<_> = tensors.iter().map(|(name, tensor)| (&name[..], &tensor.name[..])).collect();
        let expected = [
            ("lm_head.weight", "output.weight"),
            ("model.embed_tokens.weight", "token_embd.weight"),
            ("model.layers.0.self_attn.q_proj.weight", "blk.0.attn_q.weight"),
            ("model.layers.1.self_attn.q_proj.bias", "blk.1.attn_q.bias"),
        ];
        assert_eq!(found, expected);
        assert_eq!(tensors["model.layers.0.self_attn.q_proj.weight"].transforms, permute("attn_q"));
        assert!(tensors["lm_head.weight"].transforms.is_empty());
    }
}
