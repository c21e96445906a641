use expect_test::expect;
use serde_json::{Value, json};
use torus_abi::{
    TensorType,
    author::Model,
    fragment::{Operation, WeightHandle},
    model::{ModelOptions, StateHandle},
};

use super::*;
use crate::Qwen;

fn open(architecture: &str, change: Value) -> Qwen {
    let mut config = json!({
        "architectures": [architecture], "hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 2,
        "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 4, "vocab_size": 31,
    });
    config.as_object_mut().unwrap().extend(change.as_object().unwrap().clone());
    Qwen::open(&ModelOptions { config, parallel: Default::default() }).unwrap()
}

fn hidden() -> ModelPart {
    let shape = StepShape { tokens: 8, seqs: 2, page_size: 4, pages: 5, page_table: 6 };
    ModelPart::Hidden { shape, capture: Vec::new() }
}

fn request(model: &Qwen, part: ModelPart) -> EmitModel {
    let handle =
        |shape: &[u64]| WeightHandle { parts: vec![TensorType::new(DType::F32, shape)], storage: "dense-f32".into() };
    let pool = TensorType::new(DType::F32, [20, 1, 4]);
    EmitModel {
        part,
        dtype: DType::F32,
        weights: model.describe().weights.iter().map(|spec| (spec.name.clone(), handle(&spec.shape))).collect(),
        state: vec![StateHandle { pool: vec![pool.clone(), pool], context: vec![TensorType::new(DType::I32, [8])] }],
        imports: Default::default(),
        loops: None,
    }
}

fn emit(model: &Qwen, part: ModelPart) -> Fragment {
    model.emit(&request(model, part)).unwrap().fragment
}

/// The function of a layer and what it calls.
fn layer(fragment: &Fragment) -> String {
    let layers: Vec<_> = fragment.functions.iter().filter(|function| function.symbol == "qwen_hidden.layer").collect();
    assert_eq!(layers.len(), 1, "layers of equal types share one function");
    let types = |list: &[TensorType]| list.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ");
    let calls: Vec<_> = layers[0].calls.iter().map(|callee| callee.trim_start_matches("qwen_hidden.import.")).collect();
    format!("({}) -> ({})\n{}\n", types(&layers[0].arguments), types(&layers[0].results), calls.join("\n"))
}

#[test]
fn a_layer_of_qwen2_is_two_imports() {
    expect![[r#"
        (f32[8,12] f32[8,2] f32[8,2] f32[12] f32[20,12] f32[20] f32[12,12] f32[20,1,4] f32[20,1,4] i32[8] f32[12] f32[40,12] f32[12,20]) -> (f32[8,12] f32[20,1,4] f32[20,1,4])
        attention_block.0
        gated_mlp.0
    "#]]
    .assert_eq(&layer(&emit(&open("Qwen2ForCausalLM", json!({})), hidden())));
}

#[test]
fn a_layer_of_qwen3_normalizes_heads_between_imports() {
    let fragment = emit(&open("Qwen3ForCausalLM", json!({})), hidden());
    expect![[r#"
        (f32[8,12] f32[8,2] f32[8,2] f32[12] f32[20,12] f32[12,12] f32[20,1,4] f32[20,1,4] i32[8] f32[4] f32[4] f32[12] f32[40,12] f32[12,20]) -> (f32[8,12] f32[20,1,4] f32[20,1,4])
        attention.0
        gated_mlp.0
        linear.0
        linear.1
    "#]]
    .assert_eq(&layer(&fragment));
    let body = fragment.functions.iter().find(|function| function.symbol == "qwen_hidden.layer").unwrap();
    // Queries, keys and the hidden state before the attention; the MLP's norm is inside its import.
    assert_eq!(body.text.matches("stablehlo.rsqrt").count(), 3);
    assert!(!fragment.imports.iter().any(|import| matches!(import.operation, Operation::AttentionBlock { .. })));
}

#[test]
fn a_layer_of_qwen3_is_two_imports_where_the_host_knows_norms_of_heads() {
    let model = open("Qwen3ForCausalLM", json!({"attention_bias": true}));
    let mut todays = request(&model, hidden());
    todays.imports.block_norms = true;
    let fragment = model.emit(&todays).unwrap().fragment;
    expect![[r#"
        (f32[8,12] f32[8,2] f32[8,2] f32[12] f32[20,12] f32[20] f32[12,12] f32[20,1,4] f32[20,1,4] i32[8] f32[4] f32[4] f32[12] f32[12] f32[40,12] f32[12,20]) -> (f32[8,12] f32[20,1,4] f32[20,1,4])
        attention_block.0
        gated_mlp.0
    "#]]
    .assert_eq(&layer(&fragment));
}

#[test]
fn a_host_that_names_no_imports_gets_what_it_always_got() {
    let model = open("Qwen3ForCausalLM", json!({}));
    let mut message = serde_json::to_value(request(&model, hidden())).unwrap();
    assert!(message.as_object_mut().unwrap().remove("imports").is_some());
    let fragment = model.emit(&serde_json::from_value(message).unwrap()).unwrap().fragment;
    assert_eq!(fragment, emit(&model, hidden()));
    let sent = serde_json::to_string(&fragment).unwrap();
    assert!(!["head_norms", "o_bias", "post_norm"].iter().any(|field| sent.contains(&format!("\"{field}\":"))));
}

#[test]
fn biases_are_those_of_the_generation() {
    let weights = |architecture: &str| {
        let export =
            emit(&open(architecture, json!({"attention_bias": true})), hidden()).exports.remove("hidden").unwrap();
        let has =
            |name: &str| export.arguments.contains(&Operand::Weight { name: format!("layers.1.{name}"), part: 0 });
        ["qkv_bias", "o_bias", "q_norm", "k_norm"].map(has)
    };
    assert_eq!(weights("Qwen2ForCausalLM"), [true, false, false, false]);
    assert_eq!(weights("Qwen3ForCausalLM"), [true, true, true, true]);
}

#[test]
fn a_tied_head_reads_the_embedding() {
    for (tied, name) in [(true, "embed"), (false, "head")] {
        let model = open("Qwen3ForCausalLM", json!({"tie_word_embeddings": tied}));
        let fragment = emit(&model, ModelPart::Head { rows: 2 });
        let weight = Operand::Weight { name: name.into(), part: 0 };
        assert_eq!(fragment.exports["head"].arguments, [Operand::Hidden, weight]);
    }
}

#[test]
fn the_same_request_gives_the_same_text() {
    for architecture in ["Qwen2ForCausalLM", "Qwen3ForCausalLM"] {
        let both = || [hidden(), ModelPart::Head { rows: 3 }].map(|part| emit(&open(architecture, json!({})), part));
        assert_eq!(both(), both());
    }
}

#[test]
fn captured_layers_are_results() {
    let ModelPart::Hidden { shape, .. } = hidden() else { unreachable!() };
    let fragment = emit(&open("Qwen3ForCausalLM", json!({})), ModelPart::Hidden { shape, capture: vec![0] });
    assert!(fragment.exports["hidden"].results.contains(&Operand::Captured { layer: 0 }));
}

#[test]
fn requests_that_do_not_fit_are_refused() {
    let model = open("Qwen3ForCausalLM", json!({}));
    let refused = |change: &dyn Fn(&mut EmitModel)| {
        let mut request = request(&model, hidden());
        change(&mut request);
        model.emit(&request).unwrap_err().message
    };
    assert!(refused(&|r| r.dtype = DType::F16).contains("f16"));
    assert!(refused(&|r| drop(r.weights.remove("layers.1.q_norm"))).contains("'layers.1.q_norm'"));
    assert!(refused(&|r| r.state.clear()).contains("1 kind of layers"));
}
