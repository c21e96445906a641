//! Packed weights from one start to the next, for models that are big enough ([`torus_weights::CacheEntry`]).

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::Instant,
};

use torus_weights::{AlignedBytes, CacheEntry, LoadPlan};

use crate::config::WeightCacheConfig;

/// The entry for a plan, if its weights are worth keeping.
pub(crate) fn entry(config: Option<&WeightCacheConfig>, plan: &LoadPlan<'_>) -> Option<CacheEntry> {
    let config = config.filter(|config| plan.bytes() >= config.from_bytes)?;
    match CacheEntry::new(&config.folder, plan) {
        Ok(entry) => Some(entry),
        Err(error) => {
            tracing::warn!(folder = %config.folder.display(), %error, "packed weights are not cached");
            None
        }
    }
}

/// Memory that a device reads and a thread writes to disk.
#[derive(Clone, Debug)]
pub(crate) struct SharedBytes(Arc<AlignedBytes>);

impl SharedBytes {
    pub fn new(bytes: AlignedBytes) -> Self {
        Self(Arc::new(bytes))
    }
}

impl AsRef<[u8]> for SharedBytes {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

/// Writes an entry beside a serving engine. Dropped before it is done, it leaves none.
#[derive(Debug)]
pub(crate) struct Keeping {
    cancelled: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Keeping {
    pub fn start(entry: CacheEntry, matrices: SharedBytes, vectors: Vec<u8>) -> Self {
        let cancelled = Arc::new(AtomicBool::new(false));
        let is_cancelled = cancelled.clone();
        let write = move || {
            let (started, file, bytes) = (Instant::now(), entry.path(), entry.bytes());
            let stored = entry.store(matrices.as_ref(), &vectors, &|| is_cancelled.load(Ordering::Acquire));
            match stored {
                Ok(()) if is_cancelled.load(Ordering::Acquire) => {}
                Ok(()) => {
                    let seconds = started.elapsed().as_secs_f32();
                    tracing::info!(file = %file.display(), bytes, seconds, "packed weights are cached");
                }
                Err(error) => tracing::warn!(file = %file.display(), %error, "packed weights are not cached"),
            }
        };
        let thread = thread::Builder::new().name("weight-cache".to_owned()).spawn(write);
        if let Err(error) = &thread {
            tracing::warn!(%error, "packed weights are not cached");
        }
        Self { cancelled, thread: thread.ok() }
    }
}

impl Drop for Keeping {
    fn drop(&mut self) {
        self.cancelled.store(true, Ordering::Release);
        // A panic there has been reported, and cost an entry.
        let _ = self.thread.take().map(JoinHandle::join);
    }
}
