//! The way through chunks, tiles and blocks, in scalars, and the copies along it.

use torus_mosaic::{Builder, Dma, Value, ds, ds_dynamic};

use crate::{launch::ChunkValues, layout::LANES, queue};

use super::Prefill;

/// Where the loop is.
#[derive(Clone, Copy)]
pub(super) struct Place<'k> {
    /// The chunk's number; that of chunks in all, at the end.
    pub chunk: Value<'k>,
    /// The tile's first token, counted from the chunk's.
    pub token: Value<'k>,
    pub unit: Value<'k>,
    /// The block's number among those of the tile.
    pub block: Value<'k>,
}

/// A tile, and what of the sequence it sees.
pub(super) struct Tile<'k> {
    pub chunk: ChunkValues<'k>,
    pub token: Value<'k>,
    /// Its tokens.
    pub rows: Value<'k>,
    pub unit: Value<'k>,
    /// With a window: the position of the first token that its first and that its last token see.
    pub seen: Option<(Value<'k>, Value<'k>)>,
    /// The position of the first token of the cache's first block.
    base: Value<'k>,
    /// The number of the first block that is seen of the cache, and how many are.
    old_from: Value<'k>,
    old_blocks: Value<'k>,
    /// The number of the first block that is seen of the new tokens.
    new_from: Value<'k>,
    /// All blocks.
    pub blocks: Value<'k>,
}

/// A block of keys and values.
pub(super) struct Block<'k> {
    /// It is of new tokens.
    is_new: Value<'k>,
    /// Its first token, counted from the first new one or from `base`.
    start: Value<'k>,
    /// The position of its first token.
    pub position: Value<'k>,
    /// Its tokens.
    pub rows: Value<'k>,
    /// All rows of the tile see all of it.
    pub whole: Value<'k>,
}

/// What is done about a copy.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    StartRead,
    AwaitRead,
    StartWrite,
    AwaitWrite,
}

impl<'k> Place<'k> {
    /// Values that carry it.
    pub const VALUES: usize = 4;

    pub fn first(k: &'k Builder) -> Self {
        Self { chunk: k.i32(0), token: k.i32(0), unit: k.i32(0), block: k.i32(0) }
    }

    pub fn values(&self) -> Vec<Value<'k>> {
        vec![self.chunk, self.token, self.unit, self.block]
    }

    pub fn from_values(values: &[Value<'k>]) -> Self {
        Self { chunk: values[0], token: values[1], unit: values[2], block: values[3] }
    }

    pub fn choose(condition: Value<'k>, yes: &Self, no: &Self) -> Self {
        let chosen: Vec<_> =
            yes.values().into_iter().zip(no.values()).map(|(yes, no)| condition.select(yes, no)).collect();
        Self::from_values(&chosen)
    }

    /// The first block of the tile after this one: of the next unit, token or chunk.
    pub fn next_tile(&self, prefill: &Prefill<'_, 'k>, tile: &Tile<'k>) -> Self {
        let (launch, zero) = (prefill.l, prefill.l.k.i32(0));
        let unit = self.unit + 1;
        let all_units = unit.ge(launch.layout.units as i32);
        let token = all_units.select(self.token + prefill.tiles.tokens as i32, self.token);
        let all_tokens = token.ge(tile.chunk.len);
        Self {
            chunk: all_tokens.select((self.chunk + 1).min(launch.count(queue::CHUNKS)), self.chunk),
            token: all_tokens.select(zero, token),
            unit: all_units.select(zero, unit),
            block: zero,
        }
    }
}

impl<'k> Prefill<'_, 'k> {
    fn bits(&self) -> i32 {
        self.tiles.block.trailing_zeros() as i32
    }

    /// The tile of a place; of the last chunk, if there is none any more.
    pub(super) fn tile(&self, place: &Place<'k>) -> Tile<'k> {
        let (l, bits, size) = (self.l, self.bits(), self.tiles.block as i32);
        let k = l.k;
        let chunk = l.chunk(place.chunk.min(l.count(queue::CHUNKS) - 1));
        let rows = (chunk.len - place.token).min(self.tiles.tokens as i32);
        let end = place.token + rows;
        let base = chunk.first_page * l.spec.page_size as i32;
        let all_old = (chunk.old - base + (size - 1)) >> bits;
        let all_new = (end + (size - 1)) >> bits;
        let zero = k.i32(0);
        let (mut seen, mut old_from, mut old_blocks, mut new_from) = (None, zero, all_old, zero);
        if let Some(window) = l.spec.window {
            let first_of = |token: Value<'k>| (chunk.old + token + (1 - window as i32)).max(0);
            let (first, last) = (first_of(place.token), first_of(end - 1));
            old_from = (first - base).max(0) >> bits;
            old_blocks = first.lt(chunk.old).select(all_old - old_from, zero);
            new_from = (first - chunk.old).max(0) >> bits;
            seen = Some((first, last));
        }
        let blocks = old_blocks + all_new - new_from;
        let (token, unit) = (place.token, place.unit);
        Tile { chunk, token, rows, unit, seen, base, old_from, old_blocks, new_from, blocks }
    }

    pub(super) fn block(&self, tile: &Tile<'k>, number: Value<'k>) -> Block<'k> {
        let (bits, size) = (self.bits(), self.tiles.block as i32);
        let is_new = number.ge(tile.old_blocks);
        let number = is_new.select(tile.new_from + number - tile.old_blocks, tile.old_from + number);
        let start = number << bits;
        let end = is_new.select(tile.token + tile.rows, tile.chunk.old - tile.base);
        let rows = (end - start).min(size);
        let position = start + is_new.select(tile.chunk.old, tile.base);
        // The first row of the tile sees the block's last token.
        let mut whole = rows.ge(size) & (!is_new | (start + (size - 1)).le(tile.token));
        if let Some((_, last)) = tile.seen {
            whole = whole & position.ge(last);
        }
        Block { is_new, start, position, rows, whole }
    }

    /// Starts the copies of a place's block to a slot, if there is one, and gives the place after it.
    pub(super) fn fetch(&self, place: &Place<'k>, slot: Value<'k>) -> Place<'k> {
        let tile = self.tile(place);
        let block = self.block(&tile, place.block);
        self.l.k.when(place.chunk.lt(self.l.count(queue::CHUNKS)), || {
            self.copy_block(&tile, &block, slot, Step::StartRead);
        });
        let is_last = (place.block + 1).ge(tile.blocks);
        let within = Place { block: place.block + 1, ..*place };
        Place::choose(is_last, &place.next_tile(self, &tile), &within)
    }

    /// A block's words, from its pages or from the new tokens.
    pub(super) fn copy_block(&self, tile: &Tile<'k>, block: &Block<'k>, slot: Value<'k>, step: Step) {
        let (l, arrived) = (self.l, self.arrived.at((slot,)));
        let k = l.k;
        if step == Step::AwaitRead {
            let all = self.ring.at((slot, .., ds_dynamic(0, block.rows)));
            return all.copy_to(all, arrived).wait();
        }
        k.when(block.is_new, || {
            let from = l.new.at((tile.unit, .., ds_dynamic(tile.chunk.token + block.start, block.rows)));
            from.copy_to(self.ring.at((slot, .., ds_dynamic(0, block.rows))), arrived).start();
        });
        let (page, first) = (l.spec.page_size, block.start / l.spec.page_size as i32);
        for i in 0..self.tiles.block / page {
            let rows = (block.rows - (i * page) as i32).min(page as i32);
            k.when(!block.is_new & rows.gt(0), || {
                let number = l.pages.get((tile.chunk.item + first + i as i32,));
                let from = l.pool.at((number, tile.unit, .., ds_dynamic(0, rows)));
                from.copy_to(self.ring.at((slot, .., ds_dynamic(i * page, rows))), arrived).start();
            });
        }
    }

    /// The tile's query rows into a buffer, or its output from there.
    pub(super) fn copy_rows(&self, tile: &Tile<'k>, buffer: Value<'k>, step: Step) {
        let token = tile.chunk.token + tile.token;
        self.each_chunk_of_lanes(tile.rows, buffer, step, |chunk| {
            self.l.query.at((ds_dynamic(token, tile.rows), tile.unit, .., ds(chunk * LANES, LANES)))
        });
    }

    /// [`Prefill::copy_rows`], to be waited for, of so many rows; of none, nothing.
    pub(super) fn copy_rows_of(&self, rows: Value<'k>, buffer: Value<'k>, step: Step) {
        self.l.k.when(rows.gt(0), || {
            self.each_chunk_of_lanes(rows, buffer, step, |chunk| self.rows.at((buffer, chunk, ds_dynamic(0, rows))));
        });
    }

    fn each_chunk_of_lanes(
        &self,
        rows: Value<'k>,
        buffer: Value<'k>,
        step: Step,
        far: impl Fn(usize) -> torus_mosaic::Ref<'k>,
    ) {
        for chunk in 0..self.l.layout.width() / LANES {
            let (far, near) = (far(chunk), self.rows.at((buffer, chunk, ds_dynamic(0, rows))));
            let copy: Dma<'k> = match step {
                Step::StartRead | Step::AwaitRead => far.copy_to(near, self.read.at((buffer,))),
                Step::StartWrite | Step::AwaitWrite => near.copy_to(far, self.written.at((buffer,))),
            };
            match step {
                Step::StartRead | Step::StartWrite => copy.start(),
                Step::AwaitRead | Step::AwaitWrite => copy.wait(),
            }
        }
    }
}
