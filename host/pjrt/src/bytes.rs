//! Host memory that devices can use in place.

use std::{
    alloc::{Layout, alloc_zeroed, dealloc},
    fmt,
    ops::{Deref, DerefMut},
    ptr::NonNull,
};

use crate::error::{PjrtError, Result};

/// Bytes at an address that XLA's CPU client accepts without copying.
///
/// It asks for 64-byte alignment, which vectors do not have.
pub struct AlignedBytes {
    data: NonNull<u8>,
    len: usize,
    layout: Layout,
}

// SAFETY: plain owned memory, like a vector's.
unsafe impl Send for AlignedBytes {}
// SAFETY: see above.
unsafe impl Sync for AlignedBytes {}

impl AlignedBytes {
    /// Alignment in bytes.
    pub const ALIGN: usize = 64;

    /// Memory of its own, all zero.
    pub fn zeroed(len: usize) -> Result<Self> {
        let out_of_memory = PjrtError::OutOfMemory { bytes: len };
        // Never of size zero, which the allocator does not take.
        let Ok(layout) = Layout::from_size_align(len.max(1), Self::ALIGN) else { return Err(out_of_memory) };
        // SAFETY: the size is not zero.
        let data = NonNull::new(unsafe { alloc_zeroed(layout) }).ok_or(out_of_memory)?;
        Ok(Self { data, len, layout })
    }

    /// A copy of bytes that lie anywhere.
    pub fn copy_of(bytes: &[u8]) -> Result<Self> {
        let mut copy = Self::zeroed(bytes.len())?;
        copy.copy_from_slice(bytes);
        Ok(copy)
    }
}

impl Drop for AlignedBytes {
    fn drop(&mut self) {
        // SAFETY: allocated with this very layout.
        unsafe { dealloc(self.data.as_ptr(), self.layout) };
    }
}

impl Deref for AlignedBytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: `len` initialized bytes, owned by self.
        unsafe { std::slice::from_raw_parts(self.data.as_ptr(), self.len) }
    }
}

impl DerefMut for AlignedBytes {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: `len` initialized bytes, owned by self, which is borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.data.as_ptr(), self.len) }
    }
}

impl AsRef<[u8]> for AlignedBytes {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

impl fmt::Debug for AlignedBytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "AlignedBytes({})", self.len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_aligned_and_kept() {
        for len in [0, 1, 63, 64, 4097] {
            let source: Vec<u8> = (0..len).map(|i| i as u8).collect();
            let bytes = AlignedBytes::copy_of(&source).unwrap();
            assert_eq!(bytes.as_ptr() as usize % AlignedBytes::ALIGN, 0);
            assert_eq!(&bytes[..], &source[..]);
        }
    }

    #[test]
    fn too_much_is_an_error() {
        let error = AlignedBytes::zeroed(usize::MAX).unwrap_err();
        assert!(matches!(error, PjrtError::OutOfMemory { bytes: usize::MAX }), "{error}");
    }
}
