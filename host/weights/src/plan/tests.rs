use tempfile::TempDir;
use torus_abi::model::GgufTensor;

use super::*;
use crate::testing::{GgufFile, description, folder, open_gguf, safetensors_file, source, weight};

fn model(tensors: &[(&str, &[u64])]) -> (TempDir, Checkpoint) {
    let values = vec![0.0; 64];
    let tensors: Vec<_> = tensors
        .iter()
        .map(|(name, shape)| (*name, *shape, &values[..shape.iter().product::<u64>() as usize]))
        .collect();
    let folder = folder(&[("model.safetensors", &safetensors_file(&tensors))]);
    let checkpoint = Checkpoint::open_folder(folder.path()).unwrap();
    (folder, checkpoint)
}

fn problems(plan: Result<LoadPlan<'_>, WeightsError>) -> Vec<String> {
    match plan.unwrap_err() {
        WeightsError::Mismatch { problems, .. } => problems.iter().map(ToString::to_string).collect(),
        other => panic!("{other}"),
    }
}

fn plain(name: &str, shape: &[u64]) -> WeightSpec {
    weight(&format!("model.{name}"), shape, vec![source(name, shape, &[])])
}

#[test]
fn a_plan_knows_sizes_and_order() {
    let (_folder, checkpoint) =
        model(&[("a", &[2, 4]), ("b", &[6, 4]), ("c.inv_freq", &[3]), ("d", &[1]), ("layers.0.k_scale", &[1])]);
    let fused = vec![source("b", &[6, 4], &[Transform::Rows { start: 0, len: 3 }]), source("a", &[2, 4], &[])];
    let description = description(vec![weight("z", &[5, 4], fused), plain("a", &[2, 4])], &["c.*", "d"]);
    let storage = |spec: &WeightSpec| if spec.name == "z" { StorageDType::Bf16 } else { StorageDType::F32 };
    let plan = LoadPlan::new(&checkpoint, &description, None, storage).unwrap();
    let weights: Vec<_> = plan
        .weights()
        .iter()
        .map(|weight| (weight.tensor_type().to_string(), weight.bytes(), weight.source_bytes()))
        .collect();
    assert_eq!(weights, [("bf16[5,4]".to_owned(), 40, 128), ("f32[2,4]".to_owned(), 32, 32)]);
    let ignored = ["c.inv_freq", "d", "layers.0.k_scale"].map(str::to_owned);
    assert_eq!((plan.bytes(), plan.ignored()), (72, ignored.as_slice()));
    assert_eq!(plan.storage_types(), &[(StorageType::F32, 2)].into());
}

#[test]
fn everything_wrong_is_named_at_once() {
    let (_folder, checkpoint) = model(&[("a", &[2, 4]), ("extra", &[3]), ("inv_freq", &[1])]);
    let specs = vec![plain("a", &[4, 2]), plain("gone", &[1]), plain("gone2", &[1])];
    let found = problems(LoadPlan::new(&checkpoint, &description(specs, &["inv_fre"]), None, |_| StorageDType::F32));
    let expected = [
        "wrong shape: a is [2, 4], the model's configuration says [4, 2]",
        "missing: gone, wanted for model.gone",
        "missing: gone2, wanted for model.gone2",
        "unknown to the model: extra [3]",
        "unknown to the model: inv_freq [1]",
    ];
    assert_eq!(found, expected, "a pattern without '*' matches whole names only");
}

#[test]
fn the_message_is_cut_after_twenty() {
    let (_folder, checkpoint) = model(&[("a", &[1])]);
    let specs = (0..30).map(|i| plain(&format!("w{i}"), &[1])).chain([plain("a", &[1])]).collect();
    let error = LoadPlan::new(&checkpoint, &description(specs, &[]), None, |_| StorageDType::F32).unwrap_err();
    let message = error.to_string();
    assert!(message.contains("TestForCausalLM in 30 place(s)") && message.ends_with("and 10 more"), "{message}");
    assert_eq!(message.lines().count(), 22);
}

#[test]
fn a_plugin_that_contradicts_itself_is_told_so() {
    let (_folder, checkpoint) = model(&[("a", &[2, 4]), ("b", &[2, 3]), ("v", &[4]), ("s", &[])]);
    let whole = |name: &str, shape: &[u64]| source(name, shape, &[]);
    let bad_rows = source("a", &[2, 4], &[Transform::Rows { start: 1, len: 2 }]);
    let specs = vec![
        weight("short", &[3, 4], vec![whole("a", &[2, 4])]),
        weight("ragged", &[4, 4], vec![whole("a", &[2, 4]), whole("b", &[2, 3])]),
        weight("mixed", &[3, 4], vec![whole("a", &[2, 4]), whole("v", &[4])]),
        weight("scalars", &[2], vec![whole("s", &[]), whole("s", &[])]),
        weight("rows", &[2, 4], vec![bad_rows]),
        weight("none", &[], vec![]),
        weight("scalar", &[], vec![whole("s", &[])]),
        weight("scalar", &[], vec![whole("s", &[])]),
    ];
    let found = problems(LoadPlan::new(&checkpoint, &description(specs, &[]), None, |_| StorageDType::F32));
    let expected = [
        "the model plugin declares short as [3, 4], but its sources are [[2, 4]]",
        "the model plugin declares ragged as [4, 4], but its sources are [[2, 4], [2, 3]]",
        "the model plugin declares mixed as [3, 4], but its sources are [[2, 4], [4]]",
        "the model plugin declares scalars as [2], but its sources are [[], []]",
        "impossible transform of a: rows 1 to 1 + 2 of [2, 4]",
        "the model plugin declares none as [], but its sources are []",
        "the model plugin declares scalar twice",
    ];
    assert_eq!(found, expected);
}

#[test]
fn a_gguf_file_is_read_under_hugging_face_names() {
    // 32 floats, transposed in the file by convention of this test; an unreadable type; two unused tensors.
    let file = GgufFile::new()
        .tensor("blk.q", &[4, 8], 0, 0)
        .tensor("iq", &[256], 23, 128)
        .tensor("rope_freqs.weight", &[1], 0, 288)
        .tensor("blk.rot", &[1], 0, 320)
        .data([0; 324]);
    let checkpoint = open_gguf(&file.bytes()).unwrap();
    let tensor =
        |name: &str, transforms: &[Transform]| GgufTensor { name: name.into(), transforms: transforms.to_vec() };
    let answer = GgufAnswer {
        config: serde_json::Value::Null,
        tensors: [
            ("q_proj".to_owned(), tensor("blk.q", &[Transform::Transpose])),
            ("iq_hf".to_owned(), tensor("iq", &[])),
            ("rotary.inv_freq".to_owned(), tensor("blk.rot", &[])),
            ("lost".to_owned(), tensor("blk.lost", &[])),
        ]
        .into(),
        ignored_tensors: vec!["rope_freqs.*".to_owned()],
    };
    let new = |specs, ignored: &[&str]| {
        LoadPlan::new(&checkpoint, &description(specs, ignored), Some(&answer), |_| StorageDType::F32)
    };
    let q = weight("q", &[2, 8], vec![source("q_proj", &[4, 8], &[Transform::Rows { start: 2, len: 2 }])]);
    let found = problems(new(
        vec![q.clone(), plain("q_proj", &[8, 4]), plain("iq_hf", &[256]), plain("lost", &[1]), plain("unmapped", &[1])],
        &[],
    ));
    let expected = [
        "wrong shape: q_proj is [4, 8], the model's configuration says [8, 4]",
        "unreadable: iq is stored as IQ4_XS; readable are F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q4_K, Q5_K and Q6_K",
        "missing: lost (in this file blk.lost), wanted for model.lost",
        "missing: unmapped, wanted for model.unmapped",
        "unknown to the model: blk.rot [1]",
    ];
    assert_eq!(found, expected);
    assert_eq!(problems(new(vec![q], &["rotary.inv_*"])), ["unknown to the model: iq [256]"]);
    let unanswered = LoadPlan::new(&checkpoint, &description(vec![], &[]), None, |_| StorageDType::F32).unwrap_err();
    assert!(unanswered.to_string().contains("no reading of GGUF files"), "{unanswered}");
}

#[test]
fn an_empty_tensor_is_no_weight() {
    let (_folder, checkpoint) = model(&[("a", &[0, 4])]);
    let found =
        problems(LoadPlan::new(&checkpoint, &description(vec![plain("a", &[0, 4])], &[]), None, |_| StorageDType::F32));
    assert_eq!(found, ["impossible transform of a: it is empty: [0, 4]"]);
}
