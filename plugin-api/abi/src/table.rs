//! The function tables behind the root. Append only: `released.rs` lists what is out there, and a table that no longer
//! fits it fails the build.
//!
//! Every table starts with `struct_size`, the size its library was built with. A reader takes a slot with [`slot`],
//! which answers `None` past that size; so an old host works with a new plugin and a new host with an old plugin.
//! Requests and answers are JSON (see [`crate::model`], [`crate::attention`]).

use std::ffi::c_void;

use abi_stable::std_types::{RSlice, RStr, RVec};

use crate::{
    fault::{Fault, FaultCode},
    kernel::Handler,
};

/// Names under which [`crate::root::PluginRoot::interface`] hands out tables.
pub mod interface {
    pub const MODEL: &str = "model";
    pub const ATTENTION: &str = "attention";
    pub const SPECULATIVE: &str = "speculative";
    pub const RUNTIME: &str = "runtime";
    pub const KERNELS: &str = "kernels";
}

/// The answer of a call: JSON, or a fault's message.
#[repr(C)]
pub struct Reply {
    /// 0, or the number of a [`FaultCode`].
    pub status: u32,
    pub body: RVec<u8>,
}

impl Reply {
    pub fn new(result: Result<Vec<u8>, Fault>) -> Self {
        match result {
            Ok(body) => Self { status: 0, body: body.into() },
            Err(fault) => Self { status: fault.code.number(), body: fault.message.into_bytes().into() },
        }
    }

    pub fn into_result(self) -> Result<Vec<u8>, Fault> {
        let body = self.body.into_vec();
        match self.status {
            0 => Ok(body),
            number => Err(Fault {
                code: FaultCode::from_number(number),
                message: String::from_utf8_lossy(&body).into_owned(),
            }),
        }
    }
}

/// Build-time calls of a model plugin ([`crate::author::Model`]). All may be called from any thread.
#[repr(C)]
pub struct ModelTable {
    pub struct_size: usize,
    /// [`crate::model::GgufQuery`] to [`crate::model::GgufAnswer`].
    pub from_gguf: extern "C" fn(request: RSlice<'_, u8>) -> Reply,
    /// [`crate::model::ModelOptions`] to a handle, written to `model` on success; the body is empty.
    pub open: unsafe extern "C" fn(request: RSlice<'_, u8>, model: *mut *mut c_void) -> Reply,
    /// To [`crate::model::ModelDescription`].
    pub describe: unsafe extern "C" fn(model: *const c_void) -> Reply,
    /// [`crate::model::EmitModel`] to [`crate::fragment::Package`].
    pub emit: unsafe extern "C" fn(model: *const c_void, request: RSlice<'_, u8>) -> Reply,
    pub close: unsafe extern "C" fn(model: *mut c_void),
}

/// Build-time calls of an attention plugin ([`crate::author::Attention`]). All may be called from any thread.
#[repr(C)]
pub struct AttentionTable {
    pub struct_size: usize,
    /// [`crate::attention::AttentionQuery`] to [`crate::attention::AttentionAnswer`].
    pub query: extern "C" fn(request: RSlice<'_, u8>) -> Reply,
    /// [`crate::attention::EmitAttention`] to [`crate::fragment::Package`].
    pub emit: extern "C" fn(request: RSlice<'_, u8>) -> Reply,
}

/// Calls of a speculative plugin ([`crate::author::Speculative`]). One handle is used by one thread at a time.
#[repr(C)]
pub struct SpeculativeTable {
    pub struct_size: usize,
    /// [`crate::speculative::SpeculativeOptions`] to a handle, written to `speculator` on success; the body is empty.
    pub open: unsafe extern "C" fn(request: RSlice<'_, u8>, speculator: *mut *mut c_void) -> Reply,
    /// To [`crate::speculative::SpeculativeDescription`].
    pub describe: unsafe extern "C" fn(speculator: *const c_void) -> Reply,
    /// Step-time: fills what the output points to. Answers 0 or the number of a [`FaultCode`], whose message is logged.
    pub propose:
        unsafe extern "C" fn(speculator: *mut c_void, input: *const ProposeInput, output: *mut ProposeOutput) -> u32,
    /// The sequence has ended; its id may come again for another.
    pub forget: unsafe extern "C" fn(speculator: *mut c_void, id: u64),
    pub close: unsafe extern "C" fn(speculator: *mut c_void),
}

/// What [`SpeculativeTable::propose`] is told. Arrays have an element for each of `rows` sequences.
#[repr(C)]
pub struct ProposeInput {
    pub struct_size: usize,
    pub rows: usize,
    /// A number that stays the same as long as the sequence runs.
    pub ids: *const u64,
    /// All tokens of the sequence so far, prompt and output. They only grow from call to call.
    pub tokens: *const *const u32,
    pub lengths: *const usize,
    /// Tokens that may be proposed for the sequence in this step, at most [`ProposeOutput::stride`].
    pub limits: *const u32,
}

/// Where [`SpeculativeTable::propose`] writes. The memory is the caller's.
#[repr(C)]
pub struct ProposeOutput {
    pub struct_size: usize,
    /// Elements of `tokens` for each row.
    pub stride: usize,
    /// `[rows, stride]`: the proposed continuation, each token following the one before.
    pub tokens: *mut u32,
    /// `[rows]`: how many were proposed.
    pub counts: *mut u32,
}

/// The native functions that a plugin's programs call on the CPU ([`crate::kernel::Kernel`]).
#[repr(C)]
pub struct KernelTable {
    pub struct_size: usize,
    pub count: extern "C" fn() -> usize,
    /// The name of a kernel; empty past the last.
    pub name: extern "C" fn(index: usize) -> RStr<'static>,
    /// Its handler for XLA's FFI, which catches panics; null past the last.
    pub handler: extern "C" fn(index: usize) -> Option<Handler>,
}

/// What every plugin offers, whatever its kind.
#[repr(C)]
pub struct RuntimeTable {
    pub struct_size: usize,
    /// Hands the host's table to the plugin, once, before any other table is used. It lives as long as the process.
    pub attach: unsafe extern "C" fn(host: *const HostTable),
}

/// What the host offers to plugins.
#[repr(C)]
pub struct HostTable {
    pub struct_size: usize,
    /// Takes a log line. Levels: 1 error, 2 warn, 3 info, 4 debug, 5 trace.
    pub log: extern "C" fn(level: u32, target: RStr<'_>, message: RStr<'_>),
    /// Calls `body(context, index)` for each index below `count`, from several threads, and returns when all calls
    /// have. `body` does not unwind.
    pub parallel_for: unsafe extern "C" fn(count: usize, body: ParallelBody, context: *const c_void),
    /// Threads that `parallel_for` uses at most, the caller's own included.
    pub threads: extern "C" fn() -> usize,
}

/// What [`HostTable::parallel_for`] calls.
pub type ParallelBody = unsafe extern "C" fn(context: *const c_void, index: usize);

/// Reads the slot at `offset` of a table, or `None` if the table ends before it or the slot is null.
///
/// # Safety
/// `table` points to a live table headed by its `struct_size`, and the slot at `offset` is of type `F`, a function
/// pointer.
pub unsafe fn slot<T, F: Copy>(table: *const T, offset: usize) -> Option<F> {
    // SAFETY: every table begins with its size (caller's promise).
    let size = unsafe { table.cast::<usize>().read() };
    if offset + size_of::<F>() > size {
        return None;
    }
    // SAFETY: the slot lies within the table, as the size says; `Option` of a function pointer may be null.
    unsafe { table.cast::<u8>().add(offset).cast::<Option<F>>().read() }
}

#[cfg(test)]
mod tests {
    use std::mem::offset_of;

    use super::*;

    #[test]
    fn a_slot_past_the_end_of_an_older_table_is_none() {
        extern "C" fn answer() -> u32 {
            7
        }
        #[repr(C)]
        struct Newer {
            struct_size: usize,
            first: extern "C" fn() -> u32,
            second: extern "C" fn() -> u32,
        }
        let older = Newer { struct_size: offset_of!(Newer, second), first: answer, second: answer };
        // SAFETY: `older` is a live table and both slots are of the type named.
        let (first, second) = unsafe {
            (
                slot::<Newer, extern "C" fn() -> u32>(&older, offset_of!(Newer, first)),
                slot::<Newer, extern "C" fn() -> u32>(&older, offset_of!(Newer, second)),
            )
        };
        assert_eq!(first.map(|f| f()), Some(7));
        assert!(second.is_none());
        assert_eq!((older.second)(), 7);
    }
}
