//! The device: opened once, shared by all engines of a process.

use std::{
    fmt,
    path::Path,
    sync::{Arc, Mutex, OnceLock},
};

use torus_abi::{DType, TensorType, model::Parallel};
use torus_pjrt::{
    Buffer, Client, ClientOptions, CompileOptions, Device as PjrtDevice, ElementType, OptionValue, OverrideValue,
    PjrtError, Plugin as PjrtPlugin,
};
use torus_weights::{AlignedBytes, Untouched};

use super::hash::file_hash;
use crate::{
    StartError,
    config::{DeviceConfig, Platform},
    handle::lock,
};

/// What engines compute on. It is opened when the first of them needs it, and all of them share it.
#[derive(Clone)]
pub struct Device(Arc<Inner>);

struct Inner {
    config: DeviceConfig,
    opened: Mutex<Option<Target>>,
    /// Of the PJRT plugin's file.
    sha256: OnceLock<[u8; 32]>,
}

impl Device {
    /// Nothing is opened yet.
    pub fn new(config: DeviceConfig) -> Self {
        Self(Arc::new(Inner { config, opened: Mutex::new(None), sha256: OnceLock::new() }))
    }

    pub fn platform(&self) -> Platform {
        self.0.config.platform
    }

    /// Over how many devices models are split.
    pub(crate) fn parallel(&self) -> Parallel {
        Parallel { tensor: self.0.config.tensor_parallel.max(1) }
    }

    /// In how many parts the weights and pools of a model lie in one memory: on a CPU all devices share it.
    pub(crate) fn shards_per_memory(&self) -> u64 {
        if self.platform() == Platform::Cpu { u64::from(self.parallel().tensor) } else { 1 }
    }

    pub(crate) fn cpu_threads(&self) -> Option<usize> {
        self.0.config.cpu_threads
    }

    /// Opens the device, or gives the one opened before. A failure is not kept: the next call tries again.
    pub(crate) fn open(&self) -> Result<Target, StartError> {
        let mut opened = lock(&self.0.opened);
        if let Some(target) = &*opened {
            return Ok(target.clone());
        }
        let plugin = PjrtPlugin::load(&self.0.config.pjrt_plugin)?;
        let count = self.parallel().tensor as usize;
        let client = Client::new(&plugin, &client_options(self.platform(), count))
            .map_err(|error| no_client(&self.0.config, error))?;
        let mut devices = client.devices()?;
        devices.retain(PjrtDevice::is_addressable);
        if devices.len() < count {
            let message =
                format!("{count} devices are to share the model, and the device plugin finds {}", devices.len());
            return Err(StartError::Config { field: "--tp-size", message });
        }
        devices.truncate(count);
        Ok(opened.insert(Target { plugin, client, devices }).clone())
    }

    /// Opens the device on a thread of its own, so that it is there when an engine needs it: that takes a good part of a
    /// start, and on one core only. Whatever goes wrong is reported by the engine, which tries again.
    pub fn prepare(&self) {
        let device = self.clone();
        let open = move || drop(device.open());
        if let Err(error) = std::thread::Builder::new().name("device".to_owned()).spawn(open) {
            tracing::debug!(%error, "the device is opened when it is needed");
        }
    }

    /// The hash of the PJRT plugin's file, which decides the machine code; remembered in the folder `notes`.
    pub(crate) fn plugin_sha256(&self, notes: Option<&Path>) -> Result<[u8; 32], StartError> {
        if let Some(hash) = self.0.sha256.get() {
            return Ok(*hash);
        }
        let path = &self.0.config.pjrt_plugin;
        let hash = file_hash(path, notes).map_err(|source| StartError::Unreadable { path: path.clone(), source })?;
        Ok(*self.0.sha256.get_or_init(|| hash))
    }
}

impl fmt::Debug for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Device").field(&self.0.config).finish()
    }
}

/// A client and the devices of it that engines use together: shard `i` of a model is on device `i`.
#[derive(Clone)]
pub(crate) struct Target {
    pub plugin: Arc<PjrtPlugin>,
    pub client: Client,
    pub devices: Vec<PjrtDevice>,
}

impl Target {
    /// The device in the words that plugins are told.
    pub fn description(&self) -> torus_abi::attention::Target {
        let (platform, device_kind) = (self.client.platform_name().to_owned(), self.kind().to_owned());
        torus_abi::attention::Target { platform, device_kind }
    }

    /// What programs can use of each device's memory, if it has its own and says so.
    pub fn memory_bytes(&self) -> Option<u64> {
        self.devices.iter().filter_map(PjrtDevice::memory_limit).min()
    }

    /// What sort of devices they are.
    pub fn kind(&self) -> &str {
        self.devices.first().map_or("", PjrtDevice::kind)
    }

    /// How programs that run on all of them are compiled.
    pub fn compile_options(&self, platform: Platform) -> CompileOptions {
        compile_options(platform, self.devices.iter().map(|device| i64::from(device.id())).collect())
    }

    pub fn upload(&self, bytes: &[u8], tensor: &TensorType, device: usize) -> Result<Buffer, PjrtError> {
        let dims: Vec<i64> = tensor.dims.iter().map(|dim| *dim as i64).collect();
        self.client.buffer_from_host(bytes, element(tensor.dtype), &dims, &self.devices[device])
    }

    /// Hands memory over; a device that shares the host's takes it without a copy.
    pub fn give<B>(&self, bytes: B, tensor: &TensorType, device: usize) -> Result<Buffer, PjrtError>
    where
        B: AsRef<[u8]> + Send + 'static,
    {
        let dims: Vec<i64> = tensor.dims.iter().map(|dim| *dim as i64).collect();
        self.client.buffer_from_owned(bytes, element(tensor.dtype), &dims, &self.devices[device])
    }

    /// Zeros in memory that programs update in place. On a device that shares the host's memory, the system clears a page
    /// when it is first touched, and what is never used takes none.
    pub fn zeros(&self, tensor: &TensorType, device: usize) -> Result<(Buffer, Untouched), PjrtError> {
        let bytes = tensor.bytes().unwrap_or(u64::MAX) as usize;
        let memory = AlignedBytes::zeroed(bytes)
            .map_err(|error| PjrtError::Invalid(format!("{bytes} bytes cannot be had: {error}")))?;
        let dims: Vec<i64> = tensor.dims.iter().map(|dim| *dim as i64).collect();
        let untouched = memory.untouched();
        let buffer = self.client.buffer_from_owned_mut(memory, element(tensor.dtype), &dims, &self.devices[device])?;
        Ok((buffer, untouched))
    }

    pub fn upload_words(&self, words: &[i32], dtype: DType, dims: &[u64], device: usize) -> Result<Buffer, PjrtError> {
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        self.upload(&bytes, &TensorType::new(dtype, dims), device)
    }
}

/// Share of a GPU's memory that XLA's allocator takes at once: its default leaves a quarter to others, and what is not its
/// own holds the machine code and the workspaces of CUDA's libraries.
const CUDA_MEMORY_FRACTION: f32 = 0.9;

/// How a client is made of which an engine uses so many devices.
pub fn client_options(platform: Platform, devices: usize) -> ClientOptions {
    let option = |name: &str, value| vec![(name.to_owned(), value)];
    match platform {
        Platform::Cpu => option("cpu_device_count", OptionValue::Int(devices as i64)),
        Platform::Tpu => Vec::new(),
        Platform::Cuda => option("memory_fraction", OptionValue::Float(CUDA_MEMORY_FRACTION)),
    }
}

/// The plugin loads where there is no GPU and no CUDA, and then only says that it finds no device.
fn no_client(config: &DeviceConfig, error: PjrtError) -> StartError {
    if config.platform != Platform::Cuda {
        return error.into();
    }
    let message = format!(
        "no GPU answers through {}: {error}; 'nvidia-smi' should show one, and the libraries of CUDA and cuDNN must be where \
         the plugin looks: beside it in the Python packages it was installed with, or in a folder of LD_LIBRARY_PATH",
        config.pjrt_plugin.display()
    );
    StartError::Config { field: "--device cuda", message }
}

/// How programs are compiled that run on the devices of these ids together, one shard on each.
pub fn compile_options(platform: Platform, device_ids: Vec<i64>) -> CompileOptions {
    let options = CompileOptions::partitioned(device_ids.len() as u32);
    let options = match device_ids.len() {
        // The first device, whatever its id.
        1 => options,
        _ => CompileOptions { device_ids, ..options },
    };
    match platform {
        // One body of a layer for all of them: a tenth of the code, and the same schedule.
        Platform::Tpu => options.with("xla_tpu_enable_deduplicated_calls", OverrideValue::Bool(true)),
        Platform::Cpu | Platform::Cuda => options,
    }
}

/// The device element type of a dtype.
pub(crate) fn element(dtype: DType) -> ElementType {
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
