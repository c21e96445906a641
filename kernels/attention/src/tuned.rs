//! Sizes that make the kernel fast: a table of kinds that were measured, and a rule for all others.
//!
//! What was measured are cycles of the compiler's schedule (libtpu 0.0.52), for a batch of long sequences. More pages in
//! an iteration hide more of the matrix unit's latency, and leave more of it at the end, where nothing hides it.
//!
//! Decode computes in less time than its pages take to arrive, but for caches of int8, which are widened for the matrix
//! unit. A TPU7x, which reads 1.8 times as much in a cycle as a v6e, needs three times the pages for that; of a single head,
//! or of bytes, it computes just as long.

use torus_mosaic::Generation;

use crate::{
    layout::{Form, LANES, Layout},
    queue::HEAD_ITEMS,
    spec::{KvFormat, Spec},
};

/// Sizes of decode's loop, and prefill's.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Tuning {
    /// Pages that one iteration takes, of any sequences. Even, where pages of one head are multiplied in pairs.
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

/// What decides how long an iteration takes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Key {
    generation: Generation,
    form: Form,
    units: usize,
    /// Query rows of a unit, over all tokens of a slot.
    rows: usize,
    width: usize,
}

const RING: usize = 8;

/// Kinds with their pages, and cycles of an iteration for each 512 KiB that it reads (a TPU v6e reads them in 560).
const TABLE: [(Key, usize); 3] = [
    // 441 with 4 pages; 8 give 328, and twice as long an end.
    (key(Generation::V6e, Form::Pairs, 1, 8, 128), 4),
    // 450 with 4 pages.
    (key(Generation::V6e, Form::Pairs, 1, 16, 128), 4),
    // 339 with 4 pages; 2 would take 545.
    (key(Generation::V6e, Form::Pairs, 1, 8, 256), 4),
];

const fn key(generation: Generation, form: Form, units: usize, rows: usize, width: usize) -> Key {
    Key { generation, form, units, rows, width }
}

/// Bytes of an iteration's pages: as much as hides the latency of one product where little else is to be done.
const GROUP_BYTES: usize = 512 << 10;

impl Tuning {
    /// For slots of one token.
    pub fn new(spec: &Spec, layout: &Layout) -> Self {
        Self::for_slots(spec, layout, 1)
    }

    /// For slots of at most so many tokens.
    pub fn for_slots(spec: &Spec, layout: &Layout, draft: usize) -> Self {
        let key = Key {
            generation: spec.generation,
            form: layout.form,
            units: layout.units,
            rows: draft * layout.rows(),
            width: layout.width(),
        };
        let known = TABLE.iter().find(|(known, _)| *known == key).map(|(_, pages)| *pages);
        Self { pages: known.unwrap_or_else(|| rule(spec, layout, draft)), ring: RING, tiles: Tiles::new(layout) }
    }
}

/// More where computing takes longer than reading: several tokens of a sequence, a chip with more bandwidth, or bytes that
/// are widened.
fn rule(spec: &Spec, layout: &Layout, draft: usize) -> usize {
    let bytes = match spec.generation {
        Generation::Tpu7x => 3 * GROUP_BYTES,
        _ if draft > 1 => 2 * GROUP_BYTES,
        // 814 cycles for what is read in 840; 8 pages take 623 of 560.
        Generation::V6e if matches!(spec.kv, KvFormat::Int8 { .. }) => 3 * GROUP_BYTES / 2,
        _ => GROUP_BYTES,
    };
    let step = if layout.is_joined() { 2 } else { 1 };
    // The first groups' items come with the counts, and two groups are in flight at least.
    (bytes / layout.page_bytes()).next_multiple_of(step).clamp(step, HEAD_ITEMS / 2)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Scales, Shape, tests::decode::spec};

    /// The rule gives sizes that a kernel can have, for whatever kind.
    #[test]
    fn the_rule_fits_every_kind() {
        let scales = Scales { keys: 1.0, values: 1.0 };
        for generation in [Generation::V5e, Generation::V6e, Generation::Tpu7x] {
            for (q_heads, kv_heads) in [(1, 1), (5, 1), (8, 1), (9, 3), (8, 2), (4, 4), (12, 4), (32, 8), (16, 16)] {
                for (head_dim, kv) in [
                    (64, KvFormat::Bf16),
                    (128, KvFormat::Bf16),
                    (256, KvFormat::Bf16),
                    (128, KvFormat::Fp8 { scales }),
                    (128, KvFormat::Int8 { scales }),
                ] {
                    for draft in [1, 4] {
                        let spec = Spec { generation, kv, ..spec(q_heads, kv_heads, head_dim) };
                        let Ok(layout) = Layout::new(&spec) else { continue };
                        let shape = Shape { tokens: 256, seqs: 64, pages: 512, page_table: 1024, draft };
                        let pages = rule(&spec, &layout, draft);
                        let tuning = Tuning { pages, ring: RING, tiles: Tiles::new(&layout) };
                        assert!(tuning.pages >= 1 && 2 * tuning.pages <= HEAD_ITEMS);
                        crate::check(&spec, &shape, &tuning).unwrap_or_else(|error| panic!("{spec:?}: {error}"));
                    }
                }
            }
        }
    }
}
