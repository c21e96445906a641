//! Requests that cannot be served: each with the right status, naming the field, and without work done.

use reqwest::header::CONTENT_TYPE;
use serde_json::{Value, json};
use torus_engine::api::Readiness;

use crate::{
    engine::Script,
    support::{MODEL, TestServer, user},
};

/// The fields of an error, and that both shapes agree.
fn fields(body: &Value) -> (String, String) {
    assert_eq!(body["object"], "error");
    assert_eq!(body["message"], body["error"]["message"]);
    assert_eq!(body["param"], body["error"]["param"]);
    (body["message"].as_str().unwrap().to_owned(), body["param"].as_str().unwrap_or_default().to_owned())
}

async fn assert_refused(server: &TestServer, path: &str, body: Value, message: &str, param: &str) {
    let (status, error) = server.refused(path, &body).await;
    let (found, found_param) = fields(&error);
    assert_eq!(status, 400, "{path} {body}: {found}");
    assert!(found.contains(message), "{path} {body}: {found}");
    assert_eq!(found_param, param, "{path} {body}");
    assert_eq!((&error["type"], &error["code"]), (&json!("BadRequestError"), &json!(400)));
    assert_eq!((&error["error"]["type"], &error["error"]["code"]), (&json!("invalid_request_error"), &json!(400)));
}

#[tokio::test]
async fn features_that_do_not_exist() {
    let server = TestServer::start().await;
    let base = |path: &str| match path {
        "/v1/chat/completions" => json!({"messages": user("Hi")}),
        "/v1/completions" => json!({"prompt": "Hi"}),
        _ => json!({"text": "Hi"}),
    };
    let chat = [
        ("response_format", json!({"type": "json_object"})),
        ("tools", json!([{"type": "function", "function": {"name": "f"}}])),
        ("tool_choice", json!("required")),
        ("lora_path", json!("a")),
        ("regex", json!("a+")),
        ("ebnf", json!("root ::= \"a\"")),
        ("json_schema", json!("{}")),
        ("structural_tag", json!("{\"a\":1}")),
        ("return_hidden_states", json!(true)),
        ("return_routed_experts", json!(true)),
        ("reasoning_effort", json!("high")),
        ("modalities", json!(["audio"])),
        ("functions", json!([{}])),
        ("dp_rank", json!(1)),
    ];
    let completions =
        ["suffix", "lora_path", "regex", "json_schema", "response_format", "image_data", "session_params"];
    let native = [
        "lora_path",
        "image_data",
        "video_data",
        "audio_data",
        "input_embeds",
        "token_ids_logprob",
        "return_hidden_states",
        "custom_logit_processor",
        "bootstrap_host",
    ];
    let cases = (chat.into_iter().map(|(field, value)| ("/v1/chat/completions", field, value)))
        .chain(completions.map(|field| ("/v1/completions", field, json!("x"))))
        .chain(native.map(|field| ("/generate", field, json!([1]))));
    for (path, field, value) in cases {
        let mut body = base(path);
        body[field] = value;
        assert_refused(&server, path, body.clone(), "is not supported by this server", field).await;
        body[field] = Value::Null;
        body["max_tokens"] = json!(1);
        if path == "/generate" {
            body.as_object_mut().unwrap().remove("max_tokens");
        }
        server.ask(path, body).await;
    }
    for field in ["regex", "json_schema", "ebnf", "structural_tag"] {
        let body = json!({"text": "Hi", "sampling_params": {field: "x"}});
        assert_refused(&server, "/generate", body, "is not supported", field).await;
    }
    let image = json!([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}]);
    let param = "messages[0].content[0]";
    assert_refused(&server, "/v1/chat/completions", json!({"messages": image}), "'text'", param).await;
}

#[tokio::test]
async fn unknown_fields() {
    let server = TestServer::start().await;
    let cases = [
        ("/v1/chat/completions", json!({"messages": user("Hi"), "temprature": 1}), "temprature"),
        ("/v1/completions", json!({"prompt": "Hi", "foo": null}), "foo"),
        ("/generate", json!({"text": "Hi", "bar": 1}), "bar"),
    ];
    for (path, body, field) in cases {
        let message = format!("Unrecognized request argument supplied: {field}");
        assert_refused(&server, path, body, &message, field).await;
    }
    let body = json!({"text": "Hi", "sampling_params": {"max_tokens": 1}});
    let (status, error) = server.refused("/generate", &body).await;
    assert_eq!(status, 400);
    assert!(fields(&error).0.contains("max_tokens"), "{error}");
    let harmless = json!({"messages": user("Hi"), "user": "me", "metadata": {"a": 1}, "store": true,
        "service_tier": "auto", "parallel_tool_calls": true, "prompt_cache_key": "k", "safety_identifier": "x"});
    server.ask("/v1/chat/completions", harmless).await;
}

#[tokio::test]
async fn numbers_out_of_range() {
    let server = TestServer::start().await;
    let huge = [json!(i64::MAX), json!(i64::MIN), json!(u64::MAX), json!(1e300), json!(-1e300), json!(2147483648_u64)];
    let integers = ["n", "max_tokens", "min_tokens", "top_k", "logprobs", "best_of", "stop_token_ids"]
        .map(|field| (field, "/v1/completions"));
    for (field, path) in integers {
        for value in &huge {
            // These mean "no limit" or "all", and are bounded by the model.
            let is_fine = field == "top_k" && value.as_i64().is_some_and(|top_k| top_k > 0);
            let body = json!({"prompt": "Hi", field: value});
            let (status, error) = server.refused(path, &body).await;
            if is_fine {
                assert_eq!(status, 200, "{body}");
            } else {
                assert_eq!(status, 400, "{body}");
                let (message, param) = fields(&error);
                assert!(param.starts_with(field), "{body}: {message} ({param})");
            }
        }
    }
    let real = ["temperature", "top_p", "min_p", "frequency_penalty", "presence_penalty", "repetition_penalty"];
    for field in real {
        for value in [json!(1e300), json!(-1e300), json!("NaN"), json!(-2.5), json!([])] {
            let (status, error) = server.refused("/v1/completions", &json!({"prompt": "Hi", field: value})).await;
            assert_eq!((status, fields(&error).1.as_str()), (400, field), "{value}");
        }
    }
    assert!(server.engine.submitted().iter().all(|request| request.sampling.top_k == 300));
}

#[tokio::test]
async fn fields_that_contradict_the_model_or_each_other() {
    let server = TestServer::start().await;
    let chat = |extra: Value| {
        let mut body = json!({"messages": user("Hi")});
        body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        ("/v1/chat/completions", body)
    };
    let text = |extra: Value| {
        let mut body = json!({"prompt": "Hi"});
        body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        ("/v1/completions", body)
    };
    let native = |body: Value| ("/generate", body);
    let cases = [
        (chat(json!({"messages": null})), "Field required", "messages"),
        (chat(json!({"messages": []})), "must not be empty", "messages"),
        (chat(json!({"messages": "Hi"})), "must be a list", "messages"),
        (chat(json!({"temperature": -1})), "temperature must be non-negative, got -1.0.", "temperature"),
        (chat(json!({"top_logprobs": 5})), "needs logprobs", "top_logprobs"),
        (chat(json!({"logprobs": true, "top_logprobs": 21})), "must be in [0, 20], got 21.", "top_logprobs"),
        (chat(json!({"max_tokens": 0})), "must be positive", "max_tokens"),
        (chat(json!({"max_tokens": 180})), "Requested token count exceeds the model's maximum context", "max_tokens"),
        (chat(json!({"continue_final_message": true})), "final message of the assistant", "continue_final_message"),
        (chat(json!({"chat_template_kwargs": []})), "must be an object", "chat_template_kwargs"),
        (chat(json!({"rid": "a b"})), "printable ASCII", "rid"),
        (text(json!({"top_p": 1.5})), "top_p must be in (0, 1], got 1.5.", "top_p"),
        (text(json!({"prompt": null})), "Field required", "prompt"),
        (text(json!({"prompt": ""})), "prompt cannot be empty.", "prompt"),
        (text(json!({"prompt": []})), "prompt cannot be empty.", "prompt"),
        (text(json!({"prompt": [1, 300]})), "300 is not below 300", "prompt"),
        (text(json!({"prompt": [[1], [4294967295_u32]]})), "greater than the vocab size", "prompt"),
        (text(json!({"prompt": {"a": 1}})), "expected a text", "prompt"),
        (
            text(json!({"prompt": "x".repeat(200)})),
            "The input (200 tokens) is longer than the model's context length (200 tokens).",
            "prompt",
        ),
        (
            text(json!({"prompt": "x".repeat(70_000)})),
            "is longer than the model's context length (200 tokens).",
            "prompt",
        ),
        (text(json!({"best_of": 3, "n": 2})), "best_of must equal n", "best_of"),
        (text(json!({"max_tokens": 0})), "max_tokens must be positive", "max_tokens"),
        (text(json!({"logprobs": 21})), "must be in [0, 20]", "logprobs"),
        (text(json!({"logit_bias": {"300": 1}})), "logit_bias must has keys in [0, 299], got 300.", "logit_bias"),
        (text(json!({"logit_bias": {"1": 101}})), "[-100, 100]", "logit_bias"),
        (text(json!({"stop": [""]})), "1 to 1024 bytes", "stop"),
        (text(json!({"stop": vec!["a"; 17]})), "at most 16", "stop"),
        (text(json!({"prompt": vec!["a"; 128], "n": 17})), "more than the 2048 sequences", "n"),
        (text(json!({"prompt": vec!["a"; 1025]})), "at most 1024 elements", "prompt"),
        (native(json!({})), "At least one of text, input_ids, or image should be provided", "text"),
        (native(json!({"text": "a", "input_ids": [1]})), "cannot be provided at the same time", "input_ids"),
        (native(json!({"input_ids": []})), "input_ids cannot be empty.", "input_ids"),
        (native(json!({"input_ids": [[1], []]})), "input_ids cannot be empty.", "input_ids"),
        (native(json!({"text": []})), "text cannot be empty.", "text"),
        (
            native(json!({"text": ["a", "b"], "rid": ["r"]})),
            "length of rid (1) should be equal to the batch size (2)",
            "rid",
        ),
        (native(json!({"text": ["a", "b"], "rid": ["r", "r"]})), "in progress", "rid"),
        (native(json!({"text": ["a"], "sampling_params": []})), "length of sampling_params (0)", "sampling_params"),
        (
            native(json!({"text": ["a", "b"], "sampling_params": [{"n": 1}, {"n": 2}]})),
            "n must be the same",
            "sampling_params",
        ),
        (
            native(json!({"text": "a", "return_logprob": true, "logprob_start_len": 1})),
            "must be -1 or in [0, 1), got 1.",
            "logprob_start_len",
        ),
        (native(json!({"text": "a", "return_logprob": true, "top_logprobs_num": 21})), "[0, 20]", "top_logprobs_num"),
        (
            native(json!({"text": "a", "sampling_params": {"max_new_tokens": 200}})),
            "You requested a total of 201 tokens",
            "max_new_tokens",
        ),
        (
            native(json!({"text": "a", "sampling_params": {"min_new_tokens": 129}})),
            "min_new_tokens must be in [0, max_new_tokens(128)], got 129.",
            "min_new_tokens",
        ),
    ];
    for ((path, body), message, param) in cases {
        assert_refused(&server, path, body, message, param).await;
    }
    assert_eq!(server.engine.submitted().len(), 0, "nothing reached the engine");
}

#[tokio::test]
async fn unknown_models_paths_and_methods() {
    let server = TestServer::start().await;
    let (status, error) = server.refused("/v1/chat/completions", &json!({"model": "x", "messages": user("Hi")})).await;
    let detail = json!({"message": "The model 'x' does not exist", "type": "invalid_request_error",
        "param": "model", "code": "model_not_found"});
    assert_eq!((status, &error["error"]), (404, &detail));
    let (status, error) = server.refused("/v1/nothing", &json!({})).await;
    assert_eq!((status, &error["type"]), (404, &json!("NotFoundError")));
    let response = server.get("/v1/completions").send().await.unwrap();
    assert_eq!(response.status(), 405);
    let error: Value = response.json().await.unwrap();
    assert_eq!(fields(&error).0, "GET is not allowed at /v1/completions");
}

#[tokio::test]
async fn bodies_that_are_not_json() {
    let server = TestServer::start().await;
    let send = async |body: String, content_type: Option<&str>| {
        let mut request = server.client.post(server.url("/v1/completions")).body(body);
        if let Some(content_type) = content_type {
            request = request.header(CONTENT_TYPE, content_type);
        }
        let response = request.send().await.unwrap();
        (response.status().as_u16(), fields(&response.json().await.unwrap()).0)
    };
    let json = Some("application/json; charset=utf-8");
    let whole = json!({"prompt": "Hi", "model": MODEL}).to_string();
    for content_type in [None, Some("text/plain"), Some("application/x-www-form-urlencoded")] {
        let (status, message) = send(whole.clone(), content_type).await;
        assert_eq!((status, message.as_str()), (400, "Unsupported Media Type: Only 'application/json' is allowed"));
    }
    let hostile = ["", "{", "{\"prompt\": \"test\", \"max_tokens\": 10", "[]", "\"x\"", "\u{0}", "{\"a\":1}}"]
        .map(str::to_owned)
        .into_iter()
        .chain([
            "[".repeat(1_000_000),
            "{\"prompt\":".repeat(100_000),
            format!("{{\"prompt\":{}", "[".repeat(200_000)),
        ]);
    for body in hostile {
        let (status, message) = send(body, json).await;
        assert_eq!(status, 400, "{message}");
        assert!(!message.contains("struct") && message.len() < 600, "{message}");
    }
}

#[tokio::test]
async fn bodies_that_are_too_large() {
    let server = TestServer::with(Script::default(), |config| config.limits.body_bytes = 100_000).await;
    let (status, error) = server.refused("/v1/completions", &json!({"prompt": "x".repeat(100_000)})).await;
    assert_eq!((status, &error["type"]), (413, &json!("RequestTooLargeError")));
    let chunks = futures::stream::iter((0..200_000).map(|_| Ok::<_, std::io::Error>(vec![b' '])));
    let request = server.client.post(server.url("/generate")).header(CONTENT_TYPE, "application/json");
    let response = request.body(reqwest::Body::wrap_stream(chunks)).send().await.unwrap();
    assert_eq!(response.status(), 413, "however small the chunks");
}

#[tokio::test]
async fn bodies_that_are_too_large_together() {
    let server = TestServer::with(Script::default(), |config| config.limits.bodies_total_bytes = 64 << 10).await;
    let status = async |bytes: usize| server.refused("/v1/completions", &json!({"prompt": "x".repeat(bytes)})).await.0;
    assert_eq!(status(90_000).await, 503);
    assert_eq!(status(60_000).await, 400, "memory is free again, only the prompt is too long");
}

#[tokio::test]
async fn overload_and_start() {
    let server = TestServer::with(Script { capacity: 1, is_gated: true, ..Script::default() }, |_| {}).await;
    let body = json!({"prompt": "Hi", "n": 2, "rid": "r"});
    let response = server.post("/v1/completions", &body).send().await.unwrap();
    assert_eq!(response.status(), 429);
    assert_eq!(response.headers()["retry-after"], "1");
    let error: Value = response.json().await.unwrap();
    assert_eq!(error["error"]["code"], "rate_limit_exceeded");
    assert_eq!(fields(&error).0, "the queue is full (1 requests are waiting); try again later");
    assert_eq!(server.engine.dropped(), ["r-0"], "all sequences or none");

    server.engine.set_readiness(Readiness::Compiling { done: 3, total: 12 });
    let response = server.post("/v1/chat/completions", &json!({"messages": user("Hi")})).send().await.unwrap();
    assert_eq!((response.status().as_u16(), &response.headers()["retry-after"]), (503, &"5".parse().unwrap()));
    let error: Value = response.json().await.unwrap();
    assert_eq!(fields(&error).0, "the model is not ready: compiling 3 of 12");
}
