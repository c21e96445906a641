//! The GGUF container, versions 2 and 3: metadata and where the tensors lie.
//!
//! A file is: magic, version, number of tensors, number of metadata entries, the entries, the tensor list, padding up to
//! the alignment, tensor data. All of it is little-endian.

mod cursor;
mod metadata;
mod tokenizer;

use std::{collections::BTreeMap, ops::Range};

use self::cursor::{Cursor, Fault};
pub use self::metadata::{GgufArray, GgufMetadata, GgufValue};
pub use self::tokenizer::GgufTokenizerParts;
use crate::{StorageType, WeightsError, mapped::MappedFile};

/// Metadata and tensor list must end within this many bytes. The largest vocabularies need about 30 MB.
const MAX_HEADER_BYTES: usize = 128 << 20;
/// The largest models have some thousands.
const MAX_TENSORS: u64 = 100_000;
const MAX_METADATA_ENTRIES: u64 = 10_000;
/// The format's own limit is 64; some writers exceed it.
const MAX_TENSOR_NAME_BYTES: usize = 256;
/// The format's own limit.
const MAX_DIMS: u32 = 4;
/// Both are far beyond what any writer uses (32).
const MAX_ALIGNMENT: u64 = 1 << 16;

#[derive(Debug)]
pub(crate) struct Gguf {
    pub metadata: GgufMetadata,
    pub tensors: BTreeMap<String, GgufTensorInfo>,
}

#[derive(Debug)]
pub(crate) struct GgufTensorInfo {
    /// Outermost axis first; the file has it the other way round.
    pub shape: Vec<u64>,
    pub storage: StorageType,
    /// In the file.
    pub range: Range<usize>,
}

impl Gguf {
    pub fn parse(file: &MappedFile) -> Result<Self, WeightsError> {
        let unsupported = |reason: String| WeightsError::Unsupported { path: file.path().to_owned(), reason };
        check_version(file).map_err(unsupported)?;
        let parsed = parse_header(file).map_err(|reason| file.damaged(reason))?;
        match parsed.metadata.get("split.count").and_then(GgufValue::as_u64) {
            Some(parts @ 2..) => Err(unsupported(format!(
                "it is one of {parts} parts of a split model; join them first (llama-gguf-split --merge)"
            ))),
            _ => Ok(parsed),
        }
    }
}

fn check_version(file: &[u8]) -> Result<(), String> {
    let Some((start, _)) = file.split_first_chunk::<8>() else {
        return Err("it is no GGUF file".into());
    };
    let (magic, version) = start.split_at(4);
    let version = u32::from_le_bytes([version[0], version[1], version[2], version[3]]);
    match (magic, version) {
        (b"GGUF", 2 | 3) => Ok(()),
        (b"GGUF", _) if matches!(version.swap_bytes(), 2 | 3) => Err("it is a big-endian GGUF file".into()),
        (b"GGUF", _) => Err(format!("it is GGUF version {version}; versions 2 and 3 are read")),
        (b"vers", _) => Err("it is a Git LFS pointer, not the file itself; run 'git lfs pull'".into()),
        _ => Err("it is no GGUF file".into()),
    }
}

fn parse_header(file: &[u8]) -> Result<Gguf, Fault> {
    let mut cursor = Cursor::new(&file[..file.len().min(MAX_HEADER_BYTES)], file.len());
    cursor.skip(8)?;
    let tensors = cursor.count("tensors", MAX_TENSORS)?;
    let entries = cursor.count("metadata entries", MAX_METADATA_ENTRIES)?;
    let metadata = GgufMetadata::parse(&mut cursor, entries)?;
    let alignment = alignment(&metadata)?;
    let listed = (0..tensors).map(|_| parse_tensor(&mut cursor, alignment)).collect::<Result<Vec<_>, _>>()?;
    let data_start = (cursor.position() as u64).next_multiple_of(alignment);
    let tensors = locate(listed, data_start, file.len() as u64)?;
    Ok(Gguf { metadata, tensors })
}

fn alignment(metadata: &GgufMetadata) -> Result<u64, Fault> {
    let Some(value) = metadata.get("general.alignment") else { return Ok(32) };
    match value.as_u64() {
        Some(alignment) if alignment.is_power_of_two() && (8..=MAX_ALIGNMENT).contains(&alignment) => Ok(alignment),
        _ => Err(format!("general.alignment is {value:?}, not a power of two from 8 to {MAX_ALIGNMENT}")),
    }
}

/// An entry of the tensor list.
struct Listed {
    name: String,
    shape: Vec<u64>,
    storage: StorageType,
    bytes: u64,
    /// From the start of the tensor data.
    offset: u64,
}

fn parse_tensor(cursor: &mut Cursor<'_>, alignment: u64) -> Result<Listed, Fault> {
    let name = cursor.string(MAX_TENSOR_NAME_BYTES, "a tensor name")?;
    let fault = |reason: String| format!("tensor '{name}': {reason}");
    let dims = cursor.u32()?;
    if dims > MAX_DIMS {
        return Err(fault(format!("it has {dims} axes; at most {MAX_DIMS} are possible")));
    }
    let mut shape = (0..dims).map(|_| cursor.u64()).collect::<Result<Vec<_>, _>>()?;
    shape.reverse();
    let id = cursor.u32()?;
    let storage = StorageType::from_gguf(id).ok_or_else(|| fault(format!("its element type {id} is unknown")))?;
    let bytes = storage.bytes_of(&shape).map_err(fault)?;
    let offset = cursor.u64()?;
    if offset % alignment != 0 {
        return Err(fault(format!("its offset {offset} is no multiple of {alignment}")));
    }
    Ok(Listed { name, shape, storage, bytes, offset })
}

/// Turns offsets into ranges of the file and checks that none leaves it, overlaps another or repeats a name.
fn locate(mut listed: Vec<Listed>, data_start: u64, file_len: u64) -> Result<BTreeMap<String, GgufTensorInfo>, Fault> {
    listed.sort_by_key(|tensor| (tensor.offset, tensor.bytes));
    let mut tensors = BTreeMap::new();
    let mut free_from = 0;
    for Listed { name, shape, storage, bytes, offset } in listed {
        if offset < free_from {
            return Err(format!("the data of tensor '{name}' overlaps that of another"));
        }
        let range = data_start.checked_add(offset).and_then(|start| Some(start..start.checked_add(bytes)?));
        let range = match range {
            Some(range) if range.end <= file_len => range.start as usize..range.end as usize,
            _ => return Err(format!("tensor '{name}' lies at {offset} + {bytes} bytes, beyond the file's {file_len}")),
        };
        free_from = offset + bytes;
        let repeated = format!("tensor '{name}' is listed twice");
        if tensors.insert(name, GgufTensorInfo { shape, storage, range }).is_some() {
            return Err(repeated);
        }
    }
    Ok(tensors)
}

#[cfg(test)]
mod tests;
