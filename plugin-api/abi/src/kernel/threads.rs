//! Threads for kernels, lent by the host: a plugin starts none of its own.

use std::{
    any::Any,
    ffi::c_void,
    mem::offset_of,
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use crate::{
    log,
    table::{HostTable, ParallelBody},
};

/// Threads that [`parallel_for`] uses at most, the caller's own included.
pub fn threads() -> usize {
    // SAFETY: the slot has this type.
    let ask: Option<extern "C" fn() -> usize> = unsafe { log::host_slot(offset_of!(HostTable, threads)) };
    ask.map_or(1, |ask| ask().max(1))
}

/// Calls `body` for each index below `count`, on the host's threads and this one, and returns when all calls have. The
/// order is unspecified. If others use the threads, or this is one of them, all calls happen here.
///
/// # Panics
/// If a call panics, with the first panic; indices that were not begun are then left out.
pub fn parallel_for<F: Fn(usize) + Sync>(count: usize, body: F) {
    // SAFETY: the slot has this type.
    let run: Option<unsafe extern "C" fn(usize, ParallelBody, *const c_void)> =
        unsafe { log::host_slot(offset_of!(HostTable, parallel_for)) };
    match run {
        Some(run) if count > 1 => {
            let work = Work { body, failed: AtomicBool::new(false), panic: Mutex::default() };
            // SAFETY: `call::<F>` takes a `Work<F>`, which outlives the call: the host returns when all calls have.
            unsafe { run(count, call::<F>, (&raw const work).cast()) };
            if let Some(panic) = work.panic.into_inner().unwrap_or_else(PoisonError::into_inner) {
                resume_unwind(panic);
            }
        }
        _ => (0..count).for_each(body),
    }
}

/// Splits `data` into chunks of `len` elements, the last may be shorter, and calls `body` for each with its index, as
/// [`parallel_for`] does.
///
/// # Panics
/// As [`parallel_for`]; and if `len` is 0.
pub fn parallel_chunks<T: Send, F: Fn(usize, &mut [T]) + Sync>(data: &mut [T], len: usize, body: F) {
    let (total, start) = (data.len(), Start(data.as_mut_ptr()));
    parallel_for(total.div_ceil(len), |index| {
        let (start, begin) = (start.get(), index * len);
        // SAFETY: the chunks lie within `data`, which is borrowed meanwhile, and each index comes once, so that no two
        // of them overlap.
        body(index, unsafe { std::slice::from_raw_parts_mut(start.add(begin), len.min(total - begin)) });
    });
}

/// The first of the elements that are shared out.
struct Start<T>(*mut T);

impl<T> Start<T> {
    fn get(&self) -> *mut T {
        self.0
    }
}

// SAFETY: every thread gets other elements of it, and they may be sent.
unsafe impl<T: Send> Sync for Start<T> {}

struct Work<F> {
    body: F,
    failed: AtomicBool,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

unsafe extern "C" fn call<F: Fn(usize) + Sync>(work: *const c_void, index: usize) {
    // SAFETY: the host passes on what `parallel_for` gave it.
    let work = unsafe { &*work.cast::<Work<F>>() };
    if work.failed.load(Ordering::Relaxed) {
        return;
    }
    // What the closure leaves behind is not seen again: the panic goes on in the caller.
    if let Err(panic) = catch_unwind(AssertUnwindSafe(|| (work.body)(index))) {
        work.failed.store(true, Ordering::Relaxed);
        let mut first = work.panic.lock().unwrap_or_else(PoisonError::into_inner);
        match *first {
            None => *first = Some(panic),
            // Dropping a payload may panic.
            Some(_) => std::mem::forget(panic),
        }
    }
}
