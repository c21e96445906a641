//! What kernels cost: begin and end of each call, while someone records.

use std::{
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Instant,
};

/// One call of a kernel.
#[derive(Clone, Copy, Debug)]
pub struct KernelTime {
    pub name: &'static str,
    pub begin: Instant,
    pub end: Instant,
}

/// Calls recorded at most; later ones are not.
const CALLS_MAX: usize = 1 << 20;

static RECORDING: AtomicBool = AtomicBool::new(false);
static CALLS: Mutex<Vec<KernelTime>> = Mutex::new(Vec::new());

/// Begins to record. What an earlier recording left is dropped.
pub fn start_profile() {
    CALLS.lock().unwrap_or_else(PoisonError::into_inner).clear();
    RECORDING.store(true, Ordering::Relaxed);
}

/// Ends the recording, and gives the calls in the order in which they ended.
pub fn stop_profile() -> Vec<KernelTime> {
    RECORDING.store(false, Ordering::Relaxed);
    std::mem::take(&mut *CALLS.lock().unwrap_or_else(PoisonError::into_inner))
}

/// Runs a call, and notes how long it took if someone records. Nobody else takes the lock during a recording but the
/// calls of other engines.
pub fn timed<T>(name: &'static str, call: impl FnOnce() -> T) -> T {
    if !RECORDING.load(Ordering::Relaxed) {
        return call();
    }
    let begin = Instant::now();
    let result = call();
    let mut calls = CALLS.lock().unwrap_or_else(PoisonError::into_inner);
    if calls.len() < CALLS_MAX {
        calls.push(KernelTime { name, begin, end: Instant::now() });
    }
    result
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_are_recorded_between_start_and_stop() {
        timed("before", || ());
        start_profile();
        assert_eq!(timed("during", || 7), 7);
        let calls = stop_profile();
        timed("after", || ());
        let names: Vec<_> = calls.iter().map(|call| call.name).filter(|name| name.contains("r")).collect();
        assert!(names.contains(&"during") && !names.contains(&"before") && !names.contains(&"after"));
        assert!(calls.iter().all(|call| call.begin <= call.end));
    }
}
