//! A tile's rows and a block's keys and values: products and softmax.
//!
//! Rows of a tile are taken in strips of [`Tiles::rows`](crate::tuned::Tiles::rows). The products of one strip with the
//! keys stand before the softmax of the strip before it, so that the matrix units always have something to do.

use torus_mosaic::{Dim, Elem, Position, Value, ds};

use crate::{
    launch::{LEAST, LOG2_E},
    layout::{LANES, Part},
};

use super::{
    Prefill, tile_rows,
    walk::{Block, Tile},
};

/// Keys and values of a head: `bf16 [tokens, width]`.
#[derive(Clone, Copy)]
struct Matrices<'k> {
    keys: Value<'k>,
    values: Value<'k>,
}

/// Rows of a tile: the head, and the strip of it.
type Strip = (usize, usize);

impl<'k> Prefill<'_, 'k> {
    /// A block that all rows see.
    pub(super) fn attend_whole(&self, slot: Value<'k>) {
        let matrices = self.matrices(slot, 0.into(), self.tiles.block, None);
        self.attend(&matrices, &|_, scores| scores);
    }

    /// A block at an edge, in parts, as far as some row sees them.
    pub(super) fn attend_edge(&self, tile: &Tile<'k>, block: &Block<'k>, slot: Value<'k>) {
        let (k, part) = (self.l.k, self.tiles.part());
        let bits = part.trailing_zeros() as i32;
        let first = tile.seen.map_or(k.i32(0), |(first, _)| (first - block.position).max(0) >> bits);
        let end = (block.rows + (part as i32 - 1)) >> bits;
        k.for_range(first, end, &[], |number, _| {
            let from = (number << bits).assume_multiple(part as u32);
            let matrices = self.matrices(slot, from.into(), part, Some(block.rows - from));
            // The distance of the tile's first token from the part's first one.
            let distance = tile.chunk.old + tile.token - block.position - from;
            let last = block.rows - from - 1;
            self.attend(&matrices, &|strip, scores| self.mask(strip, scores, distance, last));
            Vec::new()
        });
    }

    /// Scores with [`LEAST`] where a token is not seen.
    fn mask(&self, (_, strip): Strip, scores: Value<'k>, distance: Value<'k>, last: Value<'k>) -> Value<'k> {
        let (k, tokens, dims) = (self.l.k, self.tiles.tokens, scores.dims());
        let half = dims[1] as i32 / 2;
        let column = k.iota(dims.clone(), 1);
        let column = (column >> 1) + (column & 1) * half;
        let first = (strip * self.tiles.rows % tokens) as i32;
        let own = k.iota(dims, 0) + (distance + first);
        let mut seen = column.le(own.min(last));
        if let Some(window) = self.l.spec.window {
            seen = seen & column.gt(own - window as i32);
        }
        seen.select(scores, LEAST)
    }

    /// The matrices of the unit's KV heads from `tokens` of a slot; of values, those from `end` on are zero, because they
    /// were not copied.
    fn matrices(
        &self,
        slot: Value<'k>,
        from: Position<'k>,
        tokens: usize,
        end: Option<Value<'k>>,
    ) -> Vec<Matrices<'k>> {
        let (layout, half) = (self.l.layout, tokens / 2);
        let upper: Position<'k> = match from {
            Position::Known(from) => (from + half as i32).into(),
            Position::Value(from) => (from + half as i32).assume_multiple(half as u32).into(),
        };
        // Words of the lower and the upper half, by plane.
        let words = |part: Part| -> Vec<[Value<'k>; 2]> {
            let plane = |plane: usize| {
                [(from, 0), (upper, half)].map(|(row, first)| {
                    let words = self.ring.load_at((slot, plane, ds(row, half)));
                    let words = match end.filter(|_| part == Part::Value) {
                        Some(end) => {
                            let row = self.l.k.iota([half, LANES], 0) + first as i32;
                            row.lt(end).select(words, 0)
                        }
                        None => words,
                    };
                    layout.pairs(self.l.spec, words, part)
                })
            };
            layout.planes_of(part).map(plane).collect()
        };
        let (keys, values) = (words(Part::Key), words(Part::Value));
        let matrix = |words: &[[Value<'k>; 2]], upper: bool| {
            let chunk = |[low, high]: &[Value<'k>; 2]| {
                let words = match upper {
                    false => (*low & 0xFFFF) | (*high << 16),
                    true => low.shift_right_logical(16) | (*high & layout.high_half()),
                };
                words.bitcast(Elem::Bf16)
            };
            let chunks: Vec<_> = words.iter().map(chunk).collect();
            if chunks.len() == 1 { chunks[0] } else { chunks[0].concatenate(&chunks[1..], 1) }
        };
        let joined = layout.is_joined();
        let halves = if joined { 1 } else { 2 };
        let of_half: Vec<_> = (0..halves)
            .map(|half| Matrices { keys: matrix(&keys, half == 1), values: matrix(&values, half == 1 || joined) })
            .collect();
        (0..layout.unit_heads).map(|head| of_half[head % halves]).collect()
    }

    /// Adds what all rows see of a block to their state.
    fn attend(&self, heads: &[Matrices<'k>], mask: &dyn Fn(Strip, Value<'k>) -> Value<'k>) {
        let strips = tile_rows(self.l.layout, &self.tiles) / self.tiles.rows;
        let all: Vec<Strip> = (0..heads.len()).flat_map(|head| (0..strips).map(move |strip| (head, strip))).collect();
        let scores = |strip: Strip| mask(strip, self.scores(strip, heads[strip.0].keys));
        let mut next = all.first().map(|strip| scores(*strip));
        for (i, strip) in all.iter().enumerate() {
            let Some(current) = next else { continue };
            next = all.get(i + 1).map(|strip| scores(*strip));
            self.soften(*strip, current, heads[strip.0].values);
        }
    }

    fn strip_rows(&self, strip: usize) -> Dim<'k> {
        ds(strip * self.tiles.rows, self.tiles.rows)
    }

    fn scores(&self, (head, strip): Strip, keys: Value<'k>) -> Value<'k> {
        let products = self.query.load_at((head, self.strip_rows(strip))).dot_transposed(keys);
        match self.l.spec.soft_cap {
            Some(cap) => products.tanh() * (cap * LOG2_E),
            None => products,
        }
    }

    /// Advances maximum, sum and result of a strip.
    fn soften(&self, (head, strip): Strip, scores: Value<'k>, values: Value<'k>) {
        let rows = self.strip_rows(strip);
        let parts = scores.dims()[1] / LANES;
        let parts: Vec<_> =
            (0..parts).map(|part| scores.slice(&[0, part * LANES], &[self.tiles.rows, LANES])).collect();
        let highest = parts.iter().copied().reduce(|a, b| a.max(b)).unwrap_or(scores).reduce_max(1);
        let before = self.max.load_at((head, rows));
        let max = before.max(highest);
        let scale = (before - max).exp2();
        let weights: Vec<_> = parts.iter().map(|part| (*part - max).exp2()).collect();
        let sum = weights.iter().fold(self.sum.load_at((head, rows)) * scale, |sum, part| sum + *part);
        self.max.store_at((head, rows), max);
        self.sum.store_at((head, rows), sum);
        let narrow: Vec<_> = weights.iter().map(|part| part.cast(Elem::Bf16)).collect();
        let narrow = if narrow.len() == 1 { narrow[0] } else { narrow[0].concatenate(&narrow[1..], 1) };
        let products = narrow.dot(values);
        let acc = self.acc.load_at((head, rows)) * self.wide(scale) + products;
        self.acc.store_at((head, rows), acc);
    }

    /// A number per row, in every lane, for all lanes of a result.
    pub(super) fn wide(&self, lanes: Value<'k>) -> Value<'k> {
        let chunks = self.l.layout.width() / LANES;
        if chunks == 1 { lanes } else { lanes.concatenate(&vec![lanes; chunks - 1], 1) }
    }
}
