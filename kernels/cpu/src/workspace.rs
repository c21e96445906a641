//! Memory for the intermediate values of a call.
//!
//! Every thread keeps the memory that its calls gave back, in sizes of powers of two: once a thread has run its largest
//! call, no further call allocates.

use std::{
    alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error},
    cell::RefCell,
    ops::{Deref, DerefMut},
    ptr::NonNull,
};

use half::bf16;

use crate::packed::ALIGNMENT;

/// The smallest piece of memory is 2 to the power of this.
const SMALLEST: u32 = 12;
const SIZES: usize = usize::BITS as usize;

thread_local! {
    static FREE: RefCell<[Vec<Memory>; SIZES]> = const { RefCell::new([const { Vec::new() }; SIZES]) };
}

/// Types for which any initialized bytes are a value.
///
/// # Safety
/// That must be so, and the alignment at most [`ALIGNMENT`].
pub unsafe trait Plain: Copy + Send + Sync + 'static {}

// SAFETY: numbers.
unsafe impl Plain for f32 {}
// SAFETY: as above.
unsafe impl Plain for bf16 {}
// SAFETY: as above.
unsafe impl Plain for i8 {}
// SAFETY: as above.
unsafe impl Plain for u8 {}
// SAFETY: as above.
unsafe impl Plain for i32 {}
// SAFETY: as above.
unsafe impl Plain for u32 {}

/// Memory of 2 to the power of `power` bytes, always initialized.
struct Memory {
    start: NonNull<u8>,
    power: u32,
}

impl Memory {
    fn layout(power: u32) -> Layout {
        // Neither is ever zero or above the address space: lengths of slices come in here.
        Layout::from_size_align(1 << power, ALIGNMENT).unwrap_or(Layout::new::<[u8; 1 << SMALLEST]>())
    }

    fn new(power: u32) -> Self {
        let layout = Self::layout(power);
        assert_eq!(layout.size(), 1 << power, "a length that memory can have");
        // SAFETY: the size is not zero.
        let start = NonNull::new(unsafe { alloc_zeroed(layout) }).unwrap_or_else(|| handle_alloc_error(layout));
        Self { start, power }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: allocated with the same layout, once.
        unsafe { dealloc(self.start.as_ptr(), Self::layout(self.power)) };
    }
}

/// A slice of `T` from the thread's workspace, aligned to [`ALIGNMENT`], given back when dropped. It holds what the
/// last user left there.
pub struct Buffer<T> {
    memory: Option<Memory>,
    start: NonNull<T>,
    len: usize,
}

// SAFETY: it owns its elements, and `Plain` ones may be read by any thread.
unsafe impl<T: Plain> Sync for Buffer<T> {}
// SAFETY: as above; whoever drops it keeps the memory.
unsafe impl<T: Plain> Send for Buffer<T> {}

impl<T: Plain> Buffer<T> {
    pub fn take(len: usize) -> Self {
        if len == 0 {
            return Self::default();
        }
        let power = (len * size_of::<T>()).next_power_of_two().trailing_zeros().max(SMALLEST);
        let kept = FREE.with_borrow_mut(|free| free[power as usize].pop());
        let memory = kept.unwrap_or_else(|| Memory::new(power));
        Self { start: memory.start.cast(), memory: Some(memory), len }
    }

    /// As [`Self::take`], filled with zeros.
    pub fn zeroed(len: usize) -> Self {
        let buffer = Self::take(len);
        // SAFETY: so many elements, whose type has zero bytes as a value, and nobody else has them yet.
        unsafe { buffer.start.write_bytes(0, len) };
        buffer
    }

    /// The first element, for threads that write to different parts.
    ///
    /// Writing through it needs what [`Self::deref_mut`] needs for the elements written: no one else uses them.
    pub fn as_shared_ptr(&self) -> *mut T {
        self.start.as_ptr()
    }
}

impl<T> Default for Buffer<T> {
    fn default() -> Self {
        Self { memory: None, start: NonNull::dangling(), len: 0 }
    }
}

impl<T> Deref for Buffer<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        // SAFETY: `len` initialized elements, or none.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }
}

impl<T> DerefMut for Buffer<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as in `deref`, and the buffer is borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }
}

impl<T> Drop for Buffer<T> {
    fn drop(&mut self) {
        if let Some(memory) = self.memory.take() {
            // When the thread ends, its list may be gone: then the memory is freed.
            let _ = FREE.try_with(|free| free.borrow_mut()[memory.power as usize].push(memory));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_aligned_and_used_again() {
        let (first, second) = (Buffer::<f32>::take(5000), Buffer::<i8>::take(20_000));
        let (one, other) = (first.as_ptr().addr(), second.as_ptr().addr());
        assert_ne!(one, other);
        assert!(one.is_multiple_of(ALIGNMENT) && other.is_multiple_of(ALIGNMENT));
        assert_eq!((first.len(), second.len(), Buffer::<f32>::take(0).len()), (5000, 20_000, 0));
        drop(first);
        let again = Buffer::<bf16>::take(16_000);
        assert_eq!(again.as_ptr().addr(), one);
    }
}
