//! Small model files for tests.

use std::{collections::BTreeMap, fs, path::Path};

use tempfile::TempDir;
use torus_abi::{
    DType,
    model::{ModelDescription, Transform, WeightRole, WeightSource, WeightSpec},
};

use crate::Checkpoint;

pub(crate) fn testdata(name: &str) -> Checkpoint {
    Checkpoint::open_gguf(&Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata").join(name)).unwrap()
}

/// Writes any GGUF header, sound or not.
#[derive(Clone)]
pub(crate) struct GgufFile {
    pub version: u32,
    pub entries: Vec<u8>,
    pub entry_count: u64,
    pub tensors: Vec<u8>,
    pub tensor_count: u64,
    pub data: Vec<u8>,
}

impl GgufFile {
    pub fn new() -> Self {
        Self { version: 3, entries: vec![], entry_count: 0, tensors: vec![], tensor_count: 0, data: vec![] }
    }

    /// `kind` and `value` as the format encodes them.
    pub fn entry(mut self, key: &str, kind: u32, value: &[u8]) -> Self {
        self.entries.extend(string(key));
        self.entries.extend(kind.to_le_bytes());
        self.entries.extend(value);
        self.entry_count += 1;
        self
    }

    pub fn text(self, key: &str, value: &str) -> Self {
        self.entry(key, 8, &string(value))
    }

    /// `dims` as in the file: innermost first.
    pub fn tensor(mut self, name: &str, dims: &[u64], kind: u32, offset: u64) -> Self {
        self.tensors.extend(string(name));
        self.tensors.extend((dims.len() as u32).to_le_bytes());
        self.tensors.extend(dims.iter().flat_map(|dim| dim.to_le_bytes()));
        self.tensors.extend(kind.to_le_bytes());
        self.tensors.extend(offset.to_le_bytes());
        self.tensor_count += 1;
        self
    }

    pub fn data(mut self, data: impl Into<Vec<u8>>) -> Self {
        self.data = data.into();
        self
    }

    pub fn bytes(&self) -> Vec<u8> {
        let mut file = b"GGUF".to_vec();
        file.extend(self.version.to_le_bytes());
        file.extend(self.tensor_count.to_le_bytes());
        file.extend(self.entry_count.to_le_bytes());
        file.extend(&self.entries);
        file.extend(&self.tensors);
        if !self.data.is_empty() {
            file.resize(file.len().next_multiple_of(32), 0);
        }
        file.extend(&self.data);
        file
    }
}

/// A string as GGUF has it.
pub(crate) fn string(text: &str) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes(), text.as_bytes()].concat()
}

/// An array value of GGUF.
pub(crate) fn array(kind: u32, len: u64, elements: &[u8]) -> Vec<u8> {
    [&kind.to_le_bytes(), len.to_le_bytes().as_slice(), elements].concat()
}

pub(crate) fn open_gguf(bytes: &[u8]) -> Result<Checkpoint, crate::WeightsError> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.gguf");
    fs::write(&path, bytes).unwrap();
    Checkpoint::open_gguf(&path)
}

/// A safetensors file of f32 tensors.
pub(crate) fn safetensors_file(tensors: &[(&str, &[u64], &[f32])]) -> Vec<u8> {
    let mut header = serde_json::Map::new();
    let mut data = Vec::new();
    for (name, shape, values) in tensors {
        let start = data.len();
        data.extend(values.iter().flat_map(|value| value.to_le_bytes()));
        let entry = serde_json::json!({"dtype": "F32", "shape": shape, "data_offsets": [start, data.len()]});
        header.insert((*name).to_owned(), entry);
    }
    let header = serde_json::to_vec(&header).unwrap();
    [&(header.len() as u64).to_le_bytes(), header.as_slice(), &data].concat()
}

/// A model folder with these files beside a `config.json`.
pub(crate) fn folder(files: &[(&str, &[u8])]) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("config.json"), r#"{"architectures": ["TestForCausalLM"]}"#).unwrap();
    for (name, bytes) in files {
        fs::write(folder.path().join(name), bytes).unwrap();
    }
    folder
}

/// 0, 1, 2, …
pub(crate) fn counting(len: usize) -> Vec<f32> {
    (0..len).map(|i| i as f32).collect()
}

pub(crate) fn source(tensor: &str, shape: &[u64], transforms: &[Transform]) -> WeightSource {
    WeightSource { tensor: tensor.to_owned(), shape: shape.to_vec(), transforms: transforms.to_vec(), units: None }
}

pub(crate) fn weight(name: &str, shape: &[u64], sources: Vec<WeightSource>) -> WeightSpec {
    WeightSpec { name: name.to_owned(), shape: shape.to_vec(), role: WeightRole::Vector, sources }
}

pub(crate) fn description(weights: Vec<WeightSpec>, ignored: &[&str]) -> ModelDescription {
    ModelDescription {
        parallel: Default::default(),
        architecture: "TestForCausalLM".to_owned(),
        hidden: 4,
        vocab: 8,
        context_length: 16,
        dtype: DType::F32,
        kinds: vec![],
        layers: vec![],
        weights,
        ignored_tensors: ignored.iter().map(|name| (*name).to_owned()).collect(),
    }
}

/// A sink that keeps what it is given.
#[derive(Default)]
pub(crate) struct Kept(pub BTreeMap<String, (torus_abi::TensorType, Vec<u8>)>);

impl Kept {
    pub fn f32(&self, name: &str) -> Vec<f32> {
        let (tensor_type, bytes) = &self.0[name];
        assert_eq!(tensor_type.dtype, DType::F32);
        bytes.as_chunks().0.iter().map(|element| f32::from_le_bytes(*element)).collect()
    }
}

impl crate::WeightSink for Kept {
    fn put(&mut self, weight: &crate::PlannedWeight, bytes: crate::AlignedBytes) -> Result<(), crate::SinkError> {
        assert_eq!(bytes.as_ptr() as usize % 64, 0);
        let replaced = self.0.insert(weight.name.clone(), (weight.tensor_type(), bytes.to_vec()));
        assert!(replaced.is_none(), "{} came twice", weight.name);
        Ok(())
    }
}
