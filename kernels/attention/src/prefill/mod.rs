//! Prefill: sequences with many new tokens.
//!
//! A *tile* is as many consecutive new tokens of one chunk as [`Tiles::tokens`], in one unit: a few hundred query rows
//! of each KV head, enough to keep the matrix units busy. For every tile there is a walk over the *blocks* of keys and
//! values that its tokens see, [`Tiles::block`] tokens each: first those from the cache, then those that are new. Blocks
//! that no token of the tile sees are not on the way, so neither the future nor what lies before a window costs
//! anything. One loop goes over all blocks of all tiles of all chunks; copies run ahead of it whichever tile they are
//! for ([`walk`]).
//!
//! A block that all rows see whole is taken at once, without a mask. One at an edge (the diagonal, the end of the cache,
//! the beginning of a window) is taken in parts, masked, and parts that nobody sees are left out.
//!
//! The pages hold tokens below `old`; what lies behind them in the last page is being written meanwhile. So new keys
//! and values are read from [`Launch::new`], and the two kinds of blocks do not mix. A block's tokens come as words of
//! two heads; a head's matrix pairs the words of its lower half with those of its upper half, so column `c` is token
//! `c / 2 + c % 2 * half` of it.
//!
//! What it leaves: the attended rows in [`Launch::query`], where the query's were. A row is read before it is written.
//! Every copy that it starts it waits for.
//!
//! The query is multiplied by the scale of the scores and rounded to `bf16` once more before products are made, which
//! costs nothing in the loop.
//!
//! Deliberately absent: a mask among new tokens; draft tokens are decoded.

mod attend;
mod rows;
mod walk;

use torus_mosaic::{Elem, Ref, Semaphore, Space, Value};

use crate::{
    launch::Launch,
    layout::{LANES, Layout},
    queue,
    tuned::Tiles,
};

use walk::{Place, Step};

/// Emits the loop over blocks. It is called where there is a chunk.
pub(crate) fn emit(launch: &Launch<'_>) {
    Prefill::new(launch).build();
}

/// Blocks in the ring, of which all but one are in flight.
const RING: i32 = 3;

struct Prefill<'l, 'k> {
    l: &'l Launch<'k>,
    tiles: Tiles,
    /// `bf16 [2, lane chunks, tokens, rows, 128]`: query rows as they come and as they go, of two tiles in turn.
    rows: Ref<'k>,
    /// `bf16 [heads, tile rows, width]`: the tile's query by KV head, scaled.
    query: Ref<'k>,
    /// `i32 [ring, planes, block, 128]`
    ring: Ref<'k>,
    /// `bf16`, constant: what brings rows by token to rows by head, and back.
    gather: Ref<'k>,
    scatter: Ref<'k>,
    /// `f32 [heads, tile rows, 128]`: the running maximum, in every lane.
    max: Ref<'k>,
    /// The same of the sum, by lane and yet to be added up.
    sum: Ref<'k>,
    /// `f32 [heads, tile rows, width]`
    acc: Ref<'k>,
    arrived: Semaphore<'k>,
    read: Semaphore<'k>,
    written: Semaphore<'k>,
}

impl<'l, 'k> Prefill<'l, 'k> {
    fn new(launch: &'l Launch<'k>) -> Self {
        let (k, layout, tiles) = (launch.k, launch.layout, launch.tuning.tiles);
        let (heads, width, rows) = (layout.unit_heads, layout.width(), tile_rows(layout, &tiles));
        let (batch, moved) = (tiles.batch(layout), heads * layout.group * tiles.batch(layout));
        let vmem = |elem: Elem, dims: &[usize]| k.scratch(Space::Vmem, elem.of(dims));
        Self {
            l: launch,
            tiles,
            rows: vmem(Elem::Bf16, &[2, width / LANES, tiles.tokens, layout.rows(), LANES]),
            query: vmem(Elem::Bf16, &[heads, rows, width]),
            ring: vmem(Elem::I32, &[RING as usize, layout.planes, tiles.block, LANES]),
            gather: vmem(Elem::Bf16, &[moved, batch * layout.rows()]),
            scatter: vmem(Elem::Bf16, &[batch * layout.rows(), moved]),
            max: vmem(Elem::F32, &[heads, rows, LANES]),
            sum: vmem(Elem::F32, &[heads, rows, LANES]),
            acc: vmem(Elem::F32, &[heads, rows, width]),
            arrived: k.dma_semaphores(&[RING as usize]),
            read: k.dma_semaphores(&[2]),
            written: k.dma_semaphores(&[2]),
        }
    }

    fn build(&self) {
        let k = self.l.k;
        let first = Place::first(k);
        self.copy_rows(&self.tile(&first), k.i32(0), Step::StartRead);
        let mut ahead = first;
        self.place_rows();
        for slot in 0..RING - 1 {
            ahead = self.fetch(&ahead, k.i32(slot));
        }
        // Where the loop is and where its copies are; the block's slot; which of the two buffers of rows is the tile's,
        // and how many rows of the tile before are on their way out.
        let mut carried = [first.values(), ahead.values()].concat();
        carried.extend([k.i32(0), k.i32(0), k.i32(0)]);
        let is_left = |carried: &[Value<'k>]| carried[0].lt(self.l.count(queue::CHUNKS));
        let last = k.while_loop(&carried, is_left, |carried| self.step(carried));
        let [.., buffer, leaving] = last[..] else { return };
        self.copy_rows_of(leaving, other(buffer), Step::AwaitWrite);
    }

    /// One block of one tile.
    fn step(&self, carried: &[Value<'k>]) -> Vec<Value<'k>> {
        let k = self.l.k;
        let (here, ahead) = (Place::from_values(carried), Place::from_values(&carried[Place::VALUES..]));
        let [slot, buffer, leaving] = [0, 1, 2].map(|i| carried[2 * Place::VALUES + i]);
        let tile = self.tile(&here);
        let block = self.block(&tile, here.block);
        let is_first = here.block.eq(0);
        k.when(is_first, || self.begin(&tile, buffer));
        let ahead = self.fetch(&ahead, cyclic(slot + (RING - 1)));
        self.copy_block(&tile, &block, slot, Step::AwaitRead);
        let nothing = Vec::new;
        k.if_else(
            block.whole,
            || {
                self.attend_whole(slot);
                nothing()
            },
            || {
                self.attend_edge(&tile, &block, slot);
                nothing()
            },
        );
        // The other buffer is free once the tile before has left it.
        let next_tile = here.next_tile(self, &tile);
        k.when(is_first, || {
            self.copy_rows_of(leaving, other(buffer), Step::AwaitWrite);
            k.when(next_tile.chunk.lt(self.l.count(queue::CHUNKS)), || {
                self.copy_rows(&self.tile(&next_tile), other(buffer), Step::StartRead);
            });
        });
        let is_last = (here.block + 1).ge(tile.blocks);
        k.when(is_last, || self.finish(&tile, buffer));
        let next = Place::choose(is_last, &next_tile, &Place { block: here.block + 1, ..here });
        let leaving = is_last.select(tile.rows, is_first.select(k.i32(0), leaving));
        let mut carried = [next.values(), ahead.values()].concat();
        carried.extend([cyclic(slot + 1), is_last.select(other(buffer), buffer), leaving]);
        carried
    }
}

/// Query rows of one KV head in a tile.
fn tile_rows(layout: &Layout, tiles: &Tiles) -> usize {
    tiles.tokens * layout.group
}

/// A slot of the ring, of a number below twice their count.
fn cyclic(slot: Value<'_>) -> Value<'_> {
    slot.ge(RING).select(slot - RING, slot)
}

/// Of the two buffers of rows, not this one.
fn other(buffer: Value<'_>) -> Value<'_> {
    buffer ^ 1
}
