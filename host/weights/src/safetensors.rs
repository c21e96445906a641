//! The safetensors container, and folders that hold a model in it.
//!
//! A file is: length of the header (u64, little-endian), header (JSON: tensor name -> dtype, shape, data offsets), tensor
//! data. Large models are cut into shards, which `model.safetensors.index.json` lists.

use std::{
    collections::BTreeMap,
    fmt,
    fs::{self, File},
    io::Read,
    marker::PhantomData,
    ops::Range,
    path::{Component, Path},
};

use serde::{
    Deserialize, Deserializer,
    de::{DeserializeOwned, Error, IgnoredAny, MapAccess, Visitor},
};

use crate::{StorageType, WeightsError, error::list, mapped::MappedFile};

pub(crate) const SINGLE_FILE: &str = "model.safetensors";
pub(crate) const INDEX_FILE: &str = "model.safetensors.index.json";

/// The format's own limit.
const MAX_HEADER_BYTES: u64 = 100_000_000;
/// The largest models have some hundred thousand (experts one by one).
const MAX_TENSORS: usize = 1_000_000;
const MAX_DIMS: usize = 8;
/// Longest `config.json` and index read.
const MAX_JSON_BYTES: u64 = 100_000_000;

/// A tensor of one file.
#[derive(Debug)]
pub(crate) struct SafetensorsInfo {
    pub name: String,
    pub shape: Vec<u64>,
    pub storage: StorageType,
    /// In the file.
    pub range: Range<usize>,
}

/// The tensors of a file, in the order of their data.
pub(crate) fn parse(file: &MappedFile) -> Result<Vec<SafetensorsInfo>, WeightsError> {
    parse_bytes(file).map_err(|reason| file.damaged(reason))
}

fn parse_bytes(file: &[u8]) -> Result<Vec<SafetensorsInfo>, String> {
    if file.starts_with(b"version https://git-lfs") {
        return Err("it is a Git LFS pointer, not the file itself ('git lfs pull' brings that)".into());
    }
    let Some((header_len, rest)) = file.split_first_chunk() else {
        return Err(format!("{} bytes are no safetensors file", file.len()));
    };
    let header_len = u64::from_le_bytes(*header_len);
    if header_len > MAX_HEADER_BYTES || header_len > rest.len() as u64 {
        return Err(format!("its header claims {header_len} bytes, of {} after the length", rest.len()));
    }
    let (header, data) = rest.split_at(header_len as usize);
    // A copy, because the file may change under the mapping.
    let header = header.to_vec();
    let header: UniqueKeys<HeaderEntry> =
        serde_json::from_slice(&header).map_err(|error| format!("header: {error}"))?;
    let data_start = file.len() - data.len();
    let tensors = header.0.into_iter().filter_map(|(name, entry)| match entry {
        HeaderEntry::Tensor(tensor) => Some(locate(name, tensor, data_start, data.len() as u64)),
        HeaderEntry::Metadata => None,
    });
    let mut tensors = tensors.collect::<Result<Vec<_>, _>>()?;
    tensors.sort_by_key(|tensor| (tensor.range.start, tensor.range.end));
    check_cover(&tensors, data_start..file.len())?;
    Ok(tensors)
}

fn locate(name: String, tensor: HeaderTensor, data_start: usize, data_len: u64) -> Result<SafetensorsInfo, String> {
    let fault = |reason: String| format!("tensor '{name}': {reason}");
    let HeaderTensor { dtype, shape, data_offsets: [start, end] } = tensor;
    let storage =
        StorageType::from_safetensors(&dtype).ok_or_else(|| fault(format!("its dtype {dtype} is unknown")))?;
    if shape.len() > MAX_DIMS {
        return Err(fault(format!("it has {} axes; at most {MAX_DIMS} are read", shape.len())));
    }
    let bytes = storage.bytes_of(&shape).map_err(fault)?;
    if start > end || end > data_len {
        return Err(fault(format!("its data {start}..{end} is not within the file's {data_len} bytes of data")));
    }
    if end - start != bytes {
        return Err(fault(format!("its data {start}..{end} is not the {bytes} bytes of {dtype} {shape:?}")));
    }
    let range = data_start + start as usize..data_start + end as usize;
    Ok(SafetensorsInfo { name, shape, storage, range })
}

/// The format forbids overlaps and holes.
fn check_cover(tensors: &[SafetensorsInfo], data: Range<usize>) -> Result<(), String> {
    let mut end = data.start;
    for tensor in tensors {
        if tensor.range.start != end {
            return Err(format!("tensor '{}' does not follow the one before it in the file", tensor.name));
        }
        end = tensor.range.end;
    }
    match data.end - end {
        0 => Ok(()),
        left => Err(format!("{left} bytes at its end belong to no tensor")),
    }
}

enum HeaderEntry {
    Tensor(HeaderTensor),
    Metadata,
}

#[derive(Deserialize)]
struct HeaderTensor {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: [u64; 2],
}

/// What a JSON object maps a key to; the key may decide how the value is read.
trait Keyed: Sized {
    fn read<'de, A: MapAccess<'de>>(key: &str, map: &mut A) -> Result<Self, A::Error>;
}

impl Keyed for HeaderEntry {
    fn read<'de, A: MapAccess<'de>>(key: &str, map: &mut A) -> Result<Self, A::Error> {
        match key {
            "__metadata__" => map.next_value::<IgnoredAny>().map(|_| Self::Metadata),
            _ => map.next_value().map(Self::Tensor),
        }
    }
}

impl Keyed for String {
    fn read<'de, A: MapAccess<'de>>(_: &str, map: &mut A) -> Result<Self, A::Error> {
        map.next_value()
    }
}

/// A JSON object in which no key may come twice; serde's own maps keep the last.
struct UniqueKeys<V>(BTreeMap<String, V>);

impl<'de, V: Keyed> Deserialize<'de> for UniqueKeys<V> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries<V>(PhantomData<V>);

        impl<'de, V: Keyed> Visitor<'de> for Entries<V> {
            type Value = UniqueKeys<V>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object with a key for each tensor")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut entries = BTreeMap::new();
                while let Some(key) = map.next_key::<String>()? {
                    if entries.len() == MAX_TENSORS {
                        return Err(A::Error::custom(format!("more than {MAX_TENSORS} tensors")));
                    }
                    let value = V::read(&key, &mut map)?;
                    if let Some(_first) = entries.insert(key.clone(), value) {
                        return Err(A::Error::custom(format!("tensor '{key}' is listed twice")));
                    }
                }
                Ok(UniqueKeys(entries))
            }
        }

        deserializer.deserialize_map(Entries(PhantomData))
    }
}

/// `model.safetensors.index.json`
#[derive(Deserialize)]
struct Index {
    weight_map: UniqueKeys<String>,
}

/// File names by the tensors in them.
pub(crate) type ShardByTensor = BTreeMap<String, String>;

pub(crate) fn read_index(path: &Path) -> Result<ShardByTensor, WeightsError> {
    let index: Index = read_json(path)?;
    let map = index.weight_map.0;
    let damaged = |reason| WeightsError::Damaged { path: path.to_owned(), reason };
    match map.values().find(|shard| !is_file_name(shard)) {
        Some(shard) => Err(damaged(format!("it names the shard '{shard}', which is no file of its own folder"))),
        None if map.is_empty() => Err(damaged("it names no tensor".into())),
        None => Ok(map),
    }
}

/// True for a plain name: no folder, no `..`, no root.
pub(crate) fn is_file_name(text: &str) -> bool {
    let mut components = Path::new(text).components();
    let is_normal = matches!(components.next(), Some(Component::Normal(name)) if name == text);
    is_normal && components.next().is_none() && !text.contains(['\\', '\0'])
}

/// The files with a folder's tensors, and the index if there is one. Like Hugging Face, a single file goes before it.
pub(crate) fn open_files(folder: &Path) -> Result<(Vec<MappedFile>, ShardByTensor), WeightsError> {
    let single = folder.join(SINGLE_FILE);
    let index = folder.join(INDEX_FILE);
    if single.exists() {
        return Ok((vec![MappedFile::open(&single)?], ShardByTensor::new()));
    }
    if !index.exists() {
        return Err(WeightsError::Incomplete { path: folder.to_owned(), reason: no_weights(folder) });
    }
    let index = read_index(&index)?;
    let mut shards: Vec<_> = index.values().collect();
    shards.sort_unstable();
    shards.dedup();
    let missing: Vec<_> = shards.iter().filter(|shard| !folder.join(shard).exists()).collect();
    if !missing.is_empty() {
        let reason = format!("its index names files that are not there: {}", list(missing.iter(), ", "));
        return Err(WeightsError::Incomplete { path: folder.to_owned(), reason });
    }
    let files = shards.iter().map(|shard| MappedFile::open(&folder.join(shard))).collect::<Result<_, _>>()?;
    Ok((files, index))
}

/// What to say about a folder without safetensors, by what else is in it.
fn no_weights(folder: &Path) -> String {
    let names: Vec<_> = fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.file_name()).collect();
    let with_ending = |ending: &str| names.iter().filter_map(|name| name.to_str()).find(|name| name.ends_with(ending));
    if let Some(gguf) = with_ending(".gguf") {
        return format!("it has no {SINGLE_FILE}, but {gguf}; give the path of that file");
    }
    match with_ending(".bin").or_else(|| with_ending(".pth")) {
        Some(pickle) => format!("its weights are in {pickle}, which is not read; convert them to safetensors"),
        None => format!("it has neither {SINGLE_FILE} nor {INDEX_FILE}"),
    }
}

/// Reads a JSON file of reasonable size.
pub(crate) fn read_json<T: DeserializeOwned>(path: &Path) -> Result<T, WeightsError> {
    let io = |source| WeightsError::Io { path: path.to_owned(), source };
    let damaged = |reason: String| WeightsError::Damaged { path: path.to_owned(), reason };
    let mut text = Vec::new();
    File::open(path).and_then(|file| file.take(MAX_JSON_BYTES + 1).read_to_end(&mut text)).map_err(io)?;
    if text.len() as u64 > MAX_JSON_BYTES {
        return Err(damaged(format!("it has more than {MAX_JSON_BYTES} bytes")));
    }
    serde_json::from_slice(&text).map_err(|error| damaged(error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(header: &str, data_len: usize) -> Vec<u8> {
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header.as_bytes());
        bytes.resize(bytes.len() + data_len, 0);
        bytes
    }

    fn refusal(header: &str, data_len: usize) -> String {
        parse_bytes(&file(header, data_len)).unwrap_err()
    }

    #[test]
    fn files_of_the_reference_writer_are_read() {
        use safetensors::{Dtype, tensor::TensorView};
        let (a, b) = ([1.5f32, -2.0].map(f32::to_le_bytes).concat(), vec![7u8; 24]);
        let views = [
            ("a", TensorView::new(Dtype::F32, vec![2], &a).unwrap()),
            ("b.c", TensorView::new(Dtype::BF16, vec![3, 4], &b).unwrap()),
        ];
        let written = safetensors::serialize(views, Some([("format".to_owned(), "pt".to_owned())].into())).unwrap();
        let read = parse_bytes(&written).unwrap();
        let by_name = |name: &str| read.iter().find(|tensor| tensor.name == name).unwrap();
        assert_eq!((read.len(), by_name("a").storage, &by_name("b.c").shape), (2, StorageType::F32, &vec![3, 4]));
        assert_eq!(written[by_name("a").range.clone()], a);
        assert_eq!(written[by_name("b.c").range.clone()], b);
    }

    #[test]
    fn offsets_are_checked_against_the_shape_and_the_file() {
        let one = |offsets: &str| format!(r#"{{"a": {{"dtype": "F32", "shape": [2], "data_offsets": {offsets}}}}}"#);
        assert!(parse_bytes(&file(&one("[0, 8]"), 8)).is_ok());
        assert!(refusal(&one("[0, 8]"), 7).contains("not within the file's 7 bytes"));
        assert!(refusal(&one("[0, 8]"), 9).contains("1 bytes at its end"));
        assert!(refusal(&one("[1, 9]"), 9).contains("does not follow"));
        assert!(refusal(&one("[0, 4]"), 4).contains("not the 8 bytes"));
        assert!(refusal(&one("[8, 0]"), 8).contains("not within"));
        assert!(refusal(&one("[0, 18446744073709551615]"), 8).contains("not within"));
        assert!(refusal(&one("[0, -8]"), 8).contains("header"));
    }

    #[test]
    fn tensors_may_neither_overlap_nor_repeat() {
        let entry = |name: &str, from: u64| {
            format!(r#""{name}": {{"dtype": "U8", "shape": [4], "data_offsets": [{from}, {}]}}"#, from + 4)
        };
        let both = |second: &str, from: u64| format!("{{{}, {}}}", entry("a", 0), entry(second, from));
        assert!(parse_bytes(&file(&both("b", 4), 8)).is_ok());
        assert!(refusal(&both("b", 2), 6).contains("does not follow"));
        assert!(refusal(&both("a", 0), 4).contains("'a' is listed twice"));
        assert!(refusal(&both("a", 4), 8).contains("'a' is listed twice"));
    }

    #[test]
    fn impossible_headers_are_refused() {
        assert!(parse_bytes(&[1, 2, 3]).unwrap_err().contains("3 bytes"));
        assert!(parse_bytes(&u64::MAX.to_le_bytes()).unwrap_err().contains("claims"));
        assert!(parse_bytes(b"version https://git-lfs.github.com/spec/v1\n").unwrap_err().contains("Git LFS"));
        assert!(refusal("[]", 0).contains("an object"));
        assert!(refusal(&"[".repeat(10_000), 0).contains("header"));
        assert!(refusal(r#"{"a": {"dtype": "F7", "shape": [], "data_offsets": [0, 0]}}"#, 0).contains("F7 is unknown"));
        let shape = r#"{"a": {"dtype": "F32", "shape": [4294967296, 4294967296], "data_offsets": [0, 0]}}"#;
        assert!(refusal(shape, 0).contains("overflows"));
    }

    #[test]
    fn an_index_names_files_of_its_own_folder() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(INDEX_FILE);
        let read = |map: &str| {
            fs::write(&path, format!(r#"{{"metadata": {{}}, "weight_map": {map}}}"#)).unwrap();
            read_index(&path).map_err(|error| error.to_string())
        };
        assert_eq!(read(r#"{"a": "model-1.safetensors"}"#).unwrap()["a"], "model-1.safetensors");
        for bad in ["../x", "/etc/passwd", "a/b", "..", ".", "", "./a", "a/", "..\\x"] {
            let error = read(&format!(r#"{{"a": {}}}"#, serde_json::json!(bad))).unwrap_err();
            assert!(error.contains("no file of its own folder"), "{bad}: {error}");
        }
        assert!(read(r#"{"a": "x", "a": "y"}"#).unwrap_err().contains("listed twice"));
        assert!(read("{}").unwrap_err().contains("no tensor"));
    }
}
