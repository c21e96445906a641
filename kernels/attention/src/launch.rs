//! One launch: what a layer's kernel is called with, and the order of its parts.
//!
//! # Operands
//!
//! | operand | type | where |
//! |---|---|---|
//! | [`COUNTS`], [`SLOTS`], [`CHUNKS`] | see [`crate::queue`] | SMEM |
//! | [`ITEMS`], [`PAGES`] | likewise | HBM |
//! | [`QUERY`] | `bf16 [tokens, units, rows, width]`: rows and lanes as [`Layout::query_row`] and [`Layout::query_lane`] say, zero elsewhere | HBM; the result takes its place |
//! | [`NEW`] | `i32 [units, planes, tokens, 128]`: the new keys and values as the pool has them | HBM |
//! | [`POOL`] | `i32 [pages, units, planes, page, 128]` | HBM, updated in place |
//! | the mask, if the spec has one: it comes after [`CHUNKS`], and the others move on | `i32 [tokens]`: bit `j` says that the token sees the `j`-th new token of its sequence | SMEM |
//! | [`SINKS`], if the spec has them | `f32 [units, rows, 128]`: the sink's score times log2(e), in every lane | VMEM |
//!
//! Results: the attended rows, laid out as the query (rows of no sequence stay as they were), and the pool.
//!
//! # Order
//!
//! 1. The queue is copied to SMEM; decode begins meanwhile with the first items, which came with the counts.
//! 2. Decode, if there is a slot: `decode.rs`. It writes its tokens' keys and values into their pages.
//! 3. The keys and values of chunks are copied from [`NEW`] to their pages. Nothing in this launch reads them there.
//! 4. Prefill, if there is a chunk: `prefill.rs`.

use torus_mosaic::{Builder, CallOptions, Dma, Elem, Kernel, Ref, Semaphore, Space, Value, ds_dynamic};

use crate::{
    decode,
    layout::{LANES, Layout},
    prefill,
    queue::{self, BLOCK, CHUNK_WORDS, SLOT_WORDS, Sizes},
    spec::{Shape, Spec, Unsupported},
    tuned::Tuning,
};

pub const COUNTS: usize = 0;
pub const SLOTS: usize = 1;
pub const CHUNKS: usize = 2;
pub const ITEMS: usize = 3;
pub const PAGES: usize = 4;
pub const QUERY: usize = 5;
pub const NEW: usize = 6;
pub const POOL: usize = 7;
pub const SINKS: usize = 8;

/// Scores are powers of 2: `exp2` is what the hardware has.
pub(crate) const LOG2_E: f32 = std::f32::consts::LOG2_E;
/// Of tokens that are not seen.
pub(crate) const LEAST: f32 = -1e30;

/// A kernel that is being built: what its parts are given.
pub(crate) struct Launch<'k> {
    pub k: &'k Builder,
    pub spec: &'k Spec,
    pub layout: &'k Layout,
    pub shape: &'k Shape,
    pub tuning: &'k Tuning,
    pub sizes: Sizes,
    /// SMEM, as [`crate::queue`] says.
    pub counts: Ref<'k>,
    pub slots: Ref<'k>,
    pub chunks: Ref<'k>,
    /// The queue's arrays in HBM and in SMEM, and what counts the copy.
    queue: [(Ref<'k>, Ref<'k>); 2],
    queued: Semaphore<'k>,
    /// The queue in SMEM, `[items]` each: there once decode has begun.
    pub items: Ref<'k>,
    pub pages: Ref<'k>,
    /// HBM; the query and the result are one memory, so a row is read before it is written.
    pub query: Ref<'k>,
    pub new: Ref<'k>,
    pub pool: Ref<'k>,
    pub sinks: Option<Ref<'k>>,
    /// Bit `j` of a token's word: it sees the `j`-th new token of its sequence.
    pub mask: Option<Ref<'k>>,
}

/// A slot's words, read from SMEM; see [`queue::Slot`].
#[derive(Clone, Copy)]
pub(crate) struct SlotValues<'k> {
    pub token: Value<'k>,
    pub new: Value<'k>,
    pub old: Value<'k>,
    pub page: Value<'k>,
    pub next_page: Value<'k>,
}

/// A chunk's words, read from SMEM; see [`queue::Chunk`].
#[derive(Clone, Copy)]
pub(crate) struct ChunkValues<'k> {
    pub token: Value<'k>,
    pub len: Value<'k>,
    pub old: Value<'k>,
    pub item: Value<'k>,
    #[expect(dead_code, reason = "prefill's")]
    pub pages: Value<'k>,
    pub first_page: Value<'k>,
}

/// The kernel of a kind of layer.
pub fn kernel(spec: &Spec, shape: &Shape, tuning: &Tuning) -> Result<Kernel, Unsupported> {
    let layout = Layout::new(spec)?;
    let sizes = Sizes::new(shape, tuning.pages)?;
    let Shape { tokens, pages, .. } = *shape;
    let row = [layout.units, layout.rows(), layout.width()];
    let kernel = Kernel::build("attention", |k| {
        let counts = k.prefetch(Elem::I32.of([queue::COUNTS]));
        let slots = k.prefetch(Elem::I32.of([SLOT_WORDS * (sizes.seqs + 1)]));
        let chunks = k.prefetch(Elem::I32.of([sizes.chunks * CHUNK_WORDS]));
        let mask = spec.mask.then(|| k.prefetch(Elem::I32.of([tokens])));
        let all_items = k.input(Space::Hbm, Elem::I32.of([sizes.items]));
        let all_pages = k.input(Space::Hbm, Elem::I32.of([sizes.items]));
        let query = k.input(Space::Hbm, Elem::Bf16.of([tokens, row[0], row[1], row[2]]));
        let new = k.input(Space::Hbm, Elem::I32.of([layout.units, layout.planes, tokens, LANES]));
        let pool = k.input(Space::Hbm, layout.pool(pages));
        let sinks = spec.sinks.then(|| k.input(Space::Vmem, Elem::F32.of([row[0], row[1], LANES])));
        let query = k.output_in_place(query);
        let pool = k.output_in_place(pool);
        let [items, pages] = [0, 1].map(|_| k.scratch(Space::Smem, Elem::I32.of([sizes.items])));
        let launch = Launch {
            k,
            spec,
            layout: &layout,
            shape,
            tuning,
            sizes,
            queue: [(all_items, items), (all_pages, pages)],
            queued: k.dma_semaphores(&[]),
            counts,
            slots,
            chunks,
            items,
            pages,
            query,
            new,
            pool,
            sinks,
            mask,
        };
        let decodes = launch.count(queue::GROUPS).gt(0);
        launch.queue_copies().iter().for_each(|copy| copy.start());
        k.when(decodes, || decode::emit(&launch));
        k.when(!decodes, || launch.await_queue());
        // A step of so few tokens has no chunks.
        if tokens > shape.draft {
            k.when(launch.count(queue::CHUNKS).gt(0), || launch.chunked());
        }
    })?;
    let (bytes, available) = (kernel.footprint().smem, spec.generation.usable_smem_bytes());
    if bytes > available {
        return Err(Unsupported::Smem { bytes, available });
    }
    Ok(kernel)
}

/// Whether there is a kernel that fits the chip's memories.
pub fn check(spec: &Spec, shape: &Shape, tuning: &Tuning) -> Result<(), Unsupported> {
    kernel(spec, shape, tuning)?.custom_call(&call_options(spec), Vec::new())?;
    Ok(())
}

/// Bytes of VMEM that a launch may use at most: XLA prefetches weights into the rest meanwhile.
pub const VMEM_LIMIT: usize = 60 << 20;

/// How the kernel is called. The interpreter checks all bounds, the compiled kernel none.
pub fn call_options(spec: &Spec) -> CallOptions {
    CallOptions {
        vmem_limit_bytes: Some(VMEM_LIMIT),
        disable_bounds_checks: true,
        cost: Some(Default::default()),
        ..CallOptions::new(spec.generation)
    }
}

impl<'k> Launch<'k> {
    pub fn count(&self, which: usize) -> Value<'k> {
        self.counts.get((which,))
    }

    /// The copies of the queue to SMEM.
    fn queue_copies(&self) -> [Dma<'k>; 2] {
        let blocks = (self.count(queue::ITEMS) + (BLOCK as i32 - 1)) & -(BLOCK as i32);
        let used = ds_dynamic(0, blocks.assume_multiple(BLOCK as u32));
        self.queue.map(|(from, to)| from.at((used,)).copy_to(to.at((used,)), self.queued))
    }

    /// Waits until the queue is in SMEM. Once in a launch.
    pub fn await_queue(&self) {
        self.queue_copies().iter().for_each(|copy| copy.wait());
    }

    pub fn slot(&self, number: Value<'k>) -> SlotValues<'k> {
        let word = |word: usize| self.slots.get((number + (word * (self.sizes.seqs + 1)) as i32,));
        SlotValues { token: word(0), new: word(1), old: word(2), page: word(3), next_page: word(4) }
    }

    pub fn chunk(&self, number: Value<'k>) -> ChunkValues<'k> {
        let word = |word: i32| self.chunks.get((number * CHUNK_WORDS as i32 + word,));
        ChunkValues { token: word(0), len: word(1), old: word(2), item: word(3), pages: word(4), first_page: word(5) }
    }

    /// Writes the chunks' keys and values, and attends to them meanwhile.
    fn chunked(&self) {
        let written = self.k.dma_semaphores(&[]);
        self.for_each_piece(|piece| piece.copy(self, written).start());
        prefill::emit(self);
        self.for_each_piece(|piece| piece.copy(self, written).wait());
    }

    /// The new tokens of chunks, piece by piece: those of one page.
    fn for_each_piece(&self, visit: impl Fn(Piece<'k>)) {
        let (k, page) = (self.k, self.spec.page_size as i32);
        k.for_range(0, self.count(queue::CHUNKS), &[], |number, _| {
            let chunk = self.chunk(number);
            let (first, end) = (chunk.old / page, chunk.old + chunk.len);
            k.for_range(first, (end + (page - 1)) / page, &[], |at, _| {
                let from = chunk.old.max(at * page);
                let rows = end.min((at + 1) * page) - from;
                let number = self.pages.get((chunk.item + at - chunk.first_page,));
                visit(Piece { page: number, row: from - at * page, rows, token: chunk.token + from - chunk.old });
                Vec::new()
            });
            Vec::new()
        });
    }
}

/// New tokens within one page.
struct Piece<'k> {
    page: Value<'k>,
    row: Value<'k>,
    rows: Value<'k>,
    token: Value<'k>,
}

impl<'k> Piece<'k> {
    fn copy(&self, launch: &Launch<'k>, semaphore: Semaphore<'k>) -> Dma<'k> {
        let from = launch.new.at((.., .., ds_dynamic(self.token, self.rows)));
        let to = launch.pool.at((self.page, .., .., ds_dynamic(self.row, self.rows)));
        from.copy_to(to, semaphore)
    }
}
