//! The threads that plugins' kernels share: one pool for the process, parked while there is nothing to do.
//!
//! One call at a time has the pool, and its caller works along. A call that finds the pool taken, or comes from inside
//! of another, runs where it is: nothing ever waits for a thread, so there is no deadlock.

use std::{
    ffi::c_void,
    num::NonZero,
    sync::{
        Mutex, OnceLock,
        atomic::{AtomicUsize, Ordering},
    },
};

use rayon::{ThreadPool, ThreadPoolBuilder};
use torus_abi::table::ParallelBody;

static LIMIT: OnceLock<usize> = OnceLock::new();
/// `None` where one thread is all there is.
static POOL: OnceLock<Option<ThreadPool>> = OnceLock::new();
static TAKEN: Mutex<()> = Mutex::new(());

/// Sets how many threads kernels may use, callers included. Without it as many as affinity and cgroup allow. The first
/// call of a process counts, and only before a kernel has used threads.
pub fn limit_kernel_threads(threads: usize) {
    LIMIT.get_or_init(|| threads.max(1));
}

pub(crate) extern "C" fn threads() -> usize {
    *LIMIT.get_or_init(|| std::thread::available_parallelism().map_or(1, NonZero::get))
}

pub(crate) unsafe extern "C" fn parallel_for(count: usize, body: ParallelBody, context: *const c_void) {
    let (next, work) = (AtomicUsize::new(0), Work { body, context });
    let drain = || {
        loop {
            let index = next.fetch_add(1, Ordering::Relaxed);
            if index >= count {
                break;
            }
            work.call(index);
        }
    };
    let taken = TAKEN.try_lock();
    match (pool(), taken) {
        (Some(pool), Ok(_taken)) if count > 1 => pool.in_place_scope(|scope| {
            for _ in 0..pool.current_num_threads().min(count - 1) {
                scope.spawn(|_| drain());
            }
            drain();
        }),
        _ => drain(),
    }
}

/// The workers: all threads but the caller's.
fn pool() -> Option<&'static ThreadPool> {
    let build = || {
        let workers = threads() - 1;
        let named = ThreadPoolBuilder::new().num_threads(workers).thread_name(|index| format!("kernel-{index}"));
        // With 0 rayon would take as many as there are cores.
        let built = (workers > 0).then(|| named.build())?;
        built.inspect_err(|error| tracing::warn!(%error, "kernels run on one thread: no others can be started")).ok()
    };
    POOL.get_or_init(build).as_ref()
}

/// A plugin's closure.
struct Work {
    body: ParallelBody,
    context: *const c_void,
}

impl Work {
    fn call(&self, index: usize) {
        // SAFETY: the table's contract: `body` may be called with `context` from any thread until `parallel_for`
        // returns, and does not unwind.
        unsafe { (self.body)(self.context, index) }
    }
}

// SAFETY: as in `call`.
unsafe impl Sync for Work {}

#[cfg(test)]
mod tests {
    use super::*;

    fn run<F: Fn(usize) + Sync>(count: usize, body: F) {
        unsafe extern "C" fn call<F: Fn(usize) + Sync>(body: *const c_void, index: usize) {
            // SAFETY: `run` passes its closure.
            unsafe { (*body.cast::<F>())(index) }
        }
        // SAFETY: the closure outlives the call and may be called from any thread.
        unsafe { parallel_for(count, call::<F>, (&raw const body).cast()) };
    }

    #[test]
    fn every_index_comes_once_also_from_inside_and_from_several_threads() {
        limit_kernel_threads(3);
        let counts: Vec<_> = (0..1000).map(|_| AtomicUsize::new(0)).collect();
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    run(10, |outer| {
                        run(100, |inner| {
                            counts[outer * 100 + inner].fetch_add(1, Ordering::Relaxed);
                        });
                    });
                });
            }
        });
        assert!(counts.iter().all(|count| count.load(Ordering::Relaxed) == 4));
        assert_eq!(threads(), 3);
        run(0, |_| panic!("there is nothing to do"));
    }
}
