//! Log lines from plugins. A shared library has its own statics, so lines go to the host through a function it hands
//! over ([`crate::table::RuntimeTable::attach`]); before that they are dropped.

use std::sync::atomic::{AtomicPtr, Ordering};

use crate::table::{HostTable, slot};

static HOST: AtomicPtr<HostTable> = AtomicPtr::new(std::ptr::null_mut());

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Level {
    Error = 1,
    Warn = 2,
    Info = 3,
    Debug = 4,
    Trace = 5,
}

/// Writes a line to the host's log, under the plugin's crate name.
#[track_caller]
pub fn log(level: Level, message: &str) {
    // SAFETY: the slot has this type in every version.
    let sink: Option<extern "C" fn(u32, abi_stable::std_types::RStr<'_>, abi_stable::std_types::RStr<'_>)> =
        unsafe { host_slot(std::mem::offset_of!(HostTable, log)) };
    if let Some(sink) = sink {
        sink(level as u32, std::panic::Location::caller().file().into(), message.into());
    }
}

/// A slot of the host's table, if there is a host and it has the slot.
///
/// # Safety
/// The slot at `offset` is of type `F`, a function pointer.
pub(crate) unsafe fn host_slot<F: Copy>(offset: usize) -> Option<F> {
    let host = HOST.load(Ordering::Acquire);
    // SAFETY: the host's table lives as long as the process; the caller vouches for the slot.
    if host.is_null() { None } else { unsafe { slot(host.cast_const(), offset) } }
}

pub(crate) fn attach(host: *const HostTable) {
    HOST.store(host.cast_mut(), Ordering::Release);
}
