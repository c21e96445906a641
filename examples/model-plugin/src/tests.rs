//! What the model says through the interface, without a device.

use torus_plugin::{
    DType, EmitModel, Fault, Model, ModelOptions, ModelPart, Parallel, StateHandle, StateKind, StepShape, TensorType,
    WeightHandle,
    serde_json::{Value, json},
};

use crate::GraniteModel;

fn open(change: Value) -> Result<GraniteModel, Fault> {
    let mut config = json!({
        "architectures": ["GraniteForCausalLM"], "hidden_size": 12, "intermediate_size": 20, "vocab_size": 31,
        "num_hidden_layers": 2, "num_attention_heads": 3,
    });
    config.as_object_mut().unwrap().extend(change.as_object().unwrap().clone());
    GraniteModel::open(&ModelOptions { config, parallel: Parallel::default() })
}

fn request(model: &GraniteModel, part: ModelPart) -> EmitModel {
    let handle =
        |shape: &[u64]| WeightHandle { parts: vec![TensorType::new(DType::F32, shape)], storage: "dense-f32".into() };
    let pool = TensorType::new(DType::F32, [20, 3, 4]);
    EmitModel {
        part,
        dtype: DType::Bf16,
        weights: model.describe().weights.iter().map(|spec| (spec.name.clone(), handle(&spec.shape))).collect(),
        state: vec![StateHandle { pool: vec![pool.clone(), pool], context: vec![TensorType::new(DType::I32, [8])] }],
        imports: Default::default(),
        loops: None,
    }
}

#[test]
fn defaults_are_those_of_transformers() {
    let model = open(json!({})).unwrap();
    let description = model.describe();
    let [StateKind::Paged(attention)] = &description.kinds[..] else { panic!("{:?}", description.kinds) };
    assert_eq!((attention.q_heads, attention.kv_heads, attention.head_dim, attention.scale), (3, 3, 4, 1.0));
    assert_eq!((description.context_length, description.dtype), (2048, DType::F32));
    assert_eq!((model.config.norm_eps, model.config.rope.theta), (1e-6, 10_000.0));
}

#[test]
fn theta_is_read_from_both_places() {
    let old = open(json!({"rope_theta": 5e5, "rope_scaling": null})).unwrap();
    let new = open(json!({"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}})).unwrap();
    assert_eq!((old.config.rope.theta, new.config.rope.theta), (5e5, 5e5));
}

#[test]
fn what_the_graph_does_not_do_is_named() {
    for (field, value) in [
        ("hidden_act", json!("gelu")),
        ("attention_bias", json!(true)),
        ("mlp_bias", json!(true)),
        ("rope_scaling", json!({"type": "linear", "factor": 2.0})),
        ("rope_parameters", json!({"rope_type": "yarn", "factor": 2.0})),
        ("quantization_config", json!({"quant_method": "awq"})),
        ("dtype", json!("float8_e4m3fn")),
        ("num_hidden_layers", json!(0)),
        ("num_attention_heads", json!(0)),
        ("num_key_value_heads", json!(2)),
        ("head_dim", json!(3)),
    ] {
        let message = open(json!({ field: value })).err().unwrap().message;
        assert!(message.contains(field), "{field}: {message}");
    }
    let message = open(json!({"hidden_size": "x"})).err().unwrap().message;
    assert!(message.contains("config.json"), "{message}");
}

#[test]
fn every_tensor_of_a_checkpoint_is_mapped_once() {
    let mut layer: Vec<_> = ["q", "k", "v", "o"].map(|name| format!("self_attn.{name}_proj")).into();
    layer.extend(["gate", "up", "down"].map(|name| format!("mlp.{name}_proj")));
    layer.extend(["input", "post_attention"].map(|name| format!("{name}_layernorm")));
    let mut checkpoint: Vec<_> =
        (0..2).flat_map(|i| layer.iter().map(move |name| format!("model.layers.{i}.{name}.weight"))).collect();
    checkpoint.extend(["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"].map(String::from));
    checkpoint.sort();
    for tied in [false, true] {
        let description = open(json!({"tie_word_embeddings": tied})).unwrap().describe();
        let mut tensors = description.ignored_tensors;
        assert_eq!(tensors.len(), usize::from(tied));
        for spec in description.weights {
            let rows: u64 = spec.sources.iter().map(|source| source.shape[0]).sum();
            assert_eq!(rows, spec.shape[0], "{}", spec.name);
            tensors.extend(spec.sources.into_iter().map(|source| source.tensor));
        }
        tensors.sort();
        assert_eq!(tensors, checkpoint);
    }
}

#[test]
fn both_parts_have_the_right_types_and_the_same_request_gives_the_same_text() {
    let shape = StepShape { tokens: 8, seqs: 2, page_size: 4, pages: 5, page_table: 6 };
    let hidden = ModelPart::Hidden { shape, capture: vec![0] };
    for (part, name, last) in [(hidden, "hidden", "bf16[8,12]"), (ModelPart::Head { rows: 2 }, "head", "f32[2,31]")] {
        let emit = || {
            let model = open(json!({"residual_multiplier": 0.2})).unwrap();
            model.emit(&request(&model, part.clone())).unwrap().fragment
        };
        let fragment = emit();
        let symbol = &fragment.exports[name].symbol;
        let function = fragment.functions.iter().find(|function| function.symbol == *symbol).unwrap();
        assert_eq!(function.results.last().unwrap().to_string(), last);
        assert_eq!(emit(), fragment);
    }
}

#[test]
fn a_request_that_does_not_fit_is_refused() {
    let model = open(json!({})).unwrap();
    let mut lacking = request(&model, ModelPart::Head { rows: 2 });
    lacking.weights.remove("layers.1.down");
    assert!(model.emit(&lacking).unwrap_err().message.contains("layers.1.down"));
    let stateless = EmitModel { state: vec![], ..request(&model, ModelPart::Head { rows: 2 }) };
    assert!(model.emit(&stateless).unwrap_err().message.contains("kind"));
}

#[test]
fn it_conforms() {
    let config = json!({
        "architectures": ["GraniteForCausalLM"], "hidden_size": 12, "intermediate_size": 20, "vocab_size": 31,
        "num_hidden_layers": 2, "num_attention_heads": 3,
    });
    torus_plugin::testkit::model::check::<GraniteModel>(&config.to_string()).assert();
}
