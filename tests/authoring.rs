//! Plugins from outside of the tree: the guide's commands are run, so what `torus plugins new` writes for each kind builds,
//! passes its own tests, loads and serves.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use serde_json::json;

use crate::{
    server::{built, free_port, plugins_target, torus},
    support::{fetched, smollm2},
};

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..").canonicalize().unwrap()
}

/// A fenced block of a Markdown file: the words after the fence, and what is inside.
struct Block<'t> {
    info: &'t str,
    text: &'t str,
}

fn blocks(markdown: &str) -> Vec<Block<'_>> {
    let fenced = markdown.split("\n```").skip(1).step_by(2);
    fenced.map(|block| block.split_once('\n').unwrap()).map(|(info, text)| Block { info, text }).collect()
}

fn guide() -> String {
    fs::read_to_string(repository().join("plugin-api/README.md")).unwrap()
}

#[test]
fn the_code_of_the_guide_is_the_code_of_the_examples() {
    let (guide, mut compared) = (guide(), 0);
    for block in blocks(&guide) {
        let Some((language, file)) = block.info.split_once(' ') else {
            assert!(["sh", "text"].contains(&block.info), "a block of '{}' names no file", block.info);
            continue;
        };
        if language == "rust" {
            let code = fs::read_to_string(repository().join(file)).unwrap();
            assert!(code.contains(&format!("\n{}\n", block.text)), "{file} has no such lines:\n{}", block.text);
            compared += 1;
        }
    }
    assert!(compared > 5, "{compared}");
}

/// A checkpoint of the family that no stock plugin serves, with a tokenizer for its 48 tokens.
fn granite(folder: &Path) {
    fs::create_dir_all(folder).unwrap();
    let data = repository().join("tests/data/granite/grouped-untied");
    for file in ["config.json", "model.safetensors"] {
        fs::copy(data.join(file), folder.join(file)).unwrap();
    }
    let words = ["[UNK]", "The", "capital", "of", "France", "is"].map(str::to_owned);
    let vocabulary = words.into_iter().chain((6..48).map(|id| format!("word{id}"))).zip(0..);
    let vocabulary: serde_json::Map<_, _> = vocabulary.map(|(word, id)| (word, json!(id))).collect();
    let tokenizer = json!({
        "version": "1.0",
        "pre_tokenizer": {"type": "Whitespace"},
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "[UNK]"},
        "decoder": {"type": "Fuse"},
    });
    fs::write(folder.join("tokenizer.json"), tokenizer.to_string()).unwrap();
}

/// What makes a script of the guide's commands: settings for this machine, and servers in the background.
const PREAMBLE: &str = r#"
set -euo pipefail
exec 2>&1
export CARGO_NET_OFFLINE=true CARGO_TERM_COLOR=never
server=
stop() { if [ -n "$server" ]; then kill "$server"; wait "$server" || true; server=; fi; }
trap stop EXIT
ready() {
  until curl -fs "http://127.0.0.1:$PORT/health" > health; do
    kill -0 "$server" || { cat "$ROOT/server.log"; exit 1; }
    sleep 0.1
  done
}
# All projects share the folder of what is built, and what was written as their lock file is kept to be compared.
share() {
  for project in "$ROOT"/my-*/; do
    project=${project%/}
    [ -e "$project/target" ] || { ln -s "$TARGET" "$project/target"; cp "$project/Cargo.lock" "$project.lock"; }
  done
}
cd "$ROOT"
"#;

/// The guide's commands as one script. Each block is announced by a line `@@`.
fn script(blocks: &[Block<'_>]) -> String {
    let mut script = PREAMBLE.to_owned();
    for block in blocks {
        script += match block.info {
            "sh" => format!("echo @@\n{}\nshare\n", block.text),
            "sh serve" => format!("echo @@\nstop\n{} > \"$ROOT/server.log\" 2>&1 &\nserver=$!\nready\n", block.text),
            _ => continue,
        }
        .as_str();
    }
    script
}

/// All of the guide: a project of each kind is written, builds, passes its own tests, loads, and serves.
#[test]
fn the_commands_of_the_guide_do_what_it_says() {
    // Always the same folder, because cargo keeps what it built for each path.
    let root = plugins_target().join("guide");
    if root.exists() {
        fs::remove_dir_all(&root).unwrap();
    }
    granite(&root.join("granite"));
    let (guide, port) = (guide(), free_port());
    let blocks = blocks(&guide);
    let path = [built().as_os_str(), &std::env::var_os("PATH").unwrap()].join(":".as_ref());
    let mut bash = Command::new("bash");
    bash.args(["-c", &script(&blocks)]).env("PATH", path).env_remove("CARGO_TARGET_DIR");
    bash.env("ROOT", &root).env("TARGET", plugins_target()).env("TORUS_CACHE", fetched("models").parent().unwrap());
    bash.env("MODEL", smollm2()).env("GRANITE", root.join("granite")).env("PORT", port.to_string());
    let output = bash.output().unwrap();
    let output = (output.status, String::from_utf8(output.stdout).unwrap());
    assert!(output.0.success(), "{}", output.1);

    let mut outputs = output.1.split("@@\n").skip(1);
    let mut last = "";
    for block in &blocks {
        match block.info {
            "sh" | "sh serve" => last = outputs.next().unwrap(),
            "text" => {
                let missing = block.text.lines().find(|line| !last.contains(line));
                assert_eq!(missing, None, "{last}");
            }
            _ => {}
        }
    }
    for project in ["my-kernel", "my-family", "my-guess"] {
        let [written, left] = [root.join(format!("{project}.lock")), root.join(project).join("Cargo.lock")];
        let [written, left] = [written, left].map(|file| fs::read_to_string(file).unwrap());
        assert!(written == left, "cargo completed the lock file of {project}: build its example without --locked once");
    }
}

#[test]
fn a_mistaken_call_is_explained_and_writes_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let refused = |arguments: &[&str]| {
        let output =
            Command::new(torus()).args(["plugins", "new", "--kind"]).args(arguments).current_dir(&folder).output();
        let output = output.unwrap();
        assert!(!output.status.success());
        String::from_utf8(output.stderr).unwrap()
    };
    assert!(refused(&["kernel", "mine"]).contains("[possible values: model, attention, speculative]"));
    assert!(refused(&["model", "Mine"]).contains("use lower-case letters"));
    assert!(refused(&["model", "mine", "--api", "nowhere"]).contains("no plugin/Cargo.toml"));
    assert_eq!(fs::read_dir(&folder).unwrap().count(), 0);
}

/// Each external crate of a lock file, with its version and hash.
fn locked(file: &Path) -> BTreeSet<String> {
    let text = fs::read_to_string(file).unwrap();
    let packages = text.split("\n\n").filter(|package| package.contains("\nchecksum = "));
    packages.map(|package| package.split("dependencies = ").next().unwrap().trim().to_owned()).collect()
}

#[test]
fn examples_are_locked_to_the_versions_that_are_tested() {
    let ours = locked(&repository().join("Cargo.lock"));
    for kind in ["attention", "model", "speculative"] {
        let example = locked(&repository().join(format!("examples/{kind}-plugin/Cargo.lock")));
        let other: Vec<_> = example.difference(&ours).collect();
        assert!(example.len() > 10 && other.is_empty(), "{kind}: {other:#?}");
    }
}
