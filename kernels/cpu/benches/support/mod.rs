//! Threads that spin between calls, for a bench without a host.

use std::{
    ffi::c_void,
    hint::spin_loop,
    sync::atomic::{AtomicPtr, AtomicUsize, Ordering},
};

use torus_abi::table::{HostTable, ParallelBody, RuntimeTable, interface};

pub const THREADS: usize = 2;

static HOST: HostTable = HostTable {
    struct_size: size_of::<HostTable>(),
    log: ignore,
    parallel_for: run,
    threads: {
        extern "C" fn count() -> usize {
            THREADS
        }
        count
    },
};
/// The call in progress: its number, how many of its indices are taken and done, and what to call.
static CALL: AtomicUsize = AtomicUsize::new(0);
static NEXT: AtomicUsize = AtomicUsize::new(usize::MAX / 2);
static COUNT: AtomicUsize = AtomicUsize::new(0);
static IDLE: AtomicUsize = AtomicUsize::new(0);
static BODY: AtomicUsize = AtomicUsize::new(0);
static CONTEXT: AtomicPtr<c_void> = AtomicPtr::new(std::ptr::null_mut());

extern "C" fn ignore(_: u32, _: abi_stable::std_types::RStr<'_>, _: abi_stable::std_types::RStr<'_>) {}

fn take_part(body: ParallelBody, context: *const c_void, count: usize) {
    loop {
        let index = NEXT.fetch_add(1, Ordering::AcqRel);
        if index >= count {
            return;
        }
        // SAFETY: `run` was called with these, and waits for this thread.
        unsafe { body(context, index) };
    }
}

unsafe extern "C" fn run(count: usize, body: ParallelBody, context: *const c_void) {
    BODY.store(body as usize, Ordering::Relaxed);
    CONTEXT.store(context.cast_mut(), Ordering::Relaxed);
    COUNT.store(count, Ordering::Relaxed);
    NEXT.store(0, Ordering::Relaxed);
    IDLE.store(0, Ordering::Relaxed);
    CALL.fetch_add(1, Ordering::Release);
    take_part(body, context, count);
    while IDLE.load(Ordering::Acquire) < THREADS - 1 {
        spin_loop();
    }
}

fn work() {
    let mut seen = 0;
    loop {
        while CALL.load(Ordering::Acquire) == seen {
            spin_loop();
        }
        seen += 1;
        // SAFETY: stored by `run` from such a function.
        let body = unsafe { std::mem::transmute::<usize, ParallelBody>(BODY.load(Ordering::Relaxed)) };
        take_part(body, CONTEXT.load(Ordering::Relaxed), COUNT.load(Ordering::Relaxed));
        IDLE.fetch_add(1, Ordering::Release);
    }
}

/// Starts the threads, and makes `parallel_for` use them. To be called once.
pub fn start_threads() {
    let table = torus_abi::export::common_interface(interface::RUNTIME).cast::<RuntimeTable>();
    // SAFETY: the runtime's table is a static, and so is the host's.
    unsafe { ((*table).attach)(&HOST) };
    (1..THREADS).for_each(|_| drop(std::thread::spawn(work)));
}
