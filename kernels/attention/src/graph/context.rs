//! [`crate::Queue::of`] as StableHLO.
//!
//! Everything about sequences is a sum over all of them, masked: there are few, and a TPU has no fast gather of single
//! numbers. The queue itself is filled block by block, as many as the batch needs, so a short queue costs little
//! however long the page table is. Only page numbers are gathered.

use torus_abi::{DType, TensorType};
use torus_hlo::{Axis, Func, Shape as Tensor, Value, axes::SEQS};

use crate::{
    queue::{BLOCK, CHUNK_WORDS, CHUNKS, COUNTS, GROUPS, HEAD, HEAD_ITEMS, ITEMS, Item, RUN, SLOT_WORDS, SLOTS, Sizes},
    spec::{Shape, Spec, Unsupported},
};

const QUEUE: Axis = Axis("queue");
const IN_BLOCK: Axis = Axis("in_block");
const SLOT: Axis = Axis("slot");
const CHUNK: Axis = Axis("chunk");
const WORD: Axis = Axis("word");
const TABLE: Axis = Axis("page_table");

/// The step inputs, all `i32`.
#[derive(Clone, Copy)]
pub struct Inputs<'f> {
    /// `[seqs + 1]`
    pub cu_q_lens: Value<'f>,
    /// `[seqs]`
    pub kv_lens: Value<'f>,
    /// `[seqs]`
    pub page_begin: Value<'f>,
    /// `[page_table]`
    pub page_table: Value<'f>,
}

/// The types of what [`context`] gives: counts, slots, chunks, items, pages.
pub fn context_types(shape: &Shape, group: usize) -> Result<Vec<TensorType>, Unsupported> {
    let sizes = Sizes::new(shape, group)?;
    let lists = [COUNTS, SLOT_WORDS * (sizes.seqs + 1), sizes.chunks * CHUNK_WORDS, sizes.items, sizes.items];
    Ok(lists.iter().map(|size| TensorType::new(DType::I32, [*size as u64])).collect())
}

/// The queue of a batch in the arrays that [`crate::queue`] describes.
pub fn context<'f>(
    f: &'f Func<'f>,
    spec: &Spec,
    shape: &Shape,
    group: usize,
    inputs: &Inputs<'f>,
) -> Result<Vec<Value<'f>>, Unsupported> {
    let sizes = Sizes::new(shape, group)?;
    let sequences = Sequences::new(f, spec, shape, group, inputs);
    let table = inputs.page_table.named(&[TABLE]);
    let slots = sequences.slots(&sizes, table);
    let run = sequences.run(&sizes);
    let mut counts = vec![f.scalar(DType::I32, 0); HEAD];
    counts[GROUPS] = sequences.base / group as i32;
    counts[SLOTS] = sequences.decoded.sum(SEQS);
    counts[RUN] = run;
    counts[CHUNKS] = sequences.chunked.sum(SEQS);
    counts[ITEMS] = sequences.total;
    let chunks = sequences.chunks(&sizes);
    let [items, pages] = sequences.queue(&sizes, table);
    let mut counts: Vec<_> = counts.into_iter().map(|count| count.broadcast(&[(WORD, 1)])).collect();
    counts.extend([items, pages].map(|list| list.slice(QUEUE, 0..HEAD_ITEMS as u64).rename(QUEUE, WORD)));
    Ok(vec![f.concatenate(WORD, &counts), slots, chunks, items, pages])
}

/// What is known of each sequence, `i32 [seqs]` unless said otherwise.
struct Sequences<'f, 'a> {
    f: &'f Func<'f>,
    spec: &'a Spec,
    draft: usize,
    /// Its first row, its new tokens, its tokens in the cache before.
    token: Value<'f>,
    new: Value<'f>,
    old: Value<'f>,
    page_begin: Value<'f>,
    /// The first token that its first new token sees.
    seen: Value<'f>,
    /// 1 if it is decoded, prefilled; else 0.
    decoded: Value<'f>,
    chunked: Value<'f>,
    /// The slot, the chunk, if it is one.
    slot: Value<'f>,
    chunk: Value<'f>,
    /// Its first item, how many there are, and the number of the first one's page.
    item: Value<'f>,
    items: Value<'f>,
    first_page: Value<'f>,
    /// Items of slots, whole groups; items of all. Scalars.
    base: Value<'f>,
    total: Value<'f>,
}

/// The sum of those before.
fn before<'f>(counts: Value<'f>) -> Value<'f> {
    counts.cumulative_sum(SEQS) - counts
}

impl<'f, 'a> Sequences<'f, 'a> {
    fn new(f: &'f Func<'f>, spec: &'a Spec, shape: &Shape, group: usize, inputs: &Inputs<'f>) -> Self {
        let (page, seqs) = (spec.page_size as i32, shape.seqs as u64);
        let bounds = inputs.cu_q_lens.named(&[SEQS]);
        let token = bounds.slice(SEQS, 0..seqs);
        let new = bounds.slice(SEQS, 1..seqs + 1) - token;
        let all = inputs.kv_lens.named(&[SEQS]);
        let old = all - new;
        let seen = match spec.window {
            Some(window) => (old - (window as i32 - 1)).max(0),
            None => old.full_like(0),
        };
        let decoded = (new.ge(1) & new.le(shape.draft as i32)).convert(DType::I32);
        let chunked = new.gt(shape.draft as i32).convert(DType::I32);
        let first_page = seen / page;
        let pages_to = |end: Value<'f>| (end + (page - 1)) / page - first_page;
        // A slot without old tokens that are seen has an empty item all the same.
        let (first_page, of_slot) = match shape.draft {
            1 => {
                let none = decoded.eq(1) & seen.eq(old);
                let of_slot = seen.eq(old).select(old.full_like(1), pages_to(old));
                (none.select(first_page.full_like(0), first_page), of_slot)
            }
            _ => (first_page, pages_to(all)),
        };
        let count = decoded * of_slot;
        let base = (count.sum(SEQS) + (group as i32 - 1)) / group as i32 * group as i32;
        let chunk_count = chunked * pages_to(all);
        let item = chunked.eq(1).select(before(chunk_count) + base, before(count));
        Self {
            f,
            spec,
            draft: shape.draft,
            token,
            new,
            old,
            page_begin: inputs.page_begin.named(&[SEQS]),
            seen,
            decoded,
            chunked,
            slot: before(decoded),
            chunk: before(chunked),
            item,
            items: count + chunk_count,
            first_page,
            base,
            total: base + chunk_count.sum(SEQS),
        }
    }

    /// Values of sequences in the places of `axis` that `place` gives them, where `taken` is 1; else 0.
    fn placed(
        &self,
        axis: Axis,
        size: usize,
        place: Value<'f>,
        taken: Value<'f>,
        values: &[Value<'f>],
    ) -> Vec<Value<'f>> {
        let here = self.f.iota(DType::I32, axis, size as u64).eq(place) & taken.eq(1);
        let sum = |value: &Value<'f>| here.select(*value, value.full_like(0)).sum(SEQS);
        values.iter().map(sum).collect()
    }

    fn slots(&self, sizes: &Sizes, table: Value<'f>) -> Value<'f> {
        let entry = self.page_begin + self.old / self.spec.page_size as i32;
        let [page, next] = [0, 1].map(|ahead| table.take(TABLE, entry + ahead));
        // A sequence of which no new token lies in the next page has none.
        let page_size = self.spec.page_size as i32;
        let room = self.old.full_like(page_size) - self.old % page_size;
        let next = self.new.gt(room).select(next, next.full_like(0));
        let words =
            self.placed(SLOT, sizes.seqs + 1, self.slot, self.decoded, &[self.token, self.new, self.old, page, next]);
        self.f.concatenate(SLOT, &words)
    }

    /// How many of the first slots have the token of the same number.
    fn run(&self, sizes: &Sizes) -> Value<'f> {
        let stray = self.decoded.eq(1) & self.token.ne(self.slot);
        let first = stray.select(self.slot, self.slot.full_like(sizes.seqs as i32)).reduce_min(SEQS);
        first.min(self.decoded.sum(SEQS))
    }

    fn chunks(&self, sizes: &Sizes) -> Value<'f> {
        let words = [self.token, self.new, self.old, self.item, self.items, self.first_page];
        let words = self.placed(CHUNK, sizes.chunks, self.chunk, self.chunked, &words);
        let columns: Vec<_> =
            words.into_iter().map(|word| word.broadcast(&[(CHUNK, sizes.chunks as u64), (WORD, 1)])).collect();
        self.f.concatenate(WORD, &columns).merge(&[CHUNK, WORD], CHUNK)
    }

    /// Items and pages, filled block by block.
    fn queue(&self, sizes: &Sizes, table: Value<'f>) -> [Value<'f>; 2] {
        let f = self.f;
        let empty = f.zeros(Tensor::new(DType::I32, [(QUEUE, sizes.items as u64)]));
        let filled = f.while_loop(
            &[f.scalar(DType::I32, 0), empty, empty],
            |carried| carried[0].lt(self.total),
            |carried| {
                let (items, pages) = self.block(sizes, carried[0], table);
                let put = |list: Value<'f>, block: Value<'f>| {
                    list.dynamic_update_slice(block.rename(IN_BLOCK, QUEUE), &[(QUEUE, carried[0])])
                };
                vec![carried[0] + BLOCK as i32, put(carried[1], items), put(carried[2], pages)]
            },
        );
        [filled[1], filled[2]]
    }

    fn block(&self, sizes: &Sizes, from: Value<'f>, table: Value<'f>) -> (Value<'f>, Value<'f>) {
        let page = self.spec.page_size as i32;
        let at = self.f.iota(DType::I32, IN_BLOCK, BLOCK as u64) + from;
        let own = at.ge(self.item) & at.lt(self.item + self.items);
        let of = |value: Value<'f>| own.select(value, value.full_like(0)).sum(SEQS);
        let (decoded, owned) = (of(self.decoded), of(self.decoded + self.chunked));
        let number = at + of(self.first_page - self.item);
        let entry = number + of(self.page_begin);
        let within = |token: Value<'f>| (of(token) - number * page).clamp(0, page);
        let empty = of(self.seen.eq(self.old).convert(DType::I32)).eq(1);
        let seen = |token: Value<'f>| empty.select(at.full_like(0), within(token));
        let (low, rows) = (seen(self.seen), seen(self.old));
        let first = at.eq(of(self.item)).convert(DType::I32);
        let shifted = |value: Value<'f>, bit: u32| value << bit as i32;
        let item = of(self.slot) | shifted(first, Item::FIRST_BIT);
        let item = match self.draft {
            1 => item | shifted(low, Item::LOW_BIT) | shifted(rows, Item::ROWS_BIT),
            _ => item | shifted(number, Item::NUMBER_BIT),
        };
        // Items that fill up the last group belong to the slot past the last.
        let filler = Item { slot: sizes.seqs, first: true, low: 0, rows: 0 }.pack();
        let rest =
            (of(self.decoded + self.chunked).eq(0) & at.lt(self.base)).select(at.full_like(filler), at.full_like(0));
        let items = decoded.eq(1).select(item, rest);
        let owned = owned.eq(1);
        let reads = if self.draft == 1 { owned & (decoded.eq(0) | rows.gt(0)) } else { owned };
        let found = table.take(TABLE, entry);
        (items, reads.select(found, found.full_like(0)))
    }
}
