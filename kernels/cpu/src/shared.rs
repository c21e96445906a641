//! Results that several threads write to, and how caches keep them.

use std::{marker::PhantomData, ops::Range};

/// Bytes of a line of the caches.
pub(crate) const LINE: usize = 64;

/// A slice whose disjoint parts are written by several threads.
pub(crate) struct Shared<'a, T> {
    start: *mut T,
    len: usize,
    slice: PhantomData<&'a mut [T]>,
}

// SAFETY: the parts that threads get are disjoint, as `part` demands.
unsafe impl<T: Send> Sync for Shared<'_, T> {}

impl<'a, T> Shared<'a, T> {
    pub fn new(slice: &'a mut [T]) -> Self {
        Self { start: slice.as_mut_ptr(), len: slice.len(), slice: PhantomData }
    }

    /// # Safety
    /// No two parts that exist at the same time overlap.
    #[expect(clippy::mut_from_ref, reason = "threads share the whole, and own their parts")]
    pub unsafe fn part(&self, range: Range<usize>) -> &mut [T] {
        assert!(range.start <= range.end && range.end <= self.len, "a part of the slice");
        // SAFETY: within the slice, and the caller says that no one else uses it.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(range.start), range.len()) }
    }
}
