//! What the tests of this crate share: the plugins on this machine, and small programs.

use std::{path::PathBuf, sync::Arc};

use crate::{Buffer, Client, ElementType, Plugin};

/// The CPU plugins, newest first.
const CPU_PLUGINS: [&str; 3] = [
    "lammps-jax-pjrt-cpu-0.11.2/pjrt_c_api_cpu_plugin.so",
    "fastatomstruct-xla-cpu-2026.6.23/libpjrt_cpu.so",
    "xla-cpu-pjrt-0.0.1/xla_cpu_pjrt.so",
];

pub(crate) const LIBTPU: &str = "libtpu-0.0.52/libtpu.so";

pub(crate) fn plugin_path(file: &str) -> PathBuf {
    let cache = std::env::var_os("TORUS_CACHE").map(PathBuf::from).unwrap_or_else(|| {
        let home = || PathBuf::from(std::env::var_os("HOME").expect("HOME is set")).join(".cache");
        std::env::var_os("XDG_CACHE_HOME").map_or_else(home, PathBuf::from).join("torus")
    });
    let path = cache.join("pjrt").join(file);
    assert!(path.exists(), "{} is missing: run .make/setup.sh test", path.display());
    path
}

/// The newest CPU plugin.
pub(crate) fn cpu_plugin() -> Arc<Plugin> {
    Plugin::load(plugin_path(CPU_PLUGINS[0])).unwrap()
}

pub(crate) fn cpu_plugins() -> Vec<Arc<Plugin>> {
    CPU_PLUGINS.iter().map(|file| Plugin::load(plugin_path(file)).unwrap()).collect()
}

pub(crate) fn cpu_client(plugin: &Arc<Plugin>, devices: i64) -> Client {
    Client::new(plugin, &[("cpu_device_count".to_owned(), devices.into())]).unwrap()
}

pub(crate) fn f32_bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

/// A vector on the client's first device.
pub(crate) fn f32_buffer(client: &Client, values: &[f32]) -> Buffer {
    f32_buffer_on(client, 0, values)
}

pub(crate) fn f32_buffer_on(client: &Client, device: usize, values: &[f32]) -> Buffer {
    let device = &client.devices().unwrap()[device];
    client.buffer_from_host(&f32_bytes(values), ElementType::F32, &[values.len() as i64], device).unwrap()
}

pub(crate) fn read_f32(buffer: &Buffer) -> Vec<f32> {
    let bytes = buffer.to_host_vec().unwrap();
    bytes.chunks_exact(4).map(|chunk| f32::from_le_bytes(chunk.try_into().unwrap())).collect()
}

/// `x * y + x` over vectors of four.
pub(crate) const MULTIPLY_ADD: &str = r#"
module @multiply_add attributes {mhlo.num_partitions = 1 : i32, mhlo.num_replicas = 1 : i32} {
  func.func public @main(%x: tensor<4xf32>, %y: tensor<4xf32>) -> tensor<4xf32> {
    %0 = stablehlo.multiply %x, %y : tensor<4xf32>
    %1 = stablehlo.add %0, %x : tensor<4xf32>
    return %1 : tensor<4xf32>
  }
}
"#;

/// Adds `y` to `x` in place, and yields the sum of what it was before.
pub(crate) const UPDATE_IN_PLACE: &str = r#"
module @update attributes {mhlo.num_partitions = 1 : i32, mhlo.num_replicas = 1 : i32} {
  func.func public @main(%x: tensor<4xf32> {tf.aliasing_output = 0 : i32}, %y: tensor<4xf32>)
      -> (tensor<4xf32>, tensor<f32>) {
    %zero = stablehlo.constant dense<0.0> : tensor<f32>
    %0 = stablehlo.add %x, %y : tensor<4xf32>
    %1 = stablehlo.reduce(%x init: %zero) applies stablehlo.add across dimensions = [0]
      : (tensor<4xf32>, tensor<f32>) -> tensor<f32>
    return %0, %1 : tensor<4xf32>, tensor<f32>
  }
}
"#;
