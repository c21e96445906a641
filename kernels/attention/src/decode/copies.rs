//! What decode copies: query rows in and out, new keys and values to their pages, pages to the ring.

use torus_mosaic::{Dim, Dma, Ref, Semaphore, Value, ds, ds_dynamic};

use super::{Decode, Source};
use crate::{
    layout::LANES,
    queue::{HEAD, HEAD_ITEMS, Item, RUN, SLOTS},
};

const SLOT_MASK: i32 = (1 << Item::SLOT_BITS) - 1;

/// What of a page is copied to the ring and what of it is seen. A row of a sequence's `i`-th new token sees the page's
/// tokens `t` with `low <= t - i < below`.
#[derive(Clone, Copy)]
pub(super) struct Rows<'k> {
    /// Rows from `from` up to `old` are the pool's.
    pub from: Value<'k>,
    pub old: Value<'k>,
    /// Rows from `old` up to `end` are those of new tokens, from this one on.
    pub new: Option<Value<'k>>,
    /// Where the rows that count end.
    pub end: Value<'k>,
    pub low: Option<Value<'k>>,
    pub below: Value<'k>,
}

impl<'k> Rows<'k> {
    /// How many rows are copied to the ring.
    fn copied(&self) -> Value<'k> {
        self.new.map_or(self.old, |_| self.end) - self.from
    }
}

/// A page on its way to the ring.
struct Place<'k> {
    slot: Value<'k>,
    page: usize,
    /// In the pool.
    number: Value<'k>,
    rows: Rows<'k>,
}

impl<'k> Decode<'_, 'k> {
    /// Starts to copy each slot's query (and new rows, where the state begins with them) to VMEM, or its output from
    /// there: those of the run at once. Gives how many tokens there are.
    pub(super) fn copy_rows(&self, semaphore: Semaphore<'k>, inputs: bool) -> Value<'k> {
        let (k, single) = (self.l.k, self.draft == 1);
        let several = |tokens: Dim<'k>, rows: Dim<'k>| {
            let far = self.l.query.at((tokens,));
            if !inputs {
                return self.out.at((rows,)).copy_to(far, semaphore).start();
            }
            far.copy_to(self.query.at((rows,)), semaphore).start();
            if single {
                self.l.new.at((.., .., tokens)).copy_to(self.new.at((.., .., rows)), semaphore).start();
            }
        };
        let run = if single { self.l.count(RUN) } else { k.i32(0) };
        if single {
            k.when(run.gt(0), || several(ds_dynamic(0, run), ds_dynamic(0, run)));
        }
        let all = k.for_range(run, self.l.count(SLOTS), &[run], |slot, tokens| {
            let words = self.l.slot(slot);
            match single {
                true => several(ds(words.token, 1), ds(slot, 1)),
                false => several(ds_dynamic(words.token, words.new), ds_dynamic(slot * self.draft as i32, words.new)),
            }
            vec![if single { tokens[0] + 1 } else { tokens[0] + words.new }]
        });
        all[0]
    }

    /// Waits for what [`Self::copy_rows`] started: at once, since semaphores count bytes.
    pub(super) fn await_rows(&self, semaphore: Semaphore<'k>, inputs: bool, tokens: Value<'k>) {
        let all = self.query.at((ds_dynamic(0, tokens),));
        all.copy_to(all, semaphore).wait();
        if inputs && self.draft == 1 {
            self.await_new(semaphore, tokens);
        }
    }

    /// Waits for copies of so many new rows in all.
    pub(super) fn await_new(&self, semaphore: Semaphore<'k>, tokens: Value<'k>) {
        let all = self.l.new.at((.., .., ds_dynamic(0, tokens)));
        all.copy_to(all, semaphore).wait();
    }

    /// Starts to copy the new rows to their pages.
    pub(super) fn write_new(&self, written: Semaphore<'k>) {
        let (l, page) = (self.l, self.l.spec.page_size as i32);
        l.k.for_range(0, l.count(SLOTS), &[], |slot, _| {
            let words = l.slot(slot);
            let row = words.old & (page - 1);
            if self.draft == 1 {
                let to = l.pool.at((words.page, .., .., ds(row, 1)));
                self.new.at((.., .., ds(slot, 1))).copy_to(to, written).start();
                return Vec::new();
            }
            let fit = words.new.min(l.k.i32(page) - row);
            let part = |token: Value<'k>, number: Value<'k>, row: Value<'k>, rows: Value<'k>| {
                let from = l.new.at((.., .., ds_dynamic(token, rows)));
                from.copy_to(l.pool.at((number, .., .., ds_dynamic(row, rows))), written).start();
            };
            part(words.token, words.page, row, fit);
            let rest = words.new - fit;
            l.k.when(rest.gt(0), || part(words.token + fit, words.next_page, l.k.i32(0), rest));
            Vec::new()
        });
    }

    /// Groups in flight.
    pub(super) fn ahead(&self) -> i32 {
        let tuning = self.l.tuning;
        (tuning.ring - 2).min(HEAD_ITEMS / tuning.pages) as i32
    }

    pub(super) fn ring_slot(&self, group: Value<'k>) -> Value<'k> {
        group & (self.l.tuning.ring as i32 - 1)
    }

    fn number(&self, group: Value<'k>, page: usize) -> Value<'k> {
        group * self.l.tuning.pages as i32 + page as i32
    }

    pub(super) fn item(&self, group: Value<'k>, page: usize) -> Value<'k> {
        self.l.items.get((self.number(group, page),))
    }

    pub(super) fn slot(&self, group: Value<'k>, page: usize) -> Value<'k> {
        self.item(group, page) & SLOT_MASK
    }

    pub(super) fn is_first(&self, group: Value<'k>, page: usize) -> Value<'k> {
        (self.item(group, page) & (1 << Item::FIRST_BIT)).ne(0)
    }

    pub(super) fn rows_of(&self, group: Value<'k>, page: usize) -> Rows<'k> {
        self.rows_of_item(self.item(group, page))
    }

    fn rows_of_item(&self, item: Value<'k>) -> Rows<'k> {
        let l = self.l;
        if self.draft == 1 {
            let low = l.spec.window.map(|_| (item >> Item::LOW_BIT as i32) & 0x7F);
            let rows = item >> Item::ROWS_BIT as i32;
            // An empty page has one row, so that no copy is empty.
            let from = low.unwrap_or(l.k.i32(0));
            return Rows { from, old: from + (rows - from).max(1), new: None, end: rows, low, below: rows };
        }
        let (size, words) = (l.spec.page_size as i32, l.slot(item & SLOT_MASK));
        let start = (item >> Item::NUMBER_BIT as i32) * size;
        let within = |token: Value<'k>| (token - start).max(0).min(size);
        let (old, end) = (within(words.old), within(words.old + words.new));
        let below = words.old + 1 - start;
        let low = l.spec.window.map(|window| below - window as i32);
        let from = low.map_or(l.k.i32(0), |low| low.max(0).min(old));
        let new = Some(words.token + start + old - words.old);
        Rows { from, old, new, end, low, below }
    }

    /// Starts to copy a group's pages to the ring, if there is such a group. The first groups are known before the queue
    /// is there.
    pub(super) fn fetch(&self, group: Value<'k>, source: Source) {
        let k = self.l.k;
        let exists = group.lt(self.groups);
        let group = group.min(self.groups - 1);
        let places: Vec<_> = (0..self.l.tuning.pages).map(|page| self.place(group, page, source)).collect();
        // One condition for each copy, and, where the copy exists for every page, nothing else under it: a branch would
        // split the schedule.
        for place in &places {
            let Rows { from, old, new, end, .. } = place.rows;
            match new {
                None => {
                    let copy = self.old_copy(place);
                    k.when(exists, || copy.start());
                }
                Some(token) => {
                    k.when(exists & old.gt(from), || self.old_copy(place).start());
                    k.when(exists & end.gt(old), || self.new_copy(place, token).start());
                }
            }
        }
        let copied = places.iter().map(|place| place.rows.copied()).reduce(|a, b| a + b);
        self.expected.set((self.ring_slot(group),), copied.unwrap_or(group));
    }

    fn place(&self, group: Value<'k>, page: usize, source: Source) -> Place<'k> {
        let at = self.number(group, page);
        let (item, number) = match source {
            Source::Queue => (self.l.items.get((at,)), self.l.pages.get((at,))),
            Source::Head => {
                let word = |first: usize| self.l.counts.get((at + first as i32,));
                (word(HEAD), word(HEAD + HEAD_ITEMS))
            }
        };
        Place { slot: self.ring_slot(group), page, number, rows: self.rows_of_item(item) }
    }

    /// The copy of rows of the pool's.
    fn old_copy(&self, place: &Place<'k>) -> Dma<'k> {
        let Rows { from, old, .. } = place.rows;
        let pool = self.l.pool.at((place.number, .., .., ds_dynamic(from, old - from)));
        self.copy_to_ring(pool, place, from, old - from)
    }

    /// The copy of rows of new tokens, from this one on, where they go through the ring.
    fn new_copy(&self, place: &Place<'k>, token: Value<'k>) -> Dma<'k> {
        let Rows { old, end, .. } = place.rows;
        let new = self.l.new.at((.., .., ds_dynamic(token, end - old)));
        self.copy_to_ring(new, place, old, end - old)
    }

    fn copy_to_ring(&self, source: Ref<'k>, place: &Place<'k>, from: Value<'k>, rows: Value<'k>) -> Dma<'k> {
        let to = self.ring.at((place.slot, place.page, .., .., ds_dynamic(from, rows)));
        source.copy_to(to, self.arrived.at((place.slot,)))
    }

    /// One wait for all pages of a group.
    pub(super) fn await_group(&self, group: Value<'k>) {
        let (layout, tuning, slot) = (self.l.layout, self.l.tuning, self.ring_slot(group));
        let rows = self.expected.get((slot,)) * (layout.units * layout.planes) as i32;
        let all = tuning.pages * layout.units * layout.planes * layout.page;
        let all = self.ring.reshape(&[tuning.ring, all, LANES]).at((slot, ds_dynamic(0, rows)));
        all.copy_to(all, self.arrived.at((slot,))).wait();
    }
}
