//! The native `/generate`.

use expect_test::expect;
use serde_json::{Value, json};
use torus_engine::api::Abort;

use crate::{
    engine::{Script, bytes},
    support::{TestServer, lines, steady},
};

const PATH: &str = "/generate";

#[tokio::test]
async fn an_output() {
    let script = Script { says: bytes("Hé"), cached_tokens: 2, ..Script::default() };
    let server = TestServer::with(script, |_| {}).await;
    let body = json!({"text": "Say", "rid": "r1", "sampling_params": {"temperature": 0}});
    let output = server.ask(PATH, body.clone()).await;
    expect![[r#"{"text":"Hé","output_ids":[72,195,169],"meta_info":{"id":"r1","finish_reason":{"type":"stop","matched":257},"prompt_tokens":3,"completion_tokens":4,"cached_tokens":2,"e2e_latency":0}}"#]].assert_eq(&steady(output).to_string());
    assert_eq!(server.engine.submitted()[0].sampling.max_new_tokens, Some(128));

    let put = server.client.put(server.url(PATH)).json(&body).send().await.unwrap();
    assert_eq!(put.status(), 200);
}

#[tokio::test]
async fn ways_to_end() {
    let server = TestServer::saying("abc END").await;
    let of = async |params: Value| {
        let output = server.ask(PATH, json!({"input_ids": [1], "sampling_params": params})).await;
        (output["text"].clone(), output["meta_info"]["finish_reason"].clone(), output["output_ids"].clone())
    };
    let (text, reason, ids) = of(json!({"max_new_tokens": 2})).await;
    assert_eq!((text, reason), (json!("ab"), json!({"type": "length", "length": 2})));
    assert_eq!(ids, json!([97, 98]));
    let (text, reason, ids) = of(json!({"stop": "EN"})).await;
    assert_eq!((text, reason), (json!("abc "), json!({"type": "stop", "matched": "EN"})));
    assert_eq!(ids, json!([97, 98, 99, 32, 69, 78]), "up to the token that completed the stop string");
    let (text, reason, ids) = of(json!({"no_stop_trim": true, "skip_special_tokens": false})).await;
    assert_eq!((text, reason), (json!("abc END<|im_end|>"), json!({"type": "stop", "matched": 257})));
    assert_eq!(ids, json!([97, 98, 99, 32, 69, 78, 68, 257]));
    let (text, reason, _) = of(json!({"max_new_tokens": 0})).await;
    assert_eq!((text, reason), (json!(""), json!({"type": "length", "length": 0})));
}

#[tokio::test]
async fn a_streamed_output_that_is_ready_comes_in_one_event() {
    let server = TestServer::saying("Hé").await;
    let body = json!({"text": "Say", "rid": "r1", "stream": true, "sampling_params": {"temperature": 0}});
    let events = server.stream(PATH, body.clone()).await;
    expect![[r#"
        {"text":"Hé","output_ids":[72,195,169],"meta_info":{"id":"r1","finish_reason":{"type":"stop","matched":257},"prompt_tokens":3,"completion_tokens":4,"cached_tokens":0,"e2e_latency":0}}
    "#]].assert_eq(&lines(events));
}

/// One event per token, however fast the connection is.
async fn one_by_one(server: &TestServer, body: Value) -> Vec<Value> {
    let mut response = server.post(PATH, &body).send().await.unwrap();
    let mut events = Vec::new();
    loop {
        server.engine.gate.add_permits(1);
        let chunk = crate::support::chunk(&mut response).await.unwrap();
        for event in chunk.split_terminator("\n\n") {
            match event.strip_prefix("data: ").unwrap() {
                "[DONE]" => return events,
                data => events.push(serde_json::from_str(data).unwrap()),
            }
        }
    }
}

#[tokio::test]
async fn streams_as_the_benchmark_client_reads_them() {
    let script = Script { says: bytes("Hé"), is_gated: true, ..Script::default() };
    let server = TestServer::with(script, |_| {}).await;
    let body = json!({"text": "Say", "sampling_params": {"temperature": 0.0, "max_new_tokens": 3, "ignore_eos": true},
        "stream": true, "lora_path": null, "return_logprob": false, "return_routed_experts": false,
        "logprob_start_len": -1});
    let events = one_by_one(&server, body).await;
    let seen: Vec<_> = events.iter().map(|event| (&event["text"], &event["meta_info"]["completion_tokens"])).collect();
    assert_eq!(seen, [(&json!("H"), &json!(1)), (&json!("H"), &json!(2)), (&json!("Hé"), &json!(3))]);
    let reasons: Vec<_> = events.iter().map(|event| &event["meta_info"]["finish_reason"]["type"]).collect();
    assert_eq!(reasons, [&Value::Null, &Value::Null, &json!("length")]);
    assert!(events[0]["meta_info"].get("e2e_latency").is_none());
    assert!(events[2]["meta_info"]["e2e_latency"].is_f64());
    assert!(events.iter().all(|event| event["meta_info"]["cached_tokens"] == 0));
}

#[tokio::test]
async fn a_stream_can_be_incremental() {
    let script = Script { says: bytes("Hey"), is_gated: true, ..Script::default() };
    let server = TestServer::with(script, |_| {}).await;
    let body = json!({"text": "Say", "stream": true, "stream_output": true, "return_logprob": true});
    let events = one_by_one(&server, body).await;
    let text: Vec<_> = events.iter().map(|event| event["text"].as_str().unwrap()).collect();
    assert_eq!(text.concat(), "Hey");
    assert!(events.iter().all(|event| event["output_ids"].as_array().unwrap().len() <= 1));
    let logprobs = events.iter().map(|event| event["meta_info"]["output_token_logprobs"].as_array().unwrap().len());
    assert_eq!(logprobs.sum::<usize>(), 4);
}

#[tokio::test]
async fn batches() {
    let server = TestServer::saying("abc").await;
    let body = json!({"text": ["x", "yz"], "rid": "r",
        "sampling_params": [{"max_new_tokens": 1}, {"max_new_tokens": 2}], "extra_key": ["k", "l"]});
    let outputs = server.ask(PATH, body.clone()).await;
    let of = |output: &Value| (output["text"].clone(), output["meta_info"]["id"].clone());
    let outputs: Vec<_> = outputs.as_array().unwrap().iter().map(of).collect();
    assert_eq!(outputs, [(json!("a"), json!("r_0")), (json!("ab"), json!("r_1"))]);
    let namespaces: Vec<_> =
        server.engine.submitted().iter().map(|request| request.namespace.clone().unwrap()).collect();
    assert_eq!(namespaces, ["1:k".into(), "1:l".into()]);

    let mut body = body;
    body["stream"] = json!(true);
    let events = server.stream(PATH, body).await;
    for (index, text) in [(0, "a"), (1, "ab")] {
        let last = events.iter().rfind(|event| event["index"] == index).unwrap();
        assert_eq!(last["text"], text);
        assert_eq!(last["meta_info"]["finish_reason"]["type"], "length");
    }
}

#[tokio::test]
async fn several_outputs_of_one_prompt() {
    let server = TestServer::saying("abc").await;
    let body = json!({"input_ids": [[1, 2]], "rid": ["r"], "sampling_params": {"n": 2, "sampling_seed": 5}});
    let outputs = server.ask(PATH, body).await;
    let ids: Vec<_> = outputs.as_array().unwrap().iter().map(|output| &output["meta_info"]["id"]).collect();
    assert_eq!(ids, ["r_0", "r_1"]);
    let single = server.ask(PATH, json!({"text": "x", "sampling_params": {"n": 2}})).await;
    assert_eq!(single.as_array().unwrap().len(), 2, "a list although there is one prompt");
    let list_of_one = server.ask(PATH, json!({"text": ["x"]})).await;
    assert_eq!(list_of_one.as_array().unwrap().len(), 1);
}

#[tokio::test]
async fn logprobs() {
    let server = TestServer::saying("a").await;
    let of = async |options: Value| {
        let mut body = json!({"input_ids": [97, 98, 99], "rid": "r", "return_logprob": true});
        body.as_object_mut().unwrap().extend(options.as_object().unwrap().clone());
        steady(server.ask(PATH, body).await)["meta_info"].clone()
    };
    let output_only = of(json!({})).await;
    assert_eq!(output_only["output_token_logprobs"], json!([[-12.125, 97, "a"], [-32.125, 257, "<|im_end|>"]]));
    assert!(output_only.get("input_token_logprobs").is_none());
    let all = of(json!({"logprob_start_len": 0, "top_logprobs_num": 1, "return_text_in_logprobs": false})).await;
    expect![[r#"{"id":"r","finish_reason":{"type":"stop","matched":257},"prompt_tokens":3,"input_token_logprobs":[[null,97,null],[-12.25,98,null],[-12.375,99,null]],"output_token_logprobs":[[-12.125,97,null],[-32.125,257,null]],"input_top_logprobs":[null,[[-12.25,98,null]],[[-12.375,99,null]]],"output_top_logprobs":[[[-12.125,97,null]],[[-32.125,257,null]]],"completion_tokens":2,"cached_tokens":0,"e2e_latency":0}"#]].assert_eq(&all.to_string());
    let from_two = of(json!({"logprob_start_len": 2})).await;
    assert_eq!(from_two["input_token_logprobs"], json!([[-12.375, 99, "c"]]));
    assert!(from_two.get("input_top_logprobs").is_none());

    let body = json!({"input_ids": [97, 98], "return_logprob": true, "logprob_start_len": 0, "stream": true});
    let last = server.stream(PATH, body).await.pop().unwrap();
    assert_eq!(last["meta_info"]["input_token_logprobs"].as_array().unwrap().len(), 2);
    assert_eq!(last["meta_info"]["output_token_logprobs"].as_array().unwrap().len(), 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn large_answers_are_whole() {
    let server = TestServer::start().await;
    server.engine.set_info(|info| {
        info.context_length = 10_000;
        info.max_total_tokens = 10_000;
    });
    let prompt = vec![97; 5_000];
    let mut body = json!({"input_ids": prompt, "return_logprob": true, "logprob_start_len": 0, "stream": false,
        "sampling_params": {"max_new_tokens": 2_000, "ignore_eos": true}});
    let output = server.ask(PATH, body.clone()).await;
    body["stream"] = json!(true);
    let last = server.stream(PATH, body).await.pop().unwrap();
    for output in [output, last] {
        assert_eq!(output["output_ids"].as_array().unwrap().len(), 2_000);
        assert_eq!(output["meta_info"]["input_token_logprobs"].as_array().unwrap().len(), 5_000);
        assert_eq!(output["meta_info"]["output_token_logprobs"].as_array().unwrap().len(), 2_000);
    }
    let echo = server.ask("/v1/completions", json!({"prompt": vec![98; 9_000], "echo": true, "max_tokens": 1})).await;
    assert_eq!(echo["choices"][0]["text"].as_str().unwrap().len(), 9_001);
}

#[tokio::test]
async fn failures_are_told_in_their_place() {
    let failing = Script { fails_after: Some((2, Abort::Failed("a step failed".into()))), ..Script::default() };
    let server = TestServer::with(failing, |_| {}).await;
    let (status, body) = server.refused(PATH, &json!({"text": "x"})).await;
    assert_eq!((status, &body["error"]["message"]), (500, &json!("a step failed")));
    let reason = json!({"type": "abort", "message": "a step failed", "status_code": 500,
        "err_type": "InternalServerError"});
    let outputs = server.ask(PATH, json!({"text": ["x", "y"]})).await;
    assert!(outputs.as_array().unwrap().iter().all(|output| output["meta_info"]["finish_reason"] == reason));
    let last = server.stream(PATH, json!({"text": "x", "stream": true})).await.pop().unwrap();
    assert_eq!(last["meta_info"]["finish_reason"], reason);
    assert_eq!(last["text"], "He", "what there is of it");
}
