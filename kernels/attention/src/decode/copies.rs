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

/// A page on its way to the ring.
struct Place<'k> {
    slot: Value<'k>,
    page: usize,
    /// In the pool.
    number: Value<'k>,
    rows: Rows<'k>,
}

impl<'k> Decode<'_, 'k> {
    /// The copies of each slot's query (and new rows, where the state begins with them) to VMEM, or of its output from
    /// there: those of the run at once.
    pub(super) fn copy_rows(&self, semaphore: Semaphore<'k>, inputs: bool, visit: &dyn Fn(Dma<'k>)) {
        let (k, single) = (self.l.k, self.draft == 1);
        let several = |tokens: Dim<'k>, rows: Dim<'k>| {
            let far = self.l.query.at((tokens,));
            if !inputs {
                return visit(self.out.at((rows,)).copy_to(far, semaphore));
            }
            visit(far.copy_to(self.query.at((rows,)), semaphore));
            if single {
                visit(self.l.new.at((.., .., tokens)).copy_to(self.new.at((.., .., rows)), semaphore));
            }
        };
        let run = if single { self.l.count(RUN) } else { k.i32(0) };
        if single {
            k.when(run.gt(0), || several(ds_dynamic(0, run), ds_dynamic(0, run)));
        }
        k.for_range(run, self.l.count(SLOTS), &[], |slot, _| {
            let words = self.l.slot(slot);
            match single {
                true => several(ds(words.token, 1), ds(slot, 1)),
                false => several(ds_dynamic(words.token, words.new), ds_dynamic(slot * self.draft as i32, words.new)),
            }
            Vec::new()
        });
    }

    /// The copies of the new rows to their pages.
    pub(super) fn write_new(&self, written: Semaphore<'k>, visit: &dyn Fn(Dma<'k>)) {
        let (l, page) = (self.l, self.l.spec.page_size as i32);
        l.k.for_range(0, l.count(SLOTS), &[], |slot, _| {
            let words = l.slot(slot);
            let row = words.old & (page - 1);
            if self.draft == 1 {
                let to = l.pool.at((words.page, .., .., ds(row, 1)));
                visit(self.new.at((.., .., ds(slot, 1))).copy_to(to, written));
                return Vec::new();
            }
            let fit = words.new.min(l.k.i32(page) - row);
            let part = |token: Value<'k>, number: Value<'k>, row: Value<'k>, rows: Value<'k>| {
                let from = l.new.at((.., .., ds_dynamic(token, rows)));
                visit(from.copy_to(l.pool.at((number, .., .., ds_dynamic(row, rows))), written));
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
        let (k, pages) = (self.l.k, self.l.tuning.pages);
        let exists = group.lt(self.groups);
        if self.draft == 1 {
            let all = || (0..pages).for_each(|page| self.copy_old(&self.place(group, page, source)));
            return k.when(exists, all);
        }
        // One condition for each copy: a branch around several would split the schedule.
        let group = group.min(self.groups - 1);
        for page in 0..pages {
            let place = self.place(group, page, source);
            let Rows { from, old, end, .. } = place.rows;
            k.when(exists & old.gt(from), || self.copy_old(&place));
            k.when(exists & end.gt(old), || self.copy_new(&place));
        }
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

    /// Rows of the pool's.
    fn copy_old(&self, place: &Place<'k>) {
        let Rows { from, old, .. } = place.rows;
        let pool = self.l.pool.at((place.number, .., .., ds_dynamic(from, old - from)));
        self.copy_to_ring(pool, place, from, old - from);
    }

    /// Rows of new tokens, where they go through the ring.
    fn copy_new(&self, place: &Place<'k>) {
        let Rows { old, end, new: Some(token), .. } = place.rows else { return };
        let new = self.l.new.at((.., .., ds_dynamic(token, end - old)));
        self.copy_to_ring(new, place, old, end - old);
    }

    fn copy_to_ring(&self, source: Ref<'k>, place: &Place<'k>, from: Value<'k>, rows: Value<'k>) {
        let to = self.ring.at((place.slot, place.page, .., .., ds_dynamic(from, rows)));
        source.copy_to(to, self.arrived.at((place.slot,))).start();
    }

    /// One wait for all pages of a group.
    pub(super) fn await_group(&self, group: Value<'k>) {
        let (layout, tuning, slot) = (self.l.layout, self.l.tuning, self.ring_slot(group));
        let copied = |page: usize| {
            let Rows { from, old, new, end, .. } = self.rows_of(group, page);
            new.map_or(old, |_| end) - from
        };
        let rows = (0..tuning.pages).map(copied).reduce(|a, b| a + b);
        let rows = rows.unwrap_or(group) * (layout.units * layout.planes) as i32;
        let all = tuning.pages * layout.units * layout.planes * layout.page;
        let all = self.ring.reshape(&[tuning.ring, all, LANES]).at((slot, ds_dynamic(0, rows)));
        all.copy_to(all, self.arrived.at((slot,))).wait();
    }
}
