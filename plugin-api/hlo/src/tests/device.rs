//! Runs graphs on XLA's CPU compiler.

use std::{path::PathBuf, sync::OnceLock};

use torus_pjrt::{Client, CompileOptions, ElementType, OptionValue, Plugin};

use crate::{Axis, Builder, DType, Element, Func, Shape, Value, module_text};

const NEWEST: &str = "lammps-jax-pjrt-cpu-0.11.2/pjrt_c_api_cpu_plugin.so";
const OLDEST: &str = "xla-cpu-pjrt-0.0.1/xla_cpu_pjrt.so";
pub const DEVICES: usize = 4;

/// A tensor on the host.
#[derive(Clone, Debug)]
pub struct Tensor {
    pub shape: Shape,
    bytes: Vec<u8>,
}

/// Elements as bytes.
pub trait Plain: Element {
    fn write(self, bytes: &mut Vec<u8>);
    fn read(bytes: &[u8]) -> Self;
}

macro_rules! plain {
    ($($type:ty),*) => {$(
        impl Plain for $type {
            fn write(self, bytes: &mut Vec<u8>) {
                bytes.extend(self.to_le_bytes());
            }

            fn read(bytes: &[u8]) -> Self {
                <$type>::from_le_bytes(bytes.try_into().unwrap())
            }
        }
    )*};
}

plain!(i8, u8, i32, u32, i64, u64, f32, f64);

impl Plain for bool {
    fn write(self, bytes: &mut Vec<u8>) {
        bytes.push(self as u8);
    }

    fn read(bytes: &[u8]) -> Self {
        bytes[0] != 0
    }
}

impl Tensor {
    pub fn new<T: Plain>(axes: &[(Axis, u64)], values: &[T]) -> Self {
        let shape = Shape::new(T::DTYPE, axes);
        assert_eq!(shape.elements(), values.len() as u64);
        let mut bytes = Vec::new();
        values.iter().for_each(|value| value.write(&mut bytes));
        Self { shape, bytes }
    }

    /// Numbers between -1 and 1 that depend on the seed alone.
    pub fn noise(axes: &[(Axis, u64)], seed: u64) -> Self {
        let count = Shape::new(DType::F32, axes).elements();
        Self::new(axes, &noise(count as usize, seed))
    }

    pub fn values<T: Plain>(&self) -> Vec<T> {
        assert_eq!(self.shape.dtype, T::DTYPE);
        self.bytes.chunks_exact(T::DTYPE.bytes()).map(T::read).collect()
    }
}

pub fn noise(count: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut next = || {
        // xorshift64*
        state ^= state >> 12;
        state ^= state << 25;
        state ^= state >> 27;
        (state.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..count).map(|_| next()).collect()
}

/// Integers below `bound` that depend on the seed alone.
pub fn picks(count: usize, bound: i32, seed: u64) -> Vec<i32> {
    noise(count, seed).iter().map(|x| ((x + 1.0) / 2.0 * bound as f32) as i32 % bound).collect()
}

#[track_caller]
pub fn assert_close(found: &[f32], expected: &[f32], tolerance: f32) {
    assert_eq!(found.len(), expected.len());
    for (i, (a, b)) in found.iter().zip(expected).enumerate() {
        let near = (a - b).abs() <= tolerance * b.abs().max(1.0) || a == b || (a.is_nan() && b.is_nan());
        assert!(near, "element {i}: {a} is not {b}\n{found:?}\n{expected:?}");
    }
}

fn client() -> &'static Client {
    static CLIENT: OnceLock<Client> = OnceLock::new();
    CLIENT.get_or_init(|| open(NEWEST))
}

/// Its compiler must understand the same text: what is emitted may not need the newest StableHLO.
fn old_client() -> &'static Client {
    static CLIENT: OnceLock<Client> = OnceLock::new();
    CLIENT.get_or_init(|| open(OLDEST))
}

fn open(plugin: &str) -> Client {
    let home = || PathBuf::from(std::env::var_os("HOME").unwrap_or_default()).join(".cache");
    let base = || std::env::var_os("XDG_CACHE_HOME").map_or_else(home, PathBuf::from).join("torus");
    let path = std::env::var_os("TORUS_CACHE").map_or_else(base, PathBuf::from).join("pjrt").join(plugin);
    assert!(path.exists(), "{} is missing: run .make/setup.sh test", path.display());
    let devices = ("cpu_device_count".to_owned(), OptionValue::Int(DEVICES as i64));
    Client::new(&Plugin::load(&path).unwrap(), &[devices]).unwrap()
}

fn element_type(dtype: DType) -> ElementType {
    match dtype {
        DType::Bool => ElementType::Pred,
        DType::I8 => ElementType::S8,
        DType::I16 => ElementType::S16,
        DType::I32 => ElementType::S32,
        DType::I64 => ElementType::S64,
        DType::U8 => ElementType::U8,
        DType::U16 => ElementType::U16,
        DType::U32 => ElementType::U32,
        DType::U64 => ElementType::U64,
        DType::F16 => ElementType::F16,
        DType::Bf16 => ElementType::BF16,
        DType::F32 => ElementType::F32,
        DType::F64 => ElementType::F64,
        DType::F8E4M3 => ElementType::F8E4M3FN,
    }
}

/// Runs a graph over inputs on one device.
pub fn run(inputs: &[Tensor], body: impl for<'f> FnOnce(&'f Func<'f>, &[Value<'f>]) -> Vec<Value<'f>>) -> Vec<Tensor> {
    run_on_all(&[inputs], body).remove(0)
}

/// Runs a graph with one list of inputs for each of several devices.
pub fn run_on_all(
    inputs: &[&[Tensor]],
    body: impl for<'f> FnOnce(&'f Func<'f>, &[Value<'f>]) -> Vec<Value<'f>>,
) -> Vec<Vec<Tensor>> {
    let builder = Builder::new("test");
    let main = builder.main(|f| {
        let arguments: Vec<_> = inputs[0].iter().map(|input| f.argument(input.shape.clone())).collect();
        body(f, &arguments)
    });
    let fragment = builder.finish().unwrap();
    let text = module_text("test", inputs.len() as u32, &fragment.functions);
    execute(&text, inputs, &main.results)
}

/// Runs the text of a module with one list of inputs for each device.
pub fn execute(text: &str, inputs: &[&[Tensor]], results: &[Shape]) -> Vec<Vec<Tensor>> {
    let partitions = inputs.len() as u32;
    let options = CompileOptions { partitions, ..Default::default() };
    let compile = |client: &Client| client.compile(text, &options).unwrap_or_else(|error| panic!("{error}\n{text}"));
    compile(old_client());
    let executable = compile(client());
    let devices = client().devices().unwrap();
    let upload = |(input, device): (&Tensor, _)| {
        let dims: Vec<_> = input.shape.dims().map(|dim| dim as i64).collect();
        client().buffer_from_host(&input.bytes, element_type(input.shape.dtype), &dims, device).unwrap()
    };
    let lists = inputs.iter().zip(&devices).map(|(list, device)| list.iter().map(move |input| (input, device)));
    let buffers: Vec<Vec<_>> = lists.map(|list| list.map(upload).collect()).collect();
    let borrowed: Vec<Vec<_>> = buffers.iter().map(|list| list.iter().collect()).collect();
    let lists: Vec<_> = borrowed.iter().map(Vec::as_slice).collect();
    let executions = executable.execute_on_all(&lists).unwrap();
    let download = |(buffer, shape): (&torus_pjrt::Buffer, &Shape)| {
        let dims: Vec<_> = shape.dims().map(|dim| dim as i64).collect();
        assert_eq!((buffer.element_type().unwrap(), buffer.dims().unwrap()), (element_type(shape.dtype), dims));
        Tensor { shape: shape.clone(), bytes: buffer.to_host_vec().unwrap() }
    };
    executions.iter().map(|execution| execution.outputs.iter().zip(results).map(download).collect()).collect()
}
