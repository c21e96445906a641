//! The memory that the engines of a process share.
//!
//! An engine reserves what its weights and KV pools take before it allocates them, and gives it back when its last
//! buffer is gone. What is not reserved is free: engines do not borrow from each other.

use std::{
    sync::{Arc, Condvar, Mutex, OnceLock},
    time::Duration,
};

use crate::handle::lock;

/// Memory that is counted on where nobody knows how much there is.
const UNKNOWN_TOTAL_BYTES: u64 = 8 << 30;
/// How often who waits for memory looks whether it should go on waiting.
const CANCEL_POLL: Duration = Duration::from_millis(50);

/// The memory of one device, and who holds how much of it.
#[derive(Clone, Debug)]
pub struct MemoryBudget(Arc<Ledger>);

#[derive(Debug)]
struct Ledger {
    /// `None` until the device tells.
    total_bytes: OnceLock<u64>,
    reserved_bytes: Mutex<u64>,
    released: Condvar,
}

/// Memory that is held until this is dropped.
#[derive(Debug)]
pub(crate) struct Reservation {
    budget: MemoryBudget,
    bytes: u64,
}

/// There is less memory than was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{wanted} MiB are needed and {free} MiB are free", wanted = .wanted_bytes >> 20, free = .free_bytes >> 20)]
pub struct Shortage {
    pub wanted_bytes: u64,
    pub free_bytes: u64,
}

impl MemoryBudget {
    /// `total_bytes`: what this process may still take of the device's memory; `None` = as the device says once it is
    /// opened, and 8 GiB if it does not.
    pub fn new(total_bytes: Option<u64>) -> Self {
        Self(Arc::new(Ledger {
            total_bytes: total_bytes.map_or_else(OnceLock::new, OnceLock::from),
            reserved_bytes: Mutex::new(0),
            released: Condvar::new(),
        }))
    }

    /// Takes what the device says, unless the memory is known already.
    pub(crate) fn learn(&self, total_bytes: u64) {
        self.0.total_bytes.get_or_init(|| total_bytes);
    }

    pub fn total_bytes(&self) -> u64 {
        self.0.total_bytes.get().copied().unwrap_or(UNKNOWN_TOTAL_BYTES)
    }

    pub fn free_bytes(&self) -> u64 {
        self.total_bytes().saturating_sub(*lock(&self.0.reserved_bytes))
    }

    pub(crate) fn reserve(&self, bytes: u64) -> Result<Reservation, Shortage> {
        let mut reserved = lock(&self.0.reserved_bytes);
        let free_bytes = self.total_bytes().saturating_sub(*reserved);
        if bytes > free_bytes {
            return Err(Shortage { wanted_bytes: bytes, free_bytes });
        }
        *reserved += bytes;
        Ok(Reservation { budget: self.clone(), bytes })
    }

    /// Waits until others have released enough. `None` if it was cancelled meanwhile.
    pub(crate) fn wait_for(&self, bytes: u64, is_cancelled: impl Fn() -> bool) -> Option<Reservation> {
        while !is_cancelled() {
            if let Ok(reservation) = self.reserve(bytes) {
                return Some(reservation);
            }
            // A release between the two locks is seen after the timeout at the latest.
            let reserved = lock(&self.0.reserved_bytes);
            drop(self.0.released.wait_timeout(reserved, CANCEL_POLL));
        }
        None
    }
}

impl Reservation {
    pub fn bytes(&self) -> u64 {
        self.bytes
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        *lock(&self.budget.0.reserved_bytes) -= self.bytes;
        self.budget.0.released.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_reserved_is_not_free_until_it_is_dropped() {
        let budget = MemoryBudget::new(Some(100 << 20));
        let held = budget.reserve(60 << 20).unwrap();
        let shortage = budget.reserve(50 << 20).unwrap_err();
        assert_eq!(shortage.to_string(), "50 MiB are needed and 40 MiB are free");
        assert_eq!((held.bytes(), budget.free_bytes()), (60 << 20, 40 << 20));
        drop(held);
        assert_eq!(budget.free_bytes(), budget.total_bytes());
    }

    #[test]
    fn what_a_device_says_counts_unless_the_memory_is_known() {
        let (unknown, known) = (MemoryBudget::new(None), MemoryBudget::new(Some(10)));
        assert_eq!(unknown.total_bytes(), UNKNOWN_TOTAL_BYTES);
        for budget in [&unknown, &known] {
            budget.learn(7);
            budget.learn(9);
        }
        assert_eq!((unknown.total_bytes(), known.total_bytes()), (7, 10));
    }

    #[test]
    fn who_waits_gets_what_another_releases() {
        let budget = MemoryBudget::new(Some(10));
        let held = budget.reserve(8).unwrap();
        assert!(budget.wait_for(5, || true).is_none());
        let waiter = budget.clone();
        let waiting = std::thread::spawn(move || waiter.wait_for(5, || false).unwrap().bytes());
        drop(held);
        assert_eq!(waiting.join().unwrap(), 5);
    }
}
