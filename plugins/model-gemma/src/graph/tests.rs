use serde_json::{Value as Json, json};
use torus_abi::{
    TensorType,
    author::Model,
    fragment::{Operation, WeightHandle},
    model::{ModelOptions, StateHandle, StateKind},
};

use super::*;
use crate::Gemma;

fn open(change: impl FnOnce(&mut Json)) -> Gemma {
    let mut config = json!({
        "architectures": ["Gemma3ForCausalLM"], "hidden_size": 12, "intermediate_size": 20, "head_dim": 4,
        "num_hidden_layers": 5, "num_attention_heads": 3, "num_key_value_heads": 1, "vocab_size": 31,
        "sliding_window": 6, "sliding_window_pattern": 2,
    });
    change(&mut config);
    Gemma::open(&ModelOptions { config, parallel: Default::default() }).unwrap()
}

fn hidden(capture: Vec<usize>) -> ModelPart {
    ModelPart::Hidden { shape: StepShape { tokens: 8, seqs: 2, page_size: 4, pages: 5, page_table: 6 }, capture }
}

fn request(model: &Gemma, part: ModelPart) -> EmitModel {
    let handle =
        |shape: &[u64]| WeightHandle { parts: vec![TensorType::new(DType::F32, shape)], storage: "dense-f32".into() };
    let description = model.describe();
    let pool = TensorType::new(DType::F32, [20, 1, 4]);
    let state = StateHandle { pool: vec![pool.clone(), pool], context: vec![TensorType::new(DType::I32, [8])] };
    EmitModel {
        part,
        dtype: DType::F32,
        weights: description.weights.iter().map(|spec| (spec.name.clone(), handle(&spec.shape))).collect(),
        state: vec![state; description.kinds.len()],
        imports: Default::default(),
        loops: None,
    }
}

#[test]
fn the_two_kinds_differ_in_their_windows() {
    let model = open(|config| {
        config["query_pre_attn_scalar"] = json!(16);
        config["attn_logit_softcapping"] = json!(30.0);
    });
    let specs: Vec<_> = model.describe().kinds.into_iter().map(|StateKind::Paged(spec)| spec).collect();
    assert_eq!(specs.iter().map(|spec| spec.window).collect::<Vec<_>>(), [Some(6), None]);
    assert!(specs.iter().all(|spec| spec.scale == 0.25 && spec.soft_cap == Some(30.0)));
}

#[test]
fn layers_of_one_kind_share_a_function_and_kinds_do_not() {
    let model = open(|_| {});
    let fragment = model.emit(&request(&model, hidden(vec![]))).unwrap().fragment;
    let layers = fragment.functions.iter().filter(|function| function.symbol.contains("layer")).count();
    assert_eq!(layers, 2);
    let kinds: Vec<_> = fragment
        .imports
        .iter()
        .filter_map(|import| match import.operation {
            Operation::Attention { kind, .. } => Some(kind),
            _ => None,
        })
        .collect();
    assert_eq!(kinds, [0, 1]);
}

/// The imports that the functions of layers call.
fn called(fragment: &Fragment) -> Vec<Vec<&str>> {
    let layers = fragment.functions.iter().filter(|function| function.symbol.contains("layer"));
    let name = |callee: &'_ String| -> Option<&'static str> {
        ["attention_block", "attention", "gated_mlp", "linear"]
            .into_iter()
            .find(|name| callee.contains(&format!(".{name}.")))
    };
    layers.map(|layer| layer.calls.iter().filter_map(name).collect()).collect()
}

#[test]
fn a_layer_is_two_imports_where_the_host_knows_its_norms() {
    let model = open(|_| {});
    let mut request = request(&model, hidden(vec![]));
    request.imports.block_norms = true;
    let fragment = model.emit(&request).unwrap().fragment;
    assert_eq!(called(&fragment), [["attention_block", "gated_mlp"], ["attention_block", "gated_mlp"]]);
}

#[test]
fn a_host_that_names_no_imports_gets_what_it_always_got() {
    let model = open(|_| {});
    let mut message = serde_json::to_value(request(&model, hidden(vec![]))).unwrap();
    assert!(message.as_object_mut().unwrap().remove("imports").is_some());
    let fragment = model.emit(&serde_json::from_value(message).unwrap()).unwrap().fragment;
    let layer = ["attention", "linear", "linear", "linear", "linear"];
    assert_eq!(called(&fragment), [layer, layer]);
    // Norms of the hidden state before and after both halves, and of the heads of queries and keys.
    let text = &fragment.functions.iter().find(|function| function.symbol.contains("layer")).unwrap().text;
    assert_eq!(text.matches("stablehlo.rsqrt").count(), 6);
}

#[test]
fn every_weight_is_an_argument_and_captures_are_results() {
    let model = open(|_| {});
    let fragment = model.emit(&request(&model, hidden(vec![3]))).unwrap().fragment;
    let export = &fragment.exports["hidden"];
    for spec in model.describe().weights {
        assert!(export.arguments.contains(&Operand::Weight { name: spec.name.clone(), part: 0 }), "{}", spec.name);
    }
    assert!(export.results.contains(&Operand::Captured { layer: 3 }));
}

#[test]
fn logits_are_capped_where_the_config_says_so() {
    let text = |cap: Json| {
        let model = open(|config| config["final_logit_softcapping"] = cap);
        let fragment = model.emit(&request(&model, ModelPart::Head { rows: 2 })).unwrap().fragment;
        let embed = Operand::Weight { name: "embed".into(), part: 0 };
        assert_eq!(fragment.exports["head"].arguments, [Operand::Hidden, embed]);
        fragment.functions.iter().map(|function| function.text.as_str()).collect::<String>()
    };
    assert!(text(json!(20.0)).contains("stablehlo.tanh"));
    assert!(!text(Json::Null).contains("stablehlo.tanh"));
}

#[test]
fn requests_that_do_not_fit_are_refused() {
    let model = open(|_| {});
    let refused = |change: &dyn Fn(&mut EmitModel)| {
        let mut request = request(&model, hidden(vec![]));
        change(&mut request);
        model.emit(&request).unwrap_err().message
    };
    assert!(refused(&|r| r.dtype = DType::F16).contains("f16"));
    assert!(refused(&|r| drop(r.weights.remove("layers.1.q_norm"))).contains("'layers.1.q_norm'"));
    assert!(refused(&|r| drop(r.state.pop())).contains("kind"));
}
