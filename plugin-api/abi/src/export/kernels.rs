//! The table of a plugin's kernels.

use abi_stable::std_types::RStr;

use crate::{
    kernel::{Handler, KernelList},
    table::KernelTable,
};

/// The table of a [`KernelList`].
#[doc(hidden)]
pub struct KernelExport<L>(std::marker::PhantomData<L>);

impl<L: KernelList> KernelExport<L> {
    pub const TABLE: &'static KernelTable = &KernelTable {
        struct_size: size_of::<KernelTable>(),
        count: Self::count,
        name: Self::name,
        handler: Self::handler,
    };

    extern "C" fn count() -> usize {
        L::ENTRIES.len()
    }

    extern "C" fn name(index: usize) -> RStr<'static> {
        L::ENTRIES.get(index).map_or_else(RStr::empty, |entry| entry.name.into())
    }

    extern "C" fn handler(index: usize) -> Option<Handler> {
        L::ENTRIES.get(index).map(|entry| entry.handler)
    }
}
