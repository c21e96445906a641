//! Turns an author's trait implementations into tables, and tables into a library.
//!
//! Every function that crosses the boundary is made here, and each catches panics: no plugin author writes
//! `extern "C"`.

use std::{
    any::Any,
    ffi::c_void,
    panic::{AssertUnwindSafe, catch_unwind},
};

use abi_stable::std_types::{RSlice, RStr, RVec};
use serde::{Serialize, de::DeserializeOwned};

mod kernels;
mod speculative;

pub use kernels::KernelExport;
pub use speculative::SpeculativeExport;

use crate::{
    author::{Attention, Model, Speculative},
    fault::Fault,
    manifest::{Kind, Manifest},
    table::{AttentionTable, HostTable, ModelTable, Reply, RuntimeTable, interface},
};

/// A plugin as its library offers it: the functions of the root. The `inventory` of linked-in plugins holds these, and
/// [`crate::export_root!`] exports one from a shared library.
#[derive(Clone, Copy)]
pub struct PluginEntry {
    pub describe: extern "C" fn() -> RVec<u8>,
    pub interface: extern "C" fn(kind: RStr<'_>) -> *const c_void,
}

inventory::collect!(PluginEntry);

/// The plugins linked into this binary.
pub fn linked_plugins() -> impl Iterator<Item = &'static PluginEntry> {
    inventory::iter::<PluginEntry>.into_iter()
}

/// Declares the plugin of a crate: its name, what it offers, and an entry for binaries that link the crate. Defines
/// `PLUGIN`, which [`crate::export_root!`] takes.
///
/// ```ignore
/// torus_abi::declare_plugin! {
///     name: "llama",
///     description: "The Llama family",
///     model: Llama,
/// }
/// ```
#[macro_export]
macro_rules! declare_plugin {
    (
        name: $name:literal,
        description: $description:literal
        $(, model: $model:ty)?
        $(, attention: $attention:ty)?
        $(, speculative: $speculative:ty)?
        $(, kernels: [$($kernel:ty),* $(,)?])?
        $(,)?
    ) => {
        /// This crate's plugin, as linked-in binaries and the shared library offer it.
        pub const PLUGIN: $crate::export::PluginEntry = {
            extern "C" fn describe() -> $crate::export::Bytes {
                $crate::export::describe(|| {
                    #[allow(unused_mut, clippy::allow_attributes)]
                    let mut manifest = $crate::export::manifest($name, env!("CARGO_PKG_VERSION"), $description);
                    $($crate::export::add_model::<$model>(&mut manifest);)?
                    $($crate::export::add_attention::<$attention>(&mut manifest);)?
                    $($crate::export::add_speculative::<$speculative>(&mut manifest);)?
                    manifest
                })
            }
            extern "C" fn interface(kind: $crate::export::Text<'_>) -> *const ::std::ffi::c_void {
                $(if kind.as_str() == $crate::table::interface::MODEL {
                    return ::std::ptr::from_ref($crate::export::ModelExport::<$model>::TABLE).cast();
                })?
                $(if kind.as_str() == $crate::table::interface::ATTENTION {
                    return ::std::ptr::from_ref($crate::export::AttentionExport::<$attention>::TABLE).cast();
                })?
                $(if kind.as_str() == $crate::table::interface::SPECULATIVE {
                    return ::std::ptr::from_ref($crate::export::SpeculativeExport::<$speculative>::TABLE).cast();
                })?
                $(if kind.as_str() == $crate::table::interface::KERNELS {
                    struct Kernels;
                    impl $crate::kernel::KernelList for Kernels {
                        const PLUGIN: &'static str = $name;
                        const ENTRIES: &'static [$crate::kernel::Entry] =
                            &[$($crate::kernel::Entry::new::<Kernels, $kernel>()),*];
                    }
                    return ::std::ptr::from_ref($crate::export::KernelExport::<Kernels>::TABLE).cast();
                })?
                $crate::export::common_interface(kind.as_str())
            }
            $crate::export::PluginEntry { describe, interface }
        };
        $crate::export::inventory::submit! { PLUGIN }
    };
}

/// Exports a plugin's root from a shared library: `torus_abi::export_root!(torus_model_llama::PLUGIN);`. At most once
/// in a library, and never in a crate that a binary links.
#[macro_export]
macro_rules! export_root {
    ($plugin:expr) => {
        #[doc(hidden)]
        #[unsafe(no_mangle)]
        pub static _1as_0lib_1header_0root_bmodule_bloader: $crate::export::LibHeader = {
            extern "C" fn construct() -> $crate::export::RootModuleResult {
                fn root() -> $crate::root::PluginRootRef {
                    $crate::export::root($plugin)
                }
                $crate::root::construct_root(root)
            }
            $crate::root::library_header(construct)
        };
    };
}

/// Declares a crate's plugin and exports it: for crates that are built as a shared library only.
///
/// ```ignore
/// torus_abi::export_plugin! {
///     name: "mine",
///     description: "My attention",
///     attention: Mine,
/// }
/// ```
#[macro_export]
macro_rules! export_plugin {
    ($($declaration:tt)*) => {
        $crate::declare_plugin! { $($declaration)* }
        $crate::export_root!(PLUGIN);
    };
}

#[doc(hidden)]
pub use abi_stable::library::{LibHeader, RootModuleResult};
#[doc(hidden)]
pub use inventory;
#[doc(hidden)]
pub type Bytes = RVec<u8>;
#[doc(hidden)]
pub type Text<'a> = RStr<'a>;

#[doc(hidden)]
pub fn root(entry: PluginEntry) -> crate::root::PluginRootRef {
    use abi_stable::prefix_type::PrefixTypeTrait;
    crate::root::PluginRoot { describe: entry.describe, interface: entry.interface }.leak_into_prefix()
}

#[doc(hidden)]
pub fn manifest(name: &str, version: &str, description: &str) -> Manifest {
    Manifest {
        abi: crate::ABI_VERSION,
        name: name.to_owned(),
        version: version.to_owned(),
        description: description.to_owned(),
        kinds: Vec::new(),
        architectures: Vec::new(),
        gguf_architectures: Vec::new(),
        panic: if cfg!(panic = "unwind") { "unwind" } else { "abort" }.to_owned(),
        target: format!("{}-{}", std::env::consts::ARCH, std::env::consts::OS),
    }
}

#[doc(hidden)]
pub fn add_model<M: Model>(manifest: &mut Manifest) {
    manifest.kinds.push(Kind::Model);
    manifest.architectures = M::ARCHITECTURES.iter().map(|name| (*name).to_owned()).collect();
    manifest.gguf_architectures = M::GGUF_ARCHITECTURES.iter().map(|name| (*name).to_owned()).collect();
}

#[doc(hidden)]
pub fn add_attention<A: Attention>(manifest: &mut Manifest) {
    manifest.kinds.push(Kind::Attention);
}

#[doc(hidden)]
pub fn add_speculative<S: Speculative>(manifest: &mut Manifest) {
    manifest.kinds.push(Kind::Speculative);
}

#[doc(hidden)]
pub fn describe(make: fn() -> Manifest) -> RVec<u8> {
    let described = catch_unwind(|| serde_json::to_vec(&make()).unwrap_or_default());
    described.unwrap_or_default().into()
}

#[doc(hidden)]
pub fn common_interface(kind: &str) -> *const c_void {
    if kind == interface::RUNTIME { (&raw const RUNTIME).cast() } else { std::ptr::null() }
}

static RUNTIME: RuntimeTable = RuntimeTable { struct_size: size_of::<RuntimeTable>(), attach };

unsafe extern "C" fn attach(host: *const HostTable) {
    crate::log::attach(host);
}

/// The table of a [`Model`].
#[doc(hidden)]
pub struct ModelExport<M>(std::marker::PhantomData<M>);

impl<M: Model> ModelExport<M> {
    pub const TABLE: &'static ModelTable = &ModelTable {
        struct_size: size_of::<ModelTable>(),
        from_gguf: Self::from_gguf,
        open: Self::open,
        describe: Self::describe,
        emit: Self::emit,
        close: Self::close,
    };

    extern "C" fn from_gguf(request: RSlice<'_, u8>) -> Reply {
        answer(|| respond(&M::from_gguf(&parse(request)?)?))
    }

    unsafe extern "C" fn open(request: RSlice<'_, u8>, model: *mut *mut c_void) -> Reply {
        answer(|| {
            let opened = Box::new(M::open(&parse(request)?)?);
            // SAFETY: the host passes a valid place for the handle.
            unsafe { model.write(Box::into_raw(opened).cast()) };
            Ok(Vec::new())
        })
    }

    unsafe extern "C" fn describe(model: *const c_void) -> Reply {
        // SAFETY: the host passes a handle that `open` made and `close` has not seen.
        answer(|| respond(&unsafe { &*model.cast::<M>() }.describe()))
    }

    unsafe extern "C" fn emit(model: *const c_void, request: RSlice<'_, u8>) -> Reply {
        // SAFETY: as in `describe`.
        answer(|| respond(&unsafe { &*model.cast::<M>() }.emit(&parse(request)?)?))
    }

    unsafe extern "C" fn close(model: *mut c_void) {
        // SAFETY: as in `describe`; the host does not use the handle again.
        let closed = catch_unwind(|| drop(unsafe { Box::from_raw(model.cast::<M>()) }));
        if let Err(panic) = closed {
            crate::log::log(crate::log::Level::Error, &format!("panic on close: {}", panic_text(&*panic)));
        }
    }
}

/// The table of an [`Attention`].
#[doc(hidden)]
pub struct AttentionExport<A>(std::marker::PhantomData<A>);

impl<A: Attention> AttentionExport<A> {
    pub const TABLE: &'static AttentionTable =
        &AttentionTable { struct_size: size_of::<AttentionTable>(), query: Self::query, emit: Self::emit };

    extern "C" fn query(request: RSlice<'_, u8>) -> Reply {
        answer(|| respond(&A::query(&parse(request)?)?))
    }

    extern "C" fn emit(request: RSlice<'_, u8>) -> Reply {
        answer(|| respond(&A::emit(&parse(request)?)?))
    }
}

/// Runs `call`; a panic becomes a fault.
fn answer(call: impl FnOnce() -> Result<Vec<u8>, Fault>) -> Reply {
    // The closure's state is dropped on a panic and nothing of it is seen again, except a model, whose author answers
    // for it (`Model: Sync`).
    let result = catch_unwind(AssertUnwindSafe(call));
    Reply::new(
        result.unwrap_or_else(|panic| Err(Fault::internal(format!("the plugin panicked: {}", panic_text(&*panic))))),
    )
}

fn parse<T: DeserializeOwned>(request: RSlice<'_, u8>) -> Result<T, Fault> {
    serde_json::from_slice(request.as_slice()).map_err(|error| Fault::invalid(format!("malformed request: {error}")))
}

fn respond<T: Serialize>(answer: &T) -> Result<Vec<u8>, Fault> {
    serde_json::to_vec(answer).map_err(|error| Fault::internal(format!("the answer cannot be written: {error}")))
}

pub(crate) fn panic_text(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("no message")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        attention::{AttentionAnswer, AttentionQuery, EmitAttention},
        fault::FaultCode,
        fragment::Package,
        table::slot,
    };

    struct Panicking;

    impl Attention for Panicking {
        fn query(_: &AttentionQuery) -> Result<AttentionAnswer, Fault> {
            Ok(AttentionAnswer::refuse("never"))
        }

        fn emit(_: &EmitAttention) -> Result<Package, Fault> {
            panic!("lost")
        }
    }

    declare_plugin! { name: "panicking", description: "A test", attention: Panicking }

    const QUERY: &str = r#"{"spec":{"q_heads":1,"kv_heads":1,"head_dim":8,"scale":1.0},"dtype":"f32","kv_dtype":"f32",
        "shape":{"tokens":1,"seqs":1,"page_size":1,"pages":2,"page_table":1},"target":{"platform":"cpu"}}"#;

    fn call(name: &str, request: &str) -> Result<Vec<u8>, Fault> {
        let table = (PLUGIN.interface)("attention".into()).cast::<AttentionTable>();
        let offset = match name {
            "query" => std::mem::offset_of!(AttentionTable, query),
            _ => std::mem::offset_of!(AttentionTable, emit),
        };
        // SAFETY: the table lives as long as the process; both slots have this type.
        let function: extern "C" fn(RSlice<'_, u8>) -> Reply = unsafe { slot(table, offset) }.unwrap();
        function(request.as_bytes().into()).into_result()
    }

    #[test]
    fn a_declared_plugin_describes_itself_and_is_linked_in() {
        let manifest: Manifest = serde_json::from_slice(&(PLUGIN.describe)()).unwrap();
        assert_eq!((manifest.name.as_str(), manifest.kinds.as_slice()), ("panicking", [Kind::Attention].as_slice()));
        assert_eq!(manifest.panic, "unwind");
        assert!((PLUGIN.interface)("model".into()).is_null());
        assert!(!(PLUGIN.interface)("runtime".into()).is_null());
        assert_eq!(linked_plugins().count(), 1);
    }

    #[test]
    fn answers_and_faults_cross_and_panics_become_faults() {
        let answer: AttentionAnswer = serde_json::from_slice(&call("query", QUERY).unwrap()).unwrap();
        assert_eq!((answer.score, answer.reason.as_str()), (0, "never"));
        let fault = call("query", "{").unwrap_err();
        assert_eq!(fault.code, FaultCode::Invalid);
        let fault = call("emit", &format!(r#"{{"kind":0,"query":{QUERY}}}"#)).unwrap_err();
        assert_eq!((fault.code, fault.message.as_str()), (FaultCode::Internal, "the plugin panicked: lost"));
    }
}
