//! The device: opened once, shared by all engines of a process.

use std::{
    fmt, fs,
    io::{self, Read},
    path::Path,
    sync::{Arc, Mutex, OnceLock},
};

use sha2::{Digest, Sha256};
use torus_abi::{DType, TensorType};
use torus_pjrt::{Buffer, Client, Device as PjrtDevice, ElementType, OptionValue, PjrtError, Plugin as PjrtPlugin};

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
        let options = match self.platform() {
            Platform::Cpu => vec![("cpu_device_count".to_owned(), OptionValue::Int(1))],
            Platform::Tpu | Platform::Cuda => Vec::new(),
        };
        let client = Client::new(&plugin, &options)?;
        let device = client.devices()?.into_iter().next();
        let message = "the device plugin finds no device".to_owned();
        let device = device.ok_or(StartError::Config { field: "--device", message })?;
        Ok(opened.insert(Target { plugin, client, device }).clone())
    }

    /// The hash of the PJRT plugin's file, which decides the machine code.
    pub(crate) fn plugin_sha256(&self) -> Result<[u8; 32], StartError> {
        if let Some(hash) = self.0.sha256.get() {
            return Ok(*hash);
        }
        let path = &self.0.config.pjrt_plugin;
        let hash = file_hash(path).map_err(|source| StartError::Unreadable { path: path.clone(), source })?;
        Ok(*self.0.sha256.get_or_init(|| hash))
    }
}

impl fmt::Debug for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Device").field(&self.0.config).finish()
    }
}

fn file_hash(path: &Path) -> io::Result<[u8; 32]> {
    const CHUNK_BYTES: usize = 1 << 20;
    let (mut file, mut hash) = (fs::File::open(path)?, Sha256::new());
    let mut chunk = vec![0; CHUNK_BYTES];
    loop {
        match file.read(&mut chunk)? {
            0 => return Ok(hash.finalize().into()),
            bytes => hash.update(&chunk[..bytes]),
        }
    }
}

/// A client and the one device of it that this engine uses.
#[derive(Clone)]
pub(crate) struct Target {
    pub plugin: Arc<PjrtPlugin>,
    pub client: Client,
    pub device: PjrtDevice,
}

impl Target {
    /// The device in the words that plugins are told.
    pub fn description(&self) -> torus_abi::attention::Target {
        let (platform, device_kind) = (self.client.platform_name().to_owned(), self.device.kind().to_owned());
        torus_abi::attention::Target { platform, device_kind }
    }

    pub fn upload(&self, bytes: &[u8], tensor: &TensorType) -> Result<Buffer, PjrtError> {
        let dims: Vec<i64> = tensor.dims.iter().map(|dim| *dim as i64).collect();
        self.client.buffer_from_host(bytes, element(tensor.dtype), &dims, &self.device)
    }

    /// Hands memory over; a device that shares the host's takes it without a copy.
    pub fn give(&self, bytes: torus_weights::AlignedBytes, tensor: &TensorType) -> Result<Buffer, PjrtError> {
        let dims: Vec<i64> = tensor.dims.iter().map(|dim| *dim as i64).collect();
        self.client.buffer_from_owned(Owned(bytes), element(tensor.dtype), &dims, &self.device)
    }

    /// Zeros in memory that programs update in place. On a device that shares the host's memory, the system clears a page
    /// when it is first touched, and what is never used takes none.
    pub fn zeros(&self, tensor: &TensorType) -> Result<Buffer, PjrtError> {
        let bytes = tensor.bytes().unwrap_or(u64::MAX) as usize;
        let memory = torus_weights::AlignedBytes::zeroed(bytes)
            .map_err(|error| PjrtError::Invalid(format!("{bytes} bytes cannot be had: {error}")))?;
        let dims: Vec<i64> = tensor.dims.iter().map(|dim| *dim as i64).collect();
        self.client.buffer_from_owned_mut(Owned(memory), element(tensor.dtype), &dims, &self.device)
    }

    pub fn upload_words(&self, words: &[i32], dtype: DType, dims: &[u64]) -> Result<Buffer, PjrtError> {
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        self.upload(&bytes, &TensorType::new(dtype, dims))
    }
}

/// Memory of `torus-weights` that a device keeps.
struct Owned(torus_weights::AlignedBytes);

impl AsMut<[u8]> for Owned {
    fn as_mut(&mut self) -> &mut [u8] {
        &mut self.0
    }
}

impl AsRef<[u8]> for Owned {
    fn as_ref(&self) -> &[u8] {
        &self.0
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
    }
}
