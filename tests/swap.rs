//! Models and plugins that are loaded and swapped while clients stream.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, Ordering},
};

use futures::{StreamExt, future::join_all};
use serde_json::{Value, json};

use torus_engine::{
    EngineHandle, MemoryBudget,
    api::{Engine, Readiness},
};

use crate::{
    golden,
    server::{ADMIN_KEY, MODEL, Server, example_library, stock_library, torus},
    support::{block_on, ready},
};

/// A folder that a server may load plugins from, with two builds of the Llama family: the stock one, and one of another
/// hash.
fn plugin_folder() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let mut library = fs::read(stock_library("torus_model_llama")).unwrap();
    fs::write(folder.path().join("llama_a.so"), &library).unwrap();
    library.push(0);
    fs::write(folder.path().join("llama_b.so"), &library).unwrap();
    folder
}

fn chat(index: usize) -> Value {
    let subjects = ["rivers", "the sea", "bread", "clocks", "paper", "winter", "horses", "glass", "music", "maps"];
    let question = format!("Tell me {} things about {}.", index / subjects.len() + 2, subjects[index % subjects.len()]);
    json!({
        "model": MODEL, "temperature": 0, "max_tokens": 24, "stream": true, "logprobs": true, "top_logprobs": 2,
        "messages": [{"role": "user", "content": question}],
    })
}

/// The tokens of a chat that ended as it should, each with how much likelier it was than the next.
async fn streamed(server: &Server, index: usize) -> Vec<(String, f64)> {
    let response = server.post("/v1/chat/completions", &chat(index)).await;
    assert!(response.status().is_success(), "{}", response.text().await.unwrap());
    let text = response.text().await.unwrap();
    assert!(text.ends_with("data: [DONE]\n\n"), "the stream of chat {index} was cut: {text}");
    let events =
        text.split("\n\n").filter_map(|event| serde_json::from_str::<Value>(event.strip_prefix("data: ")?).ok());
    let (mut tokens, mut finish) = (Vec::new(), Value::Null);
    for event in events {
        assert!(event["error"].is_null(), "{event}");
        let choice = &event["choices"][0];
        for token in choice["logprobs"]["content"].as_array().into_iter().flatten() {
            let logprob = |rank: usize| token["top_logprobs"][rank]["logprob"].as_f64().unwrap();
            tokens.push((token["token"].as_str().unwrap().to_owned(), logprob(0) - logprob(1)));
        }
        if !choice["finish_reason"].is_null() {
            finish = choice["finish_reason"].clone();
        }
    }
    assert!(finish == "length" || finish == "stop", "chat {index}: {finish}");
    tokens
}

/// Asserts that both are the same up to where two tokens are nearly as likely: which other requests share a step decides
/// the last bits of a product.
fn assert_same(index: usize, expected: &[(String, f64)], found: &[(String, f64)]) {
    const MARGIN_MIN: f64 = 1e-3;
    let clear = expected.iter().take_while(|(_, margin)| *margin >= MARGIN_MIN).count();
    let text = |tokens: &[(String, f64)]| tokens.iter().map(|(token, _)| token.clone()).collect::<String>();
    assert_eq!(text(&found[..clear.min(found.len())]), text(&expected[..clear]), "chat {index}");
}

#[test]
fn fifty_chats_stream_on_while_plugins_are_swapped() {
    const CHATS: usize = 50;
    let plugins = plugin_folder();
    let paged = example_library("paged_attention");
    fs::copy(&paged, plugins.path().join("paged.so")).unwrap();
    // One whose kernel is native code of the plugin.
    fs::copy(example_library("native_loop"), plugins.path().join("native_loop.so")).unwrap();
    let folder = plugins.path().to_str().unwrap().to_owned();
    block_on(async {
        let sizes = ["--max-total-tokens", "8192", "--chunked-prefill-size", "32", "--max-running-requests", "16"];
        let options = [&sizes[..], &["--plugin-dir", &folder]].concat();
        let server = Server::start_with(&crate::support::smollm2(), &options).await;
        // What an unswapped server says; every generation here computes the same model.
        let expected = join_all((0..CHATS).map(|index| streamed(&server, index))).await;
        let (done, server) = (AtomicBool::new(false), &server);
        // All clients stream from before the first swap to after the last.
        let clients = (0..CHATS).map(|index| {
            let (expected, done) = (&expected[index], &done);
            async move {
                let mut chats = 0;
                while !done.load(Ordering::Acquire) || chats == 0 {
                    assert_same(index, expected, &streamed(server, index).await);
                    chats += 1;
                }
                chats
            }
        });
        let swaps = async {
            let mut spanning = 0;
            let rounds = [
                ("llama_a.so", "native"),
                ("llama_b.so", "native"),
                ("native_loop.so", "native-loop"),
                ("paged.so", "paged_attention"),
            ];
            for (plugin, attention) in rounds {
                let loaded = server.change("/v1/plugins", &json!({"file": plugin})).await;
                assert_eq!(loaded["status"], "loaded");
                let swap = json!({"model": MODEL, "attention_backend": attention});
                let swapped = server.change("/v1/models/swap", &swap).await;
                spanning += swapped["retiring"].as_array().unwrap().iter().map(requests_of).sum::<u64>();
            }
            done.store(true, Ordering::Release);
            spanning
        };
        let (chats, spanning) = futures::join!(join_all(clients), swaps);
        assert!(spanning > 0, "no request was in flight when its model was swapped");
        assert!(chats.iter().sum::<usize>() > CHATS, "{chats:?}");
        let listed = server.plugins().await;
        assert_eq!(listed["models"][0]["attention_backend"], "paged_attention", "{listed}");
        let llama = listed["plugins"].as_array().unwrap().iter().find(|plugin| plugin["name"] == "llama").unwrap();
        assert!(llama["path"].as_str().unwrap().ends_with("llama_b.so"), "{llama}");
    });
}

#[test]
fn a_family_that_the_server_did_not_know_takes_over_a_name() {
    let examples = stock_library("torus_model_gemma").parent().unwrap().to_owned();
    let [llama, native] = ["torus_model_llama", "torus_attention_native"].map(stock_library);
    let sizes = ["--max-total-tokens", "2048", "--chunked-prefill-size", "16", "--max-running-requests", "4"];
    let plugins = ["--no-linked-plugins", "--plugin-dir", examples.to_str().unwrap()];
    let files = ["--plugin", llama.to_str().unwrap(), "--plugin", native.to_str().unwrap()];
    block_on(async {
        let options = [&sizes[..], &plugins, &files].concat();
        let server = Server::start_with(&crate::support::smollm2(), &options).await;
        let gemma = json!({"model": "gemma", "model_path": crate::support::gemma3()});
        let request = server.client.post(format!("{}/v1/models/load", server.url)).bearer_auth(ADMIN_KEY);
        let unknown = request.json(&gemma).send().await.unwrap();
        assert_eq!(unknown.status().as_u16(), 422, "no plugin serves Gemma yet");
        server.change("/v1/plugins", &json!({"file": "libtorus_model_gemma.so"})).await;
        server.change("/v1/models/load", &gemma).await;
        let golden = &golden::cases(include_str!("data/gemma3-270m.json"))[0];
        let ask = |model: &str| {
            let sampling = json!({"temperature": 0, "max_new_tokens": 8, "ignore_eos": true});
            json!({"model": model, "input_ids": golden.prompt, "sampling_params": sampling})
        };
        let clear = golden.tokens.len().min(8);
        let expected = json!(golden.tokens[..clear]);
        let found = server.post_json("/generate", &ask("gemma")).await["output_ids"].clone();
        assert_eq!(json!(found.as_array().unwrap()[..clear]), expected);
        server.change("/v1/models/swap", &json!({"model": MODEL, "with": "gemma"})).await;
        assert_eq!(server.post_json("/generate", &ask(MODEL)).await["output_ids"], found);
        let listed = server.plugins().await;
        assert_eq!(listed["models"].as_array().unwrap().len(), 1, "{listed}");
        assert_eq!(listed["models"][0]["names"], json!([MODEL, "gemma"]));
    });
}

fn requests_of(model: &Value) -> u64 {
    model["requests"].as_u64().unwrap()
}

/// A tiny checkpoint with a tokenizer of 48 words, so that a whole server runs on it.
fn tiny_model(folder: &Path) -> PathBuf {
    let model = folder.join("tiny");
    fs::create_dir(&model).unwrap();
    let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("data/llama/grouped-untied");
    for file in ["config.json", "model.safetensors"] {
        fs::copy(data.join(file), model.join(file)).unwrap();
    }
    let vocab: serde_json::Map<String, Value> = (0..48).map(|id| (format!("t{id}"), json!(id))).collect();
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
        "pre_tokenizer": {"type": "Whitespace"}, "post_processor": null, "decoder": {"type": "ByteFallback"},
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "t0"},
    });
    fs::write(model.join("tokenizer.json"), tokenizer.to_string()).unwrap();
    model
}

/// Resident memory in MiB, file descriptors, and threads of a process.
fn usage(process: u32) -> (u64, usize, u64) {
    let status = fs::read_to_string(format!("/proc/{process}/status")).unwrap();
    let field = |name: &str| {
        let line = status.lines().find(|line| line.starts_with(name)).unwrap();
        line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap()
    };
    (field("VmRSS:") >> 10, fs::read_dir(format!("/proc/{process}/fd")).unwrap().count(), field("Threads:"))
}

#[test]
fn memory_and_files_level_off_over_two_hundred_swaps() {
    /// By then every allocator has what it keeps.
    const SETTLED: usize = 60;
    const SWAPS: usize = 200;
    /// Of some 850 MiB, most of them the PJRT plugin's. One generation that stayed would be 0.2 MiB of state, some
    /// MiB of programs, and a thread.
    const GROWTH_MAX_MIB: u64 = 120;
    let folder = plugin_folder();
    let model = tiny_model(folder.path());
    let sizes = ["--max-total-tokens", "256", "--chunked-prefill-size", "2", "--max-running-requests", "2"];
    let options = [&sizes[..], &["--page-size", "4", "--plugin-dir", folder.path().to_str().unwrap()]].concat();
    block_on(async {
        let server = Server::start_with(&model, &options).await;
        let ask =
            json!({"model": MODEL, "text": "t5 t9 t7", "sampling_params": {"temperature": 0, "max_new_tokens": 8}});
        let expected = server.post_json("/generate", &ask).await["output_ids"].clone();
        let mut settled = (0, 0, 0);
        for swap in 0..SWAPS {
            let file = if swap % 2 == 0 { "llama_a.so" } else { "llama_b.so" };
            server.change("/v1/plugins", &json!({"file": file})).await;
            server.change("/v1/models/swap", &json!({"model": MODEL})).await;
            if swap % 20 == 0 {
                assert_eq!(server.post_json("/generate", &ask).await["output_ids"], expected);
            }
            if swap == SETTLED {
                settled = usage(server.process_id());
            }
        }
        let (mib, files, threads) = usage(server.process_id());
        assert!(mib < settled.0 + GROWTH_MAX_MIB, "{mib} MiB after {SWAPS} swaps, {} after {SETTLED}", settled.0);
        assert!(files < settled.1 + 8, "{files} open files after {SWAPS} swaps, {} after {SETTLED}", settled.1);
        assert!(threads < settled.2 + 8, "{threads} threads after {SWAPS} swaps, {} after {SETTLED}", settled.2);
        let maps = fs::read_to_string(format!("/proc/{}/maps", server.process_id())).unwrap();
        let mut libraries: Vec<_> = maps.lines().filter_map(|line| line.split_whitespace().nth(5)).collect();
        libraries.retain(|path| path.contains("/plugins/") && path.ends_with(".so"));
        libraries.sort_unstable();
        libraries.dedup();
        assert_eq!(libraries.len(), 2, "each distinct library is mapped once: {libraries:?}");
    });
}

#[test]
fn what_cannot_be_loaded_leaves_everything_as_it_was() {
    let folder = plugin_folder();
    fs::write(folder.path().join("text.so"), "# a plugin").unwrap();
    let model = tiny_model(folder.path());
    let sizes = ["--max-total-tokens", "256", "--chunked-prefill-size", "2", "--max-running-requests", "2"];
    let options = [&sizes[..], &["--page-size", "4", "--plugin-dir", folder.path().to_str().unwrap()]].concat();
    block_on(async {
        let server = Server::start_with(&model, &options).await;
        let before = server.plugins().await;
        let refused = async |path: &str, body: Value| {
            let request = server.client.post(format!("{}{path}", server.url)).json(&body);
            let response = request.bearer_auth(ADMIN_KEY).send().await.unwrap();
            (response.status().as_u16(), response.text().await.unwrap())
        };
        let pinned = json!({"file": "llama_a.so", "sha256": "00"});
        for (path, body, status, word) in [
            ("/v1/plugins", json!({"file": "text.so"}), 400, "no shared library"),
            ("/v1/plugins", json!({"file": "/etc/passwd"}), 400, "--plugin-dir"),
            ("/v1/plugins", pinned, 400, "SHA-256"),
            ("/v1/models/load", json!({"model": "b", "model_path": "/nonexistent"}), 400, "/nonexistent"),
            ("/v1/models/swap", json!({"model": MODEL, "attention_backend": "nonsense"}), 422, "nonsense"),
            ("/v1/models/swap", json!({"model": MODEL, "context_length": 100_000}), 422, "context-length"),
            ("/v1/models/swap", json!({"model": MODEL, "swap_mode": "drain", "page_size": 9999}), 422, "page-size"),
        ] {
            let (found, text) = refused(path, body.clone()).await;
            assert!(found == status && text.contains(word), "{path} {body}: {found} {text}");
        }
        assert_eq!(server.plugins().await, before);
        let ask = json!({"model": MODEL, "text": "t5", "sampling_params": {"temperature": 0, "max_new_tokens": 2}});
        server.post_json("/generate", &ask).await;
    });
}

#[test]
fn a_drained_swap_waits_for_streams_and_loses_none() {
    let folder = plugin_folder();
    let model = tiny_model(folder.path());
    let sizes = ["--max-total-tokens", "256", "--chunked-prefill-size", "2", "--max-running-requests", "2"];
    let options = [&sizes[..], &["--page-size", "4", "--plugin-dir", folder.path().to_str().unwrap()]].concat();
    block_on(async {
        let server = Server::start_with(&model, &options).await;
        let ask = json!({
            "model": MODEL, "text": "t5 t9 t7", "stream": true,
            "sampling_params": {"temperature": 0, "max_new_tokens": 60, "ignore_eos": true},
        });
        let stream = async || {
            let response = server.post("/generate", &ask).await;
            assert!(response.status().is_success());
            let mut chunks = response.bytes_stream();
            let mut last = String::new();
            while let Some(chunk) = chunks.next().await {
                last = String::from_utf8_lossy(&chunk.unwrap()).into_owned();
            }
            assert!(last.ends_with("data: [DONE]\n\n"), "{last}");
        };
        let swap = json!({"model": MODEL, "swap_mode": "drain"});
        let swapped = async {
            let mut generations = Vec::new();
            for _ in 0..3 {
                let swapped = server.change("/v1/models/swap", &swap).await;
                assert_eq!(swapped["retiring"], json!([]), "the old generation is gone before the new one serves");
                generations.push(swapped["model"]["generation"].as_u64().unwrap());
            }
            generations
        };
        let streams = join_all((0..12).map(|_| async {
            for _ in 0..3 {
                stream().await;
            }
        }));
        let (generations, _) = futures::join!(swapped, streams);
        assert!(generations.is_sorted() && generations[0] > 1, "{generations:?}");
    });
}

#[test]
fn an_engine_that_does_not_fit_waits_for_the_one_it_replaces_or_says_so() {
    let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("data/llama/grouped-untied");
    let config = || {
        let mut config = crate::support::config(torus_weights::ResolvedModel::Folder(data.clone()));
        config.memory.page_size = Some(4);
        config.memory.max_total_tokens = Some(256);
        config.schedule.chunked_prefill_size = Some(2);
        config.schedule.max_running_requests = Some(2);
        config
    };
    let first = ready(config());
    let bytes = first.info().unwrap().reserved_bytes;
    drop(first);
    // Room for one and a half.
    let budget = MemoryBudget::new(Some(bytes * 3 / 2));
    let with = |released_bytes| {
        let mut config = config();
        (config.memory.budget, config.memory.released_bytes) = (budget.clone(), released_bytes);
        config
    };
    let first = ready(with(0));
    assert_eq!(budget.free_bytes(), bytes / 2);
    let until = |engine: &EngineHandle, is_reached: &dyn Fn(&Readiness) -> bool| loop {
        let stage = engine.readiness();
        if is_reached(&stage) {
            return stage;
        }
        std::thread::yield_now();
    };
    let beside = torus_engine::start(with(0)).unwrap();
    let Readiness::Failed { message } = until(&beside, &|stage| matches!(stage, Readiness::Failed { .. })) else {
        panic!("it cannot fit")
    };
    assert!(message.contains("does not fit") && message.contains("drain"), "{message}");
    let successor = torus_engine::start(with(bytes)).unwrap();
    until(&successor, &|stage| matches!(stage, Readiness::WaitingForMemory { .. }));
    drop(first);
    until(&successor, &|stage| *stage == Readiness::Ready);
    // One that nobody waits for any more ends, and leaves nothing behind.
    let abandoned = torus_engine::start(with(bytes)).unwrap();
    until(&abandoned, &|stage| matches!(stage, Readiness::WaitingForMemory { .. }));
    drop((abandoned, successor));
    assert_eq!(budget.free_bytes(), budget.total_bytes());
}

#[test]
fn several_models_are_served_by_name_with_their_shares_of_the_memory() {
    let folder = tempfile::tempdir().unwrap();
    let model = tiny_model(folder.path());
    let other = folder.path().join("other");
    fs::create_dir(&other).unwrap();
    for file in fs::read_dir(&model).unwrap() {
        let file = file.unwrap();
        fs::copy(file.path(), other.join(file.file_name())).unwrap();
    }
    // The same words under other weights.
    let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("data/llama/multi-head-tied");
    for file in ["config.json", "model.safetensors"] {
        fs::copy(data.join(file), other.join(file)).unwrap();
    }
    let sizes = ["--max-total-tokens", "256", "--chunked-prefill-size", "2", "--max-running-requests", "2"];
    let models = [format!("a={},mem=0.5", model.display()), format!("b={}", other.display())];
    let options = [&sizes[..], &["--page-size", "4", "--model", &models[0], "--model", &models[1]]].concat();
    block_on(async {
        let server = Server::start_models(&options).await;
        let listed = server.get_json("/v1/models").await;
        let ids: Vec<_> = listed["data"].as_array().unwrap().iter().map(|model| model["id"].clone()).collect();
        assert_eq!(ids, ["a", "b"]);
        let ask = |model: &str| {
            let sampling = json!({"temperature": 0, "max_new_tokens": 12, "ignore_eos": true});
            json!({"model": model, "text": "t5 t9 t7", "sampling_params": sampling})
        };
        let says = async |model: &str| server.post_json("/generate", &ask(model)).await["output_ids"].clone();
        let (a, b) = (says("a").await, says("b").await);
        assert_ne!(a, b);
        assert_eq!(says("default").await, a, "the first is the default");
        let unknown = server.post("/generate", &ask("c")).await;
        assert_eq!(unknown.status().as_u16(), 404);
        // What is left of the names after one is gone.
        server.change("/v1/models/unload", &json!({"model": "a"})).await;
        assert_eq!(says("default").await, b);
    });
}

#[test]
fn ctl_does_the_same_from_a_terminal() {
    let folder = plugin_folder();
    let model = tiny_model(folder.path());
    let sizes = ["--max-total-tokens", "256", "--chunked-prefill-size", "2", "--max-running-requests", "2"];
    let options = [&sizes[..], &["--page-size", "4", "--plugin-dir", folder.path().to_str().unwrap()]].concat();
    let server = block_on(Server::start_with(&model, &options));
    let ctl = |key: &str, arguments: &[&str]| {
        let mut command = std::process::Command::new(torus());
        command.args(["ctl", "--base-url", &server.url, "--admin-api-key", key]).args(arguments);
        let output = command.output().unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        (output.status.success(), text(&output.stdout), text(&output.stderr))
    };
    let done = |arguments: &[&str]| {
        let (succeeded, output, errors) = ctl(ADMIN_KEY, arguments);
        assert!(succeeded, "{arguments:?}: {errors}");
        output
    };
    assert!(done(&["ls"]).contains(&format!("model {MODEL}: ready")));
    assert!(done(&["load-plugin", "llama_a.so"]).starts_with("loaded: plugin llama"));
    let loaded = done(&["load", "other", "--model-path", model.to_str().unwrap(), "--page-size", "8"]);
    assert!(loaded.starts_with("loaded: "), "{loaded}");
    let swapped: Value = serde_json::from_str(&done(&["swap", MODEL, "--swap-mode", "drain", "--json"])).unwrap();
    assert_eq!((&swapped["status"], &swapped["retiring"]), (&json!("swapped"), &json!([])));
    assert!(done(&["swap", MODEL, "--with", "other"]).starts_with("swapped: "));
    assert!(done(&["unload", MODEL]).starts_with("unloaded"));
    assert!(!done(&["ls"]).contains("model "), "both names are gone");
    let (succeeded, _, errors) = ctl("wrong", &["ls"]);
    assert!(!succeeded && errors.contains("Incorrect API key"), "{errors}");
    let (succeeded, _, errors) = ctl(ADMIN_KEY, &["swap", MODEL]);
    assert!(!succeeded && errors.contains("does not exist"), "{errors}");
}
