use tempfile::TempDir;
use torus_abi::model::{ModelDescription, WeightSpec};

use super::*;
use crate::{
    Checkpoint, NoProgress, PlannedWeight, SinkError, StorageDType, Target, WeightSink,
    testing::{counting, description, folder, safetensors_file, source, weight},
};

/// Two matrices and a vector.
fn model() -> (TempDir, ModelDescription) {
    let values = counting(20 * 64);
    let file = safetensors_file(&[
        ("a", &[20, 64], &values),
        ("norm", &[5], &values[3..8]),
        ("b", &[16, 32], &values[..16 * 32]),
    ]);
    let plain = |name: &str, shape: &[u64]| weight(name, shape, vec![source(name, shape, &[])]);
    let weights = vec![plain("a", &[20, 64]), plain("norm", &[5]), plain("b", &[16, 32])];
    (folder(&[("model.safetensors", &file)]), description(weights, &[]))
}

fn packed(floats: Format) -> impl Fn(&WeightSpec) -> Target {
    move |spec| match spec.name.as_str() {
        "norm" => Target::Dense(StorageDType::F32),
        _ => Target::Packed { floats, keep_quantized: true },
    }
}

/// Matrices and vectors, each one after the other.
#[derive(Default)]
struct Joined {
    matrices: Vec<u8>,
    vectors: Vec<u8>,
}

impl WeightSink for Joined {
    fn put(&mut self, weight: &PlannedWeight, bytes: AlignedBytes) -> Result<(), SinkError> {
        match weight.storage {
            PlannedStorage::Packed(_) => self.matrices.extend_from_slice(&bytes),
            PlannedStorage::Dense(_) => self.vectors.extend_from_slice(&bytes),
        }
        Ok(())
    }
}

/// An entry in a folder of its own, and what belongs into it.
struct Case {
    cache: TempDir,
    entry: CacheEntry,
    weights: Joined,
}

impl Case {
    fn new() -> Self {
        let (folder, description) = model();
        let checkpoint = Checkpoint::open_folder(folder.path()).unwrap();
        let plan = LoadPlan::new(&checkpoint, &description, None, packed(Format::Q8)).unwrap();
        let mut weights = Joined::default();
        plan.run(&mut weights, &NoProgress).unwrap();
        let cache = tempfile::tempdir().unwrap();
        let entry = CacheEntry::new(cache.path().join("weights"), &plan).unwrap();
        Self { cache, entry, weights }
    }

    fn store(&self) {
        self.entry.store(&self.weights.matrices, &self.weights.vectors, &|| false).unwrap();
    }

    fn files(&self) -> usize {
        fs::read_dir(self.cache.path().join("weights")).unwrap().count()
    }
}

#[test]
fn what_was_packed_is_mapped_again() {
    let case = Case::new();
    assert!(case.entry.open().is_none());
    case.store();
    let mut found = case.entry.open().unwrap();
    assert_eq!((&found.matrices[..], &found.vectors[..]), (&case.weights.matrices[..], &case.weights.vectors[..]));
    assert_eq!(found.vectors.len(), 20);
    for bytes in [&found.matrices, &found.vectors] {
        assert!(bytes.as_ptr().addr().is_multiple_of(AlignedBytes::ALIGNMENT));
    }
    assert_eq!((case.files(), case.entry.path().metadata().unwrap().len()), (1, case.entry.bytes()));
    // The mapping is private.
    found.matrices.fill(0);
    assert_eq!(case.entry.open().unwrap().matrices[..], case.weights.matrices);
}

#[test]
fn damaged_entries_are_none_and_are_replaced() {
    let case = Case::new();
    case.store();
    let path = case.entry.path();
    let whole = fs::read(&path).unwrap();
    let flipped = |at: usize| {
        let mut content = whole.clone();
        content[at] ^= 1;
        content
    };
    let last_matrix = PAGE as usize + case.weights.matrices.len() - 1;
    for (what, content) in [
        ("empty", vec![]),
        ("cut", whole[..whole.len() - 1].to_vec()),
        ("longer", [&whole[..], &[0]].concat()),
        ("magic", flipped(0)),
        ("key", flipped(24)),
        ("matrix header", flipped(PAGE as usize)),
        ("rows of a matrix", flipped(PAGE as usize + 24)),
        ("end of a matrix", flipped(last_matrix)),
        ("vector", flipped(whole.len() - 1)),
        ("zeros", vec![0; whole.len()]),
    ] {
        fs::write(&path, content).unwrap();
        assert!(case.entry.open().is_none(), "{what}");
    }
    case.store();
    assert!(case.entry.open().is_some());
}

#[test]
fn an_entry_belongs_to_one_checkpoint_and_one_plan() {
    let (folder, description) = model();
    let key = |path: &Path, floats| {
        let checkpoint = Checkpoint::open_folder(path).unwrap();
        let plan = LoadPlan::new(&checkpoint, &description, None, packed(floats)).unwrap();
        CacheEntry::new("cache", &plan).unwrap().path()
    };
    let first = key(folder.path(), Format::Bf16);
    assert_eq!(first, key(folder.path(), Format::Bf16));
    let mut keys = vec![first, key(folder.path(), Format::Q8)];
    let (copy, _) = model();
    keys.push(key(copy.path(), Format::Bf16));
    // Another content of the same size, in a file that claims to be as old.
    let file = folder.path().join("model.safetensors");
    let (mut content, modified) = (fs::read(&file).unwrap(), file.metadata().unwrap().modified().unwrap());
    *content.last_mut().unwrap() ^= 1;
    fs::write(&file, content).unwrap();
    File::options().append(true).open(&file).unwrap().set_modified(modified).unwrap();
    keys.push(key(folder.path(), Format::Bf16));
    File::options().append(true).open(&file).unwrap().set_modified(modified + Duration::from_nanos(1)).unwrap();
    keys.push(key(folder.path(), Format::Bf16));
    keys.sort();
    keys.dedup();
    assert_eq!(keys.len(), 5);
}

#[test]
fn samples_tell_formats_apart() {
    let mut samples: Vec<_> = Format::ALL.map(sample).into();
    assert!(samples.iter().all(|sample| !sample.is_empty()));
    samples.sort();
    samples.dedup();
    assert_eq!(samples.len(), Format::ALL.len());
}

#[test]
fn what_is_cancelled_or_of_another_plan_leaves_nothing() {
    let case = Case::new();
    case.entry.store(&case.weights.matrices, &case.weights.vectors, &|| true).unwrap();
    assert_eq!(case.files(), 0);
    let other = case.entry.store(&case.weights.matrices[1..], &case.weights.vectors, &|| false);
    assert_eq!(other.unwrap_err().to_string(), "the weights are not those of the plan");
    assert_eq!(case.files(), 0);
    // No folder can be made below a file.
    fs::write(case.cache.path().join("file"), "").unwrap();
    let entry = CacheEntry { folder: case.cache.path().join("file/weights"), ..case.entry.clone() };
    assert!(entry.store(&case.weights.matrices, &case.weights.vectors, &|| false).is_err());
    assert!(entry.open().is_none());
}

#[test]
fn the_least_recently_used_go_first_and_what_was_left_unfinished() {
    let folder = tempfile::tempdir().unwrap();
    let put = |name: &str, age: u64| {
        let path = folder.path().join(name);
        fs::write(&path, [0; 100]).unwrap();
        let modified = SystemTime::now() - Duration::from_secs(age);
        File::options().append(true).open(&path).unwrap().set_modified(modified).unwrap();
    };
    for (name, age) in [("old.packed", 20), ("older.packed", 30), ("new.packed", 10), ("stranger.txt", 9999)] {
        put(name, age);
    }
    put("a.7.partial", 3700);
    put("b.7.partial", 10);
    prune(folder.path(), 250).unwrap();
    let left = |name: &str| folder.path().join(name).exists();
    assert!(!left("older.packed") && !left("a.7.partial"));
    assert!(["old.packed", "new.packed", "stranger.txt", "b.7.partial"].into_iter().all(left));
    assert!(check_room(folder.path(), u64::MAX / 4).is_err() && check_room(folder.path(), 1).is_ok());
}
