//! Memory to stream, in large pages where the system has them, as the engine's.

use std::ops::{Deref, DerefMut};

use memmap2::{Advice, MmapMut};

use super::{Level, level};
use crate::{
    packed::ALIGNMENT,
    workspace::{Buffer, Plain},
};

/// Zeroed bytes that begin with a page, or with a cache line where the system has no pages left.
pub struct Memory(Kind);

enum Kind {
    Pages(MmapMut),
    Heap(Buffer<u8>),
}

impl Memory {
    pub fn zeroed(len: usize) -> Self {
        match MmapMut::map_anon(len.max(1)) {
            Ok(pages) => {
                // A system that has no large ones says so, which changes nothing else.
                #[cfg(target_os = "linux")]
                let _ = pages.advise(Advice::HugePage);
                let mut memory = Self(Kind::Pages(pages));
                // Really there, so that no kernel waits for the system to clear them.
                memory.fill(0);
                memory
            }
            Err(_) => Self(Kind::Heap(Buffer::zeroed(len))),
        }
    }

    /// The bytes as elements, without those at the end that make none.
    pub fn elements_mut<T: Plain>(&mut self) -> &mut [T] {
        elements_mut(self)
    }
}

/// Bytes that begin with a cache line as elements, without those at the end that make none.
pub(super) fn elements_mut<T: Plain>(bytes: &mut [u8]) -> &mut [T] {
    assert!(bytes.as_ptr().addr().is_multiple_of(ALIGNMENT), "memory that begins with a cache line");
    let len = bytes.len() / size_of::<T>();
    // SAFETY: any bytes are a value of a plain type, whose alignment is at most a cache line's.
    unsafe { std::slice::from_raw_parts_mut(bytes.as_mut_ptr().cast(), len) }
}

impl Deref for Memory {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match &self.0 {
            Kind::Pages(pages) => pages,
            Kind::Heap(bytes) => bytes,
        }
    }
}

impl DerefMut for Memory {
    fn deref_mut(&mut self) -> &mut [u8] {
        match &mut self.0 {
            Kind::Pages(pages) => pages,
            Kind::Heap(bytes) => bytes,
        }
    }
}

/// What the words of some memory add up to.
pub(super) fn sum(words: &[[u8; 256]]) -> u64 {
    #[cfg(target_arch = "x86_64")]
    if level() >= Level::Avx512 {
        // SAFETY: the level is one that this machine has.
        return unsafe { sum_avx512(words) };
    }
    #[cfg(target_arch = "x86_64")]
    if level() == Level::Avx2 {
        // SAFETY: as above.
        return unsafe { sum_avx2(words) };
    }
    sum_plain(words)
}

#[inline(always)]
fn sum_plain(words: &[[u8; 256]]) -> u64 {
    let mut sums = [0u64; 32];
    for chunk in words {
        for (sum, word) in sums.iter_mut().zip(chunk.as_chunks().0) {
            *sum = sum.wrapping_add(u64::from_le_bytes(*word));
        }
    }
    sums.iter().fold(0, |sum, word| sum.wrapping_add(*word))
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn sum_avx2(words: &[[u8; 256]]) -> u64 {
    sum_plain(words)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
fn sum_avx512(words: &[[u8; 256]]) -> u64 {
    use std::arch::x86_64::*;
    let mut sums = [_mm512_setzero_si512(); 4];
    for chunk in words {
        for (index, sum) in sums.iter_mut().enumerate() {
            // SAFETY: the chunk has four of these.
            let words = unsafe { _mm512_loadu_si512(chunk.as_ptr().add(index * 64).cast()) };
            *sum = _mm512_add_epi64(*sum, words);
        }
    }
    sums.iter().fold(0, |sum, words| sum.wrapping_add(_mm512_reduce_add_epi64(*words) as u64))
}
