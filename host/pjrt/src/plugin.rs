//! Loading plugins: shared libraries that export `GetPjrtApi`.

use std::{
    collections::{BTreeMap, HashMap},
    fmt,
    mem::{ManuallyDrop, offset_of, size_of},
    path::{Path, PathBuf},
    ptr::NonNull,
    sync::{Arc, Mutex, PoisonError},
};

use libloading::os::unix::{Library, RTLD_LOCAL, RTLD_NOW};
use pjrt_sys::{PJRT_Api, PJRT_Extension_Base};

use crate::{
    args::{Api, args},
    error::{PjrtError, Result},
    ffi,
    value::{OptionValue, copy_values},
};

/// A loaded PJRT plugin. It stays loaded until the process ends.
pub struct Plugin {
    pub(crate) api: Api,
    path: PathBuf,
    version: (i32, i32),
    attributes: BTreeMap<String, OptionValue>,
    extensions: Vec<u32>,
    /// By target and platform. XLA keeps a handler for ever under its first name; this is to refuse a second with words.
    handlers: Mutex<HashMap<(String, String), ffi::Handler>>,
}

/// The only major version of the API there is so far.
pub(crate) const API_MAJOR: i32 = 0;
/// The functions that came later than `PJRT_Compile` are optional; all before it are needed.
pub(crate) const TABLE_BYTES: usize = offset_of!(PJRT_Api, PJRT_Compile) + size_of::<usize>();

static LOADED: Mutex<Vec<Arc<Plugin>>> = Mutex::new(Vec::new());

impl Plugin {
    /// Loads and initializes a plugin, or returns the one that was loaded from this file before.
    ///
    /// A plugin runs native code with all rights of this process: load only what you trust.
    pub fn load(path: impl AsRef<Path>) -> Result<Arc<Self>> {
        let path = path.as_ref();
        let path = path.canonicalize().map_err(|reason| PjrtError::PluginMissing { path: path.to_owned(), reason })?;
        let mut loaded = LOADED.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(plugin) = loaded.iter().find(|plugin| plugin.path == path) {
            return Ok(Arc::clone(plugin));
        }
        let api = open(&path)?;
        // The loader gives one library for two names of a file, and a plugin must be initialized once.
        if let Some(plugin) = loaded.iter().find(|plugin| plugin.api == api) {
            return Ok(Arc::clone(plugin));
        }
        let plugin = Arc::new(Self::start(api, path)?);
        tracing::info!(path = %plugin.path.display(), version = ?plugin.version, "loaded a PJRT plugin");
        loaded.push(Arc::clone(&plugin));
        Ok(plugin)
    }

    fn start(api: Api, path: PathBuf) -> Result<Self> {
        let mut initialize = args!(PJRT_Plugin_Initialize_Args {});
        // SAFETY: no pointers go in; `load` sees to it that this happens once for each table.
        if let Err(reason) = unsafe { api.call(&mut initialize) } {
            return Err(PjrtError::InitializeFailed { path, reason: Box::new(reason) });
        }
        let mut attributes = args!(PJRT_Plugin_Attributes_Args {});
        // SAFETY: no pointers go in; the attributes that come out live as long as the process.
        let attributes = unsafe {
            api.call(&mut attributes)?;
            copy_values(attributes.attributes, attributes.num_attributes)
        };
        // SAFETY: `check_table` found the version to lie within the table.
        let version = unsafe { version_of(api.table()) };
        let extensions = extensions_of(api).map(|extension| extension.kind).collect();
        Ok(Self { api, path, version, attributes, extensions, handlers: Mutex::default() })
    }

    /// The file it was loaded from, with all links resolved.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Major and minor version of the PJRT C API that it was built with.
    pub fn api_version(&self) -> (i32, i32) {
        self.version
    }

    /// What the plugin says of itself, such as the StableHLO version it reads (`stablehlo_current_version`).
    pub fn attributes(&self) -> &BTreeMap<String, OptionValue> {
        &self.attributes
    }

    /// The numbers (`PJRT_Extension_Type`) of the extensions it offers.
    pub fn extensions(&self) -> &[u32] {
        &self.extensions
    }

    /// Makes `handler` the target of `stablehlo.custom_call @target {api_version = 4 : i32}` on `platform` (`Host` for
    /// CPUs), for this plugin and the rest of the process: XLA has no way to take it back.
    ///
    /// Registering the same handler again is fine; another one under the same name is refused. The plugin calls the
    /// handler at once to ask which FFI version it was built for, so a handler must not use PJRT. One that does not
    /// answer is dropped without a word, and compiling a program that calls it fails.
    ///
    /// # Safety
    /// The handler answers metadata queries, treats call frames as XLA's FFI header says, never unwinds, may be called
    /// from several threads at once, and its code is never unloaded.
    pub unsafe fn register_ffi_handler(&self, target: &str, platform: &str, handler: ffi::Handler) -> Result<()> {
        let mut handlers = self.handlers.lock().unwrap_or_else(PoisonError::into_inner);
        let key = (target.to_owned(), platform.to_owned());
        if let Some(&known) = handlers.get(&key) {
            if std::ptr::fn_addr_eq(known, handler) {
                return Ok(());
            }
            return Err(PjrtError::DuplicateHandler { target: key.0, platform: key.1 });
        }
        let extension = extensions_of(self.api)
            .find(|extension| extension.kind == pjrt_sys::PJRT_Extension_Type_PJRT_Extension_Type_FFI)
            .ok_or(PjrtError::Unsupported { function: ffi::REGISTER })?;
        // SAFETY: it is this plugin's FFI extension; the caller vouches for the handler.
        unsafe { ffi::register(self.api, extension.base, target, platform, handler) }?;
        handlers.insert(key, handler);
        Ok(())
    }
}

impl fmt::Debug for Plugin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Plugin").field("path", &self.path).field("version", &self.version).finish_non_exhaustive()
    }
}

/// Sets what libtpu reads from the environment when it is loaded on a machine without TPUs, to compile for a topology:
/// it must not ask the cloud's metadata server which machine this is (`TPU_SKIP_MDS_QUERY`), and several processes may
/// use it at once (`ALLOW_MULTIPLE_LIBTPU_LOAD`). Values that are already set are kept.
///
/// # Safety
/// No other thread reads or writes the environment meanwhile, in Rust or in C: call it first thing in `main`.
pub unsafe fn prepare_libtpu_environment() {
    for name in ["TPU_SKIP_MDS_QUERY", "ALLOW_MULTIPLE_LIBTPU_LOAD"] {
        if std::env::var_os(name).is_none() {
            // SAFETY: promised by the caller.
            unsafe { std::env::set_var(name, "1") };
        }
    }
}

fn open(path: &Path) -> Result<Api> {
    // SAFETY: running the library's initializers is what the caller of `load` asks for.
    let library = unsafe { Library::open(Some(path), RTLD_NOW | RTLD_LOCAL) }
        .map_err(|error| PjrtError::NotALibrary { path: path.to_owned(), reason: root_cause(&error) })?;
    // Plugins start threads and register exit handlers: unloading one would pull the code from under them.
    let library = ManuallyDrop::new(library);
    // SAFETY: the symbol's type is fixed by PJRT.
    let entry = unsafe { library.get::<unsafe extern "C" fn() -> *const PJRT_Api>(c"GetPjrtApi") }
        .map_err(|error| PjrtError::NotAPlugin { path: path.to_owned(), reason: root_cause(&error) })?;
    // SAFETY: the entry point takes nothing and returns the table.
    let table = unsafe { entry() };
    // SAFETY: it came from `GetPjrtApi`, and the library is never unloaded.
    unsafe { check_table(path, table) }
}

/// The dynamic loader's own words, which its errors here have as their source.
fn root_cause(error: &dyn std::error::Error) -> String {
    error.source().map_or_else(|| error.to_string(), root_cause)
}

/// # Safety
/// `table` is null or a PJRT function table that lives for ever.
unsafe fn check_table(path: &Path, table: *const PJRT_Api) -> Result<Api> {
    let Some(table) = NonNull::new(table.cast_mut()) else {
        return Err(PjrtError::NotAPlugin { path: path.to_owned(), reason: "GetPjrtApi returned nothing".into() });
    };
    // SAFETY: `struct_size` heads the table.
    let table_bytes = unsafe { (*table.as_ptr()).struct_size };
    let version_end = offset_of!(PJRT_Api, pjrt_api_version) + size_of::<pjrt_sys::PJRT_Api_Version>();
    let (major, minor) = if table_bytes < version_end {
        (0, 0)
    } else {
        // SAFETY: the version was just found to lie within the table.
        unsafe { version_of(table.as_ptr()) }
    };
    if major != API_MAJOR || table_bytes < TABLE_BYTES {
        return Err(PjrtError::IncompatibleApi { path: path.to_owned(), major, minor, table_bytes });
    }
    // SAFETY: the caller promises that it lives for ever; it was just found to be long enough.
    Ok(unsafe { Api::new(table) })
}

/// # Safety
/// The version lies within the table.
unsafe fn version_of(table: *const PJRT_Api) -> (i32, i32) {
    // SAFETY: promised by the caller; no reference to the whole table is made.
    let version = unsafe { (*table).pjrt_api_version };
    (version.major_version, version.minor_version)
}

struct Extension {
    kind: u32,
    base: NonNull<PJRT_Extension_Base>,
}

fn extensions_of(api: Api) -> impl Iterator<Item = Extension> {
    // SAFETY: every accepted table has this field.
    let mut next = unsafe { (*api.table()).extension_start };
    std::iter::from_fn(move || {
        let base = NonNull::new(next)?;
        // SAFETY: the plugin's chain of extensions lives as long as its table and ends with null.
        let extension = unsafe { base.as_ref() };
        next = extension.next;
        Some(Extension { kind: extension.type_, base })
    })
}

#[cfg(test)]
mod tests;
