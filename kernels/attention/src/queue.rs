//! What the kernel is told of a batch: plain numbers, computed once a step and shared by all layers.
//!
//! Every sequence with new tokens is either *decoded* (at most [`Shape::draft`] new tokens) and has a *slot*, or
//! *prefilled* and is a *chunk*. The queue is one list of items, each a page of one sequence: first those of all slots
//! in order, filled up to whole groups, then those of all chunks. Pages before a sliding window are not in it. Each
//! slot has at least one item, if only an empty one; items that fill up a group belong to the slot past the last.
//!
//! Numbers are `i32` and lie in these arrays:
//! - `counts [COUNTS]`, in SMEM: [`GROUPS`], [`SLOTS`], [`RUN`], [`CHUNKS`], [`ITEMS`]; from [`HEAD`] on the first
//!   [`HEAD_ITEMS`] of `items`, then of `pages`, so that the first pages can be fetched at once.
//! - `slots [SLOT_WORDS, seqs + 1]` flattened, in SMEM: see [`Slot`].
//! - `chunks [chunks, CHUNK_WORDS]` flattened, in SMEM: see [`Chunk`].
//! - `items [items]` and `pages [items]` in HBM; kernels copy what is used to SMEM. A slot's item is packed by
//!   [`Item::pack`], or by [`Item::pack_number`] where slots may have several tokens; a chunk's is 0. `pages` are page numbers in the pool.
//!
//! [`Queue::of`] is the plain computation; [`crate::graph`] has the same as StableHLO.

use crate::spec::{Shape, Spec, Unsupported};

pub const COUNTS: usize = HEAD + 2 * HEAD_ITEMS;
/// Groups of decode's items.
pub const GROUPS: usize = 0;
/// Slots in use.
pub const SLOTS: usize = 1;
/// How many of the first slots have the token of the same number: their rows are copied at once.
pub const RUN: usize = 2;
pub const CHUNKS: usize = 3;
/// Items in use, of slots and chunks.
pub const ITEMS: usize = 4;

/// Where the copy of the queue's first items begins.
pub const HEAD: usize = 8;
pub const HEAD_ITEMS: usize = 64;

pub const SLOT_WORDS: usize = 5;
pub const CHUNK_WORDS: usize = 6;
/// Items are copied to SMEM in blocks of so many.
pub const BLOCK: usize = 1024;

/// A decoded sequence. The words of a slot in this order.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Slot {
    /// Its first row among the new tokens.
    pub token: i32,
    /// Its new tokens.
    pub new: i32,
    /// Tokens that were in the cache before.
    pub old: i32,
    /// The page of its first new token, and the page after that (or anything, if it needs none).
    pub page: i32,
    pub next_page: i32,
}

impl Slot {
    pub fn words(self) -> [i32; SLOT_WORDS] {
        [self.token, self.new, self.old, self.page, self.next_page]
    }
}

/// A prefilled sequence. The words of a chunk in this order.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Chunk {
    /// Its first row among the new tokens.
    pub token: i32,
    /// Its new tokens.
    pub len: i32,
    /// Tokens that were in the cache before: the position of its first new token.
    pub old: i32,
    /// Its first item, and how many there are: the pages that hold what its first token sees up to its last new token.
    pub item: i32,
    pub pages: i32,
    /// The number of the first of these pages within the sequence; 0 without a window.
    pub first_page: i32,
}

impl Chunk {
    pub fn words(self) -> [i32; CHUNK_WORDS] {
        [self.token, self.len, self.old, self.item, self.pages, self.first_page]
    }
}

/// A page of a decoded sequence.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Item {
    pub slot: usize,
    /// It is the slot's first item.
    pub first: bool,
    /// The page's rows from `low` up to `rows` hold old tokens that are seen.
    pub low: usize,
    pub rows: usize,
}

/// Most slots.
pub const MAX_SEQS: usize = (1 << Item::SLOT_BITS) - 1;

impl Item {
    pub const SLOT_BITS: u32 = 12;
    /// Of the flag in a packed item.
    pub const FIRST_BIT: u32 = 12;
    pub const LOW_BIT: u32 = 13;
    pub const ROWS_BIT: u32 = 20;
    /// Where slots have several tokens, an item is packed by [`Item::pack_number`].
    pub const NUMBER_BIT: u32 = 13;

    pub fn pack(self) -> i32 {
        let Self { slot, first, low, rows } = self;
        (slot | (usize::from(first) << Self::FIRST_BIT) | (low << Self::LOW_BIT) | (rows << Self::ROWS_BIT)) as i32
    }

    /// Slot, flag, and the page's number within its sequence.
    pub fn pack_number(slot: usize, first: bool, number: usize) -> i32 {
        (slot | (usize::from(first) << Self::FIRST_BIT) | (number << Self::NUMBER_BIT)) as i32
    }
}

/// One sequence of a step.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Sequence {
    /// Its new tokens.
    pub new: usize,
    /// Tokens in the cache before.
    pub old: usize,
    /// Its pages, from its first token on.
    pub pages: Vec<usize>,
}

/// The arrays of a batch.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Queue {
    pub counts: Vec<i32>,
    pub slots: Vec<i32>,
    pub chunks: Vec<i32>,
    pub items: Vec<i32>,
    pub pages: Vec<i32>,
}

/// How long the arrays are.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Sizes {
    pub seqs: usize,
    pub chunks: usize,
    pub items: usize,
}

impl Sizes {
    /// `group` is how many items an iteration of decode takes.
    pub fn new(shape: &Shape, group: usize) -> Result<Self, Unsupported> {
        let Shape { tokens, seqs, page_table, draft, .. } = *shape;
        if seqs > MAX_SEQS {
            let option = "--max-running-requests";
            return Err(Unsupported::Limit { what: "the number of sequences", found: seqs, limit: MAX_SEQS, option });
        }
        // Each entry of the table is at most one item, each slot has at least one, and a group is filled up.
        let items = (page_table + seqs + group).next_multiple_of(BLOCK);
        let chunks = seqs.min(tokens / (draft + 1)).max(1);
        Ok(Self { seqs, chunks, items })
    }
}

impl Queue {
    /// The arrays of a batch whose sequences' new tokens follow one another.
    pub fn of(spec: &Spec, shape: &Shape, group: usize, sequences: &[Sequence]) -> Result<Self, Unsupported> {
        let sizes = Sizes::new(shape, group)?;
        let (mut slots, mut items, mut pages) = (Vec::new(), Vec::new(), Vec::new());
        let mut token = 0;
        for sequence in sequences {
            if (1..=shape.draft).contains(&sequence.new) {
                decode_items(spec, shape, sequence, slots.len(), &mut items, &mut pages);
                let page = |ahead: usize| {
                    sequence.pages.get(sequence.old / spec.page_size + ahead).map_or(0, |page| *page as i32)
                };
                let (new, old) = (sequence.new as i32, sequence.old as i32);
                slots.push(Slot { token, new, old, page: page(0), next_page: page(1) });
            }
            token += sequence.new as i32;
        }
        while !items.len().is_multiple_of(group) {
            items.push(Item { slot: sizes.seqs, first: true, low: 0, rows: 0 }.pack());
            pages.push(0);
        }
        let groups = items.len() / group;
        let (mut chunks, mut token) = (Vec::new(), 0);
        for sequence in sequences {
            if sequence.new > shape.draft {
                let first_page =
                    spec.window.map_or(0, |window| (sequence.old + 1).saturating_sub(window)) / spec.page_size;
                let end = (sequence.old + sequence.new).div_ceil(spec.page_size);
                chunks.push(Chunk {
                    token,
                    len: sequence.new as i32,
                    old: sequence.old as i32,
                    item: items.len() as i32,
                    pages: (end - first_page) as i32,
                    first_page: first_page as i32,
                });
                items.extend((first_page..end).map(|_| 0));
                pages.extend(sequence.pages[first_page..end].iter().map(|page| *page as i32));
            }
            token += sequence.new as i32;
        }
        let run = slots.iter().enumerate().take_while(|(slot, found)| *slot as i32 == found.token).count();
        let mut counts = vec![0; COUNTS];
        counts[GROUPS] = groups as i32;
        counts[SLOTS] = slots.len() as i32;
        counts[RUN] = run as i32;
        counts[CHUNKS] = chunks.len() as i32;
        counts[ITEMS] = items.len() as i32;
        let padded = |mut list: Vec<i32>, size: usize| {
            list.resize(size, 0);
            list
        };
        let slots = (0..SLOT_WORDS)
            .flat_map(|word| padded(slots.iter().map(|slot| slot.words()[word]).collect(), sizes.seqs + 1));
        let slots = slots.collect();
        let (items, pages) = (padded(items, sizes.items), padded(pages, sizes.items));
        counts[HEAD..HEAD + HEAD_ITEMS].copy_from_slice(&items[..HEAD_ITEMS]);
        counts[HEAD + HEAD_ITEMS..].copy_from_slice(&pages[..HEAD_ITEMS]);
        let chunks = padded(chunks.into_iter().flat_map(Chunk::words).collect(), sizes.chunks * CHUNK_WORDS);
        Ok(Self { counts, slots, chunks, items, pages })
    }
}

fn decode_items(
    spec: &Spec,
    shape: &Shape,
    sequence: &Sequence,
    slot: usize,
    items: &mut Vec<i32>,
    pages: &mut Vec<i32>,
) {
    let (page, old) = (spec.page_size, sequence.old);
    let seen = spec.window.map_or(0, |window| (old + 1).saturating_sub(window));
    if shape.draft > 1 {
        let all = seen / page..(old + sequence.new).div_ceil(page);
        items.extend(all.clone().map(|number| Item::pack_number(slot, number == all.start, number)));
        pages.extend(sequence.pages[all].iter().map(|page| *page as i32));
        return;
    }
    // A slot without old tokens has an empty item all the same.
    let all = if seen == old { 0..1 } else { seen / page..old.div_ceil(page) };
    for number in all.clone() {
        let within = |token: usize| token.saturating_sub(number * page).min(page);
        let (low, rows) = if seen == old { (0, 0) } else { (within(seen), within(old)) };
        items.push(Item { slot, first: number == all.start, low, rows }.pack());
        pages.push(if rows == 0 { 0 } else { sequence.pages[number] as i32 });
    }
}
