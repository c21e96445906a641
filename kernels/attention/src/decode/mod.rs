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

mod begin;
mod copies;
mod tiles;

use torus_mosaic::{Elem, Ref, Semaphore, Space, Value, ds};

use crate::{
    launch::{LEAST, Launch},
    layout::LANES,
    queue::GROUPS,
    spec::KvFormat,
};

/// Emits decode. It is called where there is a slot.
pub(crate) fn emit(launch: &Launch<'_>) {
    Decode::new(launch).build();
}

struct Decode<'l, 'k> {
    l: &'l Launch<'k>,
    groups: Value<'k>,
    /// Tokens of a slot, and query rows of a unit that they have together.
    draft: usize,
    rows: usize,
    /// By slot and token; the last slot is for items that fill up a group.
    query: Ref<'k>,
    new: Ref<'k>,
    out: Ref<'k>,
    /// `[groups, pages, units, planes, page, 128]`
    ring: Ref<'k>,
    /// Rows of each group in the ring that were copied or are on their way, in SMEM.
    expected: Ref<'k>,
    arrived: Semaphore<'k>,
    /// Which rows of packed values count: [`Decode::kept`].
    kept: Option<Ref<'k>>,
}

/// Where items are read.
#[derive(Clone, Copy)]
enum Source {
    Queue,
    Head,
}

/// The running softmax of one unit, each `f32`: `sum` is by lane and yet to be added up.
#[derive(Clone, Copy)]
struct State<'k> {
    sum: Value<'k>,
    max: Value<'k>,
    acc: Value<'k>,
}

impl<'l, 'k> Decode<'l, 'k> {
    fn new(launch: &'l Launch<'k>) -> Self {
        let (k, layout, tuning) = (launch.k, launch.layout, launch.tuning);
        let (slots, draft) = (launch.sizes.seqs + 1, launch.shape.draft);
        let rows = [slots * draft, layout.units, layout.rows(), layout.width()];
        let ring = [tuning.ring, tuning.pages, layout.units, layout.planes, layout.page, LANES];
        Self {
            l: launch,
            groups: launch.count(GROUPS),
            draft,
            rows: draft * layout.rows(),
            query: k.scratch(Space::Vmem, Elem::Bf16.of(rows)),
            new: k.scratch(Space::Vmem, Elem::I32.of([layout.units, layout.planes, slots, LANES])),
            out: k.scratch(Space::Vmem, Elem::Bf16.of(rows)),
            ring: k.scratch(Space::Vmem, Elem::I32.of(ring)),
            expected: k.scratch(Space::Smem, Elem::I32.of([tuning.ring])),
            arrived: k.dma_semaphores(&[tuning.ring]),
            kept: Self::needs_kept(launch).then(|| k.scratch(Space::Vmem, Elem::I32.of([2, layout.page, LANES]))),
        }
    }

    fn build(&self) {
        let k = self.l.k;
        (0..self.ahead()).for_each(|group| self.fetch(k.i32(group), Source::Head));
        let [inputs, written, outputs] = [0; 3].map(|_| k.dma_semaphores(&[]));
        let tokens = self.copy_rows(inputs, true);
        self.l.await_queue();
        self.await_rows(inputs, true, tokens);
        self.write_new(written);
        self.fill_kept();
        self.await_group(k.i32(0));
        let mut carried: Vec<_> = self.scores(k.i32(0)).concat();
        let scores = carried.len();
        for _ in 0..self.l.layout.units {
            let lanes = [self.rows, LANES];
            carried.push(k.zeros(Elem::F32.of(lanes)));
            carried.push(k.full(Elem::F32.of(lanes), LEAST));
            carried.push(k.zeros(Elem::F32.of([self.rows, self.l.layout.width()])));
        }
        k.for_range(0, self.groups, &carried, |group, carried| {
            let (scores, states) = carried.split_at(scores);
            self.iteration(group, scores, states)
        });
        self.copy_rows(outputs, false);
        self.await_rows(outputs, false, tokens);
        self.await_new(written, tokens);
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
        self.fetch(group + self.ahead(), Source::Queue);
        for page in 0..tuning.pages {
            let (slot, first) = (self.slot(group, page), self.is_first(group, page));
            for unit in 0..layout.units {
                let state = &mut states[unit];
                let before = first.select(self.new_value(slot, unit), state.acc);
                state.acc = before * self.wide(scales[page][unit]) + products[page][unit];
                let share = sums[page][unit].sum(1).reciprocal(true) * self.value_factor();
                self.store(slot, unit, (state.acc * share).cast(Elem::Bf16));
            }
        }
        let states = states.into_iter().flat_map(|State { sum, max, acc }| [sum, max, acc]);
        next_scores.concat().into_iter().chain(states).collect()
    }

    /// The weights of a page, and by what earlier results shrink. Advances the state's maximum and sum; a sequence's
    /// first page begins with the new token alone.
    fn softmax(
        &self,
        (group, page, unit): (Value<'k>, usize, usize),
        scores: Value<'k>,
        state: &mut State<'k>,
    ) -> (Vec<Value<'k>>, Value<'k>) {
        let lanes = [self.rows, LANES];
        let (slot, first) = (self.slot(group, page), self.is_first(group, page));
        let begin = self.begin(slot, unit);
        let (before, sum) = (first.select(begin.max, state.max), first.select(begin.sum, state.sum));
        let parts: Vec<_> =
            (0..self.l.layout.columns() / LANES).map(|part| scores.slice(&[0, part * LANES], &lanes)).collect();
        let highest = parts.iter().copied().reduce(|a, b| a.max(b)).unwrap_or(scores).reduce_max(1);
        let max = before.max(highest);
        let scale = (before - max).exp2();
        let weights: Vec<_> = parts.iter().map(|part| (*part - max).exp2()).collect();
        *state = State { sum: weights.iter().fold(sum * scale, |sum, part| sum + *part), max, ..*state };
        (weights, scale)
    }

    fn store(&self, slot: Value<'k>, unit: usize, rows: Value<'k>) {
        if self.draft == 1 {
            return self.out.store_at((slot, unit), rows);
        }
        let rows = rows.reshape(&[self.draft, self.l.layout.rows(), self.l.layout.width()]);
        self.out.store_at((ds(slot * self.draft as i32, self.draft), unit), rows);
    }

    /// What sums of values are multiplied by.
    fn value_factor(&self) -> f32 {
        match self.l.spec.kv {
            KvFormat::Bf16 => 1.0,
            KvFormat::Fp8 { scales } | KvFormat::Int8 { scales } => scales.values,
        }
    }

    /// A number per row and lane for all lanes of an output row.
    fn wide(&self, lanes: Value<'k>) -> Value<'k> {
        let chunks = self.l.layout.width() / LANES;
        if chunks == 1 { lanes } else { lanes.concatenate(&vec![lanes; chunks - 1], 1) }
    }
}
