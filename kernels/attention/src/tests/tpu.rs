//! Compiles kernels with libtpu, for TPUs that are not there.

use std::{path::PathBuf, process::Command};

use torus_mosaic::{CallOptions, Generation, Kernel};
use torus_pjrt::{CompileOptions, Executable, Plugin, Topology};

const LIBTPU: &str = "libtpu-0.0.52/libtpu.so";

/// A file that the setup script fetched.
pub fn pjrt(file: &str) -> PathBuf {
    let cache = std::env::var_os("TORUS_CACHE").map(PathBuf::from).unwrap_or_else(|| {
        let home = || PathBuf::from(std::env::var_os("HOME").expect("HOME is set")).join(".cache");
        std::env::var_os("XDG_CACHE_HOME").map_or_else(home, PathBuf::from).join("torus")
    });
    let path = cache.join("pjrt").join(file);
    assert!(path.exists(), "{} is missing: run .make/setup.sh test", path.display());
    path
}

/// Runs an ignored test in a process of its own: libtpu reads its environment when it is loaded.
pub fn alone(test: &str) {
    alone_with(test, &[]);
}

/// [`alone`] with more in the environment.
pub fn alone_with(test: &str, environment: &[(&str, &str)]) {
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", test, "--ignored", "--nocapture", "--test-threads=1"])
        .env("TPU_SKIP_MDS_QUERY", "1")
        .env("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
        .envs(environment.iter().copied())
        .output()
        .unwrap();
    let log = String::from_utf8_lossy(&output.stderr) + String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && log.contains("1 passed"), "{log}");
}

/// The smallest topology of a generation. Call it in a test that [`alone`] runs.
pub struct Compiler {
    pub generation: Generation,
    topology: Topology,
}

impl Compiler {
    pub fn all() -> Vec<Self> {
        let plugin = Plugin::load(pjrt(LIBTPU)).unwrap();
        let generations =
            [(Generation::V5e, "v5e:1x1"), (Generation::V6e, "v6e:1x1"), (Generation::Tpu7x, "tpu7x:1x1x1")];
        let compiler = |(generation, name)| Self { generation, topology: plugin.topology(name, &[]).unwrap() };
        generations.map(compiler).into()
    }

    /// The compiled program, or the compiler's message.
    pub fn compile(&self, kernel: &Kernel, options: &CallOptions) -> Result<Executable, String> {
        let text = kernel.program(options).map_err(|error| error.to_string())?;
        let compiled = self.topology.compile(&text, &CompileOptions::default());
        compiled.map_err(|error| format!("{:?}: {error}", self.generation))
    }
}
