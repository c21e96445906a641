//! Damaged model files: whatever bytes are cut off or flipped in a header, opening and reading ends in an error or in
//! tensors within the file, without a panic and without an allocation out of proportion to the file.
//!
//! A binary of its own, because it watches all allocations.

#![cfg(test)]

use std::{
    alloc::{GlobalAlloc, Layout, System},
    fs,
    path::{Path, PathBuf},
    sync::atomic::{AtomicUsize, Ordering},
};

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use tempfile::TempDir;
use torus_weights::{Checkpoint, WeightsError};

const CASES: usize = 4000;
/// The files here have some 30 kB; a header may claim anything.
const MAX_ALLOCATION: usize = 4 << 20;

struct Watched;

static LARGEST: AtomicUsize = AtomicUsize::new(0);

#[global_allocator]
static ALLOCATOR: Watched = Watched;

// SAFETY: everything is passed on to the system's allocator.
unsafe impl GlobalAlloc for Watched {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        LARGEST.fetch_max(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's promises are those of the system's allocator.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(pointer, layout) }
    }
}

/// Counts what came of the cases, so that a test which refuses (or accepts) everything is noticed.
#[derive(Default)]
struct Outcome {
    read: usize,
    refused: usize,
}

impl Outcome {
    fn add(&mut self, opened: Result<Checkpoint, WeightsError>) {
        match opened {
            Ok(checkpoint) => {
                read_everything(&checkpoint);
                self.read += 1;
            }
            Err(error) => {
                assert!(!error.to_string().is_empty());
                self.refused += 1;
            }
        }
        assert!(LARGEST.load(Ordering::Relaxed) <= MAX_ALLOCATION, "one allocation of {LARGEST:?} bytes");
    }
}

fn read_everything(checkpoint: &Checkpoint) {
    for (name, entry) in checkpoint.tensors() {
        let bytes = checkpoint.bytes(entry);
        assert_eq!(bytes.len(), entry.bytes(), "{name}");
        std::hint::black_box(bytes.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte)));
    }
    let query = checkpoint.gguf_query();
    assert_eq!(query.is_some(), checkpoint.is_gguf());
    // A flipped type is an error here, which is as good as parts.
    let _either = checkpoint.gguf_tokenizer();
}

/// The bytes with a random end cut off, or with one to eight random bits of the first `header` bytes flipped.
fn damaged(bytes: &[u8], header: usize, random: &mut ChaCha8Rng) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    if random.random_ratio(1, 4) {
        bytes.truncate(random.random_range(0..bytes.len()));
        return bytes;
    }
    for _ in 0..random.random_range(1..=8) {
        bytes[random.random_range(0..header)] ^= 1 << random.random_range(0..8);
    }
    bytes
}

fn write(path: &Path, bytes: &[u8]) {
    fs::write(path, bytes).unwrap();
}

#[test]
fn gguf() {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata/mixed.gguf");
    let bytes = fs::read(&source).unwrap();
    let data: usize = Checkpoint::open_gguf(&source).unwrap().tensors().values().map(|entry| entry.bytes()).sum();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.gguf");
    let mut random = ChaCha8Rng::seed_from_u64(1);
    let mut outcome = Outcome::default();
    for _ in 0..CASES {
        write(&path, &damaged(&bytes, bytes.len() - data, &mut random));
        outcome.add(Checkpoint::open_gguf(&path));
    }
    assert!(outcome.read > 0 && outcome.refused > CASES / 2, "{} read", outcome.read);
}

/// Two shards and their index.
fn sharded_folder() -> (TempDir, [PathBuf; 3]) {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    write(&path("config.json"), b"{}");
    let shard = |prefix: &str| {
        let data = vec![7u8; 64];
        let view = |shape| safetensors::tensor::TensorView::new(safetensors::Dtype::F32, shape, &data).unwrap();
        let views = [(format!("{prefix}.a"), view(vec![16])), (format!("{prefix}.b"), view(vec![4, 4]))];
        safetensors::serialize(views, Some([("format".to_owned(), "pt".to_owned())].into())).unwrap()
    };
    let paths = [path("one.safetensors"), path("two.safetensors"), path("model.safetensors.index.json")];
    write(&paths[0], &shard("one"));
    write(&paths[1], &shard("two"));
    let map = r#"{"one.a": "one.safetensors", "one.b": "one.safetensors", "two.a": "two.safetensors", "two.b": "two.safetensors"}"#;
    write(&paths[2], format!(r#"{{"metadata": {{"total_size": 256}}, "weight_map": {map}}}"#).as_bytes());
    (folder, paths)
}

fn damage_one_of_a_folder(which: usize, data: usize, seed: u64) -> Outcome {
    let (folder, paths) = sharded_folder();
    assert_eq!(Checkpoint::open_folder(folder.path()).unwrap().tensors().len(), 4);
    let bytes = fs::read(&paths[which]).unwrap();
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let mut outcome = Outcome::default();
    for _ in 0..CASES {
        write(&paths[which], &damaged(&bytes, bytes.len() - data, &mut random));
        outcome.add(Checkpoint::open_folder(folder.path()));
    }
    outcome
}

#[test]
fn safetensors_shard() {
    let outcome = damage_one_of_a_folder(1, 128, 2);
    assert!(outcome.read > 0 && outcome.refused > CASES / 2, "{} read", outcome.read);
}

#[test]
fn safetensors_index() {
    let outcome = damage_one_of_a_folder(2, 0, 3);
    assert!(outcome.read > 0 && outcome.refused > CASES / 2, "{} read", outcome.read);
}
