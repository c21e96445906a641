use expect_test::expect;
use serde_json::{Value, json};
use torus_abi::{
    TensorType,
    author::Model,
    fragment::{Operation, WeightHandle},
    model::{ModelOptions, StateHandle},
};

use super::*;
use crate::Llama;

fn open(change: impl FnOnce(&mut Value)) -> Llama {
    let mut config = json!({
        "architectures": ["LlamaForCausalLM"], "hidden_size": 12, "intermediate_size": 20,
        "num_hidden_layers": 2, "num_attention_heads": 3, "num_key_value_heads": 1, "vocab_size": 31,
    });
    change(&mut config);
    Llama::open(&ModelOptions { config, parallel: Default::default() }).unwrap()
}

fn hidden() -> ModelPart {
    let shape = StepShape { tokens: 8, seqs: 2, page_size: 4, pages: 5, page_table: 6 };
    ModelPart::Hidden { shape, capture: Vec::new() }
}

fn request(model: &Llama, part: ModelPart) -> EmitModel {
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

/// What a fragment calls for and gives, a line each.
fn outline(fragment: &Fragment) -> String {
    let types = |list: &[TensorType]| list.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ");
    let mut lines = Vec::new();
    for function in &fragment.functions {
        lines.push(format!(
            "func {} ({}) -> ({})",
            function.symbol,
            types(&function.arguments),
            types(&function.results)
        ));
        lines.extend(function.calls.iter().map(|callee| format!("  calls {callee}")));
    }
    for import in &fragment.imports {
        let operation = serde_json::to_value(&import.operation).unwrap()["op"].clone();
        lines.push(format!("import {} {operation} default {:?}", import.symbol, import.default));
    }
    for (name, export) in &fragment.exports {
        lines.push(format!("export {name} @{}", export.symbol));
    }
    lines.join("\n") + "\n"
}

#[test]
fn layers_of_equal_types_share_one_function() {
    let model = open(|_| {});
    let fragment = model.emit(&request(&model, hidden())).unwrap().fragment;
    expect![[r#"
        func llama_hidden.attention_block.default (f32[8,12] f32[12] f32[20,12] f32[12,12] f32[8,2] f32[8,2] f32[20,1,4] f32[20,1,4] i32[8]) -> (f32[8,12] f32[20,1,4] f32[20,1,4])
          calls llama_hidden.import.attention.0
          calls llama_hidden.import.linear.0
          calls llama_hidden.import.linear.1
        func llama_hidden.gated_mlp.default (f32[8,12] f32[12] f32[40,12] f32[12,20]) -> (f32[8,12])
          calls llama_hidden.import.linear.2
          calls llama_hidden.import.linear.3
        func llama_hidden.layer (f32[8,12] f32[8,2] f32[8,2] f32[12] f32[20,12] f32[12,12] f32[20,1,4] f32[20,1,4] i32[8] f32[12] f32[40,12] f32[12,20]) -> (f32[8,12] f32[20,1,4] f32[20,1,4])
          calls llama_hidden.import.attention_block.0
          calls llama_hidden.import.gated_mlp.0
        func llama_hidden.hidden (i32[8] i32[8] i32[8] f32[31,12] f32[12] f32[20,12] f32[12,12] f32[12] f32[40,12] f32[12,20] f32[20,1,4] f32[20,1,4] f32[12] f32[20,12] f32[12,12] f32[12] f32[40,12] f32[12,20] f32[20,1,4] f32[20,1,4] f32[12]) -> (f32[20,1,4] f32[20,1,4] f32[20,1,4] f32[20,1,4] f32[8,12])
          calls llama_hidden.import.embed.0
          calls llama_hidden.layer
        import llama_hidden.import.embed.0 "embed" default None
        import llama_hidden.import.linear.0 "linear" default None
        import llama_hidden.import.attention.0 "attention" default None
        import llama_hidden.import.linear.1 "linear" default None
        import llama_hidden.import.attention_block.0 "attention_block" default Some("llama_hidden.attention_block.default")
        import llama_hidden.import.linear.2 "linear" default None
        import llama_hidden.import.linear.3 "linear" default None
        import llama_hidden.import.gated_mlp.0 "gated_mlp" default Some("llama_hidden.gated_mlp.default")
        export hidden @llama_hidden.hidden
    "#]].assert_eq(&outline(&fragment));
}

#[test]
fn the_head_is_one_linear() {
    let model = open(|config| config["num_hidden_layers"] = json!(1));
    let fragment = model.emit(&request(&model, ModelPart::Head { rows: 2 })).unwrap().fragment;
    let text: String = fragment.functions.iter().map(|function| function.text.as_str()).collect();
    expect![[r#"
        func.func private @llama_head.head(%0: tensor<2x12xf32>, %1: tensor<31x12xf32>) -> (tensor<2x31xf32>) {
          %2 = "func.call"(%0, %1) {callee = @llama_head.import.linear.0} : (tensor<2x12xf32>, tensor<31x12xf32>) -> (tensor<2x31xf32>)
          "func.return"(%2) : (tensor<2x31xf32>) -> ()
        }
    "#]].assert_eq(&text);
}

#[test]
fn the_same_request_gives_the_same_text() {
    for change in [json!({}), json!({"attention_bias": true, "mlp_bias": true}), json!({"tie_word_embeddings": true})] {
        let emit = || {
            let model = open(|config| config.as_object_mut().unwrap().extend(change.as_object().unwrap().clone()));
            [hidden(), ModelPart::Head { rows: 3 }].map(|part| model.emit(&request(&model, part)).unwrap())
        };
        assert_eq!(emit(), emit());
    }
}

#[test]
fn biases_and_captures_are_passed_through() {
    let model = open(|config| {
        config["attention_bias"] = json!(true);
        config["mlp_bias"] = json!(true);
    });
    let ModelPart::Hidden { shape, .. } = hidden() else { unreachable!() };
    let part = ModelPart::Hidden { shape, capture: vec![0] };
    let fragment = model.emit(&request(&model, part)).unwrap().fragment;
    let export = &fragment.exports["hidden"];
    for name in ["qkv_bias", "o_bias", "gate_up_bias", "down_bias"] {
        let weight = Operand::Weight { name: format!("layers.1.{name}"), part: 0 };
        assert!(export.arguments.contains(&weight), "{name}");
    }
    assert!(export.results.contains(&Operand::Captured { layer: 0 }));
    let whole =
        |operation: &Operation| matches!(operation, Operation::AttentionBlock { .. } | Operation::GatedMlp { .. });
    assert!(!fragment.imports.iter().any(|import| whole(&import.operation)));
}

#[test]
fn a_tied_head_reads_the_embedding() {
    let model = open(|config| config["tie_word_embeddings"] = json!(true));
    let fragment = model.emit(&request(&model, ModelPart::Head { rows: 2 })).unwrap().fragment;
    let weight = Operand::Weight { name: "embed".into(), part: 0 };
    assert_eq!(fragment.exports["head"].arguments, [Operand::Hidden, weight]);
}

#[test]
fn requests_that_do_not_fit_are_refused() {
    let model = open(|_| {});
    let refused = |change: &dyn Fn(&mut EmitModel)| {
        let mut request = request(&model, hidden());
        change(&mut request);
        model.emit(&request).unwrap_err().message
    };
    assert!(refused(&|r| r.dtype = DType::F16).contains("f16"));
    assert!(refused(&|r| drop(r.weights.remove("layers.1.qkv"))).contains("'layers.1.qkv'"));
    assert!(refused(&|r| r.state.clear()).contains("1 kind of layers"));
}
