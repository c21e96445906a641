//! Compiles kernels with libtpu.

use std::{path::PathBuf, sync::{Arc, Mutex, OnceLock}};

use torus_pjrt::{CompileOptions, Executable, Plugin, Topology};

use crate::{CallOptions, Generation, Kernel};

const LIBTPU: &str = "libtpu-0.0.52/libtpu.so";

pub fn libtpu() -> PathBuf {
    let cache = std::env::var_os("TORUS_CACHE").map(PathBuf::from).unwrap_or_else(|| {
        let home = || PathBuf::from(std::env::var_os("HOME").expect("HOME is set")).join(".cache");
        std::env::var_os("XDG_CACHE_HOME").map_or_else(home, PathBuf::from).join("torus")
    });
    let path = cache.join("pjrt").join(LIBTPU);
    assert!(path.exists(), "{} is missing: run .make/setup.sh test", path.display());
    path
}

#[test]
fn first() {
    // SAFETY: alone
    let plugin = Plugin::load(libtpu()).unwrap();
    let topology = plugin.topology("v6e:1x1", &[]).unwrap();
    use crate::*;
    let kernel = Kernel::build("mm", |k| {
        let x = k.input(Space::Vmem, Elem::Bf16.of([256, 256]));
        let y = k.input(Space::Vmem, Elem::Bf16.of([256, 256]));
        let o = k.output(Space::Vmem, Elem::F32.of([256, 256]));
        o.store(x.load().dot(y.load()));
    })
    .unwrap();
    let text = kernel.program(&CallOptions::new(Generation::V6e)).unwrap();
    println!("{}", kernel.text(4).unwrap());
    topology.compile(&text, &CompileOptions::default()).unwrap();
}
