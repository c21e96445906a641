//! `/v1/completions`.

use expect_test::expect;
use serde_json::{Value, json};

use crate::{
    engine::{Script, bytes},
    support::{IM_END, TestServer, lines, steady},
};

const PATH: &str = "/v1/completions";

#[tokio::test]
async fn a_completion() {
    let server = TestServer::start().await;
    let answer = server.ask(PATH, json!({"prompt": "Say", "rid": "r1"})).await;
    expect![[r#"{"id":"r1","object":"text_completion","created":0,"model":"org/mock","choices":[{"index":0,"text":"Hello, wörld!","logprobs":null,"finish_reason":"stop","matched_stop":257}],"usage":{"prompt_tokens":3,"total_tokens":18,"completion_tokens":15,"prompt_tokens_details":null}}"#]].assert_eq(&steady(answer).to_string());
    let request = &server.engine.submitted()[0];
    assert_eq!(request.prompt.to_vec(), bytes("Say"));
    assert_eq!(request.sampling.max_new_tokens, Some(16));
    assert_eq!(request.sampling.temperature, 1.0);
    assert!(server.ask(PATH, json!({"prompt": "Say"})).await["id"].as_str().unwrap().starts_with("cmpl-"));
}

#[tokio::test]
async fn a_streamed_completion() {
    let script = Script { says: bytes("Hey"), portion: 2, ..Script::default() };
    let server = TestServer::with(script, |_| {}).await;
    let body = json!({"prompt": "Say", "rid": "r1", "stream": true, "echo": true,
        "stream_options": {"include_usage": true}});
    let mut events = server.stream(PATH, body).await;
    let usage = events.pop().unwrap();
    assert_eq!(usage["choices"], json!([]));
    assert_eq!(usage["usage"], json!({"prompt_tokens": 3, "total_tokens": 7, "completion_tokens": 4}));
    let text: String = events.iter().map(|event| event["choices"][0]["text"].as_str().unwrap()).collect();
    assert_eq!(text, "SayHey");
    let last = events.pop().unwrap();
    assert_eq!(last["choices"][0]["finish_reason"], "stop");
    assert_eq!(last["choices"][0]["matched_stop"], IM_END);
    assert!(events.iter().all(|event| event["choices"][0]["finish_reason"].is_null()));
    assert_eq!((&last["id"], &last["object"], &last["usage"]), (&json!("r1"), &json!("text_completion"), &Value::Null));
}

#[tokio::test]
async fn prompts_of_every_kind() {
    let server = TestServer::start().await;
    let cases = [
        (json!("ab"), vec![bytes("ab")]),
        (json!(["ab", "c"]), vec![bytes("ab"), bytes("c")]),
        (json!([97, 98]), vec![bytes("ab")]),
        (json!([[97, 98], [299]]), vec![bytes("ab"), vec![299]]),
    ];
    for (prompt, tokens) in cases {
        let before = server.engine.submitted().len();
        let answer = server.ask(PATH, json!({"prompt": prompt, "max_tokens": 1})).await;
        let submitted = server.engine.submitted();
        let prompts: Vec<_> = submitted[before..].iter().map(|request| request.prompt.to_vec()).collect();
        assert_eq!(prompts, tokens);
        assert_eq!(answer["choices"].as_array().unwrap().len(), tokens.len());
        assert_eq!(answer["usage"]["prompt_tokens"], tokens.iter().map(Vec::len).sum::<usize>());
    }
}

#[tokio::test]
async fn batches_times_n_with_echo() {
    let server = TestServer::start().await;
    for stream in [false, true] {
        let body = json!({"prompt": ["x", "yz"], "n": 2, "best_of": 2, "echo": true, "max_tokens": 2,
            "stream": stream});
        let choices: Vec<Value> = if stream {
            server.stream(PATH, body).await.into_iter().map(|event| event["choices"][0].clone()).collect()
        } else {
            server.ask(PATH, body).await["choices"].as_array().unwrap().clone()
        };
        let mut texts = vec![String::new(); 4];
        for choice in &choices {
            texts[choice["index"].as_u64().unwrap() as usize] += choice["text"].as_str().unwrap();
        }
        assert_eq!(texts, ["xHe", "xHe", "yzHe", "yzHe"]);
        assert_eq!(choices.iter().filter(|choice| choice["finish_reason"] == "length").count(), 4);
    }
}

#[tokio::test]
async fn logprobs_with_offsets() {
    let server = TestServer::saying("aé").await;
    let answer = server.ask(PATH, json!({"prompt": "xö", "logprobs": 2, "max_tokens": 4})).await;
    expect![[r#"{"text_offset":[0,1,1,2],"token_logprobs":[-12.125,-24.375,-21.125,-32.125],"tokens":["a","�","�","<|im_end|>"],"top_logprobs":[{"a":-12.125,"b":-13.125},{"�":-24.375},{"�":-21.125},{"<|im_end|>":-32.125,"":-33.125}]}"#]].assert_eq(&answer["choices"][0]["logprobs"].to_string());
}

#[tokio::test]
async fn echoed_logprobs_begin_with_the_prompt() {
    let server = TestServer::saying("ab").await;
    let body = json!({"prompt": "öx", "echo": true, "logprobs": 0, "max_tokens": 1});
    let answer = server.ask(PATH, body.clone()).await;
    assert_eq!(answer["choices"][0]["text"], "öxa");
    expect![[r#"{"text_offset":[0,0,1,2],"token_logprobs":[null,-22.75,-15.0,-12.125],"tokens":["�","�","x","a"],"top_logprobs":[null,{"�":-22.75},{"x":-15.0},{"a":-12.125}]}"#]].assert_eq(&answer["choices"][0]["logprobs"].to_string());

    let mut streamed = body;
    streamed["stream"] = json!(true);
    let events = server.stream(PATH, streamed).await;
    let part =
        |event: &Value, list: &str| event["choices"][0]["logprobs"][list].as_array().cloned().unwrap_or_default();
    for list in ["text_offset", "token_logprobs", "tokens", "top_logprobs"] {
        let joined: Vec<Value> = events.iter().flat_map(|event| part(event, list)).collect();
        assert_eq!(Value::Array(joined), answer["choices"][0]["logprobs"][list]);
    }
}

#[tokio::test]
async fn a_prompt_can_be_scored_without_a_continuation() {
    let server = TestServer::saying("ab").await;
    let body = json!({"prompt": "xyz", "echo": true, "logprobs": 1, "max_tokens": 0, "rid": "r"});
    let answer = server.ask(PATH, body).await;
    let choice = &answer["choices"][0];
    assert_eq!((&choice["text"], &choice["finish_reason"]), (&json!("xyz"), &json!("length")));
    assert_eq!(choice["logprobs"]["tokens"], json!(["x", "y", "z"]));
    assert_eq!(answer["usage"]["completion_tokens"], 0);
    let submitted = server.engine.submitted();
    assert_eq!(submitted[0].sampling.max_new_tokens, Some(1), "engines generate at least one");
    assert_eq!(submitted[0].logprobs.prompt_from, Some(0));
}

#[tokio::test]
async fn what_the_benchmark_client_sends_and_reads() {
    let server = TestServer::start().await;
    let body = json!({"model": "org/mock", "prompt": "Say", "temperature": 0.0, "best_of": 1, "max_tokens": 30,
        "stream": true, "ignore_eos": true});
    let events = server.stream(PATH, body).await;
    assert!(events.iter().all(|event| event["choices"][0]["text"].is_string()));
    let request = &server.engine.submitted()[0];
    assert!(request.sampling.ignore_eos);
    assert_eq!(request.sampling.temperature, 0.0);
    assert_eq!(events.last().unwrap()["choices"][0]["finish_reason"], "length");
}

#[tokio::test]
async fn updates_can_be_fewer() {
    let script = Script { says: bytes("abcdefg"), is_gated: true, ..Script::default() };
    let server = TestServer::with(script, |config| config.stream_interval = 3).await;
    server.engine.gate.add_permits(100);
    let events = server.stream(PATH, json!({"prompt": "Say", "stream": true, "rid": "r"})).await;
    let text: String = events.iter().map(|event| event["choices"][0]["text"].as_str().unwrap()).collect();
    assert_eq!(text, "abcdefg");
    assert!(events.len() <= 4, "{}", lines(events));
}
