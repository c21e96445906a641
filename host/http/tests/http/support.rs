//! A real server over a mock engine, and a client for it.

use std::{
    net::SocketAddr,
    sync::{Arc, OnceLock},
};

use reqwest::{Client, RequestBuilder, Response, StatusCode};
use serde_json::{Value, json};
use tokio::{sync::oneshot, task::JoinHandle};
use torus_http::{GenerationDefaults, ServedModel, ServerConfig, bind, install_metrics};
use torus_text::{ChatTemplate, TemplateLimits, Tokenizer};

use crate::engine::{Handle, MockEngine, Script};

pub const MODEL: &str = "org/mock";

// Token ids of the test tokenizer. Below 256, each is a byte.
pub const IM_START: u32 = 256;
pub const IM_END: u32 = 257;
/// More than the tokenizer has, as is common.
pub const VOCAB_SIZE: usize = 300;

pub struct TestServer {
    pub engine: Arc<MockEngine>,
    pub address: SocketAddr,
    pub client: Client,
    shutdown: Option<oneshot::Sender<()>>,
    served: JoinHandle<()>,
}

impl TestServer {
    pub async fn start() -> Self {
        Self::with(Script::default(), |_| {}).await
    }

    pub async fn saying(text: &str) -> Self {
        Self::with(Script { says: crate::engine::bytes(text), ..Script::default() }, |_| {}).await
    }

    pub async fn with(script: Script, change: impl FnOnce(&mut ServerConfig)) -> Self {
        let engine = MockEngine::new(script);
        let mut config = ServerConfig::new(vec![served(&engine, &[MODEL])], install_metrics().unwrap());
        config.port = 0;
        change(&mut config);
        let bound = bind(config).await.unwrap();
        let address = bound.local_addr();
        let (shutdown, asked) = oneshot::channel();
        let served = tokio::spawn(bound.serve(async {
            let _ = asked.await;
        }));
        Self { engine, address, client: Client::new(), shutdown: Some(shutdown), served }
    }

    pub fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }

    pub fn get(&self, path: &str) -> RequestBuilder {
        self.client.get(self.url(path))
    }

    pub fn post(&self, path: &str, body: &Value) -> RequestBuilder {
        self.client.post(self.url(path)).json(body)
    }

    /// The JSON that a request is answered with.
    pub async fn ask(&self, path: &str, body: Value) -> Value {
        let response = self.post(path, &body).send().await.unwrap();
        let status = response.status();
        let text = response.text().await.unwrap();
        assert_eq!(status, StatusCode::OK, "{body}: {text}");
        serde_json::from_str(&text).unwrap()
    }

    /// Status and JSON of a request that is refused.
    pub async fn refused(&self, path: &str, body: &Value) -> (u16, Value) {
        let response = self.post(path, body).send().await.unwrap();
        (response.status().as_u16(), response.json().await.unwrap())
    }

    /// The data of all events of a stream; the last is `[DONE]`, which is left out.
    pub async fn stream(&self, path: &str, body: Value) -> Vec<Value> {
        let response = self.post(path, &body).send().await.unwrap();
        assert_eq!(response.status(), StatusCode::OK, "{body}");
        assert_eq!(response.headers()["content-type"], "text/event-stream; charset=utf-8");
        let text = response.text().await.unwrap();
        let mut events: Vec<&str> = text.split("\n\n").collect();
        assert_eq!(events.pop(), Some(""), "the last event ends with an empty line");
        assert_eq!(events.pop(), Some("data: [DONE]"));
        let data = |event: &&str| {
            let data = event.strip_prefix("data: ").unwrap();
            assert!(!data.contains('\n'), "one line per event");
            serde_json::from_str(data).unwrap()
        };
        events.iter().map(data).collect()
    }

    /// Asks the server to stop, as a signal would.
    pub fn begin_shutdown(&mut self) {
        self.shutdown.take().unwrap().send(()).unwrap();
    }

    pub async fn wait_for_end(self) {
        self.served.await.unwrap();
    }
}

/// The next chunk of a streamed response, as text.
pub async fn chunk(response: &mut Response) -> Option<String> {
    response.chunk().await.unwrap().map(|bytes| String::from_utf8(bytes.to_vec()).unwrap())
}

pub fn served(engine: &Arc<MockEngine>, names: &[&str]) -> ServedModel {
    let (tokenizer, template) = text();
    ServedModel {
        names: names.iter().map(|name| (*name).to_owned()).collect(),
        engine: Arc::new(Handle(Arc::clone(engine))),
        tokenizer,
        chat_template: Some(template),
        defaults: GenerationDefaults::default(),
        model_path: "/models/mock".into(),
        tokenizer_path: "/models/mock".into(),
        created_s: 1_700_000_000,
        origin: None,
    }
}

/// One tokenizer for all tests: bytes, and two special tokens.
fn text() -> (Arc<Tokenizer>, Arc<ChatTemplate>) {
    static TEXT: OnceLock<(Arc<Tokenizer>, Arc<ChatTemplate>)> = OnceLock::new();
    let make = || {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, json: Value| std::fs::write(folder.path().join(name), json.to_string()).unwrap();
        write("tokenizer.json", tokenizer_json());
        let template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}\
                        {% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";
        write("tokenizer_config.json", json!({"eos_token": "<|im_end|>", "chat_template": template}));
        let tokenizer = Tokenizer::from_folder(folder.path()).unwrap();
        let source = tokenizer.chat_template().unwrap();
        let template = ChatTemplate::new(source, tokenizer.special_tokens(), TemplateLimits::default()).unwrap();
        (Arc::new(tokenizer), Arc::new(template))
    };
    TEXT.get_or_init(make).clone()
}

fn tokenizer_json() -> Value {
    // Byte-level tokenizers write bytes that are no printable characters as U+0100 and following.
    let mut substitute = 0x100;
    let vocab = (0..=255_u8).map(|byte| {
        let char = match byte {
            b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF => char::from(byte),
            _ => {
                substitute += 1;
                char::from_u32(substitute - 1).unwrap()
            }
        };
        (char.to_string(), json!(byte))
    });
    let vocab: serde_json::Map<String, Value> = vocab.collect();
    let special = |id: u32, content: &str| {
        json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": true})
    };
    json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": [special(IM_START, "<|im_start|>"), special(IM_END, "<|im_end|>")],
        "normalizer": null,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false},
        "post_processor": null,
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "vocab": vocab, "merges": []},
    })
}

/// `value` with what differs from run to run replaced.
pub fn steady(mut value: Value) -> Value {
    match &mut value {
        Value::Object(fields) => {
            for (key, field) in fields.iter_mut() {
                match key.as_str() {
                    "created" if field.is_u64() => *field = json!(0),
                    "e2e_latency" if field.is_f64() => *field = json!(0),
                    _ => *field = steady(field.take()),
                }
            }
        }
        Value::Array(values) => values.iter_mut().for_each(|value| *value = steady(value.take())),
        _ => {}
    }
    value
}

/// Many events, one per line.
pub fn lines(events: Vec<Value>) -> String {
    events.into_iter().map(|event| format!("{}\n", steady(event))).collect()
}

pub fn user(content: &str) -> Value {
    json!([{"role": "user", "content": content}])
}
