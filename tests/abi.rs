//! The boundary over time, with the files of `data/abi` (made by its `make.sh`): plugins of every released layout under
//! today's host, today's plugins under hosts of every released layout, and files that are no plugins.

mod old_host;
mod refused;

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    sync::Arc,
};

use serde_json::{Value, from_value, json};
use tempfile::TempDir;
use torus_abi::{
    DType, TensorType,
    attention::{AttentionQuery, EmitAttention},
    fault::{Fault, FaultCode},
    fragment::{Import, Operation},
    manifest::Kind,
    model::{EmitModel, GgufQuery, ModelOptions},
    speculative::{Sequence, SpeculativeOptions},
};
use torus_plugins::{
    AttentionInterface, CallError, LibraryCache, ModelInterface, Plugin, Registry, SpeculativeInterface,
    link::{Implementation, export, link},
};

/// The stored plugins, oldest first, and what each offers.
const RELEASED: [(&str, &[Kind]); 3] = [
    ("released_0_1_a", &[Kind::Model, Kind::Attention]),
    ("released_0_1_b", &[Kind::Model, Kind::Attention, Kind::Speculative]),
    ("released_0_1_c", &[Kind::Model, Kind::Attention, Kind::Speculative]),
];

fn data() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("data/abi")
}

/// A copy in a folder of its own, so that its rights are right and no other test shares the mapped library.
fn copy(file: &Path) -> (TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let copied = folder.path().join(file.file_name().unwrap());
    fs::copy(file, &copied).unwrap();
    fs::set_permissions(&copied, fs::Permissions::from_mode(0o644)).unwrap();
    (folder, copied)
}

fn load(file: &Path) -> Arc<Plugin> {
    let (folder, copied) = copy(file);
    Registry::default().load(&copied, &LibraryCache::new(folder.path().join("cache"))).unwrap()
}

#[test]
fn every_stored_layout_is_tested() {
    let files = fs::read_dir(data()).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let mut stored: Vec<_> = files.filter(|name| name.starts_with("released_")).collect();
    stored.sort();
    assert_eq!(stored, RELEASED.map(|(name, _)| format!("{name}.so")));
}

#[test]
fn plugins_of_released_layouts_work_with_todays_host() {
    for (name, kinds) in RELEASED {
        let plugin = load(&data().join(format!("{name}.so")));
        assert_eq!((plugin.name(), plugin.manifest.kinds.as_slice()), (name, kinds));
        exercise(&plugin);
    }
}

#[test]
fn the_plugin_of_the_next_layout_works_with_todays_host() {
    exercise(&load(&crate::plugins::library("abi_today")));
}

/// What came after them is told to old plugins in messages that they cannot read, or must be refused for them.
#[test]
fn a_cache_that_old_plugins_do_not_know_is_refused_for_them_alone() {
    for (name, _) in RELEASED {
        let mut registry = crate::support::linked_plugins();
        let (folder, copied) = copy(&data().join(format!("{name}.so")));
        registry.load(&copied, &LibraryCache::new(folder.path().join("cache"))).unwrap();
        let query = AttentionQuery { kv_dtype: DType::F8E4M3, sets_scales: true, ..attention_query(None, None, 1) };
        let queries = [query];
        let refused = registry.attention(Some(name), &queries).unwrap_err().to_string();
        assert!(refused.contains("was built before there were caches of f8e4m3fn: build it anew"), "{refused}");
        let (chosen, answers) = registry.attention(None, &queries).unwrap();
        assert_eq!((chosen.name(), answers[0].scales), ("native", Some(2)));
        // Of a cache that they know they keep the answer, whatever else the host offers.
        let known = AttentionQuery { sets_scales: true, ..attention_query(None, None, 1) };
        let (_, answers) = registry.attention(Some(name), &[known]).unwrap();
        assert_eq!((answers[0].score, answers[0].scales), (1, None));
    }
}

fn exercise(plugin: &Plugin) {
    assert_eq!(plugin.manifest.panic, "unwind");
    for kind in &plugin.manifest.kinds {
        match kind {
            Kind::Model => exercise_model(plugin.model().unwrap()),
            Kind::Attention => exercise_attention(plugin.attention().unwrap()),
            Kind::Speculative => exercise_speculative(plugin.speculative().unwrap()),
        }
    }
    exercise_linker(plugin);
}

fn fault<T: std::fmt::Debug>(result: Result<T, CallError>) -> (FaultCode, String) {
    match result.unwrap_err() {
        CallError::Fault { fault: Fault { code, message }, .. } => (code, message),
        other => panic!("{other}"),
    }
}

const HIDDEN: u64 = 4;

fn tensor(text: &str) -> TensorType {
    text.parse().unwrap()
}

fn options(config: Value) -> ModelOptions {
    from_value(json!({ "config": config })).unwrap()
}

fn exercise_model(model: &ModelInterface) {
    let metadata = [("toy.embedding_length".to_owned(), HIDDEN.into())].into();
    let read = model.from_gguf(&GgufQuery { metadata, tensors: [].into() }).unwrap();
    assert_eq!(read.tensors["model.embed_tokens.weight"].name, "token_embd.weight");
    let refused = fault(model.from_gguf(&GgufQuery { metadata: [].into(), tensors: [].into() }));
    assert_eq!(refused, (FaultCode::Invalid, "toy.embedding_length is missing".into()));

    assert_eq!(fault(model.open(&options(json!({})))).0, FaultCode::Unsupported);
    let panicked = fault(model.open(&options(json!({ "panic": true }))));
    assert_eq!(panicked, (FaultCode::Internal, "the plugin panicked: the config says so".into()));

    let opened = model.open(&options(read.config)).unwrap();
    let description = opened.describe().unwrap();
    assert_eq!((description.hidden, description.layers.as_slice()), (HIDDEN, [0].as_slice()));
    assert_eq!(description.weights[0].shape, [description.vocab, HIDDEN]);
    let head = emit_model(json!({ "head": { "rows": 2 } }));
    assert!(opened.emit(&head).unwrap().fragment.exports.contains_key("head"));
    let lacking = EmitModel { weights: [].into(), ..head };
    assert_eq!(fault(opened.emit(&lacking)).0, FaultCode::Invalid);
}

/// Messages are written as JSON: the structs may gain fields.
fn emit_model(part: Value) -> EmitModel {
    let weights = json!({ "embed": { "parts": ["f32[8,4]"], "storage": "plain" } });
    let state = json!([{ "pool": ["f32[20,1,4]"], "context": ["i32[3]"] }]);
    from_value(json!({ "part": part, "dtype": "f32", "weights": weights, "state": state })).unwrap()
}

fn shape() -> Value {
    json!({ "tokens": 3, "seqs": 2, "page_size": 4, "pages": 5, "page_table": 6 })
}

fn attention_query(window: Option<u64>, soft_cap: Option<f32>, q_heads: u64) -> AttentionQuery {
    let spec = json!({
        "q_heads": q_heads, "kv_heads": 1, "head_dim": HIDDEN, "scale": 1.0, "window": window, "soft_cap": soft_cap,
    });
    let target = json!({ "platform": "cpu" });
    let query = json!({ "spec": spec, "dtype": "f32", "kv_dtype": "f32", "shape": shape(), "target": target });
    from_value(query).unwrap()
}

fn exercise_attention(attention: &AttentionInterface) {
    let answer = attention.query(&attention_query(None, None, 1)).unwrap();
    assert_eq!((answer.score, answer.pool), (1, vec![tensor("f32[20,1,4]")]));
    assert_eq!(attention.query(&attention_query(None, Some(1.0), 1)).unwrap().score, 0);
    assert_eq!(fault(attention.query(&attention_query(None, None, 0))).0, FaultCode::Invalid);
    let panicking = EmitAttention { kind: 0, query: attention_query(Some(0), None, 1) };
    let (code, message) = fault(attention.emit(&panicking));
    assert!(code == FaultCode::Internal && message.contains("nothing to see"), "{message}");
}

fn exercise_speculative(speculative: &SpeculativeInterface) {
    let options = json!({ "vocab": 100, "context_length": 64, "max_sequences": 4, "max_draft_tokens": 4 });
    let options: SpeculativeOptions = from_value(options).unwrap();
    let mut speculator = speculative.open(&options).unwrap();
    assert_eq!(speculator.description().draft_tokens, 2);
    let mut propose = |tokens: &[u32], limit| {
        let drafts = speculator.propose([(Sequence { id: 7, tokens }, limit)]);
        drafts.map(|drafts| drafts.row(0).to_vec())
    };
    assert_eq!(propose(&[5, 6], 2).unwrap(), [7, 8]);
    assert_eq!(propose(&[5, 6, 7], 1).unwrap(), [8]);
    assert_eq!(fault(propose(&[12], 2)).0, FaultCode::Invalid);
    assert_eq!(fault(propose(&[13], 2)).0, FaultCode::Internal);
    assert_eq!(propose(&[1], 2).unwrap(), [2, 3]);
    speculator.forget(7);
    let parameters = [("fail".to_owned(), "today".into())].into();
    let refused = fault(speculative.open(&SpeculativeOptions { parameters, ..options }));
    assert_eq!(refused, (FaultCode::Unsupported, "fail: \"today\"".into()));
}

/// The fragments of both kinds link, as the engine links them: attention by the backend's own function.
fn exercise_linker(plugin: &Plugin) {
    let model = plugin.model().unwrap().open(&options(json!({ "hidden_size": HIDDEN }))).unwrap();
    let hidden = model.emit(&emit_model(json!({ "hidden": { "shape": shape() } }))).unwrap().fragment;
    let query = attention_query(None, None, 1);
    let backend = plugin.attention().unwrap();
    let attention = backend.emit(&EmitAttention { kind: 0, query }).unwrap().fragment;
    let units = [model.unit(&hidden), backend.unit(&attention)];
    let root = &export(units[0], "hidden").unwrap().0.symbol;
    let target = &export(units[1], "attention").unwrap().0.symbol;
    assert_eq!(export(units[1], "context").unwrap().1.results, [tensor("i32[3]")]);
    let mut implement = |import: &Import| {
        Ok(match import.operation {
            Operation::Attention { .. } => Implementation::Alias(target.clone()),
            _ => {
                let Import { symbol, arguments, results, .. } = import;
                let function = json!({ "symbol": symbol, "arguments": arguments, "results": results, "text": "" });
                Implementation::Functions(vec![from_value(function).unwrap()])
            }
        })
    };
    let linked = link(&units, &[root], &mut implement).unwrap();
    let symbols: Vec<_> = linked.iter().map(|function| function.symbol.as_str()).collect();
    let name = plugin.name();
    assert_eq!(symbols, ["hidden", "embed", "attend", "attention_0"].map(|symbol| format!("{name}.{symbol}")));
}
