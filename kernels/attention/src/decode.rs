//! Decode: one loop over the pages of all sequences.
//!
//! An iteration takes a group of pages, whichever sequences they belong to; nothing in it depends on where a sequence
//! begins or ends but selections: a sequence's first page begins with a new state, and every page writes its
//! sequence's output, of which the last one stays. Pages arrive in a ring of groups. The scores of the next group are
//! multiplied while this one's are weighted, so that the matrix unit's latency is hidden.
//!
//! The new token never goes through the ring: it alone is the state that a sequence begins with (its score is the
//! maximum, the sum is 1, its value the result), and its rows are copied to their page by a DMA that nothing waits for
//! until the end.

use torus_mosaic::{Dim, Dma, Elem, Ref, Semaphore, Space, Value, ds, ds_dynamic};

use crate::{
    launch::{LEAST, LOG2_E, Launch},
    layout::{LANES, Part, byte_factor},
    queue::{GROUPS, Item, RUN, SLOTS},
    spec::KvFormat,
};

/// Emits decode. It is called where there is a slot.
pub(crate) fn emit(launch: &Launch<'_>) {
    Decode::new(launch).build();
}

struct Decode<'l, 'k> {
    l: &'l Launch<'k>,
    groups: Value<'k>,
    /// By slot; the last one is for items that fill up a group.
    query: Ref<'k>,
    new: Ref<'k>,
    out: Ref<'k>,
    /// `[groups, pages, units, planes, page, 128]`
    ring: Ref<'k>,
    arrived: Semaphore<'k>,
}

/// The running softmax of one unit, each `f32`: `sum` is by lane and yet to be added up.
#[derive(Clone, Copy)]
struct State<'k> {
    sum: Value<'k>,
    max: Value<'k>,
    acc: Value<'k>,
}

/// What a sequence begins with.
struct Begin<'k> {
    max: Value<'k>,
    sum: Value<'k>,
    /// Of the new token, if it is not 1.
    weight: Option<Value<'k>>,
}

impl<'l, 'k> Decode<'l, 'k> {
    fn new(launch: &'l Launch<'k>) -> Self {
        let (k, layout, tuning) = (launch.k, launch.layout, launch.tuning);
        let slots = launch.sizes.seqs + 1;
        let rows = [slots, layout.units, layout.rows(), layout.width()];
        let ring = [tuning.ring, tuning.pages, layout.units, layout.planes, layout.page, LANES];
        Self {
            l: launch,
            groups: launch.count(GROUPS),
            query: k.scratch(Space::Vmem, Elem::Bf16.of(rows)),
            new: k.scratch(Space::Vmem, Elem::I32.of([layout.units, layout.planes, slots, LANES])),
            out: k.scratch(Space::Vmem, Elem::Bf16.of(rows)),
            ring: k.scratch(Space::Vmem, Elem::I32.of(ring)),
            arrived: k.dma_semaphores(&[tuning.ring]),
        }
    }

    fn build(&self) {
        let k = self.l.k;
        let ahead = self.l.tuning.ring as i32 - 2;
        for group in 0..ahead {
            k.when(self.groups.gt(group), || self.fetch(k.i32(group)));
        }
        let [inputs, written, outputs] = [0; 3].map(|_| k.dma_semaphores(&[]));
        self.rows(inputs, true, &|copy| copy.start());
        self.rows(inputs, true, &|copy| copy.wait());
        self.write_new(written);
        self.await_group(k.i32(0));
        let mut carried: Vec<_> = self.scores(k.i32(0)).concat();
        let (layout, scores) = (self.l.layout, carried.len());
        for _ in 0..layout.units {
            let lanes = [layout.rows(), LANES];
            carried.push(k.zeros(Elem::F32.of(lanes)));
            carried.push(k.full(Elem::F32.of(lanes), LEAST));
            carried.push(k.zeros(Elem::F32.of([layout.rows(), layout.width()])));
        }
        k.for_range(0, self.groups, &carried, |group, carried| {
            let (scores, states) = carried.split_at(scores);
            self.iteration(group, scores, states)
        });
        self.rows(outputs, false, &|copy| copy.start());
        self.rows(outputs, false, &|copy| copy.wait());
        k.for_range(0, self.l.count(SLOTS), &[], |_, _| {
            self.new_rows(k.i32(0)).copy_to(self.new_rows(k.i32(0)), written).wait();
            Vec::new()
        });
    }

    /// The copies of each slot's query and new rows to VMEM, or of its output from there: those of the run at once.
    fn rows(&self, semaphore: Semaphore<'k>, inputs: bool, visit: &dyn Fn(Dma<'k>)) {
        let (k, run) = (self.l.k, self.l.count(RUN));
        let several = |tokens: Dim<'k>, slots: Dim<'k>| {
            let (far, near) = (self.l.query.at((tokens,)), (slots,));
            if inputs {
                visit(far.copy_to(self.query.at(near), semaphore));
                let new = self.l.new.at((.., .., tokens));
                visit(new.copy_to(self.new.at((.., .., slots)), semaphore));
            } else {
                visit(self.out.at(near).copy_to(far, semaphore));
            }
        };
        k.when(run.gt(0), || several(ds_dynamic(0, run), ds_dynamic(0, run)));
        k.for_range(run, self.l.count(SLOTS), &[], |slot, _| {
            several(ds(self.l.slots.get((slot,)), 1), ds(slot, 1));
            Vec::new()
        });
    }

    /// A slot's key and value in VMEM.
    fn new_rows(&self, slot: Value<'k>) -> Ref<'k> {
        self.new.at((.., .., ds(slot, 1)))
    }

    /// Starts to copy the new rows to their pages.
    fn write_new(&self, written: Semaphore<'k>) {
        let (l, page) = (self.l, self.l.spec.page_size as i32);
        l.k.for_range(0, l.count(SLOTS), &[], |slot, _| {
            let to = l.slots.get((slot + (l.sizes.seqs as i32 + 1),));
            let row = l.pool.at((to / page, .., .., ds(to % page, 1)));
            self.new_rows(slot).copy_to(row, written).start();
            Vec::new()
        });
    }

    fn ring_slot(&self, group: Value<'k>) -> Value<'k> {
        group & (self.l.tuning.ring as i32 - 1)
    }

    fn number(&self, group: Value<'k>, page: usize) -> Value<'k> {
        group * self.l.tuning.pages as i32 + page as i32
    }

    fn item(&self, group: Value<'k>, page: usize) -> Value<'k> {
        self.l.items.get((self.number(group, page),))
    }

    fn slot(&self, group: Value<'k>, page: usize) -> Value<'k> {
        self.item(group, page) & ((1 << Item::SLOT_BITS) - 1)
    }

    fn is_first(&self, group: Value<'k>, page: usize) -> Value<'k> {
        (self.item(group, page) & (1 << Item::FIRST_BIT)).ne(0)
    }

    /// The rows of a page that are seen: from, up to.
    fn seen(&self, group: Value<'k>, page: usize) -> (Option<Value<'k>>, Value<'k>) {
        let item = self.item(group, page);
        let low = self.l.spec.window.map(|_| (item >> Item::LOW_BIT as i32) & 0x7F);
        (low, item >> Item::ROWS_BIT as i32)
    }

    /// The rows of a page that are copied: from, how many. An empty page has one, so that no copy is empty.
    fn copied(&self, group: Value<'k>, page: usize) -> (Value<'k>, Value<'k>) {
        let (low, rows) = self.seen(group, page);
        let low = low.unwrap_or(self.l.k.i32(0));
        (low, (rows - low).max(1))
    }

    fn fetch(&self, group: Value<'k>) {
        let slot = self.ring_slot(group);
        for page in 0..self.l.tuning.pages {
            let (low, rows) = self.copied(group, page);
            let number = self.l.pages.get((self.number(group, page),));
            let from = self.l.pool.at((number, .., .., ds_dynamic(low, rows)));
            let to = self.ring.at((slot, page, .., .., ds_dynamic(low, rows)));
            from.copy_to(to, self.arrived.at((slot,))).start();
        }
    }

    /// One wait for all pages of a group.
    fn await_group(&self, group: Value<'k>) {
        let (layout, tuning, slot) = (self.l.layout, self.l.tuning, self.ring_slot(group));
        let rows = (0..tuning.pages).map(|page| self.copied(group, page).1).reduce(|a, b| a + b);
        let rows = rows.unwrap_or(group) * (layout.units * layout.planes) as i32;
        let all = tuning.pages * layout.units * layout.planes * layout.page;
        let all = self.ring.reshape(&[tuning.ring, all, LANES]).at((slot, ds_dynamic(0, rows)));
        all.copy_to(all, self.arrived.at((slot,))).wait();
    }

    /// A page's words by plane, of those that hold a part.
    fn words(&self, group: Value<'k>, page: usize, unit: usize, part: Part) -> Vec<Value<'k>> {
        let planes = self.l.layout.planes_of(part);
        planes.map(|plane| self.ring.load_at((self.ring_slot(group), page, unit, plane))).collect()
    }

    fn keys(&self, group: Value<'k>, page: usize, unit: usize) -> Value<'k> {
        self.l.layout.keys(self.l.spec, &self.words(group, page, unit, Part::Key))
    }

    /// A page's values, zero in rows that were not copied: the ring may hold anything there.
    fn values(&self, group: Value<'k>, page: usize, unit: usize) -> Value<'k> {
        let (low, rows) = self.seen(group, page);
        let row = self.l.k.iota([self.l.layout.page, LANES], 0);
        let mut counts = row.lt(rows);
        if let Some(low) = low {
            counts = counts & row.ge(low);
        }
        let words = self.words(group, page, unit, Part::Value);
        let words: Vec<_> = words.into_iter().map(|words| counts.select(words, 0)).collect();
        self.l.layout.values(self.l.spec, &words)
    }

    /// What products of queries and keys are as powers of two.
    fn scaled(&self, products: Value<'k>) -> Value<'k> {
        let spec = self.l.spec;
        let keys = match spec.kv {
            KvFormat::Bf16 => 1.0,
            KvFormat::Fp8 { scales } | KvFormat::Int8 { scales } => scales.keys * byte_factor(spec.kv),
        };
        match spec.soft_cap {
            None => products * (spec.scale * keys * LOG2_E),
            Some(cap) => (products * (spec.scale * keys / cap)).tanh() * (cap * LOG2_E),
        }
    }

    /// Scores of each page and unit, masked: tokens that are not seen, and columns of other heads.
    fn scores(&self, group: Value<'k>) -> Vec<Vec<Value<'k>>> {
        let (layout, pages) = (self.l.layout, self.l.tuning.pages);
        let tokens = layout.tokens(self.l.k, layout.rows());
        let mask = |page: usize, products: Value<'k>| {
            let (low, rows) = self.seen(group, page);
            let mut seen = tokens.lt(rows);
            if let Some(low) = low {
                seen = seen & tokens.ge(low);
            }
            seen.select(self.scaled(products), LEAST)
        };
        let query = |page: usize, unit: usize| self.query.load_at((self.slot(group, page), unit));
        let of_page = |page: usize| {
            let of_unit = |unit: usize| mask(page, query(page, unit).dot_transposed(self.keys(group, page, unit)));
            (0..layout.units).map(of_unit).collect()
        };
        (0..pages).map(of_page).collect()
    }

    /// Weights times values of each page and unit.
    fn products(&self, group: Value<'k>, weights: &[Vec<Value<'k>>]) -> Vec<Vec<Value<'k>>> {
        let of_page = |(page, weights): (usize, &Vec<Value<'k>>)| {
            let of_unit = |(unit, weights): (usize, &Value<'k>)| weights.dot(self.values(group, page, unit));
            weights.iter().enumerate().map(of_unit).collect()
        };
        weights.iter().enumerate().map(of_page).collect()
    }

    /// The new token's key or value for each query row: `f32 [rows, width]`.
    fn new_row(&self, slot: Value<'k>, unit: usize, part: Part) -> Value<'k> {
        let (k, layout) = (self.l.k, self.l.layout);
        let dims = [layout.rows(), LANES];
        let row = k.iota(dims, 0);
        let high = (0..layout.unit_heads)
            .filter(|head| head % 2 == 1)
            .map(|head| {
                let first = (head * layout.rows_per_head) as i32;
                row.ge(first) & row.lt(first + layout.rows_per_head as i32)
            })
            .reduce(|a, b| a | b);
        let chunk = |plane: usize| {
            let words = self.new.load_at((unit, plane, ds(slot, 1))).broadcast(&dims);
            let words = layout.pairs(self.l.spec, words, part);
            let [low, upper] = [words << 16, words & layout.high_half()];
            match high {
                Some(high) => high.select(upper, low),
                None if part == Part::Key => low,
                None => upper,
            }
            .bitcast(Elem::F32)
        };
        let chunks: Vec<_> = layout.planes_of(part).map(chunk).collect();
        if chunks.len() == 1 { chunks[0] } else { chunks[0].concatenate(&chunks[1..], 1) }
    }

    fn iteration(&self, group: Value<'k>, scores: &[Value<'k>], states: &[Value<'k>]) -> Vec<Value<'k>> {
        let (k, layout, tuning) = (self.l.k, self.l.layout, self.l.tuning);
        let mut states: Vec<_> =
            states.chunks(3).map(|state| State { sum: state[0], max: state[1], acc: state[2] }).collect();
        let next = (group + 1).min(self.groups - 1);
        k.when((group + 1).lt(self.groups), || self.await_group(group + 1));
        let next_scores = self.scores(next);
        let (mut weights, mut scales, mut sums) = (Vec::new(), Vec::new(), Vec::new());
        for (page, scores) in scores.chunks(layout.units).enumerate() {
            let of_unit =
                |(unit, scores): (usize, &Value<'k>)| self.softmax((group, page, unit), *scores, &mut states[unit]);
            let (page_weights, page_scales): (Vec<_>, Vec<_>) = scores.iter().enumerate().map(of_unit).unzip();
            weights.push(page_weights);
            scales.push(page_scales);
            sums.push(states.iter().map(|state| state.sum).collect::<Vec<_>>());
        }
        let products = self.products(group, &weights);
        let ahead = group + (tuning.ring as i32 - 2);
        k.when(ahead.lt(self.groups), || self.fetch(ahead));
        for page in 0..tuning.pages {
            let (slot, first) = (self.slot(group, page), self.is_first(group, page));
            for unit in 0..layout.units {
                let state = &mut states[unit];
                let before = first.select(self.new_value(slot, unit), state.acc);
                state.acc = before * self.wide(scales[page][unit]) + products[page][unit];
                let share = sums[page][unit].sum(1).reciprocal(true) * self.value_factor();
                self.out.store_at((slot, unit), (state.acc * share).cast(Elem::Bf16));
            }
        }
        let states = states.into_iter().flat_map(|State { sum, max, acc }| [sum, max, acc]);
        next_scores.concat().into_iter().chain(states).collect()
    }

    /// The result that a sequence begins with.
    fn new_value(&self, slot: Value<'k>, unit: usize) -> Value<'k> {
        let value = self.new_row(slot, unit, Part::Value);
        self.begin(slot, unit).weight.map_or(value, |weight| value * self.wide(weight))
    }

    /// What sums of values are multiplied by.
    fn value_factor(&self) -> f32 {
        match self.l.spec.kv {
            KvFormat::Bf16 => 1.0,
            kv @ (KvFormat::Fp8 { scales } | KvFormat::Int8 { scales }) => scales.values * byte_factor(kv),
        }
    }

    /// A number per row and lane for all lanes of an output row.
    fn wide(&self, lanes: Value<'k>) -> Value<'k> {
        let chunks = self.l.layout.width() / LANES;
        if chunks == 1 { lanes } else { lanes.concatenate(&vec![lanes; chunks - 1], 1) }
    }

    /// The maximum and sum that a sequence begins with: the new token's and the sink's.
    fn begin(&self, slot: Value<'k>, unit: usize) -> Begin<'k> {
        let (k, layout) = (self.l.k, self.l.layout);
        let lanes = [layout.rows(), LANES];
        let query = self.query.load_at((slot, unit)).cast(Elem::F32);
        let own = self.scaled((query * self.new_row(slot, unit, Part::Key)).sum(1)).broadcast(&lanes);
        let only = |sum: Value<'k>| k.iota(lanes, 1).eq(0).select(sum, 0.0);
        match self.l.sinks {
            None => Begin { max: own, sum: only(k.full(Elem::F32.of(lanes), 1.0)), weight: None },
            Some(sinks) => {
                let sink = sinks.load_at((unit,));
                let max = own.max(sink);
                let weight = (own - max).exp2();
                Begin { max, sum: only(weight + (sink - max).exp2()), weight: Some(weight) }
            }
        }
    }

    /// The weights of a page, and by what earlier results shrink. Advances the state's maximum and sum; a sequence's
    /// first page begins with the new token alone.
    fn softmax(
        &self,
        (group, page, unit): (Value<'k>, usize, usize),
        scores: Value<'k>,
        state: &mut State<'k>,
    ) -> (Value<'k>, Value<'k>) {
        let layout = self.l.layout;
        let lanes = [layout.rows(), LANES];
        let (slot, first) = (self.slot(group, page), self.is_first(group, page));
        let begin = self.begin(slot, unit);
        let (before, sum) = (first.select(begin.max, state.max), first.select(begin.sum, state.sum));
        let parts: Vec<_> =
            (0..layout.columns() / LANES).map(|part| scores.slice(&[0, part * LANES], &lanes)).collect();
        let highest = parts.iter().copied().reduce(|a, b| a.max(b)).unwrap_or(scores).reduce_max(1);
        let max = before.max(highest);
        let scale = (before - max).exp2();
        let weights: Vec<_> = parts.iter().map(|part| (*part - max).exp2()).collect();
        *state = State { sum: weights.iter().fold(sum * scale, |sum, part| sum + *part), max, ..*state };
        let narrow: Vec<_> = weights.iter().map(|part| part.cast(Elem::Bf16)).collect();
        let weights = if narrow.len() == 1 { narrow[0] } else { narrow[0].concatenate(&narrow[1..], 1) };
        (weights, scale)
    }
}
