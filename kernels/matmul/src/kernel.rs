//! The kernel of a product, plain or grouped.
//!
//! Outputs are cut into parts, and the work is a sequence of steps: for each part, for each expert that has rows. A step
//! needs one tile of weights, all inputs of one expert for one part. Tiles come through a ring; as a step ends, the
//! copy of the tile that its slot takes next is started. Within a step the blocks of rows that the expert has a share
//! in are visited one after another.
//!
//! A block that several experts share is visited by each of them. It is fetched before the first visit, gathers the
//! rows of each in VMEM, and is written after the last. A plain product is the same with one expert that has all rows.

use torus_mosaic::{Builder, Dma, Elem, Kernel, Ref, Semaphore, Space, Value, ds};

use crate::{
    Layout, Matmul, MatmulError, Tiles,
    multiply::{Multiplier, Quantized},
    product::Activations,
};

pub(crate) fn build(product: &Matmul, tiles: &Tiles) -> Result<Kernel, MatmulError> {
    let name = if product.weights.experts.is_some() { "grouped_matmul" } else { "matmul" };
    Ok(Kernel::build(name, |k| {
        let plan = Plan::declare(k, *product, *tiles);
        let work = plan.work();
        let ahead = plan.fill_ring(&work);
        let row_block = plan.fill_rows(&work);
        plan.steps(&work, ahead, row_block);
        plan.drain(&work);
    })?)
}

/// Memories of the kernel.
struct Plan<'k> {
    k: &'k Builder,
    product: Matmul,
    tiles: Tiles,
    /// First row of each expert.
    starts: Option<Ref<'k>>,
    /// Experts that have rows.
    active: Option<Ref<'k>>,
    x: Ref<'k>,
    weights: Ref<'k>,
    scales: Option<Ref<'k>>,
    biases: Option<Ref<'k>>,
    out: Ref<'k>,
    multiplier: Multiplier<'k>,
    /// Results of two blocks: one is computed while the other is written.
    stage: Ref<'k>,
    weights_arrived: Semaphore<'k>,
    rows_arrived: Semaphore<'k>,
    written: Semaphore<'k>,
}

/// How much there is to do.
struct Work<'k> {
    /// Experts that have rows.
    active: Value<'k>,
    /// Blocks that hold rows.
    blocks: Value<'k>,
    /// Rows that count.
    rows: Value<'k>,
    /// Blocks written, over all parts.
    writes: Value<'k>,
}

/// The step whose weights are fetched next.
#[derive(Clone, Copy)]
struct Ahead<'k> {
    part: Value<'k>,
    /// Index among the active experts.
    expert: Value<'k>,
}

/// A block of rows, visited for an expert and a part.
struct Visit<'k> {
    part: Value<'k>,
    block: Value<'k>,
    /// Slot of the weights.
    slot: Value<'k>,
    /// Number of the block among all, over all parts.
    number: Value<'k>,
    /// With experts: first row and end of the expert, and whether this is the block's first or last visit.
    share: Option<Share<'k>>,
}

struct Share<'k> {
    from: Value<'k>,
    to: Value<'k>,
    first: Value<'k>,
    last: Value<'k>,
}

impl<'k> Plan<'k> {
    fn declare(k: &'k Builder, product: Matmul, tiles: Tiles) -> Self {
        let Matmul { weights, activations, .. } = product;
        let Tiles { rows, columns, ring, blocks, .. } = tiles;
        let blocks = blocks.min(product.blocks(&tiles));
        let hbm = |tensor| k.input(Space::Any, tensor);
        let vmem = |tensor| k.scratch(Space::Vmem, tensor);
        let starts = weights.experts.map(|experts| k.prefetch(Elem::I32.of([experts + 1])));
        let x = hbm(product.x(&tiles));
        let stored = hbm(weights.stored());
        let (scales, biases) = (weights.scales().map(hbm), weights.biases().map(hbm));
        let out = k.output(Space::Any, product.out(&tiles));
        let [tile_rows, tile_columns] = weights.stored_matrix(columns);
        let bytes = |elem: Elem, columns: usize| vmem(elem.of([blocks, rows, columns]));
        let quantized = (activations == Activations::Int8).then(|| Quantized {
            numbers: bytes(Elem::I8, weights.inputs),
            scales: bytes(Elem::F32, crate::product::LANES),
        });
        let multiplier = Multiplier {
            k,
            product,
            tiles,
            ring: vmem(weights.format.stored().of([ring, tile_rows, tile_columns])),
            scales: scales.map(|_| vmem(Elem::F32.of([ring, weights.groups(), columns]))),
            biases: biases.map(|_| vmem(Elem::F32.of([ring, 1, columns]))),
            rows: vmem(Elem::Bf16.of([blocks, rows, weights.inputs])),
            quantized,
        };
        Self {
            k,
            product,
            tiles: Tiles { blocks, ..tiles },
            starts,
            active: weights.experts.map(|experts| k.scratch(Space::Smem, Elem::I32.of([experts]))),
            x,
            weights: stored,
            scales,
            biases,
            out,
            multiplier,
            stage: vmem(Elem::Bf16.of([2, rows, columns])),
            weights_arrived: k.dma_semaphores(&[ring]),
            rows_arrived: k.dma_semaphores(&[blocks]),
            written: k.dma_semaphores(&[2]),
        }
    }

    fn i32(&self, number: usize) -> Value<'k> {
        self.k.i32(number as i32)
    }

    fn parts(&self) -> usize {
        self.product.weights.outputs / self.tiles.columns
    }

    /// All blocks of rows fit into VMEM.
    fn keeps_rows(&self) -> bool {
        self.tiles.blocks >= self.product.blocks(&self.tiles)
    }

    /// `number / by`, for what is not negative.
    fn divide(&self, number: Value<'k>, by: usize) -> Value<'k> {
        match by.is_power_of_two() {
            true => number >> by.trailing_zeros() as i32,
            false => number / by as i32,
        }
    }

    /// The number after this one, around the end.
    fn next(&self, number: Value<'k>, end: Value<'k>) -> Value<'k> {
        let next = number + 1;
        next.lt(end).select(next, 0)
    }

    fn expert(&self, index: Value<'k>) -> Value<'k> {
        self.active.map_or(index, |active| active.get((index,)))
    }

    /// Counts the work; with experts, also lists those that have rows, and starts to fetch the first of them.
    fn work(&self) -> Work<'k> {
        let (Some(starts), Some(list), Some(experts)) = (self.starts, self.active, self.product.weights.experts) else {
            let blocks = self.product.blocks(&self.tiles);
            let writes = self.i32(blocks * self.parts());
            let rows = self.i32(self.product.padded_rows(&self.tiles));
            return Work { active: self.k.i32(1), blocks: self.i32(blocks), rows, writes };
        };
        let active = self.k.for_range(0, experts as i32, &[self.k.i32(0)], |expert, count| {
            let count = count[0];
            let has_rows = starts.get((expert + 1,)).gt(starts.get((expert,)));
            self.k.when(has_rows, || list.set((count,), expert));
            self.k.when(has_rows & count.lt(self.tiles.ring as i32), || self.fetch(self.k.i32(0), expert, count));
            vec![count + has_rows.cast(Elem::I32)]
        })[0];
        let rows = starts.get((experts,));
        let blocks = self.divide(rows + (self.tiles.rows - 1) as i32, self.tiles.rows);
        Work { active, blocks, rows, writes: blocks * self.parts() as i32 }
    }

    /// Starts to fetch as many tiles of weights as the ring holds.
    fn fill_ring(&self, work: &Work<'k>) -> Ahead<'k> {
        if self.active.is_none() {
            let first = self.tiles.ring.min(self.parts());
            (0..first).for_each(|part| self.fetch(self.i32(part), self.k.i32(0), self.i32(part)));
            return Ahead { part: self.i32(first), expert: self.k.i32(0) };
        }
        // `work` has fetched those of the first part.
        let all = work.active.le(self.tiles.ring as i32);
        let zero = self.k.i32(0);
        let mut ahead = Ahead { part: all.cast(Elem::I32), expert: all.select(zero, self.i32(self.tiles.ring)) };
        for slot in 1..self.tiles.ring {
            let more = work.active.le(slot as i32) & work.active.gt(0) & ahead.part.lt(self.parts() as i32);
            self.k.when(more, || self.fetch(ahead.part, self.expert(ahead.expert), self.i32(slot)));
            let next = self.after(ahead, work);
            ahead = Ahead { part: more.select(next.part, ahead.part), expert: more.select(next.expert, ahead.expert) };
        }
        ahead
    }

    fn after(&self, ahead: Ahead<'k>, work: &Work<'k>) -> Ahead<'k> {
        if self.active.is_none() {
            return Ahead { part: ahead.part + 1, expert: ahead.expert };
        }
        let expert = self.next(ahead.expert, work.active);
        Ahead { part: ahead.part + expert.eq(0).cast(Elem::I32), expert }
    }

    /// The copies of what a step needs.
    fn weight_copies(&self, part: Value<'k>, expert: Value<'k>, slot: Value<'k>) -> Vec<Dma<'k>> {
        let columns = self.tiles.columns;
        let first = (part * columns as i32).assume_multiple(crate::product::LANES as u32);
        let arrived = self.weights_arrived.at((slot,));
        let Multiplier { ring, scales, biases, .. } = &self.multiplier;
        let tile = match self.product.weights.layout {
            Layout::InOut => self.weights.at((expert, .., ds(first, columns))),
            Layout::OutIn => {
                let rows = columns / self.product.weights.format.shared();
                let first = (part * rows as i32).assume_multiple(32);
                self.weights.at((expert, ds(first, rows), ..))
            }
        };
        let mut copies = vec![tile.copy_to(ring.at((slot,)), arrived)];
        for (from, to) in [(self.scales, *scales), (self.biases, *biases)] {
            let (Some(from), Some(to)) = (from, to) else { continue };
            copies.push(from.at((expert, .., ds(first, columns))).copy_to(to.at((slot,)), arrived));
        }
        copies
    }

    fn fetch(&self, part: Value<'k>, expert: Value<'k>, slot: Value<'k>) {
        self.weight_copies(part, expert, slot).into_iter().for_each(Dma::start);
    }

    /// The copy of a block of rows.
    fn row_copy(&self, block: Value<'k>, slot: Value<'k>) -> Dma<'k> {
        let rows = self.tiles.rows;
        let first = (block * rows as i32).assume_multiple(self.product.row_unit() as u32);
        let to = self.multiplier.rows.at((slot,));
        self.x.at((ds(first, rows), ..)).copy_to(to, self.rows_arrived.at((slot,)))
    }

    /// Starts to fetch rows. Gives the block that is fetched next.
    fn fill_rows(&self, work: &Work<'k>) -> Value<'k> {
        if self.keeps_rows() {
            self.k.for_range(0, work.blocks, &[], |block, _| {
                self.row_copy(block, block).start();
                Vec::new()
            });
            return self.k.i32(0);
        }
        (0..self.tiles.blocks - 1).fold(self.k.i32(0), |block, slot| {
            self.k.when(work.writes.gt(slot as i32), || self.row_copy(block, self.i32(slot)).start());
            self.next(block, work.blocks)
        })
    }

    fn steps(&self, work: &Work<'k>, ahead: Ahead<'k>, row_block: Value<'k>) {
        let carried = [self.k.i32(0), ahead.part, ahead.expert, row_block];
        let parts = self.parts() as i32;
        self.k.for_range(0, parts, &carried, |part, carried| match self.active {
            None => self.step(work, part, self.k.i32(0), carried),
            Some(_) => {
                self.k.for_range(0, work.active, carried, |index, carried| self.step(work, part, index, carried))
            }
        });
    }

    /// One tile of weights. Carried are its slot, the tile that is fetched next, and the block that is.
    fn step(&self, work: &Work<'k>, part: Value<'k>, index: Value<'k>, carried: &[Value<'k>]) -> Vec<Value<'k>> {
        let slot = carried[0];
        let ahead = Ahead { part: carried[1], expert: carried[2] };
        let expert = self.expert(index);
        self.weight_copies(part, expert, slot).into_iter().for_each(Dma::wait);
        let (from, to) = self.blocks_of(expert, work);
        let visit = |block: Value<'k>, row_block: Value<'k>| {
            let number = part * work.blocks + block;
            let share = self.share(expert, block, work);
            let visit = Visit { part, block, slot, number, share };
            self.visit(work, &visit, row_block)
        };
        let row_block = match (self.active, self.product.blocks(&self.tiles)) {
            (None, 1) => visit(self.k.i32(0), carried[3]),
            _ => self.k.for_range(from, to, &carried[3..], |block, carried| vec![visit(block, carried[0])])[0],
        };
        self.k.when(ahead.part.lt(self.parts() as i32), || {
            self.fetch(ahead.part, self.expert(ahead.expert), slot);
        });
        let next = self.after(ahead, work);
        vec![self.next(slot, self.i32(self.tiles.ring)), next.part, next.expert, row_block]
    }

    /// The blocks that an expert has a share in.
    fn blocks_of(&self, expert: Value<'k>, work: &Work<'k>) -> (Value<'k>, Value<'k>) {
        let Some(starts) = self.starts else { return (self.k.i32(0), work.blocks) };
        let rows = self.tiles.rows;
        let from = self.divide(starts.get((expert,)), rows);
        (from, self.divide(starts.get((expert + 1,)) + (rows - 1) as i32, rows))
    }

    fn share(&self, expert: Value<'k>, block: Value<'k>, work: &Work<'k>) -> Option<Share<'k>> {
        let starts = self.starts?;
        let (from, to) = (starts.get((expert,)), starts.get((expert + 1,)));
        let begin = block * self.tiles.rows as i32;
        let end = (begin + self.tiles.rows as i32).min(work.rows);
        Some(Share { from, to, first: from.le(begin), last: to.ge(end) })
    }

    /// Runs `body` at the first visit of a block, if `also` holds.
    fn at_first(&self, visit: &Visit<'k>, also: Option<Value<'k>>, body: impl FnOnce()) {
        match (visit.share.as_ref().map(|share| share.first), also) {
            (None, None) => body(),
            (Some(condition), None) | (None, Some(condition)) => self.k.when(condition, body),
            (Some(first), Some(also)) => self.k.when(first & also, body),
        }
    }

    /// Computes the rows that the step's expert has in a block. Gives the block that is fetched next.
    fn visit(&self, work: &Work<'k>, visit: &Visit<'k>, row_block: Value<'k>) -> Value<'k> {
        let keeps = self.keeps_rows();
        let rows_slot = match keeps {
            true => visit.block,
            false => visit.number & (self.tiles.blocks as i32 - 1),
        };
        let ahead = visit.number + (self.tiles.blocks as i32 - 1);
        self.at_first(visit, keeps.then(|| visit.part.eq(0)), || {
            self.row_copy(visit.block, rows_slot).wait();
            self.multiplier.quantize(rows_slot);
            if !keeps {
                let slot = ahead & (self.tiles.blocks as i32 - 1);
                self.k.when(ahead.lt(work.writes), || self.row_copy(row_block, slot).start());
            }
        });
        self.at_first(visit, Some(visit.number.ge(2)), || self.write(visit).wait());
        self.compute(visit, rows_slot);
        match &visit.share {
            Some(share) => self.k.when(share.last, || self.write(visit).start()),
            None => self.write(visit).start(),
        }
        let next = self.next(row_block, work.blocks);
        match &visit.share {
            _ if keeps => row_block,
            Some(share) => share.first.select(next, row_block),
            None => next,
        }
    }

    fn compute(&self, visit: &Visit<'k>, rows_slot: Value<'k>) {
        let Tiles { rows, columns, strip, .. } = self.tiles;
        let stage = self.stage.at((visit.number & 1,));
        let one = |column: Value<'k>| {
            let product = self.multiplier.strip(rows_slot, visit.slot, column);
            let product = match &visit.share {
                None => product,
                Some(share) => {
                    let row = self.k.iota([rows, strip], 0) + visit.block * rows as i32;
                    let zeros = self.k.zeros(Elem::F32.of([rows, strip]));
                    let others = stage.load_at((.., ds(column, strip))).cast(Elem::F32);
                    let others = share.first.select(zeros, others);
                    (row.ge(share.from) & row.lt(share.to)).select(product, others)
                }
            };
            stage.store_at((.., ds(column, strip)), product.cast(Elem::Bf16));
        };
        if strip == columns {
            return one(self.k.i32(0));
        }
        self.k.for_range(0, (columns / strip) as i32, &[], |number, _| {
            one((number * strip as i32).assume_multiple(crate::product::LANES as u32));
            Vec::new()
        });
    }

    /// The copy of a block's results to where they belong.
    fn write(&self, visit: &Visit<'k>) -> Dma<'k> {
        let Tiles { rows, columns, .. } = self.tiles;
        let first = (visit.block * rows as i32).assume_multiple(self.product.row_unit() as u32);
        let column = (visit.part * columns as i32).assume_multiple(crate::product::LANES as u32);
        let slot = visit.number & 1;
        let to = self.out.at((ds(first, rows), ds(column, columns)));
        self.stage.at((slot,)).copy_to(to, self.written.at((slot,)))
    }

    /// Waits for the last two blocks written.
    fn drain(&self, work: &Work<'k>) {
        let zero = self.k.i32(0);
        for back in [2, 1] {
            let number = work.writes - back;
            let visit = Visit { part: zero, block: zero, slot: zero, number, share: None };
            self.k.when(number.ge(0), || self.write(&visit).wait());
        }
    }
}
