//! Sizes that make the kernel fast.

use crate::{
    layout::{LANES, Layout},
    spec::Spec,
};

/// Sizes of decode's loop, and prefill's.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Tuning {
    /// Pages that one iteration takes, of any sequences. Even.
    pub pages: usize,
    /// Groups of pages in the ring, a power of two, of which all but two are in flight.
    pub ring: usize,
    pub tiles: Tiles,
}

/// Sizes of prefill's loop.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Tiles {
    /// New tokens of a tile, a power of two from 16 on. Enough that a tile's rows keep the matrix units busy for longer
    /// than a block takes to arrive, and than the latency of what stands before and after them.
    pub tokens: usize,
    /// Tokens of a block of keys and values: a power of two, 256 at least.
    pub block: usize,
    /// Rows of a strip, which are multiplied at once: a power of two, at most `tokens`. Weights are pushed into the
    /// matrix units once for each, and the scores of two strips exist at a time.
    pub rows: usize,
}

/// Query rows that are brought to their heads by one product, of which the matrix unit takes 256 at once.
const BATCH_ROWS: usize = 256;
/// Fewest tokens of it: rows of `bf16` are stored in sixteens.
const BATCH_TOKENS: usize = 16;

/// Query rows of a tile, of all heads of a unit.
const TILE_ROWS: usize = 2048;

impl Tiles {
    pub fn new(layout: &Layout) -> Self {
        let tokens = (TILE_ROWS / (layout.unit_heads * layout.group)).max(1);
        let tokens = (1 << tokens.ilog2()).clamp(64, 1024);
        Self { tokens, block: 1024, rows: 256.min(tokens) }
    }

    /// Tokens of a part of a block, of which those at an edge are taken: columns of the matrix unit.
    pub fn part(&self) -> usize {
        (self.block / 4).max(LANES)
    }

    /// Tokens whose query rows are brought to their heads, and back, at once: a power of two.
    pub fn batch(&self, layout: &Layout) -> usize {
        let tokens = (BATCH_ROWS / layout.rows()).max(BATCH_TOKENS);
        (1 << tokens.ilog2()).min(self.tokens)
    }

    /// Batches that an iteration moves, so that one's latency is another's work.
    pub fn batches_at_once(&self, layout: &Layout) -> usize {
        (self.tokens / self.batch(layout)).min(4)
    }
}

/// A tile is one unit of one page: what an iteration's time grows with.
const TILES: usize = 4;
/// Groups in the ring.
const RING: usize = 8;

impl Tuning {
    pub fn new(_: &Spec, layout: &Layout) -> Self {
        Self { pages: (TILES / layout.units).max(1).next_multiple_of(2), ring: RING, tiles: Tiles::new(layout) }
    }
}
