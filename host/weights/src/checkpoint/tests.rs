use std::fs;

use super::*;
use crate::testing::{folder, safetensors_file};

fn index(map: &[(&str, &str)]) -> Vec<u8> {
    let map: BTreeMap<_, _> = map.iter().copied().collect();
    serde_json::to_vec(&serde_json::json!({"metadata": {"total_size": 8}, "weight_map": map})).unwrap()
}

fn refusal(files: &[(&str, &[u8])]) -> String {
    Checkpoint::open_folder(folder(files).path()).unwrap_err().to_string()
}

const A: &str = "model-00001-of-00002.safetensors";
const B: &str = "model-00002-of-00002.safetensors";

#[test]
fn a_single_file_goes_before_an_index() {
    let file = safetensors_file(&[("w", &[2, 1], &[1.0, 2.0])]);
    let folder = folder(&[("model.safetensors", &file), (INDEX_FILE, b"not read")]);
    let checkpoint = Checkpoint::open(&ResolvedModel::Folder(folder.path().to_owned())).unwrap();
    let entry = &checkpoint.tensors()["w"];
    assert_eq!((entry.shape.as_slice(), entry.bytes()), ([2, 1].as_slice(), 8));
    assert_eq!(checkpoint.bytes(entry), [1f32, 2.0].map(f32::to_le_bytes).concat());
    assert_eq!(checkpoint.config().unwrap()["architectures"][0], "TestForCausalLM");
    assert_eq!((checkpoint.generation_config(), checkpoint.is_gguf()), (None, false));
    assert!(checkpoint.gguf_query().is_none() && checkpoint.gguf_tokenizer().unwrap().is_none());
}

#[test]
fn shards_are_read_together() {
    let (a, b) =
        (safetensors_file(&[("a", &[1], &[1.0])]), safetensors_file(&[("b", &[1], &[2.0]), ("c", &[1], &[3.0])]));
    let index = index(&[("a", A), ("b", B), ("c", B)]);
    let folder = folder(&[(A, &a), (B, &b), (INDEX_FILE, &index), ("generation_config.json", b"{\"top_k\": 5}")]);
    let checkpoint = Checkpoint::open_folder(folder.path()).unwrap();
    let values: Vec<_> = checkpoint.tensors().values().map(|entry| checkpoint.bytes(entry).to_vec()).collect();
    assert_eq!(values, [1f32, 2.0, 3.0].map(|value| value.to_le_bytes().to_vec()));
    assert_eq!(checkpoint.generation_config().unwrap()["top_k"], 5);
}

#[test]
fn a_tensor_in_two_shards_is_refused() {
    let shard = safetensors_file(&[("a", &[1], &[1.0])]);
    let message = refusal(&[(A, &shard), (B, &shard), (INDEX_FILE, &index(&[("a", A), ("b", B)]))]);
    assert!(message.contains("tensor 'a' is also in") && message.contains(A) && message.contains(B), "{message}");
}

#[test]
fn what_the_index_promises_must_be_there() {
    let shard = safetensors_file(&[("a", &[1], &[1.0])]);
    let message = refusal(&[(A, &shard), (INDEX_FILE, &index(&[("a", A), ("b", A)]))]);
    assert!(message.contains("tensors that are not there: b in model-00001"), "{message}");
    let message = refusal(&[(A, &shard), (INDEX_FILE, &index(&[("a", A), ("b", B)]))]);
    assert!(message.contains("files that are not there: model-00002"), "{message}");
    let other = safetensors_file(&[("b", &[1], &[1.0])]);
    let swapped = index(&[("a", B), ("b", A)]);
    assert!(refusal(&[(A, &shard), (B, &other), (INDEX_FILE, &swapped)]).contains("a in model-00002"));
}

#[test]
fn folders_without_weights_say_what_they_have() {
    assert!(refusal(&[]).contains("neither model.safetensors nor model.safetensors.index.json"));
    assert!(refusal(&[("m.gguf", b"")]).contains("but m.gguf; give the path of that file"));
    assert!(refusal(&[("pytorch_model.bin", b"")]).contains("convert them to safetensors"));
    let empty = tempfile::tempdir().unwrap();
    assert!(Checkpoint::open_folder(empty.path()).unwrap_err().to_string().contains("no config.json"));
}

#[test]
fn unreadable_json_names_the_file() {
    let folder = folder(&[]);
    fs::write(folder.path().join("config.json"), "{").unwrap();
    let message = Checkpoint::open_folder(folder.path()).unwrap_err().to_string();
    assert!(message.contains("config.json is damaged"), "{message}");
    assert!(refusal(&[("model.safetensors", b"")]).contains("model.safetensors is damaged"));
}
