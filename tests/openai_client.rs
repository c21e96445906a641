//! The official `openai` Python client against the server, in a virtual environment that only this test uses.

use std::{path::Path, process::Command};

use crate::{
    server::{MODEL, Server, built},
    support::block_on,
};

/// Pinned, so that a new version of the client does not change what the test says.
const CLIENT: &str = "openai==3.54.0";

/// The interpreter of the environment, made on first use and kept beside the build.
fn python() -> std::path::PathBuf {
    let environment = built().join("test-venv");
    let python = environment.join("bin/python");
    let works = |python: &Path| {
        Command::new(python).args(["-c", "import openai"]).output().is_ok_and(|output| output.status.success())
    };
    if !works(&python) {
        let run = |command: &mut Command| assert!(command.status().unwrap().success(), "{command:?} failed");
        run(Command::new("python3").args(["-m", "venv", "--clear"]).arg(&environment));
        run(Command::new(&python).args(["-m", "pip", "install", "--quiet", CLIENT]));
    }
    python
}

#[test]
fn the_official_client_is_served() {
    block_on(async {
        let server = Server::start(&["--api-key", "secret"]).await;
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("data/openai_client.py");
        let output = Command::new(python()).arg(script).args([&server.url, MODEL]).output().unwrap();
        let (out, log) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(output.status.success() && out.trim().ends_with("all checks passed"), "{out}\n{log}");
    });
}
