//! The threads that all kernels share: one pool for the process.
//!
//! A step forks and joins hundreds of times, so a fork must cost less than a microsecond: workers spin for a while after
//! a job before they park, and a job is entered through one word, the *gate*. One caller at a time has the pool, and
//! works along. A call that finds it taken, or comes from inside of another, runs where it is: nothing ever waits for a
//! thread that has not begun to work, so there is no deadlock, and a worker that the system does not run delays nobody.

use std::{
    ffi::c_void,
    hint::spin_loop,
    num::NonZero,
    sync::{
        OnceLock,
        atomic::{AtomicBool, AtomicPtr, AtomicUsize, Ordering, fence},
    },
    thread::{self, Thread},
    time::{Duration, Instant},
};

use rustix::thread::{CpuSet, sched_getaffinity, sched_getcpu, sched_setaffinity};
use torus_abi::table::ParallelBody;

static LIMIT: OnceLock<usize> = OnceLock::new();
static PINNED: AtomicBool = AtomicBool::new(true);
static POOL: OnceLock<Pool> = OnceLock::new();

/// How long a worker looks for the next job before it parks: longer than what lies between the kernels of a step, and
/// shorter than what an idle process should burn.
const SPIN: Duration = Duration::from_micros(200);
/// Looks at the gate between two looks at the clock.
const LOOKS: usize = 64;

/// Sets how many threads kernels may use, callers included. Without it as many as affinity and cgroup allow. The first
/// call of a process counts, and only before a kernel has used threads.
pub fn limit_kernel_threads(threads: usize) {
    LIMIT.get_or_init(|| threads.max(1));
}

/// Whether the pool's threads keep to one CPU each, which they do unless told otherwise before they are first used.
pub fn pin_kernel_threads(pinned: bool) {
    PINNED.store(pinned, Ordering::Relaxed);
}

/// Whether no kernel has used the pool for a while, as far as is known: all of its workers are parked, if there are any.
pub fn kernel_threads_are_idle() -> bool {
    POOL.get().is_none_or(|pool| pool.parked.0.load(Ordering::Relaxed) >= pool.workers.len())
}

pub(crate) extern "C" fn threads() -> usize {
    *LIMIT.get_or_init(|| thread::available_parallelism().map_or(1, NonZero::get))
}

pub(crate) unsafe extern "C" fn parallel_for(count: usize, body: ParallelBody, context: *const c_void) {
    let work = Work { body, context };
    let pool = POOL.get_or_init(|| Pool::start(threads() - 1));
    if count > 1 && !pool.workers.is_empty() && !pool.taken.swap(true, Ordering::Acquire) {
        if let Some(places) = &pool.places {
            places.make_way(sched_getcpu());
        }
        pool.run(count, work);
        pool.taken.store(false, Ordering::Release);
    } else {
        (0..count).for_each(|index| work.call(index));
    }
}

/// A plugin's closure.
#[derive(Clone, Copy)]
struct Work {
    body: ParallelBody,
    context: *const c_void,
}

impl Work {
    fn call(self, index: usize) {
        // SAFETY: the table's contract: `body` may be called with `context` from any thread until `parallel_for`
        // returns, and does not unwind.
        unsafe { (self.body)(self.context, index) }
    }
}

/// The bit of the gate that lets workers in.
const OPEN: usize = 1;
/// What one worker inside adds to the gate.
const INSIDE: usize = 2;
/// Gates of different jobs differ from here on, so that a worker never enters a job it has already left.
const JOB: usize = 1 << 16;

/// On a cache line of its own, for threads spin on it.
#[repr(align(128))]
struct Line<T>(T);

struct Pool {
    workers: Vec<Thread>,
    /// Where workers are pinned, if they are.
    places: Option<Places>,
    /// Whether a caller has the pool.
    taken: AtomicBool,
    /// The number of the job, the workers inside, and whether more may come in.
    gate: Line<AtomicUsize>,
    /// The next index of the job.
    next: Line<AtomicUsize>,
    /// The job; only read by workers that are inside.
    count: AtomicUsize,
    body: AtomicPtr<c_void>,
    context: AtomicPtr<c_void>,
    /// Workers that are parked or about to be.
    parked: Line<AtomicUsize>,
}

/// The CPUs that workers are pinned to, and those that are left to callers.
struct Places {
    workers: CpuSet,
    callers: CpuSet,
}

impl Places {
    /// Moves the caller off a worker's CPU, where both would take turns while the callers' CPU idles: the worker cannot
    /// move, and the system mends it only after milliseconds. The caller is not pinned, for XLA's own threads are callers
    /// too, and share all CPUs in between. Gives whether it had to move from the CPU `current`.
    fn make_way(&self, current: usize) -> bool {
        if !self.workers.is_set(current) {
            return false;
        }
        let moved = sched_getaffinity(None).and_then(|own| {
            sched_setaffinity(None, &self.callers)?;
            sched_setaffinity(None, &own)
        });
        if let Err(error) = moved {
            tracing::debug!(%error, "a thread that calls kernels stays on the CPU of another");
        }
        true
    }
}

impl Pool {
    /// With so many workers beside the caller, or as many as the system gives.
    fn start(workers: usize) -> Self {
        let cpus = if PINNED.load(Ordering::Relaxed) { allowed_cpus() } else { Vec::new() };
        // The first CPU is left to the callers; with fewer CPUs than threads nobody is pinned.
        let places = (workers < cpus.len()).then(|| {
            let (first, rest) = cpus.split_at(1);
            let (pinned, others) = rest.split_at(workers);
            Places { workers: set_of(pinned.iter()), callers: set_of(first.iter().chain(others)) }
        });
        let start = |index: usize| {
            let cpu = places.as_ref().and_then(|_| cpus.get(index + 1).copied());
            let named = thread::Builder::new().name(format!("kernel-{index}"));
            named.spawn(move || serve(cpu)).map(|handle| handle.thread().clone())
        };
        let started: Result<Vec<_>, _> = (0..workers).map(start).collect();
        let started = started.inspect_err(|error| tracing::warn!(%error, "kernels run on one thread: no others start"));
        Self {
            workers: started.unwrap_or_default(),
            places,
            taken: AtomicBool::new(false),
            gate: Line(AtomicUsize::new(0)),
            next: Line(AtomicUsize::new(0)),
            count: AtomicUsize::new(0),
            body: AtomicPtr::new(std::ptr::null_mut()),
            context: AtomicPtr::new(std::ptr::null_mut()),
            parked: Line(AtomicUsize::new(0)),
        }
    }

    /// Runs a job; the caller has the pool, and nobody is inside.
    fn run(&self, count: usize, work: Work) {
        self.count.store(count, Ordering::Relaxed);
        self.body.store(work.body as *mut c_void, Ordering::Relaxed);
        self.context.store(work.context.cast_mut(), Ordering::Relaxed);
        self.next.0.store(0, Ordering::Relaxed);
        let job = (self.gate.0.load(Ordering::Relaxed) & !(JOB - 1)).wrapping_add(JOB);
        // Whoever sees this gate sees the job.
        self.gate.0.store(job | OPEN, Ordering::Release);
        // Pairs with the fence of a worker about to park: either it sees the gate, or it is seen here.
        fence(Ordering::SeqCst);
        if self.parked.0.load(Ordering::Relaxed) > 0 {
            self.workers.iter().for_each(Thread::unpark);
        }
        self.drain(count, work);
        self.gate.0.fetch_and(!OPEN, Ordering::Relaxed);
        // What the workers wrote is seen once they have left.
        while self.gate.0.load(Ordering::Acquire) & (JOB - 1) != 0 {
            spin_loop();
        }
    }

    fn drain(&self, count: usize, work: Work) {
        loop {
            let index = self.next.0.fetch_add(1, Ordering::Relaxed);
            if index >= count {
                break;
            }
            work.call(index);
        }
    }

    /// Waits for a job other than the one of `last`, and goes in. Gives the gate's job.
    fn enter(&self, last: usize) -> usize {
        let mut since = Instant::now();
        loop {
            for _ in 0..LOOKS {
                let gate = self.gate.0.load(Ordering::Relaxed);
                let job = gate & !(JOB - 1);
                if gate & OPEN != 0 && job != last {
                    let inside =
                        self.gate.0.compare_exchange(gate, gate + INSIDE, Ordering::Acquire, Ordering::Relaxed);
                    if inside.is_ok() {
                        return job;
                    }
                }
                spin_loop();
            }
            if since.elapsed() > SPIN {
                self.parked.0.fetch_add(1, Ordering::Relaxed);
                fence(Ordering::SeqCst);
                let gate = self.gate.0.load(Ordering::Relaxed);
                if gate & OPEN == 0 || gate & !(JOB - 1) == last {
                    thread::park();
                }
                self.parked.0.fetch_sub(1, Ordering::Relaxed);
                since = Instant::now();
            }
        }
    }

    /// Works on a job that was entered, and leaves it.
    fn work(&self) {
        let body = self.body.load(Ordering::Relaxed);
        // SAFETY: it was stored from such a function before the gate opened, and stays until all have left.
        let body = unsafe { std::mem::transmute::<*mut c_void, ParallelBody>(body) };
        let context = self.context.load(Ordering::Relaxed).cast_const();
        self.drain(self.count.load(Ordering::Relaxed), Work { body, context });
        self.gate.0.fetch_sub(INSIDE, Ordering::Release);
    }
}

/// What a worker does for the rest of the process.
fn serve(cpu: Option<usize>) {
    if let Some(cpu) = cpu {
        pin(cpu);
    }
    let pool = loop {
        // The pool is being made by whoever started this thread.
        match POOL.get() {
            Some(pool) => break pool,
            None => thread::yield_now(),
        }
    };
    let mut last = 0;
    loop {
        last = pool.enter(last);
        pool.work();
    }
}

/// The CPUs that this process may use.
fn allowed_cpus() -> Vec<usize> {
    let allowed = sched_getaffinity(None);
    allowed.map_or_else(|_| Vec::new(), |set| (0..CpuSet::MAX_CPU).filter(|cpu| set.is_set(*cpu)).collect())
}

fn set_of<'a>(cpus: impl Iterator<Item = &'a usize>) -> CpuSet {
    let mut set = CpuSet::new();
    cpus.for_each(|cpu| set.set(*cpu));
    set
}

fn pin(cpu: usize) {
    if let Err(error) = sched_setaffinity(None, &set_of([cpu].iter())) {
        tracing::debug!(cpu, %error, "a kernel thread is not pinned");
    }
}

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
        thread::scope(|scope| {
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

    #[test]
    fn a_caller_leaves_a_workers_cpu_and_may_run_anywhere_afterwards() {
        let cpus = allowed_cpus();
        let (first, rest) = cpus.split_at(1);
        let places = Places { workers: set_of(rest.iter()), callers: set_of(first.iter()) };
        assert!(!places.make_way(first[0]));
        for worker in rest {
            assert!(places.make_way(*worker));
            assert_eq!(allowed_cpus(), cpus);
        }
    }

    #[test]
    fn what_workers_wrote_is_seen_by_the_caller_job_after_job() {
        limit_kernel_threads(3);
        let mut values = [0usize; 4];
        for job in 1..=50_000 {
            let cells = values.each_mut().map(|value| AtomicPtr::new(std::ptr::from_mut(value)));
            // SAFETY: each index comes once, so nobody else has the value.
            run(4, |index| unsafe { *cells[index].load(Ordering::Relaxed) += job });
        }
        assert_eq!(values, [(1..=50_000).sum::<usize>(); 4]);
    }

    #[test]
    fn workers_come_back_from_being_parked() {
        limit_kernel_threads(3);
        let pool = || POOL.get().filter(|pool| !pool.workers.is_empty());
        for _ in 0..5 {
            let sum = AtomicUsize::new(0);
            run(64, |index| {
                sum.fetch_add(index, Ordering::Relaxed);
            });
            assert_eq!(sum.into_inner(), 64 * 63 / 2);
            // Others may use the pool meanwhile: then its workers do not park, which is as well.
            let until = Instant::now() + Duration::from_millis(5);
            while pool().is_some_and(|pool| pool.parked.0.load(Ordering::Relaxed) == 0) && Instant::now() < until {
                thread::yield_now();
            }
        }
    }
}
