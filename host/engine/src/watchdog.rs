//! Notices a step that hangs.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use crate::{api::Readiness, handle::Shared};

/// Watches from a thread of its own. A step that takes too long is logged and the engine is no longer ready, until it
/// ends after all; what hangs in a device cannot be taken back from here.
pub(crate) struct Watchdog {
    state: Arc<State>,
    thread: Option<thread::Thread>,
}

struct State {
    epoch: Instant,
    /// Milliseconds since `epoch` at which the oldest step in flight began, plus one; 0 = nothing is in flight.
    since_ms: AtomicU64,
    stopped: AtomicBool,
    /// A step was reported.
    reported: AtomicBool,
    shared: Arc<Shared>,
}

/// How often it looks, as a share of the time-out.
const LOOKS_PER_TIMEOUT: u32 = 10;

impl Watchdog {
    pub fn start(timeout: Duration, shared: Arc<Shared>) -> Self {
        let state = Arc::new(State {
            epoch: Instant::now(),
            since_ms: AtomicU64::new(0),
            stopped: AtomicBool::new(false),
            reported: AtomicBool::new(false),
            shared,
        });
        let watched = state.clone();
        let watch = move || {
            while !watched.stopped.load(Ordering::Acquire) {
                thread::park_timeout(timeout / LOOKS_PER_TIMEOUT);
                let since = watched.since_ms.load(Ordering::Acquire);
                let now = watched.epoch.elapsed().as_millis() as u64;
                let too_long = since > 0 && now.saturating_sub(since - 1) > timeout.as_millis() as u64;
                if too_long && !watched.reported.swap(true, Ordering::AcqRel) {
                    let message = format!("a step has been running for more than {} s", timeout.as_secs());
                    tracing::error!("{message}; the device or a kernel hangs: restart the server");
                    watched.shared.set_readiness(Readiness::Failed { message });
                }
            }
        };
        // Without the thread nothing is watched, and everything else works.
        let started = thread::Builder::new().name("torus-watchdog".into()).spawn(watch);
        if let Err(error) = &started {
            tracing::warn!(%error, "hung steps will not be noticed");
        }
        Self { state, thread: started.ok().map(|handle| handle.thread().clone()) }
    }

    /// A step begins.
    pub fn begin(&self) {
        let now = self.state.epoch.elapsed().as_millis() as u64 + 1;
        // Only the oldest counts; one that is in flight already is older.
        let _ = self.state.since_ms.compare_exchange(0, now, Ordering::AcqRel, Ordering::Acquire);
    }

    /// The oldest step has ended; if another is in flight, it begins to count with the next look.
    pub fn end(&self) {
        self.state.since_ms.store(0, Ordering::Release);
        if self.state.reported.swap(false, Ordering::AcqRel) {
            tracing::warn!("the step that took too long has ended");
            self.state.shared.set_readiness(Readiness::Ready);
        }
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        self.state.stopped.store(true, Ordering::Release);
        // It would else sleep on long after its engine.
        self.thread.iter().for_each(thread::Thread::unpark);
    }
}
