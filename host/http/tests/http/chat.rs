//! `/v1/chat/completions`.

use expect_test::expect;
use serde_json::{Value, json};
use torus_http::GenerationDefaults;

use crate::{
    engine::{Script, bytes},
    support::{IM_END, IM_START, MODEL, TestServer, lines, steady, user},
};

const PATH: &str = "/v1/chat/completions";

#[tokio::test]
async fn an_answer() {
    let server = TestServer::start().await;
    let answer = server.ask(PATH, json!({"model": MODEL, "messages": user("Hi"), "rid": "r1"})).await;
    expect![[r#"{"id":"r1","object":"chat.completion","created":0,"model":"org/mock","choices":[{"index":0,"message":{"role":"assistant","content":"Hello, wörld!","reasoning_content":null,"tool_calls":null},"logprobs":null,"finish_reason":"stop","matched_stop":257}],"usage":{"prompt_tokens":21,"total_tokens":36,"completion_tokens":15,"prompt_tokens_details":null}}"#]].assert_eq(&steady(answer).to_string());
    let request = &server.engine.submitted()[0];
    let (start, end) = (vec![IM_START], vec![IM_END]);
    let prompt = [start.clone(), bytes("user\nHi"), end, bytes("\n"), start, bytes("assistant\n")];
    assert_eq!(request.prompt.to_vec(), prompt.concat(), "special tokens are tokens, and none is added");
    assert_eq!(request.id, "r1");
    assert_eq!(request.sampling.max_new_tokens, Some(200 - 21), "to the context length");
    assert_eq!(request.sampling.temperature, 0.7);
}

#[tokio::test]
async fn ids_and_model_names() {
    let server = TestServer::start().await;
    for (model, name) in [(json!(null), MODEL), (json!(MODEL), MODEL), (json!("default"), "default")] {
        let answer = server.ask(PATH, json!({"model": model, "messages": user("Hi")})).await;
        assert_eq!(answer["model"], name);
        let id = answer["id"].as_str().unwrap();
        assert!(id.starts_with("chatcmpl-") && id.len() == 41, "{id}");
    }
}

#[tokio::test]
async fn a_streamed_answer() {
    let server = TestServer::saying("Hey").await;
    let body = json!({"messages": user("Hi"), "rid": "r1", "stream": true, "stream_options": {"include_usage": true}});
    let mut events = server.stream(PATH, body).await;
    let usage = events.pop().unwrap();
    expect![[r#"{"id":"r1","object":"chat.completion.chunk","created":0,"model":"org/mock","choices":[],"usage":{"prompt_tokens":21,"total_tokens":25,"completion_tokens":4}}"#]].assert_eq(&steady(usage).to_string());
    let text: String = events.iter().filter_map(|event| event["choices"][0]["delta"]["content"].as_str()).collect();
    assert_eq!(text, "Hey");
    let first = events.remove(0);
    let last = events.pop().unwrap();
    expect![[r#"
        {"id":"r1","object":"chat.completion.chunk","created":0,"model":"org/mock","choices":[{"index":0,"delta":{"role":"assistant","content":"","reasoning_content":null,"tool_calls":null},"logprobs":null,"finish_reason":null,"matched_stop":null}],"usage":null}
        {"id":"r1","object":"chat.completion.chunk","created":0,"model":"org/mock","choices":[{"index":0,"delta":{"role":null,"content":null,"reasoning_content":null,"tool_calls":null},"logprobs":null,"finish_reason":"stop","matched_stop":257}],"usage":null}
    "#]].assert_eq(&lines(vec![first, last]));
    assert!(events.iter().all(|event| event["choices"][0]["finish_reason"].is_null()), "one finish chunk");
    assert!(events.iter().all(|event| event["choices"][0]["delta"]["role"].is_null()), "one role chunk");
}

#[tokio::test]
async fn chunks_come_as_tokens_do() {
    let server = TestServer::with(Script { says: bytes("aé<b"), is_gated: true, ..Script::default() }, |_| {}).await;
    let body = json!({"messages": user("Hi"), "stream": true, "stop": ["<end>"]});
    let mut response = server.post(PATH, &body).send().await.unwrap();
    let role = crate::support::chunk(&mut response).await.unwrap();
    assert!(role.contains("\"role\":\"assistant\""), "before any token: {role}");
    // é has two bytes, and < may be the beginning of the stop string.
    for (permits, content) in [(1, "a"), (2, "é"), (2, "<b")] {
        server.engine.gate.add_permits(permits);
        let event = crate::support::chunk(&mut response).await.unwrap();
        let event: Value = serde_json::from_str(event.strip_prefix("data: ").unwrap().trim_end()).unwrap();
        assert_eq!(event["choices"][0]["delta"]["content"], content);
    }
    server.engine.gate.add_permits(1);
    let rest = response.text().await.unwrap();
    assert!(rest.contains("\"finish_reason\":\"stop\"") && rest.ends_with("data: [DONE]\n\n"), "{rest}");
}

#[tokio::test]
async fn several_answers() {
    let server = TestServer::start().await;
    let body = json!({"messages": user("Hi"), "n": 3, "seed": 7, "rid": "r", "max_tokens": 5});
    let answer = server.ask(PATH, body).await;
    let choices = answer["choices"].as_array().unwrap();
    let indices: Vec<_> = choices.iter().map(|choice| choice["index"].as_u64().unwrap()).collect();
    assert_eq!(indices, [0, 1, 2]);
    assert!(choices.iter().all(|choice| choice["message"]["content"] == "Hello"));
    assert!(choices.iter().all(|choice| choice["finish_reason"] == "length"));
    assert_eq!(answer["usage"]["completion_tokens"], 15);
    assert_eq!(answer["usage"]["prompt_tokens"], 21, "the prompt counts once");
    let submitted = server.engine.submitted();
    let seeds: Vec<_> = submitted.iter().map(|request| request.sampling.seed).collect();
    assert_eq!(seeds, [Some(7), Some(8), Some(9)]);
    let ids: Vec<_> = submitted.iter().map(|request| request.id.as_str()).collect();
    assert_eq!(ids, ["r-0", "r-1", "r-2"]);
}

#[tokio::test]
async fn several_streamed_answers() {
    let server = TestServer::start().await;
    let events = server.stream(PATH, json!({"messages": user("Hi"), "n": 2, "stream": true})).await;
    for index in 0..2 {
        let of_choice: Vec<&Value> =
            events.iter().map(|event| &event["choices"][0]).filter(|choice| choice["index"] == index).collect();
        assert_eq!(of_choice[0]["delta"]["role"], "assistant");
        let text: String = of_choice.iter().filter_map(|choice| choice["delta"]["content"].as_str()).collect();
        assert_eq!(text, "Hello, wörld!");
        assert_eq!(of_choice.iter().filter(|choice| !choice["finish_reason"].is_null()).count(), 1);
    }
}

#[tokio::test]
async fn logprobs() {
    let server = TestServer::saying("é").await;
    let body = json!({"messages": user("Hi"), "rid": "r", "logprobs": true, "top_logprobs": 1, "max_tokens": 2});
    let answer = server.ask(PATH, body.clone()).await;
    expect![[r#"{"content":[{"token":"�","bytes":[195],"logprob":-24.375,"top_logprobs":[{"token":"�","bytes":[195],"logprob":-24.375}]},{"token":"�","bytes":[169],"logprob":-21.125,"top_logprobs":[{"token":"�","bytes":[169],"logprob":-21.125}]}]}"#]].assert_eq(&answer["choices"][0]["logprobs"].to_string());

    let mut body = body;
    body["stream"] = json!(true);
    let events = server.stream(PATH, body).await;
    let of_chunk = |event: &Value| event["choices"][0]["logprobs"]["content"].as_array().cloned().unwrap_or_default();
    let streamed: Vec<Value> = events.iter().flat_map(of_chunk).collect();
    assert_eq!(Value::Array(streamed), answer["choices"][0]["logprobs"]["content"]);
}

#[tokio::test]
async fn stop_strings_end_answers() {
    for portion in [1, 100] {
        let script = Script { says: bytes("one two END three"), portion, ..Script::default() };
        let server = TestServer::with(script, |_| {}).await;
        let answer = server.ask(PATH, json!({"messages": user("Hi"), "rid": "r", "stop": ["END", "nope"]})).await;
        let choice = &answer["choices"][0];
        assert_eq!(choice["message"]["content"], "one two ");
        assert_eq!(choice["finish_reason"], "stop");
        assert_eq!(choice["matched_stop"], "END");
        assert_eq!(answer["usage"]["completion_tokens"], 11, "up to the one that completed it");
        server.engine.wait_for_running(0).await;
        assert_eq!(server.engine.dropped(), ["r"], "the engine need not go on");

        let kept = server.ask(PATH, json!({"messages": user("Hi"), "stop": "END", "no_stop_trim": true})).await;
        assert_eq!(kept["choices"][0]["message"]["content"], "one two END");
        let later = server.ask(PATH, json!({"messages": user("Hi"), "stop": "o", "min_tokens": 5})).await;
        assert_eq!(later["choices"][0]["message"]["content"], "one tw", "not before five tokens");
    }
}

#[tokio::test]
async fn stop_strings_are_held_back_in_streams() {
    let script = Script { says: bytes("go EN go END"), ..Script::default() };
    let server = TestServer::with(script, |_| {}).await;
    let events = server.stream(PATH, json!({"messages": user("Hi"), "stream": true, "stop": "END"})).await;
    let text: String = events.iter().filter_map(|event| event["choices"][0]["delta"]["content"].as_str()).collect();
    assert_eq!(text, "go EN go ");
    let last = &events.last().unwrap()["choices"][0];
    assert_eq!((&last["finish_reason"], &last["matched_stop"]), (&json!("stop"), &json!("END")));
}

#[tokio::test]
async fn the_models_defaults_hold_where_the_request_says_nothing() {
    let server = TestServer::with(Script::default(), |config| {
        config.models[0].defaults = GenerationDefaults {
            temperature: Some(0.25),
            top_p: Some(0.5),
            top_k: Some(40),
            min_p: Some(0.125),
            repetition_penalty: Some(1.5),
            max_new_tokens: Some(3),
        };
    })
    .await;
    server.ask(PATH, json!({"messages": user("Hi")})).await;
    server.ask(PATH, json!({"messages": user("Hi"), "temperature": 0, "top_k": -1, "max_tokens": 4})).await;
    let [by_default, by_request] = server.engine.submitted().try_into().unwrap();
    let by_default = by_default.sampling;
    assert_eq!((by_default.temperature, by_default.top_p, by_default.top_k), (0.25, 0.5, 40));
    assert_eq!((by_default.min_p, by_default.repetition_penalty), (0.125, 1.5));
    assert_eq!(by_default.max_new_tokens, Some(3));
    let by_request = by_request.sampling;
    assert_eq!((by_request.temperature, by_request.top_k, by_request.top_p), (0.0, 0, 0.5));
    assert_eq!(by_request.max_new_tokens, Some(4));
}

#[tokio::test]
async fn cached_tokens_are_reported_if_wanted() {
    let script = Script { cached_tokens: 16, ..Script::default() };
    let server = TestServer::with(script.clone(), |config| config.enable_cache_report = true).await;
    let answer = server.ask(PATH, json!({"messages": user("Hi"), "n": 2})).await;
    assert_eq!(answer["usage"]["prompt_tokens_details"], json!({"cached_tokens": 16}));
    let quiet = TestServer::with(script, |_| {}).await;
    let answer = quiet.ask(PATH, json!({"messages": user("Hi")})).await;
    assert_eq!(answer["usage"]["prompt_tokens_details"], Value::Null);
}

#[tokio::test]
async fn conversations() {
    let server = TestServer::start().await;
    let messages = json!([
        {"role": "developer", "content": "S"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": "Once"},
    ]);
    let body = json!({"messages": messages, "continue_final_message": true, "extra_key": "tenant", "cache_salt": "s"});
    server.ask(PATH, body).await;
    let request = &server.engine.submitted()[0];
    let prompt: String =
        request.prompt.iter().filter_map(|id| char::from_u32(*id).filter(|char| *char < '\u{100}')).collect();
    assert_eq!(prompt, "system\nS\nuser\na\nb\nassistant\nOnce");
    assert_eq!(request.namespace.as_deref(), Some("6:tenants"));
}
