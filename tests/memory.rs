//! How much memory a server takes beside its weights and its KV pool.

use std::{path::Path, process::Command};

use serde_json::json;
use torus_weights::ResolvedModel;

use crate::{
    server::Server,
    support::{answer, block_on, config, greedy, ready, request, smollm2},
};

/// Resident memory of a process that no file stands behind.
fn anonymous_bytes(process: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{process}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap();
    line.split_whitespace().next().unwrap().parse::<u64>().unwrap() * 1024
}

const BARE: &str = "a bare process holds ";

/// A process that has loaded the device's library and compiled programs for one bucket, with a model of a few kilobytes.
#[test]
#[ignore = "run by a_server_holds_little_beside_weights_and_kv"]
fn bare_process() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("data/llama/grouped-untied");
    let mut config = config(ResolvedModel::Folder(folder));
    config.cache_dir = None;
    config.memory.max_total_tokens = Some(64);
    config.schedule.max_running_requests = Some(1);
    config.schedule.chunked_prefill_size = Some(1);
    let engine = ready(config);
    assert_eq!(block_on(answer(&engine, request("bare", &[1, 2, 3], greedy(2)))).tokens.len(), 2);
    println!("{BARE}{}", anonymous_bytes(std::process::id()));
}

fn bare_bytes() -> u64 {
    let arguments = ["--exact", "memory::bare_process", "--ignored", "--nocapture", "--test-threads=1"];
    let run = Command::new(std::env::current_exe().unwrap()).args(arguments).output().unwrap();
    let output = String::from_utf8_lossy(&run.stdout);
    let found = output.lines().find_map(|line| Some(line.split_once(BARE)?.1));
    found.unwrap_or_else(|| panic!("{output}{}", String::from_utf8_lossy(&run.stderr))).parse().unwrap()
}

/// A pool filled to its last page, after prompts in whole chunks and many sequences at once. What comes beside does not
/// grow with the pool (some 60 MiB: programs, their temporaries, the tokenizer): with a much smaller one the share is larger.
#[test]
fn a_server_holds_little_beside_weights_and_kv() {
    const SHARE_MAX: f64 = 1.15;
    const POOL: usize = 24 * 1024;
    const SEQUENCES: usize = 16;
    let found = block_on(async {
        let pool = POOL.to_string();
        let server = Server::start_with(&smollm2(), &["--dtype", "auto", "--max-total-tokens", &pool]).await;
        let prompt = |index: usize| (0..POOL / SEQUENCES - 8).map(move |at| 20 + (index * 997 + at * 7) % 40_000);
        let prompts: Vec<Vec<usize>> = (0..SEQUENCES).map(|index| prompt(index).collect()).collect();
        let sampling = json!({"max_new_tokens": 8, "temperature": 0, "ignore_eos": true});
        server.post_json("/generate", &json!({"input_ids": prompts, "sampling_params": sampling})).await;
        let reserved = server.plugins().await["models"][0]["reserved_bytes"].as_u64().unwrap();
        (anonymous_bytes(server.process_id()), reserved)
    });
    let ((server, reserved), bare) = (found, bare_bytes());
    let share = (server - bare) as f64 / reserved as f64;
    println!("server {server}, bare {bare}, weights and KV {reserved}: {share:.3}");
    assert!(share <= SHARE_MAX, "{server} bytes, {bare} of them bare, are {share:.3} times {reserved}");
    assert!(server > reserved / 10 * 9, "the pool was not filled: {server} bytes of {reserved}");
}
