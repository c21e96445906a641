//! The kernels through libtpu, for TPUs that are not there.

use std::{path::PathBuf, process::Command};

use torus_mosaic::{Elem, Generation};
use torus_pjrt::{CompileOptions, Executable, Plugin, Topology};

use crate::{Activations, Format, Layout, Matmul, PageCopy, Tiles, Weights, tests::graph};

const LIBTPU: &str = "libtpu-0.0.52/libtpu.so";

fn libtpu() -> PathBuf {
    let cache = std::env::var_os("TORUS_CACHE").map(PathBuf::from).unwrap_or_else(|| {
        let home = || PathBuf::from(std::env::var_os("HOME").expect("HOME is set")).join(".cache");
        std::env::var_os("XDG_CACHE_HOME").map_or_else(home, PathBuf::from).join("torus")
    });
    let path = cache.join("pjrt").join(LIBTPU);
    assert!(path.exists(), "{} is missing: run .make/setup.sh test", path.display());
    path
}

/// Runs an ignored test in a process of its own: libtpu reads its environment when it is loaded.
pub fn alone(test: &str, environment: &[(&str, &str)]) -> String {
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", test, "--ignored", "--nocapture", "--test-threads=1"])
        .env("TPU_SKIP_MDS_QUERY", "1")
        .env("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
        .envs(environment.iter().copied())
        .output()
        .unwrap();
    let log = String::from_utf8_lossy(&output.stderr) + String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && log.contains("1 passed"), "{log}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

pub struct Compiler {
    generation: Generation,
    topology: Topology,
}

impl Compiler {
    pub fn new(generation: Generation) -> Self {
        let name = match generation {
            Generation::V5e => "v5e:1x1",
            Generation::V6e => "v6e:1x1",
            Generation::Tpu7x => "tpu7x:1x1x1",
        };
        let topology = Plugin::load(libtpu()).unwrap().topology(name, &[]).unwrap();
        Self { generation, topology }
    }

    pub fn accept(&self, what: &str, program: &str) -> Executable {
        let compiled = self.topology.compile(program, &CompileOptions::default());
        compiled.unwrap_or_else(|error| panic!("{:?}: {what}: {error}", self.generation))
    }

    /// Compiles a product with the tiles that are chosen for it, and gives them.
    pub fn product(&self, product: &Matmul) -> Tiles {
        let tiles = product.tiles(self.generation).unwrap();
        let kernel = product.kernel(&tiles).unwrap();
        let options = product.call_options(&kernel, &tiles, self.generation).unwrap();
        self.accept(&format!("{product:?} {tiles:?}"), &kernel.program(&options).unwrap());
        tiles
    }
}

#[test]
fn products_and_copies_compile_for_every_generation() {
    alone("tests::compile::compile", &[]);
}

#[test]
#[ignore = "run by products_and_copies_compile_for_every_generation"]
fn compile() {
    for generation in [Generation::V5e, Generation::V6e, Generation::Tpu7x] {
        let compiler = Compiler::new(generation);
        for format in [Format::Bf16, Format::Int8, Format::Float8, Format::Int4] {
            let weights = Weights::new(512, 512, format);
            compiler.product(&Matmul::new(16, weights));
            compiler.product(&Matmul::new(300, Weights { layout: Layout::OutIn, bias: true, ..weights }));
            compiler.product(&Matmul::new(48, Weights { experts: Some(4), ..weights }));
        }
        let grouped = Weights { group: Some(128), ..Weights::new(8192, 256, Format::Int4) };
        compiler.product(&Matmul::new(16, grouped));
        if generation != Generation::Tpu7x {
            let bytes = Matmul { activations: Activations::Int8, ..Matmul::new(64, grouped) };
            compiler.product(&bytes);
        }
        let copied = compiler.accept("copies", &graph::copy_program(generation));
        let pool = Elem::Bf16.of([64, 2, 16, 128]).bytes();
        assert_eq!(copied.memory_stats().unwrap().alias_bytes, pool as i64);
        let between = PageCopy::between(Elem::I32.of([64, 8, 128]), 16, 16);
        let program = between.kernel().unwrap().program(&between.call_options(generation)).unwrap();
        compiler.accept("copies between pools", &program);
        compiler.accept("a product in a graph", &graph::product_program(generation));
    }
}
