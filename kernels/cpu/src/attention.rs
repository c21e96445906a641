//! Ragged paged attention: decoding, chunks of prompts and mixtures of both in one call.
//!
//! Every query attends causally to its own sequence, whose keys and values lie in pages ([`pages`]). The new ones are
//! written in the same call. Work is cut into *tiles* of query rows, some tokens by the heads that share a KV head, which
//! walk over the sequence with a running softmax ("FlashAttention", Dao et al., 2022; "Online normalizer calculation for
//! softmax", Milakov and Gimelshein, 2018). Where a tile is a large share of a thread's work, its walk is cut too, and the
//! parts are merged.

use torus_abi::kernel::{parallel_for, threads};

use crate::{
    activations::Element,
    level,
    shared::Shared,
    workspace::{Buffer, Plain},
};

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod block;
pub mod pages;
mod portable;
mod softmax;
#[cfg(test)]
mod tests;
mod tile;

pub use block::Block;
use pages::Compute;
pub use pages::{KvElement, PoolShape};
use softmax::Partial;
use tile::{BLOCK_TOKENS, Products, Tile, products, products_in_f32};

/// The name of the pages' and the metadata's layout. An attention plugin that answers it lets the host serve coarser
/// imports with these kernels.
pub const LAYOUT: &str = "torus-cpu-paged-1";

/// Query rows that products take at once, at most: a strip.
const STRIP_ROWS: usize = 12;
/// Strips of a tile, which share each block of keys and values while it is in the cache.
const STRIPS: usize = 4;

/// A task is at most this part of a thread's work, as far as sequences can be cut, so that all end at about the same time.
const TASKS_PER_THREAD: usize = 8;
/// Tokens of a part of a walk at least: merging a part takes as long as a few of them.
const PART_TOKENS_MIN: usize = 2 * BLOCK_TOKENS;
/// Rows whose products take as long as it takes to load keys and values for them.
const LOAD_ROWS: usize = 2;

/// What attention computes, beside its tensors.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Params {
    pub q_heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub page_size: usize,
    /// Factor on the scores.
    pub scale: f32,
    /// Only so many last tokens are seen, the current one included.
    pub window: Option<usize>,
    /// Scores become `cap * tanh(score / cap)`.
    pub soft_cap: Option<f32>,
}

impl Params {
    /// Why these cannot be served, if they cannot.
    pub fn supports(&self) -> Result<(), String> {
        let Self { q_heads, kv_heads, head_dim, page_size, .. } = *self;
        if kv_heads == 0 || !q_heads.is_multiple_of(kv_heads) || q_heads == 0 {
            return Err(format!("{q_heads} query heads do not divide among {kv_heads} KV heads"));
        }
        if head_dim == 0 || !head_dim.is_multiple_of(pages::GROUP) {
            return Err(format!("heads of {head_dim} dimensions are no multiple of {}", pages::GROUP));
        }
        if page_size == 0 || !page_size.is_multiple_of(pages::GROUP) {
            return Err(format!("pages of {page_size} tokens are no multiple of {}", pages::GROUP));
        }
        Ok(())
    }

    /// The sizes of the axes of a layer's pool, and of its scales: see [`pages`].
    pub fn pool_dims(&self, pages: u64) -> [[u64; 5]; 2] {
        let groups = (self.page_size / pages::GROUP) as u64;
        let dims = |last: usize| [pages, self.kv_heads as u64, groups, 2, last as u64];
        [dims(pages::GROUP * self.head_dim), dims(pages::GROUP)]
    }
}

/// What the step says of its sequences; see `torus_abi::step`.
#[derive(Clone, Copy, Debug)]
pub struct Step<'a> {
    /// `[tokens]`
    pub kv_slot: &'a [i32],
    /// `[seqs + 1]`
    pub cu_q_lens: &'a [i32],
    /// `[seqs]`
    pub kv_lens: &'a [i32],
    /// `[seqs]`
    pub page_begin: &'a [i32],
    /// `[page_table]`
    pub page_table: &'a [i32],
    pub num_seqs: usize,
}

impl Step<'_> {
    /// Tokens that are no padding.
    pub fn tokens(&self) -> usize {
        self.cu_q_lens.get(self.num_seqs).map_or(0, |tokens| *tokens as usize)
    }

    /// What is wrong with it, if memory outside of the pool or the tensors would be touched.
    fn check(&self, params: &Params, tokens: usize, pages: usize) -> Result<(), String> {
        let seqs = self.num_seqs;
        if self.cu_q_lens.len() <= seqs || self.kv_lens.len() < seqs || self.page_begin.len() < seqs {
            return Err(format!("{seqs} sequences are more than the step's arrays hold"));
        }
        if self.tokens() > tokens || self.kv_slot.len() < self.tokens() {
            return Err(format!("{} tokens are more than the step's arrays hold", self.tokens()));
        }
        for seq in 0..seqs {
            let (start, end) = (self.cu_q_lens[seq], self.cu_q_lens[seq + 1]);
            let (len, begin) = (self.kv_lens[seq], self.page_begin[seq]);
            if start < 0 || end < start || len < end - start || begin < 0 {
                return Err(format!("sequence {seq} has {} new tokens of {len}", end - start));
            }
            let count = (len as usize).div_ceil(params.page_size);
            let of_sequence = self.page_table.get(begin as usize..begin as usize + count);
            let is_page = |page: &i32| usize::try_from(*page).is_ok_and(|page| page < pages);
            if !of_sequence.is_some_and(|of_sequence| of_sequence.iter().all(is_page)) {
                return Err(format!("the pages of sequence {seq} are not in the pool"));
            }
        }
        let slots = (pages * params.page_size) as i32;
        match self.kv_slot[..self.tokens()].iter().find(|slot| !(0..slots).contains(*slot)) {
            Some(slot) => Err(format!("slot {slot} is not in the pool")),
            None => Ok(()),
        }
    }
}

/// Rows of a tensor of which each holds, somewhere, the heads of one token.
#[derive(Clone, Copy, Debug)]
pub struct Rows<'a, X> {
    pub data: &'a [X],
    /// Elements from a token's row to the next.
    pub stride: usize,
}

impl<'a, X: Element> Rows<'a, X> {
    /// The elements of one head.
    fn head(&self, token: usize, head: usize, head_dim: usize) -> &'a [X] {
        &self.data[token * self.stride + head * head_dim..][..head_dim]
    }
}

/// Queries, keys and values of the step's tokens.
#[derive(Clone, Copy, Debug)]
pub struct Inputs<'a, X> {
    pub q: Rows<'a, X>,
    pub k: Rows<'a, X>,
    pub v: Rows<'a, X>,
}

/// Writes the new keys and values into the pool, and gives `[tokens, q_heads, head_dim]`; rows of padding become zeros.
///
/// # Errors
/// If the step's metadata reach outside of the pool.
///
/// # Panics
/// If a slice is shorter than the others say.
pub fn attention<X: Element, Y: Element, K: KvElement>(
    params: &Params,
    step: &Step<'_>,
    inputs: &Inputs<'_, X>,
    pool: &mut [K],
    scales: &mut [f32],
    out: &mut [Y],
) -> Result<(), String> {
    attention_for(threads(), params, step, inputs, pool, scales, out)
}

/// As [`attention`], cut for so many threads.
fn attention_for<X: Element, Y: Element, K: KvElement>(
    threads: usize,
    params: &Params,
    step: &Step<'_>,
    inputs: &Inputs<'_, X>,
    pool: &mut [K],
    scales: &mut [f32],
    out: &mut [Y],
) -> Result<(), String> {
    let shape = PoolShape::new(params);
    let width = params.q_heads * params.head_dim;
    step.check(params, out.len() / width, pool.len() / shape.page_elements())?;
    pages::write(params, step, inputs, pool, scales);
    Y::clear(&mut out[step.tokens() * width..]);
    let tiles = tiles(params, step);
    let work = Work { params, step, tasks: cut(params, step, &tiles, threads), tiles };
    match products_in_f32(level()) {
        Some(products) => work.attend(products, &inputs.q, pool, scales, out),
        None => work.attend(products(level()), &inputs.q, pool, scales, out),
    }
    Ok(())
}

/// A step's tiles, and the tasks that threads make of them.
struct Work<'a> {
    params: &'a Params,
    step: &'a Step<'a>,
    tiles: Buffer<Item>,
    tasks: Buffer<Task>,
}

impl Work<'_> {
    /// Attends to what the pool holds, with queries and weights in the type that the products take.
    fn attend<X: Element, Q: Compute, Y: Element, K: KvElement>(
        &self,
        products: Products<Q, K::Compute>,
        queries: &Rows<'_, X>,
        pool: &[K],
        scales: &[f32],
        out: &mut [Y],
    ) {
        let (params, head_dim, level) = (self.params, self.params.head_dim, level());
        let tile_of = |task: &Task| Tile::new(params, self.step, &self.tiles[task.tile as usize], pool, scales);
        let saved = STRIPS * Partial::saved(head_dim);
        let (places, ahead) = (self.tasks.iter().filter(|task| task.parts > 1).count(), threads());
        let mut partials = Buffer::<f32>::take(places * saved);
        let (shared, parts) = (Shared::new(out), Shared::new(&mut partials));
        parallel_for(self.tasks.len(), |index| {
            let task = &self.tasks[index];
            let tile = tile_of(task);
            let mut strips = tile.strips();
            let mut q = Buffer::<Q>::take(tile.rows() * head_dim);
            load_queries(&tile, params, queries, &mut q);
            let range_of = |tile: &Tile<'_, K>, task: &Task| tile.part(task.part as usize, task.parts as usize);
            let range = range_of(&tile, task);
            // What this thread probably does next.
            let after = self.tasks.get(index + ahead).map(|task| (tile_of(task), task));
            let after = after.map_or_else(
                || tile.first_groups(range.clone()),
                |(tile, task)| tile.first_groups(range_of(&tile, task)),
            );
            tile.attend(level, products, &q, range, &after, &mut strips);
            if task.parts == 1 {
                return finish(&tile, params, &strips, &shared);
            }
            let place = task.place as usize;
            // SAFETY: each part has a place of its own.
            let to = unsafe { parts.part(place * saved..(place + 1) * saved) };
            for (strip, to) in strips.iter().zip(to.chunks_exact_mut(saved / STRIPS)) {
                strip.save(to, head_dim);
            }
        });
        // The parts of a tile lie one after the other.
        let mut rest = &partials[..];
        for first in self.tasks.iter().filter(|task| task.parts > 1 && task.part == 0) {
            let (own, others) = rest.split_at(first.parts as usize * saved);
            let tile = tile_of(first);
            let mut strips = tile.strips();
            for part in own.chunks_exact(saved) {
                for (strip, part) in strips.iter_mut().zip(part.chunks_exact(saved / STRIPS)) {
                    strip.merge(part, head_dim);
                }
            }
            finish(&tile, params, &strips, &shared);
            rest = others;
        }
    }
}

/// A tile's place: sequence, KV head, first row of the sequence's `tokens * group` rows with this KV head, rows.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub(crate) struct Item {
    seq: u32,
    kv_head: u32,
    first: u32,
    rows: u32,
}

// SAFETY: numbers.
unsafe impl Plain for Item {}

/// One of the parts into which what a tile sees is cut.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
struct Task {
    tile: u32,
    part: u32,
    parts: u32,
    /// Place of its result, if the tile has more parts.
    place: u32,
}

// SAFETY: numbers.
unsafe impl Plain for Task {}

/// Rows of a tile's strips but for the last: whole tokens, so that they differ little in what they see, unless one token
/// has more heads.
fn strip_rows(group: usize) -> usize {
    if group > STRIP_ROWS { STRIP_ROWS } else { STRIP_ROWS / group * group }
}

/// All tiles of a step. Prompts come after what decodes in a step, so the last sequences' are the first here, and of those
/// the late tokens', which see most: large tasks first, small ones fill up the end.
fn tiles(params: &Params, step: &Step<'_>) -> Buffer<Item> {
    let group = params.q_heads / params.kv_heads;
    let tile_rows = STRIPS * strip_rows(group);
    let rows_of = |seq: usize| (step.cu_q_lens[seq + 1] - step.cu_q_lens[seq]) as usize * group;
    let count: usize = (0..step.num_seqs).map(|seq| rows_of(seq).div_ceil(tile_rows)).sum();
    let mut items = Buffer::<Item>::take(count * params.kv_heads);
    let mut rest = items.iter_mut();
    for seq in (0..step.num_seqs).rev() {
        let rows = rows_of(seq);
        for tile in (0..rows.div_ceil(tile_rows)).rev() {
            for kv_head in 0..params.kv_heads {
                let Some(item) = rest.next() else { break };
                let first = tile * tile_rows;
                let rows = tile_rows.min(rows - first);
                *item = Item { seq: seq as u32, kv_head: kv_head as u32, first: first as u32, rows: rows as u32 };
            }
        }
    }
    items
}

/// Cuts tiles that are a large share of the step's work, so that all threads have some until the end: with few sequences,
/// and where one is much longer than others, as a prompt's part beside sequences that decode.
fn cut(params: &Params, step: &Step<'_>, tiles: &[Item], threads: usize) -> Buffer<Task> {
    let seen = |tile: &Item| Tile::<f32>::new(params, step, tile, &[], &[]).part(0, 1).len();
    // Keys and values are loaded once for all rows.
    let work = |tile: &Item| seen(tile) * (tile.rows as usize + LOAD_ROWS);
    let limit = (tiles.iter().map(work).sum::<usize>() / (TASKS_PER_THREAD * threads)).max(1);
    let parts = |tile: &Item| match threads {
        1 => 1,
        _ => work(tile).div_ceil(limit).min(seen(tile).div_ceil(PART_TOKENS_MIN)).max(1),
    };
    let mut tasks = Buffer::<Task>::take(tiles.iter().map(parts).sum());
    let (mut rest, mut places) = (tasks.iter_mut(), 0);
    for (index, tile) in tiles.iter().enumerate() {
        let parts = parts(tile);
        for (part, task) in rest.by_ref().take(parts).enumerate() {
            *task = Task { tile: index as u32, part: part as u32, parts: parts as u32, place: places };
            places += u32::from(parts > 1);
        }
    }
    tasks
}

/// Queries `[rows, head_dim]`, times the softmax's factor.
fn load_queries<X: Element, C: Compute>(
    tile: &Tile<'_, impl KvElement>,
    params: &Params,
    queries: &Rows<'_, X>,
    q: &mut [C],
) {
    let (level, factor) = (level(), softmax::factor(params));
    let mut values = Buffer::<f32>::take(q.len());
    let mut row = 0;
    while row < tile.rows() {
        // The heads of a token lie side by side.
        let (token, head) = tile.place(row);
        let heads = (row..tile.rows()).take_while(|row| tile.place(*row).0 == token).count();
        let own = &mut values[row * params.head_dim..][..heads * params.head_dim];
        let start = token * queries.stride + head * params.head_dim;
        X::load(level, &queries.data[start..start + own.len()], own);
        own.iter_mut().for_each(|value| *value *= factor);
        row += heads;
    }
    C::narrow(level, &values, q);
}

/// Divides by the totals, and rounds.
fn finish<Y: Element>(tile: &Tile<'_, impl KvElement>, params: &Params, strips: &[Partial], out: &Shared<'_, Y>) {
    let (level, mut values) = (level(), Buffer::<f32>::take(params.head_dim));
    for row in 0..tile.rows() {
        let (token, head) = tile.place(row);
        let (strip, row) = (&strips[row / tile.strip_rows()], row % tile.strip_rows());
        let sums = &strip.sums[row * params.head_dim..][..params.head_dim];
        let factor = 1.0 / strip.totals[row];
        values.iter_mut().zip(sums).for_each(|(value, sum)| *value = sum * factor);
        let start = (token * params.q_heads + head) * params.head_dim;
        // SAFETY: each query row belongs to one tile, which is finished once.
        Y::store(level, &values, unsafe { out.part(start..start + params.head_dim) });
    }
}
