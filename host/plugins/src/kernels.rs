//! The native kernels of a plugin.

use std::mem::offset_of;

use abi_stable::std_types::RStr;
use torus_abi::{
    export::PluginEntry,
    kernel::Handler,
    table::{KernelTable, interface, slot},
};

/// The kernels that a plugin exports, under a namespace of its own.
///
/// A device plugin keeps a handler for ever under its first name, so the namespace belongs to one build of the plugin:
/// a new version gets new names.
#[derive(Clone, Debug, PartialEq)]
pub struct Kernels {
    namespace: String,
    list: Vec<(String, Handler)>,
}

impl Kernels {
    /// Reads the table, if the plugin has one; fails with the name of a slot that is missing.
    pub(crate) fn read(entry: PluginEntry, namespace: String) -> Result<Option<Self>, &'static str> {
        let table = (entry.interface)(interface::KERNELS.into()).cast::<KernelTable>();
        if table.is_null() {
            return Ok(None);
        }
        // SAFETY: a non-null table of this name is a live `KernelTable`; each slot is read at its own offset and type.
        let (count, name, handler) = unsafe {
            let count: Option<extern "C" fn() -> usize> = slot(table, offset_of!(KernelTable, count));
            let name: Option<extern "C" fn(usize) -> RStr<'static>> = slot(table, offset_of!(KernelTable, name));
            let handler: Option<extern "C" fn(usize) -> Option<Handler>> =
                slot(table, offset_of!(KernelTable, handler));
            (count.ok_or("count")?, name.ok_or("name")?, handler.ok_or("handler")?)
        };
        let kernel = |index| Some((name(index).as_str().to_owned(), handler(index)?));
        Ok(Some(Self { namespace, list: (0..count()).filter_map(kernel).collect() }))
    }

    /// The names the plugin gives them.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.list.iter().map(|(name, _)| name.as_str())
    }

    /// The targets that programs call, with their handlers for XLA's FFI. The handlers catch panics, and their code
    /// stays as long as the process.
    pub fn targets(&self) -> impl Iterator<Item = (String, Handler)> {
        self.list.iter().map(|(name, handler)| (format!("{}.{name}", self.namespace), *handler))
    }

    /// The target of a kernel, if there is one of that name.
    pub(crate) fn target(&self, name: &str) -> Option<String> {
        self.names().any(|known| known == name).then(|| format!("{}.{name}", self.namespace))
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn kernels(names: &[&str]) -> Kernels {
        unsafe extern "C" fn nothing(_: *mut std::ffi::c_void) -> *mut std::ffi::c_void {
            std::ptr::null_mut()
        }
        let list = names.iter().map(|name| ((*name).to_owned(), nothing as Handler)).collect();
        Kernels { namespace: "mine-0123".into(), list }
    }

    #[test]
    fn targets_carry_the_namespace() {
        let kernels = kernels(&["attention", "copy"]);
        let targets: Vec<_> = kernels.targets().map(|(target, _)| target).collect();
        assert_eq!(targets, ["mine-0123.attention", "mine-0123.copy"]);
        assert_eq!((kernels.target("copy").as_deref(), kernels.target("gone")), (Some("mine-0123.copy"), None));
    }
}
