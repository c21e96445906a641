//! Query rows by KV head, and back.
//!
//! In HBM a token's query rows of a unit stand together, whichever head they are of. A tile wants those of one KV head
//! together: row `i * tokens + t` is token `t` of the head's query head `i`. Rows are brought there, [`Tiles::batch`](crate::tuned::Tiles::batch)
//! tokens at a time, by a product with a matrix of zeros and ones, which moves numbers without changing them and takes
//! the compiler no shuffles; it happens once for a tile, not for its blocks.

use torus_mosaic::{Elem, Value, ds};

use crate::{
    launch::{LEAST, LOG2_E},
    layout::{LANES, byte_factor},
    spec::KvFormat,
};

use super::{
    Prefill,
    walk::{Step, Tile},
};

impl<'k> Prefill<'_, 'k> {
    fn batch(&self) -> usize {
        self.tiles.batch(self.l.layout)
    }

    /// Rows of a batch by head: those of query heads alone.
    fn gathered(&self) -> usize {
        self.l.layout.unit_heads * self.l.layout.group * self.batch()
    }

    /// Writes the two matrices.
    pub(super) fn place_rows(&self) {
        let (gathered, all) = (self.gathered(), self.batch() * self.l.layout.rows());
        self.gather.store(self.moves([gathered, all], 0));
        self.scatter.store(self.moves([all, gathered], 1));
    }

    /// One where the row by head, along `axis`, is the row in HBM along the other one.
    fn moves(&self, dims: [usize; 2], axis: usize) -> Value<'k> {
        let (k, layout, batch) = (self.l.k, self.l.layout, self.batch() as i32);
        let by_head = k.iota(dims, axis);
        let (row, token) = (by_head >> batch.trailing_zeros() as i32, by_head & (batch - 1));
        // A head's rows are followed by padding.
        let padding = (layout.rows_per_head - layout.group) as i32;
        let row = (1..layout.unit_heads).fold(row, |sum, head| {
            let behind = row.ge((head * layout.group) as i32);
            sum + behind.select(k.i32(padding).broadcast(&dims), 0)
        });
        let found = (token * layout.rows() as i32 + row).eq(k.iota(dims, 1 - axis));
        found.select(k.full(Elem::F32.of(dims), 1.0), 0.0).cast(Elem::Bf16)
    }

    /// What queries are multiplied by, so that products are scores in powers of two, or what `tanh` wants.
    fn query_factor(&self) -> f32 {
        let spec = self.l.spec;
        let keys = match spec.kv {
            KvFormat::Bf16 => 1.0,
            KvFormat::Fp8 { scales } | KvFormat::Int8 { scales } => scales.keys * byte_factor(spec.kv),
        };
        spec.scale * keys * spec.soft_cap.map_or(LOG2_E, f32::recip)
    }

    /// What results are multiplied by.
    fn value_factor(&self) -> f32 {
        match self.l.spec.kv {
            KvFormat::Bf16 => 1.0,
            kv @ (KvFormat::Fp8 { scales } | KvFormat::Int8 { scales }) => scales.values * byte_factor(kv),
        }
    }

    /// Takes up a tile, whose rows are on their way.
    pub(super) fn begin(&self, tile: &Tile<'k>, buffer: Value<'k>) {
        self.copy_rows_of(tile.rows, buffer, Step::AwaitRead);
        let (k, layout, batch) = (self.l.k, self.l.layout, self.batch());
        let dims = [batch, layout.rows(), LANES];
        self.for_each_batch(|first| {
            for chunk in 0..layout.width() / LANES {
                let rows = self.rows.load_at((buffer, chunk, ds(first, batch))).cast(Elem::F32);
                // Behind the last token there may be anything.
                let is_token = k.iota(dims, 0).lt(tile.rows - first);
                let rows = is_token.select(rows * self.query_factor(), 0.0);
                let rows = rows.reshape(&[batch * layout.rows(), LANES]).cast(Elem::Bf16);
                let by_head = self.gather.load().dot(rows).cast(Elem::Bf16);
                self.for_each_row(|at, head, row| {
                    let rows = by_head.slice(&[at * batch, 0], &[batch, LANES]);
                    self.query.store_at((head, ds(self.tile_row(row, first), batch), ds(chunk * LANES, LANES)), rows);
                });
            }
            let lanes = [batch, LANES];
            self.for_each_row(|_, head, row| {
                let rows = ds(self.tile_row(row, first), batch);
                self.max.store_at((head, rows), k.full(Elem::F32.of(lanes), LEAST));
                self.sum.store_at((head, rows), k.zeros(Elem::F32.of(lanes)));
                self.acc.store_at((head, rows), k.zeros(Elem::F32.of([batch, layout.width()])));
            });
        });
    }

    /// Sends a tile's results on their way.
    pub(super) fn finish(&self, tile: &Tile<'k>, buffer: Value<'k>) {
        let (layout, batch) = (self.l.layout, self.batch());
        self.for_each_batch(|first| {
            let mut results = Vec::new();
            self.for_each_row(|_, head, row| results.push(self.result(tile, (head, row), first)));
            let all = if results.len() == 1 { results[0] } else { results[0].concatenate(&results[1..], 0) };
            for chunk in 0..layout.width() / LANES {
                let by_head = all.slice(&[0, chunk * LANES], &[self.gathered(), LANES]);
                let rows = self.scatter.load().dot(by_head);
                let rows = rows.reshape(&[batch, layout.rows(), LANES]).cast(Elem::Bf16);
                self.rows.store_at((buffer, chunk, ds(first, batch)), rows);
            }
        });
        self.copy_rows(tile, buffer, Step::StartWrite);
    }

    /// Results of a query head for a batch of tokens, `bf16 [batch, width]`.
    fn result(&self, tile: &Tile<'k>, (head, row): (usize, usize), first: Value<'k>) -> Value<'k> {
        let (k, lanes) = (self.l.k, [self.batch(), LANES]);
        let at = ds(self.tile_row(row, first), self.batch());
        let mut total = self.sum.load_at((head, at)).sum(1).broadcast(&lanes);
        let mut factor = k.full(Elem::F32.of(lanes), self.value_factor());
        if let Some(sinks) = self.l.sinks {
            let row = head * self.l.layout.rows_per_head + row;
            let sink = sinks.load_at((tile.unit, ds(row, 1))).broadcast(&lanes);
            let max = self.max.load_at((head, at));
            let higher = max.max(sink);
            let scale = (max - higher).exp2();
            total = total * scale + (sink - higher).exp2();
            factor = factor * scale;
        }
        let share = self.wide(factor * total.reciprocal(true));
        (self.acc.load_at((head, at)) * share).cast(Elem::Bf16)
    }

    /// A loop over batches, by the first token of each.
    fn for_each_batch(&self, visit: impl Fn(Value<'k>)) {
        let (k, batch) = (self.l.k, self.batch());
        let at_once = batch * self.tiles.batches_at_once(self.l.layout);
        k.for_range(0, (self.tiles.tokens / at_once) as i32, &[], |number, _| {
            for offset in (0..at_once).step_by(batch) {
                visit((number * at_once as i32 + offset as i32).assume_multiple(batch as u32));
            }
            Vec::new()
        });
    }

    /// Every query head: its number in the unit, its KV head, and its number among that one's.
    fn for_each_row(&self, mut visit: impl FnMut(usize, usize, usize)) {
        let group = self.l.layout.group;
        for head in 0..self.l.layout.unit_heads {
            (0..group).for_each(|row| visit(head * group + row, head, row));
        }
    }

    /// The row of a head's tile that has the batch's first token of a query head.
    fn tile_row(&self, row: usize, first: Value<'k>) -> Value<'k> {
        (first + (row * self.tiles.tokens) as i32).assume_multiple(self.batch() as u32)
    }
}
