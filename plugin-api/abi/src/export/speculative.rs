//! The table of a speculative plugin.

use std::{
    ffi::c_void,
    panic::{AssertUnwindSafe, catch_unwind},
};

use abi_stable::std_types::RSlice;

use super::{answer, panic_text, parse, respond};
use crate::{
    author::Speculative,
    fault::Fault,
    log::{Level, log},
    speculative::ProposeBatch,
    table::{ProposeInput, ProposeOutput, Reply, SpeculativeTable},
};

/// The table of a [`Speculative`].
#[doc(hidden)]
pub struct SpeculativeExport<S>(std::marker::PhantomData<S>);

impl<S: Speculative> SpeculativeExport<S> {
    pub const TABLE: &'static SpeculativeTable = &SpeculativeTable {
        struct_size: size_of::<SpeculativeTable>(),
        open: Self::open,
        describe: Self::describe,
        propose: Self::propose,
        forget: Self::forget,
        close: Self::close,
    };

    unsafe extern "C" fn open(request: RSlice<'_, u8>, speculator: *mut *mut c_void) -> Reply {
        answer(|| {
            let opened = Box::new(S::open(&parse(request)?)?);
            // SAFETY: the host passes a valid place for the handle.
            unsafe { speculator.write(Box::into_raw(opened).cast()) };
            Ok(Vec::new())
        })
    }

    unsafe extern "C" fn describe(speculator: *const c_void) -> Reply {
        // SAFETY: the host passes a handle that `open` made and `close` has not seen.
        answer(|| respond(&unsafe { &*speculator.cast::<S>() }.describe()))
    }

    unsafe extern "C" fn propose(
        speculator: *mut c_void,
        input: *const ProposeInput,
        output: *mut ProposeOutput,
    ) -> u32 {
        let proposed = guarded(|| {
            // SAFETY: as in `describe`, and the host uses a handle from one thread at a time.
            let speculator = unsafe { &mut *speculator.cast::<S>() };
            // SAFETY: the host passes live structs whose arrays are as the table's docs say.
            let batch = unsafe { ProposeBatch::new(input, output) };
            let mut batch = batch.ok_or_else(|| Fault::invalid("the host's structs are too short"))?;
            speculator.propose(&mut batch)
        });
        proposed.map_or_else(|fault| fault.code.number(), |()| 0)
    }

    unsafe extern "C" fn forget(speculator: *mut c_void, id: u64) {
        // The fault is logged, and there is nobody to tell.
        let _ = guarded(|| {
            // SAFETY: as in `propose`.
            unsafe { &mut *speculator.cast::<S>() }.forget(id);
            Ok(())
        });
    }

    unsafe extern "C" fn close(speculator: *mut c_void) {
        // As in `forget`.
        let _ = guarded(|| {
            // SAFETY: as in `describe`; the host does not use the handle again.
            drop(unsafe { Box::from_raw(speculator.cast::<S>()) });
            Ok(())
        });
    }
}

/// Runs a step-time call, which has no place for a message: what goes wrong, panics included, is logged.
fn guarded(call: impl FnOnce() -> Result<(), Fault>) -> Result<(), Fault> {
    // What a panic leaves behind is the speculator, whose proposals are verified anyway.
    let result = catch_unwind(AssertUnwindSafe(call));
    let result =
        result.unwrap_or_else(|panic| Err(Fault::internal(format!("the plugin panicked: {}", panic_text(&*panic)))));
    if let Err(fault) = &result {
        log(Level::Error, &fault.message);
    }
    result
}
