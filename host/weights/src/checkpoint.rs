//! A model's files, whatever their format.

use std::{
    collections::BTreeMap,
    ops::Range,
    path::{Path, PathBuf},
};

use serde_json::Value;
use torus_abi::model::GgufQuery;

use crate::{
    GgufMetadata, GgufTokenizerParts, ResolvedModel, StorageType, WeightsError,
    error::list,
    gguf::{self, Gguf},
    mapped::MappedFile,
    safetensors::{self, INDEX_FILE, ShardByTensor},
};

/// A tensor of a checkpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorEntry {
    /// Outermost axis first, in both formats: a linear's weight is `[out, in]`.
    pub shape: Vec<u64>,
    pub storage: StorageType,
    /// Which of the checkpoint's files.
    file: usize,
    /// In that file; checked against it when the checkpoint was opened.
    range: Range<usize>,
}

impl TensorEntry {
    pub fn bytes(&self) -> usize {
        self.range.len()
    }
}

/// A model's files, mapped into memory, and the list of their tensors. See the crate for what mapping implies.
#[derive(Debug)]
pub struct Checkpoint {
    path: PathBuf,
    files: Vec<MappedFile>,
    tensors: BTreeMap<String, TensorEntry>,
    kind: Kind,
}

#[derive(Debug)]
enum Kind {
    Folder { config: Value, generation_config: Option<Value> },
    Gguf(Gguf),
}

impl Checkpoint {
    pub fn open(model: &ResolvedModel) -> Result<Self, WeightsError> {
        match model {
            ResolvedModel::Folder(path) => Self::open_folder(path),
            ResolvedModel::Gguf(path) => Self::open_gguf(path),
        }
    }

    /// A Hugging Face folder: `config.json` and safetensors.
    pub fn open_folder(folder: &Path) -> Result<Self, WeightsError> {
        let config_path = folder.join("config.json");
        if !config_path.exists() {
            let reason = "it has no config.json".to_owned();
            return Err(WeightsError::Incomplete { path: folder.to_owned(), reason });
        }
        let config = safetensors::read_json(&config_path)?;
        let generation_path = folder.join("generation_config.json");
        let generation_config =
            generation_path.exists().then(|| safetensors::read_json(&generation_path)).transpose()?;
        let (files, index) = safetensors::open_files(folder)?;
        let tensors = list_shards(&files)?;
        check_index(folder, &index, &files, &tensors)?;
        Ok(Self { path: folder.to_owned(), files, tensors, kind: Kind::Folder { config, generation_config } })
    }

    pub fn open_gguf(path: &Path) -> Result<Self, WeightsError> {
        let file = MappedFile::open(path)?;
        let gguf = Gguf::parse(&file)?;
        let entry = |info: &gguf::GgufTensorInfo| TensorEntry {
            shape: info.shape.clone(),
            storage: info.storage,
            file: 0,
            range: info.range.clone(),
        };
        let tensors = gguf.tensors.iter().map(|(name, info)| (name.clone(), entry(info))).collect();
        Ok(Self { path: path.to_owned(), files: vec![file], tensors, kind: Kind::Gguf(gguf) })
    }

    /// The folder or the `.gguf` file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn is_gguf(&self) -> bool {
        matches!(self.kind, Kind::Gguf(_))
    }

    pub(crate) fn files(&self) -> &[MappedFile] {
        &self.files
    }

    /// By the name that the checkpoint uses.
    pub fn tensors(&self) -> &BTreeMap<String, TensorEntry> {
        &self.tensors
    }

    /// What a tensor's file holds for it: little-endian, at any address.
    ///
    /// # Panics
    /// May, if the entry is another checkpoint's.
    pub fn bytes(&self, entry: &TensorEntry) -> &[u8] {
        &self.files[entry.file][entry.range.clone()]
    }

    /// `config.json`; a GGUF file has none (its metadata stands for it).
    pub fn config(&self) -> Option<&Value> {
        match &self.kind {
            Kind::Folder { config, .. } => Some(config),
            Kind::Gguf(_) => None,
        }
    }

    /// `generation_config.json`, if the folder has one.
    pub fn generation_config(&self) -> Option<&Value> {
        match &self.kind {
            Kind::Folder { generation_config, .. } => generation_config.as_ref(),
            Kind::Gguf(_) => None,
        }
    }

    pub fn gguf_metadata(&self) -> Option<&GgufMetadata> {
        match &self.kind {
            Kind::Folder { .. } => None,
            Kind::Gguf(gguf) => Some(&gguf.metadata),
        }
    }

    /// What to ask a model plugin about a GGUF file.
    pub fn gguf_query(&self) -> Option<GgufQuery> {
        let metadata = self.gguf_metadata()?.to_json();
        let tensors = self.tensors.iter().map(|(name, entry)| (name.clone(), entry.shape.clone())).collect();
        Some(GgufQuery { metadata, tensors })
    }

    /// The tokenizer inside a GGUF file.
    pub fn gguf_tokenizer(&self) -> Result<Option<GgufTokenizerParts>, WeightsError> {
        let damaged = |reason| WeightsError::Damaged { path: self.path.clone(), reason };
        self.gguf_metadata().map(|metadata| metadata.tokenizer().map_err(damaged)).transpose()
    }
}

fn list_shards(files: &[MappedFile]) -> Result<BTreeMap<String, TensorEntry>, WeightsError> {
    let mut tensors = BTreeMap::<String, TensorEntry>::new();
    for (file, mapped) in files.iter().enumerate() {
        for safetensors::SafetensorsInfo { name, shape, storage, range } in safetensors::parse(mapped)? {
            if let Some(first) = tensors.get(&name) {
                let other = files[first.file].path().display();
                return Err(mapped.damaged(format!("tensor '{name}' is also in {other}")));
            }
            tensors.insert(name, TensorEntry { shape, storage, file, range });
        }
    }
    Ok(tensors)
}

/// Each tensor must be in the shard that the index names.
fn check_index(
    folder: &Path,
    index: &ShardByTensor,
    files: &[MappedFile],
    tensors: &BTreeMap<String, TensorEntry>,
) -> Result<(), WeightsError> {
    let is_there = |name: &str, shard: &str| {
        tensors.get(name).is_some_and(|entry| files[entry.file].path().file_name().is_some_and(|file| file == shard))
    };
    let absent: Vec<_> = index.iter().filter(|(name, shard)| !is_there(name, shard)).collect();
    if absent.is_empty() {
        return Ok(());
    }
    let absent = list(absent.iter().map(|(name, shard)| format!("{name} in {shard}")), ", ");
    let reason = format!("it lists tensors that are not there: {absent}");
    Err(WeightsError::Damaged { path: folder.join(INDEX_FILE), reason })
}

#[cfg(test)]
mod tests;
