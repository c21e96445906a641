//! A `torus serve` process, as its users run it.

use std::{
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use serde_json::Value;

use crate::support::{fetched, smollm2};

/// The folder of this profile: `target/release`.
pub fn built() -> PathBuf {
    let test = std::env::current_exe().unwrap();
    test.parent().and_then(|deps| deps.parent()).unwrap().to_owned()
}

/// The binary, which `make test` builds before the tests.
pub fn torus() -> PathBuf {
    let binary = built().join("torus");
    assert!(binary.exists(), "{} is missing: run 'cargo build --release -p torus-app'", binary.display());
    binary
}

/// The shared library of a stock plugin, which `cargo test` builds as an example.
pub fn stock_library(name: &str) -> PathBuf {
    let library = built().join("examples").join(format!("lib{name}.so"));
    assert!(library.exists(), "{} is missing: run 'cargo build --release --examples'", library.display());
    library
}

/// Where `make test` builds the plugins of `examples`, and the tests the projects they generate: outside of this
/// workspace's own artifacts, so that what they share is compiled once.
pub fn plugins_target() -> PathBuf {
    built().with_file_name("plugins")
}

/// The shared library of a plugin in `examples`.
pub fn example_library(name: &str) -> PathBuf {
    let library = plugins_target().join("release").join(format!("lib{name}.so"));
    assert!(library.exists(), "{} is missing: run 'make examples'", library.display());
    library
}

/// A port that nobody listens on at the moment.
pub fn free_port() -> u16 {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// A running server. Killed when dropped.
pub struct Server {
    child: Child,
    pub url: String,
    pub client: reqwest::Client,
}

pub const MODEL: &str = "SmolLM2-135M-Instruct";

/// The administrator's key of every server here.
pub const ADMIN_KEY: &str = "administrator";

impl Server {
    /// Starts a server on a free port with the small model in float32, and waits until it is ready.
    pub async fn start(options: &[&str]) -> Self {
        let sizes = ["--max-total-tokens", "16384", "--chunked-prefill-size", "64", "--max-running-requests", "16"];
        Self::start_with(&smollm2(), &[&sizes, options].concat()).await
    }

    /// Starts a server with any model.
    pub async fn start_with(model: &Path, options: &[&str]) -> Self {
        let model = ["--served-model-name", MODEL, "--model-path", model.to_str().unwrap()];
        Self::start_models(&[&model, options].concat()).await
    }

    /// Starts a server with the models that the options name.
    pub async fn start_models(options: &[&str]) -> Self {
        let port = free_port();
        let mut command = Command::new(torus());
        command.args(["serve", "--host", "127.0.0.1"]);
        if !options.contains(&"--dtype") {
            command.args(["--dtype", "float32"]);
        }
        command.args(["--port", &port.to_string(), "--admin-api-key", ADMIN_KEY]);
        command.args(options);
        command.env("TORUS_CACHE", fetched("models").parent().unwrap());
        let mut child = command.stdin(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        let log = BufReader::new(child.stderr.take().unwrap());
        // The log is shown with the test's output if the test fails.
        std::thread::spawn(move || log.lines().map_while(Result::ok).for_each(|line| println!("{line}")));
        let server = Self { child, url: format!("http://127.0.0.1:{port}"), client: reqwest::Client::new() };
        server.wait_until_ready().await
    }

    async fn wait_until_ready(mut self) -> Self {
        let started = Instant::now();
        loop {
            assert!(self.child.try_wait().unwrap().is_none(), "the server ended before it was ready");
            if let Ok(response) = self.client.get(format!("{}/health", self.url)).send().await
                && response.status().is_success()
            {
                return self;
            }
            assert!(started.elapsed() < Duration::from_secs(600), "the server is not ready");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    pub async fn post(&self, path: &str, body: &Value) -> reqwest::Response {
        self.client.post(format!("{}{path}", self.url)).json(body).send().await.unwrap()
    }

    /// A change that an administrator makes.
    pub async fn change(&self, path: &str, body: &Value) -> Value {
        let request = self.client.post(format!("{}{path}", self.url)).bearer_auth(ADMIN_KEY).json(body);
        let response = request.send().await.unwrap();
        let (status, text) = (response.status(), response.text().await.unwrap());
        assert!(status.is_success(), "{path} {body}: {status}: {text}");
        serde_json::from_str(&text).unwrap()
    }

    /// Plugins and models, as an administrator sees them.
    pub async fn plugins(&self) -> Value {
        let request = self.client.get(format!("{}/v1/plugins", self.url)).bearer_auth(ADMIN_KEY);
        request.send().await.unwrap().json().await.unwrap()
    }

    pub fn process_id(&self) -> u32 {
        self.child.id()
    }

    pub async fn post_json(&self, path: &str, body: &Value) -> Value {
        let response = self.post(path, body).await;
        let (status, text) = (response.status(), response.text().await.unwrap());
        assert!(status.is_success(), "{status}: {text}");
        serde_json::from_str(&text).unwrap()
    }

    pub async fn get_json(&self, path: &str) -> Value {
        self.client.get(format!("{}{path}", self.url)).send().await.unwrap().json().await.unwrap()
    }

    pub async fn get_text(&self, path: &str) -> String {
        self.client.get(format!("{}{path}", self.url)).send().await.unwrap().text().await.unwrap()
    }

    /// The state of the engine, as `/get_server_info` shows it.
    pub async fn state(&self) -> Value {
        self.get_json("/get_server_info").await["internal_states"][0].clone()
    }

    /// Asks the process to end and gives its exit code.
    pub fn terminate(mut self) -> Option<i32> {
        let id = self.child.id().to_string();
        assert!(Command::new("kill").args(["-TERM", &id]).status().unwrap().success());
        self.child.wait().unwrap().code()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
