//! A library of `abi_stable` whose root is not Torus': same symbol, other type.

use abi_stable::{
    StableAbi,
    library::{CheckTypeLayout, LibHeader, RootModule, RootModuleResult, __call_root_module_loader},
    prefix_type::PrefixTypeTrait,
    sabi_types::VersionStrings,
    std_types::RString,
};

#[repr(C)]
#[derive(StableAbi)]
#[sabi(kind(Prefix(prefix_ref = OtherRootRef, prefix_fields = OtherRootPrefix)))]
pub struct OtherRoot {
    pub greet: extern "C" fn(u32) -> RString,
    #[sabi(last_prefix_field)]
    pub count: u32,
}

impl RootModule for OtherRootRef {
    abi_stable::declare_root_module_statics! {OtherRootRef}
    const BASE_NAME: &'static str = "other";
    const NAME: &'static str = "other";
    const VERSION_STRINGS: VersionStrings = VersionStrings::new("1.0.0");
}

extern "C" fn greet(_: u32) -> RString {
    RString::new()
}

fn root() -> OtherRootRef {
    OtherRoot { greet, count: 1 }.leak_into_prefix()
}

extern "C" fn construct() -> RootModuleResult {
    __call_root_module_loader(root)
}

// SAFETY: `construct` returns a root module of the type named.
#[unsafe(no_mangle)]
pub static _1as_0lib_1header_0root_bmodule_bloader: LibHeader =
    unsafe { LibHeader::from_constructor::<OtherRootRef>(construct, CheckTypeLayout::Yes) };
