//! The frozen entry of a plugin library: two functions, found and checked by `abi_stable`.
//!
//! This file never changes. `abi_stable` refuses a root with fewer fields than the host's, so a field added here would
//! lock out every older plugin; whatever grows belongs into [`crate::table`].

use std::ffi::c_void;

use abi_stable::{
    StableAbi,
    library::{CheckTypeLayout, LibHeader, RootModule, RootModuleResult},
    sabi_types::VersionStrings,
    std_types::{RStr, RVec},
};

/// What every plugin library exports.
#[repr(C)]
#[derive(StableAbi)]
#[sabi(kind(Prefix(prefix_ref = PluginRootRef, prefix_fields = PluginRootPrefix)))]
pub struct PluginRoot {
    /// The plugin's [`crate::manifest::Manifest`] as JSON; empty if it panicked. Called before anything else.
    pub describe: extern "C" fn() -> RVec<u8>,
    /// The table of a kind (`model`, `attention`, `runtime`; see [`crate::table`]), or null if it is not offered.
    /// The table lives as long as the process.
    #[sabi(last_prefix_field)]
    pub interface: extern "C" fn(kind: RStr<'_>) -> *const c_void,
}

impl RootModule for PluginRootRef {
    abi_stable::declare_root_module_statics! {PluginRootRef}
    const BASE_NAME: &'static str = "torus_plugin";
    const NAME: &'static str = "torus_plugin";
    const VERSION_STRINGS: VersionStrings = VersionStrings::new(ROOT_VERSION);
}

/// Not this crate's version: `abi_stable` refuses other minor versions, and the root is the same in all of them.
pub(crate) const ROOT_VERSION: &str = "1.0.0";

/// Name of the one symbol a plugin library exports. `abi_stable` prescribes it.
pub const ROOT_SYMBOL: &str = "_1as_0lib_1header_0root_bmodule_bloader";

/// The header under which a library exports its root. For [`crate::export_root!`].
#[doc(hidden)]
pub const fn library_header(constructor: extern "C" fn() -> RootModuleResult) -> LibHeader {
    // SAFETY: `constructor` returns the root module of type `PluginRootRef`: it can only be made by `construct_root`.
    unsafe { LibHeader::from_constructor::<PluginRootRef>(constructor, CheckTypeLayout::Yes) }
}

/// Calls `load`, catching a panic. For [`crate::export_root!`].
#[doc(hidden)]
pub fn construct_root(load: fn() -> PluginRootRef) -> RootModuleResult {
    abi_stable::library::__call_root_module_loader(load)
}
