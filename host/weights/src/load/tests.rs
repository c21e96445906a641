use std::sync::Mutex;

use torus_abi::{
    fragment::LinearRole,
    model::{GgufAnswer, GgufTensor, ModelDescription, Parallel, Transform, WeightRole, WeightSpec},
    shard::Shard,
};

use super::*;
use crate::{
    NoProgress, StorageDType,
    testing::{Kept, counting, description, folder, safetensors_file, source, testdata, weight},
};

fn plain(name: &str, shape: &[u64]) -> WeightSpec {
    weight(name, shape, vec![source(name, shape, &[])])
}

fn in_f32(_: &WeightSpec) -> StorageDType {
    StorageDType::F32
}

#[test]
fn sources_are_transformed_joined_and_cast() {
    let (q, k, v) = (counting(4 * 3), counting(2 * 3), counting(2 * 3));
    let file = safetensors_file(&[("q", &[4, 3], &q), ("k", &[3, 2], &k), ("v", &[2, 3], &v)]);
    let folder = folder(&[("model.safetensors", &file)]);
    let checkpoint = Checkpoint::open_folder(folder.path()).unwrap();
    let qkv = vec![
        source("q", &[4, 3], &[Transform::PermuteRopeRows { heads: 1 }]),
        source("k", &[3, 2], &[Transform::Transpose]),
        source("v", &[2, 3], &[Transform::AddConstant(-1.0)]),
    ];
    let description = description(vec![weight("qkv", &[8, 3], qkv), plain("v", &[2, 3])], &[]);
    let storage = |spec: &WeightSpec| if spec.name == "v" { StorageDType::F16 } else { StorageDType::F32 };
    let plan = LoadPlan::new(&checkpoint, &description, None, storage).unwrap();
    let mut kept = Kept::default();
    let report = plan.run(&mut kept, &NoProgress).unwrap();
    let expected = [0., 1., 2., 6., 7., 8., 3., 4., 5., 9., 10., 11., 0., 2., 4., 1., 3., 5., -1., 0., 1., 2., 3., 4.];
    assert_eq!(kept.f32("qkv"), expected);
    let halves = v.iter().flat_map(|value| half::f16::from_f32(*value).to_le_bytes()).collect::<Vec<_>>();
    assert_eq!(kept.0["v"].1, halves);
    assert_eq!((report.weights, report.source_bytes, report.bytes), (2, 96 + 24, 96 + 12));
}

#[test]
fn a_quantized_file_loads_as_its_f32_twin() {
    let load = |name: &str| {
        let checkpoint = testdata(name);
        let shapes = checkpoint.tensors().iter().map(|(name, entry)| (name.clone(), entry.shape.clone()));
        // Pairs of rows are swapped by the file's convention, and the middle row is taken by the model.
        let tensor = |name: String| GgufTensor {
            name,
            transforms: vec![Transform::Rows { start: 1, len: 2 }, Transform::PermuteRopeRows { heads: 1 }],
        };
        let tensors = shapes.clone().map(|(name, _)| (format!("hf.{name}"), tensor(name))).collect();
        let answer = GgufAnswer { config: serde_json::Value::Null, tensors, ignored_tensors: vec![] };
        let weights = shapes.map(|(name, shape)| {
            let rows = source(&format!("hf.{name}"), &[2, shape[1]], &[Transform::Rows { start: 0, len: 1 }]);
            weight(&name, &[1, shape[1]], vec![rows])
        });
        let description = description(weights.collect(), &[]);
        let mut kept = Kept::default();
        LoadPlan::new(&checkpoint, &description, Some(&answer), in_f32).unwrap().run(&mut kept, &NoProgress).unwrap();
        kept.0
    };
    let (mixed, reference) = (load("mixed.gguf"), load("mixed-f32.gguf"));
    assert_eq!(mixed.len(), 16);
    assert!(mixed == reference);
}

/// What each of `devices` holds of the one weight of a description.
fn shards(checkpoint: &Checkpoint, spec: &WeightSpec, devices: u32) -> Vec<(Vec<u64>, Vec<f32>)> {
    let description = description(vec![spec.clone()], &["*"]);
    let load = |shard| {
        let mut kept = Kept::default();
        let plan = LoadPlan::for_shard(checkpoint, &description, None, in_f32, shard).unwrap();
        plan.run(&mut kept, &NoProgress).unwrap();
        (plan.weights()[0].shape.clone(), kept.f32(&spec.name))
    };
    Shard::all(Parallel { tensor: devices }).map(load).collect()
}

#[test]
fn each_device_gets_its_heads_its_columns_and_its_tokens() {
    let (q, k, o, e) = (counting(4 * 2), counting(2 * 2), counting(2 * 4), counting(3 * 2));
    let file = safetensors_file(&[("q", &[4, 2], &q), ("k", &[2, 2], &k), ("o", &[2, 4], &o), ("e", &[3, 2], &e)]);
    let folder = folder(&[("model.safetensors", &file)]);
    let checkpoint = Checkpoint::open_folder(folder.path()).unwrap();
    let role = |mut spec: WeightSpec, role| {
        spec.role = role;
        spec
    };
    let sources = vec![source("q", &[4, 2], &[]), source("k", &[2, 2], &[])];
    let qk = weight("qk", &[6, 2], sources).in_units(&[4, 1]);
    let qk = shards(&checkpoint, &role(qk, WeightRole::Linear(LinearRole::Column)), 2);
    assert_eq!(qk[0], (vec![4, 2], vec![0., 1., 2., 3., 0., 1., 2., 3.]));
    assert_eq!(qk[1], (vec![4, 2], vec![4., 5., 6., 7., 0., 1., 2., 3.]));
    let o = shards(&checkpoint, &role(plain("o", &[2, 4]), WeightRole::Linear(LinearRole::Row)), 2);
    assert_eq!(o, [(vec![2, 2], vec![0., 1., 4., 5.]), (vec![2, 2], vec![2., 3., 6., 7.])]);
    let e = shards(&checkpoint, &role(plain("e", &[3, 2]), WeightRole::EmbedAndHead), 2);
    assert_eq!(e, [(vec![2, 2], vec![0., 1., 2., 3.]), (vec![2, 2], vec![4., 5., 0., 0.])]);
}

#[test]
fn columns_of_quantized_blocks_are_those_of_the_f32_twin() {
    let load = |name: &str| {
        let checkpoint = testdata(name);
        let names = checkpoint.tensors().iter().filter(|(_, entry)| entry.shape.len() == 2);
        let specs = names.map(|(name, entry)| WeightSpec {
            role: WeightRole::Linear(LinearRole::Row),
            ..weight(name, &entry.shape, vec![source(name, &entry.shape, &[])])
        });
        let answer = GgufAnswer {
            config: serde_json::Value::Null,
            tensors: checkpoint
                .tensors()
                .keys()
                .map(|name| (name.clone(), GgufTensor { name: name.clone(), transforms: vec![] }))
                .collect(),
            ignored_tensors: vec!["*".to_owned()],
        };
        let description = description(specs.collect(), &[]);
        let shard = |index| {
            let shard = Shard { index, parallel: Parallel { tensor: 8 } };
            let plan = LoadPlan::for_shard(&checkpoint, &description, Some(&answer), in_f32, shard).unwrap();
            let mut kept = Kept::default();
            plan.run(&mut kept, &NoProgress).unwrap();
            kept.0
        };
        [0, 3, 7].map(shard)
    };
    let (mixed, reference) = (load("mixed.gguf"), load("mixed-f32.gguf"));
    assert!(mixed[0].len() > 8 && mixed == reference && mixed[0] != mixed[1]);
}

#[test]
fn a_weight_that_does_not_divide_is_named() {
    let file = safetensors_file(&[("o", &[2, 4], &counting(8))]);
    let folder = folder(&[("model.safetensors", &file)]);
    let checkpoint = Checkpoint::open_folder(folder.path()).unwrap();
    let spec = WeightSpec { role: WeightRole::Linear(LinearRole::Row), ..plain("o", &[2, 4]) };
    let shard = Shard { index: 0, parallel: Parallel { tensor: 3 } };
    let error = LoadPlan::for_shard(&checkpoint, &description(vec![spec], &[]), None, in_f32, shard).unwrap_err();
    assert!(error.to_string().contains("o cannot be shared out: 4 columns do not divide over 3 devices"), "{error}");
}

/// Keeps all weights in one allocation.
struct Arena {
    free: AlignedBytes,
    filled: Option<AlignedBytes>,
    order: Vec<String>,
}

impl WeightSink for Arena {
    fn reserve(&mut self, weight: &PlannedWeight) -> io::Result<AlignedBytes> {
        let rest = self.free.split_off(weight.bytes());
        Ok(std::mem::replace(&mut self.free, rest))
    }

    fn put(&mut self, weight: &PlannedWeight, bytes: AlignedBytes) -> Result<(), SinkError> {
        self.order.push(weight.name.clone());
        match &mut self.filled {
            Some(filled) => filled.unsplit(bytes).map_err(|_| "out of order")?,
            None => self.filled = Some(bytes),
        }
        Ok(())
    }
}

#[test]
fn an_arena_is_filled_in_place_and_in_order() {
    let values = counting(16 * 10);
    let names: Vec<_> = (0..10).map(|i| format!("w{}", 9 - i)).collect();
    let tensors: Vec<_> =
        names.iter().zip(values.chunks(16)).map(|(name, values)| (name.as_str(), [16u64], values)).collect();
    let tensors: Vec<_> = tensors.iter().map(|(name, shape, values)| (*name, shape.as_slice(), *values)).collect();
    let folder = folder(&[("model.safetensors", &safetensors_file(&tensors))]);
    let checkpoint = Checkpoint::open_folder(folder.path()).unwrap();
    let description = description(names.iter().map(|name| plain(name, &[16])).collect(), &[]);
    let plan = LoadPlan::new(&checkpoint, &description, None, in_f32).unwrap();
    let free = AlignedBytes::zeroed(plan.bytes() as usize).unwrap();
    let start = free.as_ptr();
    let mut arena = Arena { free, filled: None, order: vec![] };
    plan.run(&mut arena, &NoProgress).unwrap();
    let filled = arena.filled.unwrap();
    assert_eq!((arena.order, filled.as_ptr()), (names, start));
    assert_eq!(filled[..], values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<_>>());
}

fn three_weights() -> (tempfile::TempDir, ModelDescription) {
    let names = ["a", "b", "c"];
    let values = counting(4);
    let tensors = names.map(|name| (name, [4u64].as_slice(), values.as_slice()));
    let folder = folder(&[("model.safetensors", &safetensors_file(&tensors))]);
    (folder, description(names.map(|name| plain(name, &[4])).into(), &[]))
}

#[derive(Default)]
struct Recorded(Mutex<Vec<String>>);

impl Progress for Recorded {
    fn begin(&self, what: &str, total_bytes: u64) {
        self.0.lock().unwrap().push(format!("{what} {total_bytes}"));
    }

    fn advance(&self, bytes: u64) {
        self.0.lock().unwrap().push(bytes.to_string());
    }

    fn finish(&self) {
        self.0.lock().unwrap().push("end".to_owned());
    }
}

#[test]
fn progress_counts_every_byte() {
    let (folder, description) = three_weights();
    let checkpoint = Checkpoint::open_folder(folder.path()).unwrap();
    let plan = LoadPlan::new(&checkpoint, &description, None, in_f32).unwrap();
    let recorded = Recorded::default();
    plan.run(&mut Kept::default(), &recorded).unwrap();
    assert_eq!(recorded.0.into_inner().unwrap(), ["loading weights 48", "16", "16", "16", "end"]);
}

/// Fails as told.
struct Failing {
    reserve: Option<usize>,
    put: Option<&'static str>,
}

impl WeightSink for Failing {
    fn reserve(&mut self, weight: &PlannedWeight) -> io::Result<AlignedBytes> {
        AlignedBytes::zeroed(self.reserve.unwrap_or(weight.bytes()))
    }

    fn put(&mut self, weight: &PlannedWeight, _: AlignedBytes) -> Result<(), SinkError> {
        if self.put == Some(&weight.name) { Err("device full".into()) } else { Ok(()) }
    }
}

#[test]
fn failures_of_the_sink_stop_the_load_and_name_the_weight() {
    let (folder, description) = three_weights();
    let checkpoint = Checkpoint::open_folder(folder.path()).unwrap();
    let plan = LoadPlan::new(&checkpoint, &description, None, in_f32).unwrap();
    let recorded = Recorded::default();
    let failure = |sink: &mut Failing| plan.run(sink, &recorded).unwrap_err().to_string();
    let message = failure(&mut Failing { reserve: None, put: Some("b") });
    assert_eq!(message, "the weight b could not be stored: device full");
    let message = failure(&mut Failing { reserve: Some(15), put: None });
    assert_eq!(message, "no memory for the weight a of 16 bytes: the sink reserved 15 bytes");
    assert_eq!(recorded.0.into_inner().unwrap().iter().filter(|event| *event == "end").count(), 2);
}
