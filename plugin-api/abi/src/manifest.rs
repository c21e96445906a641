//! What a plugin says of itself before anything else is asked.

use serde::{Deserialize, Deserializer, Serialize};

/// The kinds of plugin there are. The names are those of the tables that `interface` hands out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    Model,
    Attention,
    Speculative,
}

impl Kind {
    pub fn name(self) -> &'static str {
        match self {
            Kind::Model => "model",
            Kind::Attention => "attention",
            Kind::Speculative => "speculative",
        }
    }
}

/// The answer of `describe`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// [`crate::ABI_VERSION`] of the API the plugin was built with.
    pub abi: (u32, u32),
    /// Unique name, also the prefix of its symbols: `llama`, `native`.
    pub name: String,
    pub version: String,
    /// One line for `torus plugins ls`.
    #[serde(default)]
    pub description: String,
    /// Kinds that this version does not know are left out: a newer plugin may offer one beside others.
    #[serde(deserialize_with = "known_kinds")]
    pub kinds: Vec<Kind>,
    /// Of a model plugin: the architectures it serves (`LlamaForCausalLM`).
    #[serde(default)]
    pub architectures: Vec<String>,
    /// Of a model plugin: the values of GGUF's `general.architecture` it reads.
    #[serde(default)]
    pub gguf_architectures: Vec<String>,
    /// `unwind`, or the plugin is refused: its panics could not be caught.
    pub panic: String,
    /// The target it was compiled for: `x86_64-linux`.
    pub target: String,
}

fn known_kinds<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<Kind>, D::Error> {
    let names = Vec::<serde_json::Value>::deserialize(deserializer)?;
    Ok(names.into_iter().filter_map(|name| serde_json::from_value(name).ok()).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_of_newer_versions_are_left_out() {
        let text = r#"{"abi":[0,1],"name":"a","version":"1","kinds":["model","oracle"],"panic":"unwind","target":"t"}"#;
        let manifest: Manifest = serde_json::from_str(text).unwrap();
        assert_eq!(manifest.kinds, [Kind::Model]);
    }
}
