//! Memory that a device can take over as it is.

use std::{
    fs::File,
    io,
    ops::{Deref, DerefMut, Range},
    sync::{Arc, Weak},
};

use memmap2::{MmapMut, MmapOptions, MmapRaw};

/// Bytes that start at a multiple of 64 (whole pages from the system, given back when dropped).
///
/// One allocation can be cut into several with [`split_off`](Self::split_off) and joined again, so that many weights lie
/// in one arena while each is filled by whoever holds its part.
#[derive(Debug)]
pub struct AlignedBytes {
    /// Shared by the parts of one allocation; their ranges never overlap.
    pages: Arc<MmapRaw>,
    offset: usize,
    len: usize,
}

impl AlignedBytes {
    pub const ALIGNMENT: usize = 64;

    pub fn zeroed(len: usize) -> io::Result<Self> {
        // A mapping of no bytes is refused by the system.
        let pages = MmapMut::map_anon(len.max(1))?;
        // Weights are read from end to end in each step: with small pages, hardware stops prefetching at each of them. A
        // system that has no large ones says so, which changes nothing else.
        #[cfg(target_os = "linux")]
        let _ = pages.advise(memmap2::Advice::HugePage);
        Ok(Self { pages: Arc::new(pages.into()), offset: 0, len })
    }

    /// The bytes of a file from `offset` on, which is a multiple of the system's page. They stay in the file's pages, shared
    /// with whoever else maps them; what is written here is seen here only.
    ///
    /// As with every mapped file: whoever truncates it ends the process when the lost part is read.
    pub(crate) fn mapped(file: &File, offset: u64, len: usize) -> io::Result<Self> {
        let mut options = MmapOptions::new();
        options.offset(offset).len(len.max(1));
        // SAFETY: the mapping is private, so that writing to it changes no file. Another process that changes the file
        // meanwhile changes numbers that may take any value.
        let pages = unsafe { options.map_copy(file) }?;
        // The whole file is needed soon. That the system cannot be told costs nothing else.
        #[cfg(target_os = "linux")]
        let _ = pages.advise(memmap2::Advice::WillNeed);
        Ok(Self { pages: Arc::new(pages.into()), offset: 0, len })
    }

    /// What takes the bytes' memory from the system ahead of use.
    pub fn untouched(&self) -> Untouched {
        Untouched { pages: Arc::downgrade(&self.pages), offset: self.offset, len: self.len }
    }

    /// Keeps the bytes before `at` and returns the others, without copying.
    ///
    /// # Panics
    /// If `at` is past the end or no multiple of [`Self::ALIGNMENT`].
    pub fn split_off(&mut self, at: usize) -> Self {
        assert!(at <= self.len, "cannot split {} bytes at {at}", self.len);
        assert!(at.is_multiple_of(Self::ALIGNMENT), "a split at {at} is not aligned");
        let rest = Self { pages: self.pages.clone(), offset: self.offset + at, len: self.len - at };
        self.len = at;
        rest
    }

    /// Undoes [`split_off`](Self::split_off); gives `rest` back if it does not follow directly.
    pub fn unsplit(&mut self, rest: Self) -> Result<(), Self> {
        if !Arc::ptr_eq(&self.pages, &rest.pages) || self.offset + self.len != rest.offset {
            return Err(rest);
        }
        self.len += rest.len;
        Ok(())
    }
}

/// Bytes of which the system may have given nothing yet but the addresses: it clears a page when that is first touched, and
/// whoever touches it waits meanwhile.
#[derive(Debug)]
pub struct Untouched {
    /// The memory goes with its bytes, whatever is held here.
    pages: Weak<MmapRaw>,
    offset: usize,
    len: usize,
}

impl Untouched {
    #[expect(clippy::len_without_is_empty, reason = "these are no elements")]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Takes the memory for some of the bytes, whose values stay what they are, also while others read and write them. False if
    /// there is nothing more to do: the bytes are gone, or this system has no way to.
    ///
    /// # Panics
    /// If these are not bytes of it.
    pub fn touch(&self, bytes: Range<usize>) -> bool {
        assert!(bytes.start <= bytes.end && bytes.end <= self.len, "{bytes:?} of {} bytes", self.len);
        let Some(pages) = self.pages.upgrade() else { return false };
        #[cfg(target_os = "linux")]
        return pages.advise_range(memmap2::Advice::PopulateWrite, self.offset + bytes.start, bytes.len()).is_ok();
        #[cfg(not(target_os = "linux"))]
        return {
            drop(pages);
            false
        };
    }
}

impl Deref for AlignedBytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: `offset..offset + len` lies inside the mapping (`zeroed` and `mapped` cover it all, `split_off` only divides,
        // `unsplit` only joins neighbours), which lives as long as `pages`. No other part overlaps it, so whoever
        // writes these bytes holds `&mut self`.
        unsafe { std::slice::from_raw_parts(self.pages.as_ptr().add(self.offset), self.len) }
    }
}

impl AsRef<[u8]> for AlignedBytes {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

impl AsMut<[u8]> for AlignedBytes {
    fn as_mut(&mut self) -> &mut [u8] {
        self
    }
}

impl DerefMut for AlignedBytes {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `deref`; `&mut self` is the only access to this part, and the mapping is writable.
        unsafe { std::slice::from_raw_parts_mut(self.pages.as_mut_ptr().add(self.offset), self.len) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_aligned_and_zero() {
        for len in [0, 1, 63, 64, 5000] {
            let bytes = AlignedBytes::zeroed(len).unwrap();
            assert_eq!((bytes.len(), bytes.as_ptr() as usize % AlignedBytes::ALIGNMENT), (len, 0));
            assert!(bytes.iter().all(|byte| *byte == 0));
        }
    }

    #[test]
    fn parts_are_written_from_two_threads_and_joined_again() {
        let mut whole = AlignedBytes::zeroed(4096 + 128).unwrap();
        let start = whole.as_ptr();
        let mut rest = whole.split_off(4096);
        std::thread::scope(|scope| {
            scope.spawn(|| whole.fill(1));
            scope.spawn(|| rest.fill(2));
        });
        whole.unsplit(rest).unwrap();
        assert_eq!((whole.as_ptr(), whole.len()), (start, 4096 + 128));
        assert!(whole[..4096].iter().all(|byte| *byte == 1) && whole[4096..].iter().all(|byte| *byte == 2));
    }

    #[test]
    fn strangers_are_not_joined() {
        let mut one = AlignedBytes::zeroed(64).unwrap();
        let mut two = AlignedBytes::zeroed(128).unwrap();
        let tail = two.split_off(64);
        let tail = one.unsplit(tail).unwrap_err();
        let empty = two.split_off(0);
        drop(two);
        let mut tail = tail;
        assert!(tail.unsplit(empty).is_err(), "parts join in order only");
    }

    #[test]
    fn memory_is_taken_ahead_and_keeps_what_it_holds() {
        let mut bytes = AlignedBytes::zeroed(1 << 20).unwrap();
        bytes[5000] = 7;
        let untouched = bytes.untouched();
        assert_eq!(untouched.len(), 1 << 20);
        // Linux before 5.14 cannot.
        untouched.touch(0..1 << 20);
        assert_eq!((bytes[5000], bytes[5001], bytes[1 << 19]), (7, 0, 0));
        drop(bytes);
        assert!(!untouched.touch(0..1 << 20), "memory that is gone");
    }

    #[test]
    #[should_panic(expected = "not aligned")]
    fn an_unaligned_split_is_refused() {
        AlignedBytes::zeroed(64).unwrap().split_off(10);
    }
}
