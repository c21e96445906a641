//! Sizes that make the kernel fast.

use crate::{layout::Layout, spec::Spec};

/// Sizes of decode's loop.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Tuning {
    /// Pages that one iteration takes, of any sequences. Even.
    pub pages: usize,
    /// Groups of pages in the ring, a power of two, of which all but two are in flight.
    pub ring: usize,
}

/// A tile is one unit of one page: what an iteration's time grows with.
const TILES: usize = 4;
/// Groups in the ring.
const RING: usize = 8;

impl Tuning {
    pub fn new(_: &Spec, layout: &Layout) -> Self {
        Self { pages: (TILES / layout.units).max(1).next_multiple_of(2), ring: RING }
    }
}
