use torus_plugin::{
    DType, StateHandle, StepShape, TensorType, WeightHandle,
    serde_json::{Value, json},
};

use super::*;

fn open(change: impl FnOnce(&mut Value)) -> Result<GraniteModel, Fault> {
    let mut config = json!({
        "architectures": ["GraniteForCausalLM"], "hidden_size": 12, "intermediate_size": 20, "vocab_size": 31,
        "num_hidden_layers": 2, "num_attention_heads": 3, "num_key_value_heads": 1, "logits_scaling": 8.0,
    });
    change(&mut config);
    GraniteModel::open(&ModelOptions { config, parallel: Default::default() })
}

fn request(model: &GraniteModel, part: torus_plugin::ModelPart) -> EmitModel {
    let handle =
        |shape: &[u64]| WeightHandle { parts: vec![TensorType::new(DType::F32, shape)], storage: "dense-f32".into() };
    let pool = TensorType::new(DType::F32, [20, 1, 4]);
    EmitModel {
        part,
        dtype: DType::F32,
        weights: model.describe().weights.iter().map(|spec| (spec.name.clone(), handle(&spec.shape))).collect(),
        state: vec![StateHandle { pool: vec![pool.clone(), pool], context: vec![TensorType::new(DType::I32, [8])] }],
    }
}

#[test]
fn both_parts_are_emitted_with_the_right_types() {
    let model = open(|_| {}).unwrap();
    let shape = StepShape { tokens: 8, seqs: 2, page_size: 4, pages: 5, page_table: 6 };
    let parts = [torus_plugin::ModelPart::Hidden { shape, capture: vec![] }, torus_plugin::ModelPart::Head { rows: 2 }];
    for (part, export, result) in [(&parts[0], "hidden", "f32[8,12]"), (&parts[1], "head", "f32[2,31]")] {
        let fragment = model.emit(&request(&model, part.clone())).unwrap().fragment;
        let symbol = &fragment.exports[export].symbol;
        let function = fragment.functions.iter().find(|function| function.symbol == *symbol).unwrap();
        assert_eq!(function.results.last().unwrap().to_string(), result);
        assert_eq!(model.emit(&request(&model, part.clone())).unwrap().fragment, fragment);
    }
}

#[test]
fn every_tensor_of_a_checkpoint_is_named_once() {
    let tensors = |tied: bool| {
        let weights = open(|config| config["tie_word_embeddings"] = json!(tied)).unwrap().describe().weights;
        let mut names: Vec<_> = weights.into_iter().flat_map(|spec| spec.sources).map(|source| source.tensor).collect();
        let count = names.len();
        names.sort();
        names.dedup();
        assert_eq!(names.len(), count);
        names
    };
    assert!(tensors(false).contains(&"lm_head.weight".to_owned()));
    assert!(!tensors(true).contains(&"lm_head.weight".to_owned()));
    assert!(tensors(true).contains(&"model.layers.1.mlp.down_proj.weight".to_owned()));
}

#[test]
fn what_the_graph_does_not_do_is_named() {
    for (field, value) in [
        ("hidden_act", json!("gelu")),
        ("rope_scaling", json!({"rope_type": "linear", "factor": 2.0})),
        ("attention_bias", json!(true)),
        ("num_key_value_heads", json!(2)),
        ("hidden_size", json!(0)),
    ] {
        let message = open(|config| config[field] = value).err().unwrap().message;
        assert!(message.contains(field), "{field}: {message}");
    }
}
