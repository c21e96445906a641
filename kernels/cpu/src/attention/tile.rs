//! One tile of query rows, and its walk over a sequence.

use std::ops::Range;

use super::{
    Item, Params, STRIP_ROWS, STRIPS, Step,
    pages::{Compute, GROUP, KvElement, PoolShape},
    portable,
    softmax::{self, Partial},
    strip_rows,
};
use crate::{Level, workspace::Buffer};

/// Tokens whose scores are computed at a time.
pub(super) const BLOCK_TOKENS: usize = 64;
const BLOCK_GROUPS: usize = BLOCK_TOKENS / GROUP;

/// Some query rows that share a KV head and a sequence.
pub(super) struct Tile<'a, K> {
    params: &'a Params,
    step: &'a Step<'a>,
    item: Item,
    pool: &'a [K],
    scales: &'a [f32],
    /// Heads that share the KV head.
    group: usize,
    /// The sequence's length before this step's tokens.
    past: usize,
}

impl<'a, K: KvElement> Tile<'a, K> {
    pub fn new(params: &'a Params, step: &'a Step<'a>, item: &Item, pool: &'a [K], scales: &'a [f32]) -> Self {
        let seq = item.seq as usize;
        let new = (step.cu_q_lens[seq + 1] - step.cu_q_lens[seq]) as usize;
        let past = step.kv_lens[seq] as usize - new;
        Self { params, step, item: *item, pool, scales, group: params.q_heads / params.kv_heads, past }
    }

    pub fn rows(&self) -> usize {
        self.item.rows as usize
    }

    pub fn strip_rows(&self) -> usize {
        strip_rows(self.group)
    }

    /// The softmax of each strip, of nothing yet.
    pub fn strips(&self) -> [Partial; STRIPS] {
        std::array::from_fn(|strip| Partial::new(self.strip(strip).len(), self.params.head_dim))
    }

    /// The rows of a strip.
    fn strip(&self, strip: usize) -> Range<usize> {
        let row = |strip: usize| (strip * self.strip_rows()).min(self.rows());
        row(strip)..row(strip + 1)
    }

    /// The token of a row among those of the sequence, and its query head.
    fn row(&self, row: usize) -> (usize, usize) {
        let row = self.item.first as usize + row;
        (row / self.group, self.item.kv_head as usize * self.group + row % self.group)
    }

    /// The step's token of a row, and its query head.
    #[inline]
    pub fn place(&self, row: usize) -> (usize, usize) {
        let (token, head) = self.row(row);
        (self.step.cu_q_lens[self.item.seq as usize] as usize + token, head)
    }

    /// The positions that a row sees.
    fn seen(&self, row: usize) -> Range<usize> {
        let end = self.past + self.row(row).0 + 1;
        end.saturating_sub(self.params.window.unwrap_or(end))..end
    }

    /// Part `part` of `parts` of the positions that some row sees; it begins with a group.
    pub fn part(&self, part: usize, parts: usize) -> Range<usize> {
        let (first, end) = (self.seen(0).start / GROUP * GROUP, self.seen(self.rows() - 1).end);
        let len = (end - first).div_ceil(parts).next_multiple_of(GROUP);
        (first + part * len).min(end)..(first + (part + 1) * len).min(end)
    }

    /// Elements of the group of 16 tokens that a position lies in: keys, then values; and their scales.
    fn group(&self, position: usize) -> (&'a [K], &'a [f32]) {
        let (params, shape) = (self.params, PoolShape::new(self.params));
        let begin = self.step.page_begin[self.item.seq as usize] as usize;
        let page = self.step.page_table[begin + position / params.page_size] as usize;
        let group = shape.group(page, self.item.kv_head as usize, position % params.page_size / GROUP);
        let len = shape.group_elements();
        let scales = if K::SCALED { &self.scales[group * 2 * GROUP..][..2 * GROUP] } else { &[] };
        (&self.pool[group * len..][..len], scales)
    }

    /// Where the first groups of `range` lie.
    pub fn first_groups(&self, range: Range<usize>) -> Next {
        std::array::from_fn(|index| self.group((range.start + index * GROUP).min(range.end - 1)).0.as_ptr().cast())
    }

    /// Attends to the positions of `range`, with queries and weights as the products take them, and fetches the groups of
    /// `after` at the end.
    pub fn attend<X: Compute>(
        &self,
        level: Level,
        products: Products<X, K::Compute>,
        q: &[X],
        range: Range<usize>,
        after: &Next,
        out: &mut [Partial],
    ) {
        let (rows, head_dim) = (STRIP_ROWS.min(self.rows()), self.params.head_dim);
        let mut scores = Buffer::<f32>::take(rows * BLOCK_TOKENS);
        let mut weights = Buffer::<X>::take(rows * BLOCK_TOKENS);
        let room = if K::SCALED { BLOCK_GROUPS * 2 * GROUP * head_dim } else { 0 };
        let mut decoded = Buffer::<K::Compute>::take(room);
        let mut start = range.start;
        while start < range.end {
            let end = (start + BLOCK_TOKENS).min(range.end);
            let groups = (end - start).div_ceil(GROUP);
            let mut blocks: [&[K::Compute]; BLOCK_GROUPS] = [&[]; BLOCK_GROUPS];
            let mut room = &mut decoded[..];
            for (index, block) in blocks[..groups].iter_mut().enumerate() {
                let (elements, scales) = self.group(start + index * GROUP);
                let (decoded, rest) =
                    std::mem::take(&mut room).split_at_mut(if K::SCALED { elements.len() } else { 0 });
                room = rest;
                *block = K::decode(level, elements, scales, decoded);
            }
            let blocks = &blocks[..groups];
            // The processor does not foresee what lies in other pages.
            let next = match K::SCALED {
                true => std::array::from_fn(|index| blocks[index.min(groups - 1)].as_ptr().cast()),
                false if end < range.end => self.first_groups(end..range.end),
                false => *after,
            };
            for (strip, out) in out.iter_mut().enumerate() {
                let strip = self.strip(strip);
                if strip.is_empty() {
                    continue;
                }
                // The groups of which some row sees something.
                let first = self.seen(strip.start).start.saturating_sub(start) / GROUP;
                let last = self.seen(strip.end - 1).end.min(end).saturating_sub(start).div_ceil(GROUP);
                if first >= last {
                    continue;
                }
                let (blocks, seen) = (&blocks[first..last], start + first * GROUP..end.min(start + last * GROUP));
                let (q, rows) = (&q[strip.start * head_dim..], strip.len());
                (products.0)(q, rows, head_dim, blocks, &next, &mut scores);
                self.softmax(level, strip, seen, &mut scores, &mut weights, out);
                (products.1)(&weights, rows, head_dim, blocks, &next, &mut out.sums);
            }
            start = end;
        }
    }

    /// Turns a strip's scores into weights relative to the rows' peaks, and the sums so far with them.
    fn softmax<X: Compute>(
        &self,
        level: Level,
        strip: Range<usize>,
        block: Range<usize>,
        scores: &mut [f32],
        weights: &mut [X],
        out: &mut Partial,
    ) {
        let mut visible = [const { 0..0 }; STRIP_ROWS];
        for (row, visible) in strip.clone().zip(&mut visible) {
            let seen = self.seen(row);
            let inside = |position: usize| position.clamp(block.start, block.end) - block.start;
            *visible = inside(seen.start)..inside(seen.end);
        }
        softmax::weigh(level, scores, &visible[..strip.len()], self.params, out, weights);
    }
}

/// `scores [rows, BLOCK_TOKENS]` = queries `[rows, head_dim]` times the keys of each group; and
/// `sums [rows, head_dim]` += weights `[rows, BLOCK_TOKENS]` times the values of each group.
pub(super) type Products<X, C> = (Product<X, C>, Weighted<X, C>);
type Product<X, C> = fn(&[X], usize, usize, &[&[C]], &Next, &mut [f32]);
type Weighted<X, C> = fn(&[X], usize, usize, &[&[C]], &Next, &mut [f32]);
/// Groups that products may fetch meanwhile: the next block's, or any that are in the cache where blocks are copies.
pub(super) type Next = [*const u8; BLOCK_GROUPS];

/// Products of queries and weights that are rounded as the cache's elements are.
pub(super) fn products<C: Compute>(level: Level) -> Products<C, C> {
    match level {
        #[cfg(target_arch = "x86_64")]
        Level::Avx512Bf16 => (super::avx512::scores::<C, C>, super::avx512::weighted::<C, C>),
        _ => (portable::scores::<C>, portable::weighted::<C>),
    }
}

/// Products of queries and weights in f32, where these are the faster ones.
pub(super) fn products_in_f32<C: Compute>(level: Level) -> Option<Products<f32, C>> {
    match level {
        #[cfg(target_arch = "x86_64")]
        Level::Avx2 => Some((super::avx2::scores, super::avx2::weighted)),
        // Where there is a matrix unit, too, the dot products of vectors are slow.
        #[cfg(target_arch = "x86_64")]
        Level::Avx512 | Level::Amx => Some((super::avx512::scores::<f32, C>, super::avx512::weighted::<f32, C>)),
        _ => None,
    }
}
