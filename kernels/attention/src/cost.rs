//! What a launch moves and computes for a batch, in plain arithmetic: how often its loops go round, and the bytes that
//! its DMAs copy. The interpreter counts the same when it runs the kernel; the tests hold the two together.

use crate::{
    layout::{LANES, Layout},
    queue::{self, BLOCK, CHUNK_WORDS, Chunk, Item, Queue, SLOT_WORDS, Sequence},
    spec::{Shape, Spec, Unsupported},
    tuned::{Tiles, Tuning},
};

/// A batch's work.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Work {
    /// Decoded sequences, and how many of them are copied one by one.
    pub slots: u64,
    pub scattered: u64,
    /// Iterations of decode.
    pub groups: u64,
    /// Prefilled sequences, and the pages that their new tokens go to.
    pub chunks: u64,
    pub pieces: u64,
    /// Iterations that bring a tile's rows to their heads, and as many that bring them back.
    pub batches: u64,
    /// Tiles of prefill, their blocks that are taken whole, those at an edge, and the parts that are taken of these.
    pub tiles: u64,
    pub whole: u64,
    pub edges: u64,
    pub parts: u64,
    /// From HBM, to HBM, and within it (read and written each).
    pub bytes_in: u64,
    pub bytes_out: u64,
    pub bytes_within: u64,
    /// Bytes of keys and values among `bytes_in`.
    pub kv_bytes: u64,
    /// Two for each multiplication of a seen token's key or value with a query row: what cannot be done without.
    pub flops: u64,
}

impl Work {
    pub fn of(spec: &Spec, shape: &Shape, tuning: &Tuning, sequences: &[Sequence]) -> Result<Self, Unsupported> {
        let layout = Layout::new(spec)?;
        let queue = Queue::of(spec, shape, tuning.pages, sequences)?;
        let count = |which: usize| queue.counts[which] as u64;
        // Rows of slots that may have several tokens are copied one slot after the other.
        let (slots, run) = (count(queue::SLOTS), if shape.draft == 1 { count(queue::RUN) } else { 0 });
        let items = count(queue::ITEMS).next_multiple_of(BLOCK as u64);
        let mut work = Self {
            slots,
            scattered: slots - run,
            groups: count(queue::GROUPS),
            chunks: count(queue::CHUNKS),
            bytes_in: 2 * items * size_of::<i32>() as u64,
            batches: batches(&tuning.tiles, &layout),
            flops: flops(spec, sequences),
            ..Self::default()
        };
        let sizes = Bytes::new(&layout);
        match shape.draft {
            1 => work.decode(&queue, tuning, &sizes),
            _ => work.decode_drafts(spec, &queue, tuning, &sizes),
        }
        for words in queue.chunks.chunks(CHUNK_WORDS).take(work.chunks as usize) {
            let chunk = Chunk {
                token: words[0],
                len: words[1],
                old: words[2],
                item: words[3],
                pages: words[4],
                first_page: words[5],
            };
            work.prefill(spec, &tuning.tiles, &chunk, &sizes);
        }
        Ok(work)
    }

    /// All bytes from and to HBM.
    pub fn hbm_bytes(&self) -> u64 {
        self.bytes_in + self.bytes_out + 2 * self.bytes_within
    }

    /// Of decode's loop and of prefill's.
    pub fn iterations(&self) -> u64 {
        self.groups + self.whole + self.edges
    }

    fn decode(&mut self, queue: &Queue, tuning: &Tuning, sizes: &Bytes) {
        for item in &queue.items[..self.groups as usize * tuning.pages] {
            let low = (item >> Item::LOW_BIT) & 0x7F;
            let rows = ((item >> Item::ROWS_BIT) - low).max(1) as u64;
            self.kv_bytes += rows * sizes.token;
        }
        self.bytes_in += self.kv_bytes + self.slots * (sizes.row + sizes.token);
        self.bytes_out += self.slots * (sizes.row + sizes.token);
    }

    /// Decode where slots may have several tokens: new rows go through the ring, and to their pages from where they are.
    fn decode_drafts(&mut self, spec: &Spec, queue: &Queue, tuning: &Tuning, sizes: &Bytes) {
        let (page, seqs) = (spec.page_size as i32, queue.slots.len() / SLOT_WORDS);
        let word = |slot: usize, word: usize| queue.slots[word * seqs + slot];
        for item in &queue.items[..self.groups as usize * tuning.pages] {
            let slot = (item & ((1 << Item::SLOT_BITS) - 1)) as usize;
            let (new, old) = (word(slot, 1), word(slot, 2));
            let start = (item >> Item::NUMBER_BIT) * page;
            let within = |token: i32| (token - start).clamp(0, page);
            let from = spec.window.map_or(0, |window| within(old + 1 - window as i32).min(within(old)));
            self.kv_bytes += (within(old + new) - from) as u64 * sizes.token;
        }
        let tokens: u64 = (0..self.slots as usize).map(|slot| word(slot, 1) as u64).sum();
        self.bytes_in += self.kv_bytes + tokens * sizes.row;
        self.bytes_out += tokens * sizes.row;
        self.bytes_within += tokens * sizes.token;
    }

    fn prefill(&mut self, spec: &Spec, tiles: &Tiles, chunk: &Chunk, sizes: &Bytes) {
        let (len, old) = (chunk.len as u64, chunk.old as u64);
        let page = spec.page_size as u64;
        self.pieces += (old + len).div_ceil(page) - old / page;
        self.bytes_within += len * sizes.token;
        let mut token = 0;
        while token < len {
            let end = len.min(token + tiles.tokens as u64);
            for _ in 0..sizes.units {
                self.tile(spec, tiles, chunk, token..end, sizes);
            }
            token = end;
        }
    }

    /// One tile in one unit.
    fn tile(&mut self, spec: &Spec, tiles: &Tiles, chunk: &Chunk, tokens: std::ops::Range<u64>, sizes: &Bytes) {
        let (old, block, part) = (chunk.old as u64, tiles.block as u64, tiles.part() as u64);
        let base = chunk.first_page as u64 * spec.page_size as u64;
        let seen = |token: u64| spec.window.map_or(0, |window| (old + token + 1).saturating_sub(window as u64));
        let (first, last) = (seen(tokens.start), seen(tokens.end - 1));
        self.tiles += 1;
        let rows = (tokens.end - tokens.start) * sizes.row / sizes.units;
        self.bytes_in += rows;
        self.bytes_out += rows;
        let mut add = |start: u64, position: u64, end: u64, is_seen: bool| {
            let rows = block.min(end - start);
            let bytes = rows * sizes.token / sizes.units;
            self.bytes_in += bytes;
            self.kv_bytes += bytes;
            if rows == block && is_seen && position >= last {
                self.whole += 1;
            } else {
                self.edges += 1;
                self.parts += rows.div_ceil(part) - first.saturating_sub(position) / part;
            }
        };
        if first < old {
            (((first - base) / block)..(old - base).div_ceil(block))
                .for_each(|at| add(at * block, base + at * block, old - base, true));
        }
        (first.saturating_sub(old) / block..tokens.end.div_ceil(block)).for_each(|at| {
            let is_seen = at * block + block - 1 <= tokens.start;
            add(at * block, old + at * block, tokens.end, is_seen);
        });
    }
}

/// Bytes of one token's keys and values, and of its query rows, in all units.
struct Bytes {
    token: u64,
    row: u64,
    units: u64,
}

impl Bytes {
    fn new(layout: &Layout) -> Self {
        let (units, rows) = (layout.units as u64, layout.rows() * layout.width());
        let token = units * (layout.planes * LANES * size_of::<u32>()) as u64;
        Self { token, row: units * (rows * size_of::<u16>()) as u64, units }
    }
}

fn batches(tiles: &Tiles, layout: &Layout) -> u64 {
    (tiles.tokens / tiles.batch(layout) / tiles.batches_at_once(layout)) as u64
}

fn flops(spec: &Spec, sequences: &[Sequence]) -> u64 {
    let seen = |sequence: &Sequence, token: usize| {
        let position = sequence.old + token;
        spec.window.map_or(position + 1, |window| window.min(position + 1))
    };
    let tokens = sequences.iter().flat_map(|sequence| (0..sequence.new).map(move |token| seen(sequence, token)));
    4 * (spec.q_heads * spec.head_dim) as u64 * tokens.map(|tokens| tokens as u64).sum::<u64>()
}
