use serde_json::json;

use crate::{
    Checkpoint, GgufArray, GgufTokenizerParts, GgufValue, StorageType,
    testing::{GgufFile, array, open_gguf, string, testdata},
};

const F32: u32 = 0;
const Q4_0: u32 = 2;
/// Numbers of metadata types.
const U8: u32 = 0;
const U32: u32 = 4;
const BOOL: u32 = 7;
const STRING: u32 = 8;
const ARRAY: u32 = 9;

fn refusal(file: &GgufFile) -> String {
    open_gguf(&file.bytes()).unwrap_err().to_string()
}

#[track_caller]
fn assert_refused(file: &GgufFile, part: &str) {
    let message = refusal(file);
    assert!(message.contains(part), "{message}");
}

#[test]
fn metadata_of_the_reference_writer_becomes_json() {
    let metadata = testdata("mixed.gguf").gguf_query().unwrap().metadata;
    let expected = json!({
        "general.architecture": "llama",
        "general.name": "mixed é",
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.block_count": 3,
        "test.array": [1, -2, 3],
        "test.bool": true,
        "test.f64": 0.1,
        "test.i16": -30000,
        "test.i32": i32::MIN,
        "test.i64": i64::MIN,
        "test.i8": -100,
        "test.u16": 60000,
        "test.u64": u64::MAX,
        "test.u8": 200,
        "tokenizer.chat_template": "{{ messages }}",
        "tokenizer.ggml.add_bos_token": false,
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
    });
    assert_eq!(json!(metadata), expected);
}

#[test]
fn the_tokenizer_is_read_with_its_arrays() {
    let strings = |texts: &[&str]| texts.iter().map(|text| (*text).to_owned()).collect::<Vec<_>>();
    let expected = GgufTokenizerParts {
        model: "gpt2".into(),
        pre: Some("smollm".into()),
        tokens: strings(&["<s>", "</s>", "a", "Ġb"]),
        token_types: Some(vec![3, 3, 1, 1]),
        scores: Some(vec![0.0, -1.0, -2.5, -3.25]),
        merges: Some(strings(&["a b", "Ġ b"])),
        bos_id: Some(0),
        eos_id: Some(1),
        add_bos: Some(false),
        chat_template: Some("{{ messages }}".into()),
        ..Default::default()
    };
    assert_eq!(testdata("mixed.gguf").gguf_tokenizer().unwrap(), Some(expected));
}

#[test]
fn a_tokenizer_key_of_the_wrong_type_is_named() {
    let file = GgufFile::new().text("tokenizer.ggml.bos_token_id", "1");
    let message = open_gguf(&file.bytes()).unwrap().gguf_tokenizer().unwrap_err().to_string();
    assert!(message.contains("'tokenizer.ggml.bos_token_id' has the wrong type"), "{message}");
}

#[test]
fn shapes_are_turned_and_data_is_found() {
    let data: Vec<u8> = (0..24).collect();
    for version in [2, 3] {
        let mut file = GgufFile::new().tensor("w", &[3, 2], F32, 0).data(data.clone());
        file.version = version;
        let checkpoint = open_gguf(&file.bytes()).unwrap();
        let entry = &checkpoint.tensors()["w"];
        assert_eq!((entry.shape.as_slice(), entry.storage), ([2, 3].as_slice(), StorageType::F32));
        assert_eq!(checkpoint.bytes(entry), data);
    }
}

#[test]
fn the_alignment_of_the_file_counts() {
    let file = |alignment: u32| GgufFile::new().entry("general.alignment", U32, &alignment.to_le_bytes());
    let with_data = |alignment: u32| file(alignment).tensor("w", &[1], F32, 8).data([0; 12]);
    assert!(open_gguf(&with_data(8).bytes()).is_ok());
    assert_refused(&with_data(16), "its offset 8 is no multiple of 16");
    for alignment in [0, 1, 12, 1 << 31] {
        assert_refused(&file(alignment), "general.alignment is");
    }
}

#[test]
fn other_files_and_versions_are_told_apart() {
    let mut old = GgufFile::new();
    old.version = 1;
    assert_refused(&old, "GGUF version 1");
    let mut big_endian = GgufFile::new();
    big_endian.version = 3u32.swap_bytes();
    assert_refused(&big_endian, "big-endian");
    for (bytes, part) in [
        (&b""[..], "no GGUF"),
        (b"GGUF", "no GGUF"),
        (b"version https://git-lfs", "git lfs pull"),
        (&[0; 64], "no GGUF"),
    ] {
        let message = open_gguf(bytes).unwrap_err().to_string();
        assert!(message.contains(part), "{message}");
    }
    let split = GgufFile::new().entry("split.count", U32, &3u32.to_le_bytes());
    assert_refused(&split, "one of 3 parts");
}

#[test]
fn tensors_lie_within_the_file_and_apart() {
    let data = [0; 64];
    assert_refused(&GgufFile::new().tensor("w", &[17], F32, 0).data(data), "tensor 'w' lies at 0 + 68 bytes, beyond");
    assert_refused(&GgufFile::new().tensor("w", &[1], F32, 64).data(data), "beyond");
    assert_refused(&GgufFile::new().tensor("w", &[1], F32, u64::MAX - 31).data(data), "beyond");
    let two =
        |name: &str, offset: u64| GgufFile::new().tensor("a", &[9], F32, 0).tensor(name, &[1], F32, offset).data(data);
    assert!(open_gguf(&two("b", 64 - 32).bytes()).is_err());
    assert_refused(&two("b", 32), "'b' overlaps");
    assert_refused(&two("b", 0), "overlaps");
    let repeated = GgufFile::new().tensor("a", &[8], F32, 0).tensor("a", &[8], F32, 32).data(data);
    assert_refused(&repeated, "tensor 'a' is listed twice");
}

#[test]
fn impossible_tensors_are_refused() {
    assert_refused(&GgufFile::new().tensor("w", &[1; 5], F32, 0), "it has 5 axes");
    assert_refused(&GgufFile::new().tensor("w", &[1 << 33, 1 << 33], F32, 0), "overflows");
    assert_refused(&GgufFile::new().tensor("w", &[16, 2], Q4_0, 0), "does not divide");
    assert_refused(&GgufFile::new().tensor("w", &[1], 4, 0), "element type 4 is unknown");
    assert_refused(&GgufFile::new().tensor(&"w".repeat(300), &[1], F32, 0), "300 bytes of a tensor name");
}

#[test]
fn counts_are_held_against_limits_and_the_file() {
    let mut many = GgufFile::new();
    many.tensor_count = 1 << 60;
    assert_refused(&many, "1152921504606846976 tensors");
    let mut many = GgufFile::new();
    many.entry_count = 10_001;
    assert_refused(&many, "10001 metadata entries");
    let mut fewer = GgufFile::new().tensor("w", &[1], F32, 0);
    fewer.tensor_count = 2;
    assert_refused(&fewer, "inside its header");
    let with_array = |value: &[u8]| GgufFile::new().entry("a", ARRAY, value);
    assert_refused(&with_array(&array(U8, 1 << 60, &[])), "metadata 'a': it claims 1152921504606846976 array elements");
    assert_refused(&with_array(&array(STRING, 1 << 20, &[])), "does not fit into the rest");
    assert_refused(&with_array(&array(STRING, 1, &string("x")[..7])), "does not fit");
    assert_refused(&with_array(&array(STRING, 1, &u64::MAX.to_le_bytes())), "element 0: it claims");
}

#[test]
fn values_have_a_known_type_and_form() {
    let entry = |kind: u32, value: &[u8]| GgufFile::new().entry("k", kind, value);
    assert_refused(&entry(13, &[0; 8]), "metadata 'k': the metadata type 13 is unknown");
    assert_refused(&entry(BOOL, &[2]), "metadata 'k': 2 is no boolean");
    assert_refused(&entry(STRING, &[&2u64.to_le_bytes(), &[0xff, 0xfe][..]].concat()), "not UTF-8");
    assert_refused(&entry(BOOL, &[1]).entry("k", BOOL, &[0]), "metadata 'k' is given twice");
}

#[test]
fn arrays_nest_three_deep_and_no_deeper() {
    let nested = |depth: usize| {
        let inner = array(U8, 2, &[1, 2]);
        (1..depth).fold(inner, |inner, _| array(ARRAY, 1, &inner))
    };
    let open = |depth| open_gguf(&GgufFile::new().entry("a", ARRAY, &nested(depth)).bytes());
    let checkpoint: Checkpoint = open(2).unwrap();
    let expected = GgufValue::Array(GgufArray::Array(vec![GgufArray::Unsigned(vec![1, 2])]));
    assert_eq!(checkpoint.gguf_metadata().unwrap().get("a"), Some(&expected));
    assert_eq!(checkpoint.gguf_query().unwrap().metadata["a"], json!([[1, 2]]));
    assert!(open(3).is_ok());
    assert!(open(4).unwrap_err().to_string().contains("nested more than 3 deep"));
    assert!(open(100_000).is_err());
}

#[test]
fn numbers_json_lacks_become_null() {
    let file =
        GgufFile::new().entry("nan", 6, &f32::NAN.to_le_bytes()).entry("third", 6, &(1.0f32 / 3.0).to_le_bytes());
    let metadata = open_gguf(&file.bytes()).unwrap().gguf_query().unwrap().metadata;
    assert_eq!((&metadata["nan"], &metadata["third"]), (&json!(null), &json!(0.33333334)));
}
