//! The CPU that programs of a check run on.

use std::{path::Path, sync::Arc};

use anyhow::Context;
use torus_abi::DType;
use torus_pjrt::{Buffer, Client, CompileOptions, Device as PjrtDevice, ElementType, LoadedExecutable, OptionValue};
use torus_plugins::Plugin;
use torus_testkit::{Device, Tensor};

use crate::{args, cache_dir::CacheDir};

pub struct Cpu {
    client: Client,
    device: PjrtDevice,
}

impl Cpu {
    /// A client that knows the kernels of `plugins`.
    pub fn new(cache: &CacheDir, pjrt_plugin: Option<&Path>, plugins: &[&Arc<Plugin>]) -> anyhow::Result<Self> {
        let path = cache.pjrt_plugin(args::Device::Cpu, pjrt_plugin)?;
        let device_plugin = torus_pjrt::Plugin::load(&path)?;
        for plugin in plugins {
            torus_engine::register_kernels(&device_plugin, plugin)?;
        }
        let options = vec![("cpu_device_count".to_owned(), OptionValue::Int(1))];
        let client = Client::new(&device_plugin, &options)?;
        let device = client.devices()?.into_iter().next().context("the CPU client has no device")?;
        Ok(Self { client, device })
    }

    fn upload(&self, tensor: &Tensor) -> Result<Buffer, String> {
        let dims: Vec<_> = tensor.ty.dims.iter().map(|size| *size as i64).collect();
        let uploaded = self.client.buffer_from_host(&tensor.bytes, element(tensor.ty.dtype), &dims, &self.device);
        uploaded.map_err(|error| error.to_string())
    }
}

impl Device for Cpu {
    type Program = LoadedExecutable;

    fn compile(&self, text: &str) -> Result<LoadedExecutable, String> {
        self.client.compile(text, &CompileOptions::default()).map_err(|error| format!("it does not compile: {error}"))
    }

    fn run(&self, program: &LoadedExecutable, arguments: &[&Tensor]) -> Result<Vec<Vec<u8>>, String> {
        let failed = |error: torus_pjrt::PjrtError| format!("it does not run: {error}");
        let buffers = arguments.iter().map(|tensor| self.upload(tensor)).collect::<Result<Vec<_>, _>>()?;
        let execution = program.execute(&buffers.iter().collect::<Vec<_>>()).map_err(failed)?;
        execution.done.wait().map_err(failed)?;
        execution.outputs.iter().map(|output| output.to_host_vec().map_err(failed)).collect()
    }
}

fn element(dtype: DType) -> ElementType {
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
