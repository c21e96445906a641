use serde_json::{Value, from_value, json};

use super::*;

fn info() -> ModelInfo {
    ModelInfo {
        architecture: "TestForCausalLM".into(),
        vocab_size: 1000,
        context_length: 100,
        max_total_tokens: 80,
        max_running_requests: 4,
        page_size: 16,
        weight_bytes: 0,
        dtype: "float32".into(),
        attention_backend: "native".into(),
        model_plugin: "test 0.1.0".into(),
        reserved_bytes: 0,
        device: "cpu".into(),
        end_token_ids: vec![2],
    }
}

fn resolve(params: Value, api: Api) -> Result<Sampling, ApiError> {
    let params =
        from_value(params).map_err(|error| ApiError::new(axum::http::StatusCode::BAD_REQUEST, error.to_string()))?;
    Sampling::new(params, api, &GenerationDefaults::default(), &info())
}

#[test]
fn messages_are_those_of_the_reference() {
    let cases = [
        (json!({"temperature": -1}), "temperature must be non-negative, got -1.0."),
        (json!({"temperature": 1e30}), "temperature must be at most 100, got 1e30."),
        (json!({"top_p": 0}), "top_p must be in (0, 1], got 0.0."),
        (json!({"top_p": 1.5}), "top_p must be in (0, 1], got 1.5."),
        (json!({"min_p": -0.1}), "min_p must be in [0, 1], got -0.1."),
        (json!({"top_k": 0}), "top_k must be -1 (disable) or at least 1, got 0."),
        (json!({"top_k": i64::MIN}), "top_k must be -1 (disable) or at least 1, got -9223372036854775808."),
        (json!({"frequency_penalty": 3}), "frequency_penalty must be in [-2, 2], got 3.0."),
        (json!({"presence_penalty": -2.5}), "presence_penalty must be in [-2, 2], got -2.5."),
        (json!({"repetition_penalty": 0}), "repetition_penalty must be in (0, 2], got 0.0."),
        (json!({"max_new_tokens": -1}), "max_new_tokens must be at least 0, got -1."),
        (json!({"min_new_tokens": -1}), "min_new_tokens must be in [0, max_new_tokens], got -1."),
        (json!({"min_new_tokens": 9, "max_new_tokens": 8}), "min_new_tokens must be in [0, max_new_tokens(8)], got 9."),
        (json!({"logit_bias": {"1000": 1}}), "logit_bias must has keys in [0, 999], got 1000."),
        (json!({"logit_bias": {"1": 1e9}}), "logit_bias must have values in [-100, 100], got 1000000000.0."),
        (json!({"stop_token_ids": [3, -1]}), "stop_token_ids must be in [0, 999], got -1."),
        (json!({"n": 0}), "n must be in [1, 128], got 0."),
        (json!({"n": i64::MAX}), "n must be in [1, 128], got 9223372036854775807."),
        (json!({"stop": ["a", ""]}), "stop strings must have 1 to 1024 bytes."),
        (json!({"stop": "x".repeat(1025)}), "stop strings must have 1 to 1024 bytes."),
        (json!({"stop": vec!["x"; 17]}), "stop may have at most 16 strings, got 17."),
        (json!({"regex": "a"}), "regex is not supported by this server; remove it from the request"),
    ];
    for (params, message) in cases {
        let error = resolve(params.clone(), Api::Generate).unwrap_err();
        assert_eq!(error.message, message, "{params}");
        assert_eq!(error.param.as_deref(), message.split(' ').next(), "{params}");
    }
}

#[test]
fn apis_differ_in_their_defaults() {
    let defaults = GenerationDefaults { temperature: Some(0.25), max_new_tokens: Some(40), ..Default::default() };
    let of = |api, defaults: &GenerationDefaults| {
        let sampling = Sampling::new(WireParams::default(), api, defaults, &info()).unwrap();
        let max = sampling.fit(10, "text", &info()).unwrap();
        (sampling.for_engine(0, max).temperature, max)
    };
    let none = GenerationDefaults::default();
    assert_eq!(of(Api::Chat, &none), (0.7, 70));
    assert_eq!(of(Api::Completion, &none), (1.0, 16));
    assert_eq!(of(Api::Generate, &none), (1.0, 70), "128 do not fit");
    assert_eq!(of(Api::Chat, &defaults), (0.25, 40));
    assert_eq!(of(Api::Completion, &defaults), (0.25, 16));
    assert_eq!(of(Api::Generate, &defaults), (0.25, 40));
}

#[test]
fn prompt_and_output_must_fit() {
    let fit = |params: Value, prompt_tokens| {
        let sampling = resolve(params, Api::Generate).unwrap();
        sampling.fit(prompt_tokens, "input_ids", &info()).map_err(|error| error.message)
    };
    assert_eq!(fit(json!({"max_new_tokens": 5}), 10), Ok(5));
    assert_eq!(fit(json!({"max_new_tokens": 0}), 10), Ok(0));
    assert_eq!(fit(json!({"max_new_tokens": null}), 10), Ok(70));
    assert_eq!(fit(json!({"max_new_tokens": 90}), 10), Ok(70), "the pool is smaller than the context");
    assert_eq!(fit(json!({}), 79), Ok(1));
    let error = fit(json!({"max_new_tokens": 91}), 10).unwrap_err();
    assert!(error.starts_with(
        "Requested token count exceeds the model's maximum context length of 100 tokens. You requested a total of 101 \
         tokens: 10 tokens from the input messages and 91 tokens for the completion."
    ));
    assert!(fit(json!({"max_new_tokens": i64::MAX}), 10).is_err());
    assert_eq!(
        fit(json!({}), 100).unwrap_err(),
        "The input (100 tokens) is longer than the model's context length (100 tokens)."
    );
    assert_eq!(
        fit(json!({}), 80).unwrap_err(),
        "Input length (80 tokens) exceeds the maximum allowed length (79 tokens)."
    );
    assert_eq!(fit(json!({}), 0).unwrap_err(), "input_ids cannot be empty.");
    assert!(fit(json!({"min_new_tokens": 60, "max_new_tokens": null}), 30).is_err());
}

#[test]
fn values_reach_the_engine() {
    let params = json!({"temperature": 1e-7, "top_k": 5000, "top_p": 0.5, "min_p": 0.1, "repetition_penalty": 1.5,
        "frequency_penalty": -1, "presence_penalty": 2, "logit_bias": {"7": -100}, "stop_token_ids": [3],
        "ignore_eos": true, "sampling_seed": -1, "min_new_tokens": 1, "n": 3});
    let sampling = resolve(params, Api::Generate).unwrap();
    let expected = SamplingParams {
        max_new_tokens: Some(9),
        min_new_tokens: 1,
        temperature: 0.0,
        top_k: 1000,
        top_p: 0.5,
        min_p: 0.1,
        repetition_penalty: 1.5,
        frequency_penalty: -1.0,
        presence_penalty: 2.0,
        logit_bias: vec![(7, -100.0)],
        stop_token_ids: vec![3],
        ignore_eos: true,
        seed: Some(1),
    };
    assert_eq!(sampling.for_engine(2, 9), expected, "each copy has a seed of its own");
    assert_eq!(sampling.end_tokens(&info()), [3]);
    assert_eq!(resolve(json!({}), Api::Chat).unwrap().end_tokens(&info()), [2]);
}
