//! Runs small programs on the CPU plugin, for tests of graphs.

use std::{path::PathBuf, sync::OnceLock};

use torus_pjrt::{Client, CompileOptions, ElementType, OptionValue, Plugin};

/// A host array.
#[derive(Clone, Debug)]
pub(crate) struct Array {
    element: ElementType,
    dims: Vec<i64>,
    bytes: Vec<u8>,
}

impl Array {
    fn new(element: ElementType, words: impl Iterator<Item = [u8; 4]>, dims: &[usize]) -> Self {
        Self { element, dims: dims.iter().map(|dim| *dim as i64).collect(), bytes: words.flatten().collect() }
    }

    pub fn f32(values: &[f32], dims: &[usize]) -> Self {
        Self::new(ElementType::F32, values.iter().map(|value| value.to_le_bytes()), dims)
    }

    pub fn i32(values: &[i32], dims: &[usize]) -> Self {
        Self::new(ElementType::S32, values.iter().map(|value| value.to_le_bytes()), dims)
    }

    pub fn u32(values: &[u32], dims: &[usize]) -> Self {
        Self::new(ElementType::U32, values.iter().map(|value| value.to_le_bytes()), dims)
    }

    pub fn to_i32(&self) -> Vec<i32> {
        self.bytes.chunks_exact(4).map(|word| i32::from_le_bytes(word.try_into().unwrap())).collect()
    }
}

/// The CPU plugin that the setup script fetches.
pub(crate) fn pjrt_plugin() -> PathBuf {
    let home = || PathBuf::from(std::env::var_os("HOME").unwrap_or_default()).join(".cache");
    let base = || std::env::var_os("XDG_CACHE_HOME").map_or_else(home, PathBuf::from).join("torus");
    let cache = std::env::var_os("TORUS_CACHE").map_or_else(base, PathBuf::from);
    let path = cache.join("pjrt/lammps-jax-pjrt-cpu-0.11.2/pjrt_c_api_cpu_plugin.so");
    assert!(path.exists(), "{} is missing: run .make/setup.sh test", path.display());
    path
}

/// Devices that tests may use together.
const DEVICES: i64 = 4;

fn client() -> &'static Client {
    static CLIENT: OnceLock<Client> = OnceLock::new();
    CLIENT.get_or_init(|| {
        let plugin = Plugin::load(pjrt_plugin()).unwrap();
        crate::kernels::register_host_kernels(&plugin).unwrap();
        Client::new(&plugin, &[("cpu_device_count".to_owned(), OptionValue::Int(DEVICES))]).unwrap()
    })
}

/// Compiles and runs a module once.
pub(crate) fn run(module: &str, arguments: &[Array]) -> Vec<Array> {
    run_on_all(module, &[arguments.to_vec()]).remove(0)
}

/// Compiles a module for as many devices as there are lists of arguments, and runs it once on all of them.
pub(crate) fn run_on_all(module: &str, lists: &[Vec<Array>]) -> Vec<Vec<Array>> {
    let devices = client().devices().unwrap();
    let upload = |(device, list): (usize, &Vec<Array>)| -> Vec<_> {
        let upload = |array: &Array| {
            client().buffer_from_host(&array.bytes, array.element, &array.dims, &devices[device]).unwrap()
        };
        list.iter().map(upload).collect()
    };
    let buffers: Vec<_> = lists.iter().enumerate().map(upload).collect();
    let options = CompileOptions::partitioned(lists.len() as u32);
    let executable = client().compile(module, &options).unwrap_or_else(|e| panic!("{e}\n{module}"));
    let arguments: Vec<Vec<_>> = buffers.iter().map(|list| list.iter().collect()).collect();
    let executions = executable.execute_on_all(&arguments.iter().map(Vec::as_slice).collect::<Vec<_>>()).unwrap();
    let download = |buffer: &torus_pjrt::Buffer| Array {
        element: buffer.element_type().unwrap(),
        dims: buffer.dims().unwrap(),
        bytes: buffer.to_host_vec().unwrap(),
    };
    executions.iter().map(|execution| execution.outputs.iter().map(download).collect()).collect()
}
