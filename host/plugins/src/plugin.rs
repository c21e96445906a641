//! A usable plugin: its manifest and typed calls over its tables.

use std::{ffi::c_void, mem::offset_of, path::PathBuf, ptr::NonNull, sync::Arc};

use abi_stable::std_types::{RSlice, RStr};
use serde::{Serialize, de::DeserializeOwned};
use torus_abi::{
    attention::{AttentionAnswer, AttentionQuery, EmitAttention},
    export::PluginEntry,
    fragment::{Fragment, Package},
    manifest::{Kind, Manifest},
    model::{EmitModel, GgufAnswer, GgufQuery, ModelDescription, ModelOptions},
    table::{AttentionTable, HostTable, ModelTable, Reply, RuntimeTable, SpeculativeTable, interface, slot},
};

use crate::{
    CallError, Kernels, LoadError,
    library::Library,
    link::Unit,
    speculative::{SpeculativeCalls, SpeculativeInterface},
    threads,
};

/// Where a plugin came from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// Linked into the binary.
    Linked,
    File {
        path: PathBuf,
        sha256: String,
    },
}

impl Origin {
    fn path(&self) -> PathBuf {
        match self {
            Origin::Linked => "(linked in)".into(),
            Origin::File { path, .. } => path.clone(),
        }
    }
}

/// A plugin whose manifest and tables were checked.
#[derive(Debug)]
pub struct Plugin {
    pub manifest: Manifest,
    pub origin: Origin,
    model: Option<ModelInterface>,
    attention: Option<AttentionInterface>,
    speculative: Option<SpeculativeInterface>,
    kernels: Option<Arc<Kernels>>,
}

impl Plugin {
    /// Checks what an entry offers. The plugin's log lines go to the host's log from here on.
    pub(crate) fn new(entry: PluginEntry, origin: Origin) -> Result<Self, LoadError> {
        let manifest = read_manifest(entry, &origin)?;
        attach_runtime(entry);
        let kernels = read_kernels(entry, &manifest, &origin)?;
        let reader = TableReader { entry, manifest: &manifest, origin: &origin, kernels: kernels.as_ref() };
        let model = reader.offers(Kind::Model).then(|| reader.model()).transpose()?;
        let attention = reader.offers(Kind::Attention).then(|| reader.attention()).transpose()?;
        let speculative = reader.offers(Kind::Speculative).then(|| reader.speculative()).transpose()?;
        Ok(Self { manifest, origin, model, attention, speculative, kernels })
    }

    pub(crate) fn from_library(library: Library) -> Result<Self, LoadError> {
        let origin = Origin::File { path: library.path, sha256: library.sha256 };
        Self::new(library.entry, origin)
    }

    pub fn name(&self) -> &str {
        &self.manifest.name
    }

    /// What identifies its code in cache keys: the file's hash, or the version of a linked-in plugin (which the
    /// binary's own hash covers).
    pub fn identity(&self) -> String {
        match &self.origin {
            Origin::Linked => format!("{} {}", self.manifest.name, self.manifest.version),
            Origin::File { sha256, .. } => sha256.clone(),
        }
    }

    pub fn model(&self) -> Option<&ModelInterface> {
        self.model.as_ref()
    }

    pub fn attention(&self) -> Option<&AttentionInterface> {
        self.attention.as_ref()
    }

    pub fn speculative(&self) -> Option<&SpeculativeInterface> {
        self.speculative.as_ref()
    }

    /// Its native kernels, if it exports any.
    pub fn kernels(&self) -> Option<&Kernels> {
        self.kernels.as_deref()
    }
}

/// The kernels, under a namespace of the plugin's name and what tells its builds apart.
fn read_kernels(entry: PluginEntry, manifest: &Manifest, origin: &Origin) -> Result<Option<Arc<Kernels>>, LoadError> {
    const HASH_DIGITS: usize = 12;
    let build = match origin {
        Origin::Linked => &manifest.version,
        Origin::File { sha256, .. } => &sha256[..HASH_DIGITS.min(sha256.len())],
    };
    let kernels = Kernels::read(entry, format!("{}-{build}", manifest.name));
    let missing = |slot| LoadError::MissingSlot {
        path: origin.path(),
        name: manifest.name.clone(),
        kind: interface::KERNELS,
        slot,
    };
    Ok(kernels.map_err(missing)?.map(Arc::new))
}

fn read_manifest(entry: PluginEntry, origin: &Origin) -> Result<Manifest, LoadError> {
    let described = (entry.describe)();
    let manifest: Manifest = serde_json::from_slice(described.as_slice()).map_err(|error| LoadError::Manifest {
        path: origin.path(),
        message: if described.is_empty() { "it panicked while describing itself".into() } else { error.to_string() },
    })?;
    let (path, name) = (origin.path(), manifest.name.clone());
    if manifest.panic != "unwind" {
        return Err(LoadError::PanicStrategy { path, name, panic: manifest.panic });
    }
    if !torus_abi::compatible(torus_abi::ABI_VERSION, manifest.abi) {
        return Err(LoadError::AbiVersion { path, name, found: manifest.abi, expected: torus_abi::ABI_VERSION });
    }
    let well_formed = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
    if name.is_empty() || !name.chars().all(well_formed) {
        let message = format!("its name '{name}' must be of letters, digits, '-' and '_'");
        return Err(LoadError::Manifest { path, message });
    }
    Ok(manifest)
}

static HOST_TABLE: HostTable = HostTable {
    struct_size: size_of::<HostTable>(),
    log: log_line,
    parallel_for: threads::parallel_for,
    threads: threads::threads,
};

extern "C" fn log_line(level: u32, target: RStr<'_>, message: RStr<'_>) {
    let (target, message) = (target.as_str(), message.as_str());
    match level {
        1 => tracing::error!(plugin = target, "{message}"),
        2 => tracing::warn!(plugin = target, "{message}"),
        3 => tracing::info!(plugin = target, "{message}"),
        4 => tracing::debug!(plugin = target, "{message}"),
        _ => tracing::trace!(plugin = target, "{message}"),
    }
}

/// Hands the host's table over. A plugin without a runtime table has nothing to log.
fn attach_runtime(entry: PluginEntry) {
    let table = (entry.interface)(interface::RUNTIME.into()).cast::<RuntimeTable>();
    if table.is_null() {
        return;
    }
    // SAFETY: a non-null table of this name is a live `RuntimeTable`, and the slot has this type.
    unsafe {
        let attach: Option<unsafe extern "C" fn(*const HostTable)> = slot(table, offset_of!(RuntimeTable, attach));
        if let Some(attach) = attach {
            attach(&HOST_TABLE);
        }
    }
}

/// Reads the tables a manifest promises.
struct TableReader<'a> {
    entry: PluginEntry,
    manifest: &'a Manifest,
    origin: &'a Origin,
    kernels: Option<&'a Arc<Kernels>>,
}

impl TableReader<'_> {
    fn offers(&self, kind: Kind) -> bool {
        self.manifest.kinds.contains(&kind)
    }

    fn table<T>(&self, kind: Kind, name: &'static str) -> Result<*const T, LoadError> {
        let table = (self.entry.interface)(name.into()).cast::<T>();
        if table.is_null() {
            let (path, name) = (self.origin.path(), self.manifest.name.clone());
            return Err(LoadError::MissingInterface { path, name, kind: kind.name() });
        }
        Ok(table)
    }

    /// # Safety
    /// `table` is a live table and the slot at `offset` has type `F`.
    unsafe fn slot<T, F: Copy>(
        &self,
        table: *const T,
        kind: Kind,
        offset: usize,
        name: &'static str,
    ) -> Result<F, LoadError> {
        // SAFETY: passed on to the caller.
        let found = unsafe { slot(table, offset) };
        found.ok_or_else(|| LoadError::MissingSlot {
            path: self.origin.path(),
            name: self.manifest.name.clone(),
            kind: kind.name(),
            slot: name,
        })
    }

    fn model(&self) -> Result<ModelInterface, LoadError> {
        const KIND: Kind = Kind::Model;
        let table: *const ModelTable = self.table(KIND, interface::MODEL)?;
        // SAFETY: the table is live, and every slot is read at its own field's offset and type.
        unsafe {
            Ok(ModelInterface {
                plugin: self.manifest.name.clone(),
                kernels: self.kernels.cloned(),
                from_gguf: self.slot(table, KIND, offset_of!(ModelTable, from_gguf), "from_gguf")?,
                open: self.slot(table, KIND, offset_of!(ModelTable, open), "open")?,
                calls: ModelCalls {
                    describe: self.slot(table, KIND, offset_of!(ModelTable, describe), "describe")?,
                    emit: self.slot(table, KIND, offset_of!(ModelTable, emit), "emit")?,
                    close: self.slot(table, KIND, offset_of!(ModelTable, close), "close")?,
                },
            })
        }
    }

    fn attention(&self) -> Result<AttentionInterface, LoadError> {
        const KIND: Kind = Kind::Attention;
        let table: *const AttentionTable = self.table(KIND, interface::ATTENTION)?;
        // SAFETY: as in `model`.
        unsafe {
            Ok(AttentionInterface {
                plugin: self.manifest.name.clone(),
                kernels: self.kernels.cloned(),
                query: self.slot(table, KIND, offset_of!(AttentionTable, query), "query")?,
                emit: self.slot(table, KIND, offset_of!(AttentionTable, emit), "emit")?,
            })
        }
    }

    fn speculative(&self) -> Result<SpeculativeInterface, LoadError> {
        const KIND: Kind = Kind::Speculative;
        let table: *const SpeculativeTable = self.table(KIND, interface::SPECULATIVE)?;
        // SAFETY: as in `model`.
        unsafe {
            Ok(SpeculativeInterface {
                plugin: self.manifest.name.clone(),
                open: self.slot(table, KIND, offset_of!(SpeculativeTable, open), "open")?,
                calls: SpeculativeCalls {
                    describe: self.slot(table, KIND, offset_of!(SpeculativeTable, describe), "describe")?,
                    propose: self.slot(table, KIND, offset_of!(SpeculativeTable, propose), "propose")?,
                    forget: self.slot(table, KIND, offset_of!(SpeculativeTable, forget), "forget")?,
                    close: self.slot(table, KIND, offset_of!(SpeculativeTable, close), "close")?,
                },
            })
        }
    }
}

type Call = extern "C" fn(RSlice<'_, u8>) -> Reply;

#[derive(Clone, Copy, Debug)]
struct ModelCalls {
    describe: unsafe extern "C" fn(*const c_void) -> Reply,
    emit: unsafe extern "C" fn(*const c_void, RSlice<'_, u8>) -> Reply,
    close: unsafe extern "C" fn(*mut c_void),
}

/// The model calls of a plugin.
#[derive(Clone, Debug)]
pub struct ModelInterface {
    plugin: String,
    kernels: Option<Arc<Kernels>>,
    from_gguf: Call,
    open: unsafe extern "C" fn(RSlice<'_, u8>, *mut *mut c_void) -> Reply,
    calls: ModelCalls,
}

impl ModelInterface {
    pub fn from_gguf(&self, query: &GgufQuery) -> Result<GgufAnswer, CallError> {
        let reply = (self.from_gguf)(request(&self.plugin, "from_gguf", query)?.as_slice().into());
        answer(&self.plugin, "from_gguf", reply)
    }

    pub fn open(&self, options: &ModelOptions) -> Result<OpenModel, CallError> {
        let request = request(&self.plugin, "open", options)?;
        let mut handle = std::ptr::null_mut();
        // SAFETY: `handle` is a valid place for the result.
        let reply = unsafe { (self.open)(request.as_slice().into(), &mut handle) };
        body(&self.plugin, reply)?;
        let handle = NonNull::new(handle).ok_or_else(|| CallError::MalformedAnswer {
            plugin: self.plugin.clone(),
            call: "open",
            message: "it said 'done' and gave no model".into(),
        })?;
        let inner = Arc::new(ModelHandle { handle, calls: self.calls });
        Ok(OpenModel { inner, plugin: self.plugin.clone(), kernels: self.kernels.clone() })
    }
}

/// An opened checkpoint of a model plugin. Closed when its last clone is dropped.
#[derive(Clone, Debug)]
pub struct OpenModel {
    inner: Arc<ModelHandle>,
    plugin: String,
    kernels: Option<Arc<Kernels>>,
}

#[derive(Debug)]
struct ModelHandle {
    handle: NonNull<c_void>,
    calls: ModelCalls,
}

// SAFETY: the table's contract is that a model may be used from any thread, by several at once.
unsafe impl Send for ModelHandle {}
// SAFETY: as above.
unsafe impl Sync for ModelHandle {}

impl Drop for ModelHandle {
    fn drop(&mut self) {
        // SAFETY: `open` made the handle and this is the only place that closes it.
        unsafe { (self.calls.close)(self.handle.as_ptr()) }
    }
}

impl OpenModel {
    pub fn plugin(&self) -> &str {
        &self.plugin
    }

    /// A fragment that it emitted, to be linked.
    pub fn unit<'a>(&'a self, fragment: &'a Fragment) -> Unit<'a> {
        Unit { plugin: &self.plugin, fragment, kernels: self.kernels.as_deref() }
    }

    pub fn describe(&self) -> Result<ModelDescription, CallError> {
        // SAFETY: the handle is open as long as `inner` lives.
        let reply = unsafe { (self.inner.calls.describe)(self.inner.handle.as_ptr()) };
        answer(&self.plugin, "describe", reply)
    }

    pub fn emit(&self, emit: &EmitModel) -> Result<Package, CallError> {
        let request = request(&self.plugin, "emit", emit)?;
        // SAFETY: as in `describe`.
        let reply = unsafe { (self.inner.calls.emit)(self.inner.handle.as_ptr(), request.as_slice().into()) };
        answer(&self.plugin, "emit", reply)
    }
}

/// The attention calls of a plugin.
#[derive(Clone, Debug)]
pub struct AttentionInterface {
    plugin: String,
    kernels: Option<Arc<Kernels>>,
    query: Call,
    emit: Call,
}

impl AttentionInterface {
    pub fn plugin(&self) -> &str {
        &self.plugin
    }

    /// A fragment that it emitted, to be linked.
    pub fn unit<'a>(&'a self, fragment: &'a Fragment) -> Unit<'a> {
        Unit { plugin: &self.plugin, fragment, kernels: self.kernels.as_deref() }
    }

    pub fn query(&self, query: &AttentionQuery) -> Result<AttentionAnswer, CallError> {
        let reply = (self.query)(request(&self.plugin, "query", query)?.as_slice().into());
        answer(&self.plugin, "query", reply)
    }

    pub fn emit(&self, emit: &EmitAttention) -> Result<Package, CallError> {
        let reply = (self.emit)(request(&self.plugin, "emit", emit)?.as_slice().into());
        answer(&self.plugin, "emit", reply)
    }
}

pub(crate) fn request<T: Serialize>(plugin: &str, call: &'static str, message: &T) -> Result<Vec<u8>, CallError> {
    serde_json::to_vec(message).map_err(|error| CallError::MalformedAnswer {
        plugin: plugin.to_owned(),
        call,
        message: format!("the request cannot be written: {error}"),
    })
}

pub(crate) fn body(plugin: &str, reply: Reply) -> Result<Vec<u8>, CallError> {
    reply.into_result().map_err(|fault| CallError::Fault { plugin: plugin.to_owned(), fault })
}

pub(crate) fn answer<T: DeserializeOwned>(plugin: &str, call: &'static str, reply: Reply) -> Result<T, CallError> {
    serde_json::from_slice(&body(plugin, reply)?).map_err(|error| CallError::MalformedAnswer {
        plugin: plugin.to_owned(),
        call,
        message: error.to_string(),
    })
}
