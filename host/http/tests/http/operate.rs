//! Administrators: plugins and models that come, go and are swapped while requests run.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex},
};

use reqwest::Response;
use serde_json::{Value, json};
use torus_engine::api::Readiness;
use torus_http::{LoadPlugin, ModelRequest, OperateError, Operator, PluginInfo, Recipe, ServedModel, ServerConfig};

use crate::{
    engine::{MockEngine, Script, bytes},
    support::{MODEL, TestServer, chunk, served},
};

const KEY: &str = "admin";

/// Makes models from engines that a test has put in line.
#[derive(Clone, Default)]
struct MockOperator(Arc<Mutex<State>>);

#[derive(Default)]
struct State {
    engines: VecDeque<Arc<MockEngine>>,
    /// What recipes were asked for.
    requests: Vec<ModelRequest>,
    /// Memory that each start could count on.
    released_bytes: Vec<u64>,
}

impl MockOperator {
    /// The next model that is made will say this.
    fn will_say(&self, text: &str) -> Arc<MockEngine> {
        let engine = MockEngine::new(Script { says: bytes(text), ..Script::default() });
        self.0.lock().unwrap().engines.push_back(engine.clone());
        engine
    }

    fn requests(&self) -> Vec<ModelRequest> {
        self.0.lock().unwrap().requests.clone()
    }

    fn released_bytes(&self) -> Vec<u64> {
        self.0.lock().unwrap().released_bytes.clone()
    }
}

fn plugin(name: &str) -> PluginInfo {
    PluginInfo {
        name: name.into(),
        version: "1.0.0".into(),
        description: String::new(),
        kinds: vec!["model".into()],
        architectures: vec![],
        path: None,
        sha256: None,
        replaced: None,
    }
}

impl Operator for MockOperator {
    fn plugins(&self) -> Vec<PluginInfo> {
        vec![plugin("llama")]
    }

    fn load_plugin(&self, request: &LoadPlugin) -> Result<PluginInfo, OperateError> {
        match request.file.to_str().unwrap() {
            "good.so" => Ok(plugin("good")),
            _ => Err(OperateError::invalid("file", "it is no shared library")),
        }
    }

    fn recipe(&self, request: &ModelRequest) -> Result<Arc<dyn Recipe>, OperateError> {
        self.0.lock().unwrap().requests.push(request.clone());
        match request.model_path.as_deref() {
            Some("/missing") => Err(OperateError::invalid("model_path", "/missing: there is no such folder")),
            _ => Ok(Arc::new(self.clone())),
        }
    }
}

impl Recipe for MockOperator {
    fn start(&self, names: Vec<String>, released_bytes: u64) -> Result<ServedModel, OperateError> {
        let mut state = self.0.lock().unwrap();
        state.released_bytes.push(released_bytes);
        let engine = state.engines.pop_front().unwrap();
        let names: Vec<_> = names.iter().map(String::as_str).collect();
        Ok(served(&engine, &names))
    }
}

/// A server whose first model says "old", one portion for each permit of its gate.
async fn server() -> (TestServer, MockOperator) {
    let operator = MockOperator::default();
    let script = Script { says: bytes("old"), is_gated: true, ..Script::default() };
    let server = TestServer::with(script, |config: &mut ServerConfig| {
        config.admin_api_key = Some(KEY.into());
        config.operator = Some(Arc::new(operator.clone()));
        let request = ModelRequest { model_path: Some("/models/mock".into()), ..ModelRequest::default() };
        config.models[0].origin = Some((request, Arc::new(operator.clone())));
    })
    .await;
    server.engine.set_info(|info| info.reserved_bytes = 1 << 20);
    (server, operator)
}

async fn admin(server: &TestServer, path: &str, body: Value) -> (u16, Value) {
    let response = server.post(path, &body).bearer_auth(KEY).send().await.unwrap();
    (response.status().as_u16(), response.json().await.unwrap())
}

async fn listed(server: &TestServer) -> Value {
    server.get("/v1/plugins").bearer_auth(KEY).send().await.unwrap().json().await.unwrap()
}

/// Waits until no generation finishes requests any more.
async fn until_none_retires(server: &TestServer) {
    while listed(server).await["retiring"] != json!([]) {
        tokio::task::yield_now().await;
    }
}

fn request(model: &str) -> Value {
    json!({"model": model, "text": "Hi", "sampling_params": {"max_new_tokens": 3}})
}

/// The text that the model called `model` answers with.
async fn says(server: &TestServer, model: &str) -> String {
    server.ask("/generate", request(model)).await["text"].as_str().unwrap().to_owned()
}

/// A request whose first token has come.
async fn streaming(server: &TestServer) -> Response {
    let mut body = request(MODEL);
    body["stream"] = true.into();
    server.engine.gate.add_permits(1);
    let mut response = server.post("/generate", &body).send().await.unwrap();
    assert!(chunk(&mut response).await.unwrap().contains("\"text\":\"o\""));
    response
}

async fn assert_ends_with_old(server: &TestServer, mut stream: Response) {
    server.engine.gate.add_permits(10);
    let mut rest = String::new();
    while let Some(text) = chunk(&mut stream).await {
        rest.push_str(&text);
    }
    assert!(rest.contains("\"text\":\"old\"") && rest.ends_with("data: [DONE]\n\n"), "{rest}");
}

#[tokio::test]
async fn changes_need_the_administrators_key() {
    let without = TestServer::with(Script::default(), |config| config.api_key = Some("client".into())).await;
    for path in ["/v1/models/load", "/v1/models/swap", "/v1/models/unload", "/v1/plugins"] {
        let refused = without.post(path, &json!({})).bearer_auth("client").send().await.unwrap();
        assert_eq!(refused.status().as_u16(), 403, "{path}");
        assert!(refused.text().await.unwrap().contains("--admin-api-key"));
    }
    let (server, _) = server().await;
    assert_eq!(server.refused("/v1/models/unload", &json!({"model": MODEL})).await.0, 401);
    let wrong = server.post("/v1/models/unload", &json!({"model": MODEL})).bearer_auth("client").send().await.unwrap();
    assert_eq!(wrong.status().as_u16(), 401);
    assert_eq!(server.get("/v1/plugins").send().await.unwrap().status().as_u16(), 401);
}

#[tokio::test]
async fn plugins_are_listed_and_loaded() {
    let (server, _) = server().await;
    let list = listed(&server).await;
    assert_eq!((&list["plugins"][0]["name"], &list["models"][0]["names"]), (&json!("llama"), &json!([MODEL])));
    let (status, answer) = admin(&server, "/v1/plugins", json!({"file": "good.so"})).await;
    assert_eq!((status, &answer["plugin"]["name"]), (200, &json!("good")));
    let (status, answer) = admin(&server, "/v1/plugins", json!({"file": "bad.so"})).await;
    assert_eq!((status, &answer["param"]), (400, &json!("file")));
    assert_eq!(admin(&server, "/v1/plugins", json!({"file": "good.so", "sha": "x"})).await.0, 400);
}

#[tokio::test]
async fn a_model_is_loaded_beside_another_then_takes_its_name() {
    let (server, operator) = server().await;
    operator.will_say("new");
    let (status, answer) = admin(&server, "/v1/models/load", json!({"model": "b", "model_path": "/b"})).await;
    assert_eq!((status, &answer["status"], &answer["model"]["status"]), (200, &json!("loaded"), &json!("ready")));
    let stream = streaming(&server).await;
    assert_eq!(says(&server, "b").await, "new");
    let (status, answer) = admin(&server, "/v1/models/swap", json!({"model": MODEL, "with": "b"})).await;
    assert_eq!((status, &answer["retiring"][0]["requests"]), (200, &json!(1)), "{answer}");
    assert_eq!((says(&server, MODEL).await, says(&server, "b").await), ("new".into(), "new".into()));
    assert_eq!(says(&server, "default").await, "new");
    let models = server.get("/v1/models").send().await.unwrap().json::<Value>().await.unwrap();
    assert_eq!(models["data"].as_array().unwrap().len(), 1);
    assert_ends_with_old(&server, stream).await;
    until_none_retires(&server).await;
}

#[tokio::test]
async fn requests_finish_on_the_generation_they_began_with() {
    let (server, operator) = server().await;
    let stream = streaming(&server).await;
    operator.will_say("new");
    let body = json!({"model": MODEL, "attention_backend": "other"});
    let (status, answer) = admin(&server, "/v1/models/swap", body).await;
    assert_eq!((status, &answer["status"]), (200, &json!("swapped")), "{answer}");
    // What the request leaves out is as the replaced generation has it.
    let asked = &operator.requests()[0];
    assert_eq!(asked.model_path.as_deref(), Some("/models/mock"));
    assert_eq!((asked.attention_backend.as_deref(), operator.released_bytes()[0]), (Some("other"), 0));
    assert_eq!(says(&server, MODEL).await, "new");
    assert_ends_with_old(&server, stream).await;
    until_none_retires(&server).await;
}

#[tokio::test]
async fn the_default_model_is_swapped_and_unloaded_under_that_name_too() {
    let (server, operator) = server().await;
    operator.will_say("new");
    let (status, answer) = admin(&server, "/v1/models/swap", json!({"model": "default"})).await;
    assert_eq!((status, &answer["status"]), (200, &json!("swapped")), "{answer}");
    assert_eq!((says(&server, MODEL).await, says(&server, "default").await), ("new".into(), "new".into()));
    assert_eq!(admin(&server, "/v1/models/unload", json!({"model": "default"})).await.0, 200);
    assert_eq!(listed(&server).await["models"], json!([]));
}

#[tokio::test]
async fn a_swap_that_fails_leaves_the_old_generation_serving() {
    let (server, operator) = server().await;
    operator.will_say("new").set_readiness(Readiness::Failed { message: "plugin 'x' panicked".into() });
    let (status, answer) = admin(&server, "/v1/models/swap", json!({"model": MODEL})).await;
    assert_eq!(status, 422);
    assert!(answer["message"].as_str().unwrap().contains("plugin 'x' panicked"), "{answer}");
    let (status, answer) = admin(&server, "/v1/models/swap", json!({"model": MODEL, "model_path": "/missing"})).await;
    assert_eq!((status, &answer["param"]), (400, &json!("model_path")));
    server.engine.gate.add_permits(10);
    assert_eq!(says(&server, MODEL).await, "old");
}

#[tokio::test]
async fn draining_ends_old_requests_first_and_new_ones_wait() {
    let (server, operator) = server().await;
    let stream = streaming(&server).await;
    let new = operator.will_say("new");
    new.set_readiness(Readiness::WaitingForMemory { bytes: 1 });
    let swap = server.post("/v1/models/swap", &json!({"model": MODEL, "swap_mode": "drain", "stream": true}));
    let mut swap = swap.bearer_auth(KEY).send().await.unwrap();
    let mut events = String::new();
    while !events.contains("\"draining\",\"requests\":1") {
        events.push_str(&chunk(&mut swap).await.unwrap());
    }
    // This one came while nothing is served under the name. It must not fail.
    let waiting = tokio::spawn(server.post("/generate", &request(MODEL)).send());
    assert_ends_with_old(&server, stream).await;
    while !events.contains("\"requests\":0") {
        events.push_str(&chunk(&mut swap).await.unwrap());
    }
    new.set_readiness(Readiness::Ready);
    while let Some(text) = chunk(&mut swap).await {
        events.push_str(&text);
    }
    assert!(events.contains("\"status\":\"swapped\"") && events.ends_with("data: [DONE]\n\n"), "{events}");
    let answer: Value = waiting.await.unwrap().unwrap().json().await.unwrap();
    assert_eq!(answer["text"], "new");
    assert_eq!(operator.released_bytes(), [1 << 20]);
}

#[tokio::test]
async fn a_drained_model_is_restored_if_the_new_one_fails() {
    let (server, operator) = server().await;
    let new = operator.will_say("new");
    new.set_readiness(Readiness::WaitingForMemory { bytes: 1 });
    operator.will_say("old again");
    let swap = server.post("/v1/models/swap", &json!({"model": MODEL, "swap_mode": "drain", "stream": true}));
    let mut swap = swap.bearer_auth(KEY).send().await.unwrap();
    let mut events = String::new();
    while !events.contains("\"requests\":0") {
        events.push_str(&chunk(&mut swap).await.unwrap());
    }
    new.set_readiness(Readiness::Failed { message: "a tensor is missing".into() });
    while let Some(text) = chunk(&mut swap).await {
        events.push_str(&text);
    }
    assert!(events.contains("restoring") && events.contains("a tensor is missing"), "{events}");
    assert_eq!(says(&server, MODEL).await, "old");
    assert_eq!(operator.released_bytes(), [1 << 20, 0]);
}

#[tokio::test]
async fn requests_that_do_not_end_keep_the_old_generation() {
    let (server, operator) = server().await;
    let stream = streaming(&server).await;
    operator.will_say("new").set_readiness(Readiness::WaitingForMemory { bytes: 1 });
    let body = json!({"model": MODEL, "swap_mode": "drain", "drain_timeout_s": 0.01});
    let (status, answer) = admin(&server, "/v1/models/swap", body).await;
    assert_eq!(status, 409, "{answer}");
    assert_ends_with_old(&server, stream).await;
    server.engine.gate.add_permits(10);
    assert_eq!(says(&server, MODEL).await, "old");
}

#[tokio::test]
async fn an_unloaded_model_finishes_its_requests() {
    let (server, operator) = server().await;
    operator.will_say("new");
    admin(&server, "/v1/models/load", json!({"model": "b", "model_path": "/b"})).await;
    let stream = streaming(&server).await;
    let (status, answer) = admin(&server, "/v1/models/unload", json!({"model": MODEL})).await;
    assert_eq!((status, &answer["retiring"][0]["requests"]), (200, &json!(1)));
    let (status, answer) = server.refused("/generate", &request(MODEL)).await;
    assert_eq!((status, &answer["error"]["code"]), (404, &json!("model_not_found")));
    assert_ends_with_old(&server, stream).await;
    until_none_retires(&server).await;
    assert_eq!(says(&server, "b").await, "new");
}

#[tokio::test]
async fn what_does_not_fit_is_refused_by_its_field() {
    let (server, _) = server().await;
    for (path, body, status, word) in [
        ("/v1/models/load", json!({"model_path": "/b"}), 400, "model is required"),
        ("/v1/models/load", json!({"model": "b"}), 400, "model_path is required"),
        ("/v1/models/load", json!({"model": MODEL, "model_path": "/b"}), 409, "served already"),
        ("/v1/models/load", json!({"model": "a b", "model_path": "/b"}), 400, "without spaces"),
        ("/v1/models/load", json!({"model": "b", "model_path": "/b", "dtyp": "x"}), 400, "dtyp"),
        ("/v1/models/load", json!({"model": "b", "model_path": "/b", "page_size": "x"}), 400, "page_size"),
        ("/v1/models/swap", json!({"model": "nobody"}), 404, "nobody"),
        ("/v1/models/swap", json!({"model": MODEL, "with": "nobody"}), 404, "nobody"),
        ("/v1/models/swap", json!({"model": MODEL, "with": MODEL}), 400, "same model"),
        ("/v1/models/swap", json!({"model": MODEL, "with": "b", "mem": 0.5}), 400, "loaded already"),
        ("/v1/models/swap", json!({"model": MODEL, "swap_mode": "fast"}), 400, "swap_mode"),
        ("/v1/models/swap", json!({"model": MODEL, "drain_timeout_s": -1}), 400, "drain_timeout_s"),
        ("/v1/models/unload", json!({"model": "nobody"}), 404, "nobody"),
        ("/v1/models/unload", json!({"model": MODEL, "now": true}), 400, "now"),
    ] {
        let (found, answer) = admin(&server, path, body.clone()).await;
        let message = answer["message"].as_str().unwrap();
        assert!(found == status && message.contains(word), "{path} {body}: {found} {message}");
    }
}
