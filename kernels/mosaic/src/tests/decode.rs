//! Decode attention as one queue of pages of all sequences: the hardest kernel that the builder must be able to say. It
//! uses copies of run-time size, a ring of them in flight, views of packed words as `bf16`, a loop that is pipelined by
//! hand, and rows written in place meanwhile.
//!
//! Pages hold 32-bit words, `[pages, 2 (keys, values), PAGE, DIM]`: a word is one lane of one token, of the first head
//! in its low half and of the second in its high half.

use rand::RngExt;

use crate::{
    Array, Builder, CallOptions, CopyRaces, Elem, FaultKind, Interpreter, Kernel, Ref, RunOptions, Semaphore, Space,
    Value, ds, ds_dynamic,
    tests::{
        support::{close, fault, random, run_with},
        tpu::{Compiler, alone},
    },
};

const SEQS: usize = 8;
const PAGES: usize = 48;
const ITEMS: usize = 64;
const PAGE: usize = 128;
const DIM: usize = 128;
const HEADS: usize = 8;
const KV_HEADS: usize = 2;
const COLUMNS: usize = KV_HEADS * PAGE;
/// Pages of one iteration.
const GROUP: usize = 4;
/// Groups in the ring, of which all but two are in flight.
const RING: usize = 8;
const LEAST: f32 = -1e30;

struct Decode<'k> {
    k: &'k Builder,
    groups: Value<'k>,
    page_of: Ref<'k>,
    /// Sequence in the low 12 bits, then "first page of it" (12), "last page" (13), rows that count from 16 on.
    meta: Ref<'k>,
    q: Ref<'k>,
    new: Ref<'k>,
    cache: Ref<'k>,
    out: Ref<'k>,
    ring: Ref<'k>,
    arrived: Semaphore<'k>,
}

/// What is carried from group to group.
struct State<'k> {
    scores: Vec<Value<'k>>,
    sum: Value<'k>,
    max: Value<'k>,
    acc: Value<'k>,
}

fn decode() -> Kernel {
    Kernel::build("decode", |k| {
        let counts = k.prefetch(Elem::I32.of([2]));
        let page_of = k.prefetch(Elem::I32.of([ITEMS]));
        let meta = k.prefetch(Elem::I32.of([ITEMS]));
        let rows = k.prefetch(Elem::I32.of([SEQS + 1]));
        let q = k.input(Space::Vmem, Elem::Bf16.of([SEQS + 1, HEADS, DIM]));
        let new = k.input(Space::Vmem, Elem::I32.of([SEQS + 1, 2, 1, DIM]));
        let cache = k.input(Space::Any, Elem::I32.of([PAGES, 2, PAGE, DIM]));
        let out = k.output(Space::Vmem, Elem::Bf16.of([SEQS + 1, HEADS, DIM]));
        let cache = k.output_in_place(cache);
        let ring = k.scratch(Space::Vmem, Elem::I32.of([RING, GROUP, 2, PAGE, DIM]));
        let arrived = k.dma_semaphores(&[RING]);
        let written = k.dma_semaphores(&[]);
        let groups = counts.get((0,));
        let decode = Decode { k, groups, page_of, meta, q, new, cache, out, ring, arrived };

        for group in 0..RING as i32 - 2 {
            k.when(groups.gt(group), || decode.fetch(k.i32(group)));
        }
        k.for_range(0, counts.get((1,)), &[], |seq, _| {
            let row = rows.get((seq,));
            new.at((seq,)).copy_to(cache.at((row >> 8, .., ds(row & 0xFF, 1))), written).start();
            Vec::new()
        });
        decode.await_group(k.i32(0));
        let zeros = k.zeros(Elem::F32.of([HEADS, DIM]));
        let least = k.full(Elem::F32.of([HEADS, DIM]), LEAST);
        let mut carried = decode.scores(k.i32(0));
        carried.extend([zeros, least, zeros]);
        k.for_range(0, groups, &carried, |group, carried| decode.iteration(group, carried));
        k.for_range(0, counts.get((1,)), &[], |_, _| {
            new.at((0,)).copy_to(new.at((0,)), written).wait();
            Vec::new()
        });
    })
    .unwrap_or_else(|error| panic!("{error}"))
}

impl<'k> Decode<'k> {
    fn slot(&self, group: Value<'k>) -> Value<'k> {
        group & (RING as i32 - 1)
    }

    fn item(&self, group: Value<'k>, page: usize) -> Value<'k> {
        self.meta.get((group * GROUP as i32 + page as i32,))
    }

    fn seq(&self, group: Value<'k>, page: usize) -> Value<'k> {
        self.item(group, page) & 0xFFF
    }

    fn rows(&self, group: Value<'k>, page: usize) -> Value<'k> {
        self.item(group, page) >> 16
    }

    fn is_first(&self, group: Value<'k>, page: usize) -> Value<'k> {
        ((self.item(group, page) >> 12) & 1).eq(1)
    }

    /// Rows of a page that are copied: whole tiles.
    fn copied(&self, group: Value<'k>, page: usize) -> Value<'k> {
        (((self.rows(group, page) + 7) >> 3) << 3).assume_multiple(8)
    }

    fn fetch(&self, group: Value<'k>) {
        let slot = self.slot(group);
        for page in 0..GROUP {
            let rows = self.copied(group, page);
            let number = self.page_of.get((group * GROUP as i32 + page as i32,));
            let from = self.cache.at((number, .., ds_dynamic(0, rows)));
            let to = self.ring.at((slot, page, .., ds_dynamic(0, rows)));
            from.copy_to(to, self.arrived.at((slot,))).start();
        }
    }

    /// One wait for all pages of a group.
    fn await_group(&self, group: Value<'k>) {
        let slot = self.slot(group);
        let rows = (0..GROUP).map(|page| self.copied(group, page)).reduce(|a, b| a + b);
        let rows = (rows.unwrap_or(group) * 2).assume_multiple(8);
        let all = self.ring.reshape(&[RING, GROUP * 2 * PAGE, DIM]).at((slot, ds_dynamic(0, rows)));
        all.copy_to(all, self.arrived.at((slot,))).wait();
    }

    /// `q . k` for each page of a group, masked: rows behind the end and columns of the other head.
    fn scores(&self, group: Value<'k>) -> Vec<Value<'k>> {
        let k = self.k;
        let (row, column) = (k.iota([HEADS, COLUMNS], 0), k.iota([HEADS, COLUMNS], 1));
        let own = (column & 1).eq((row * KV_HEADS as i32) >> 3);
        let token = own.select(column >> 1, 1 << 30);
        let page_scores = |page: usize| {
            let q = self.q.load_at((self.seq(group, page),));
            let keys = self.ring.load_at((self.slot(group), page, 0)).bitcast(Elem::Bf16);
            token.lt(self.rows(group, page)).select(q.dot_transposed(keys), LEAST)
        };
        (0..GROUP).map(page_scores).collect()
    }

    /// The new token's key or value, for each head its own.
    fn new_row(&self, seq: Value<'k>, which: usize) -> Value<'k> {
        let words = self.new.load_at((seq, which)).broadcast(&[HEADS, DIM]);
        let low = self.k.iota([HEADS, DIM], 0).lt((HEADS / 2) as i32);
        low.select(words << 16, words & 0xFFFF_0000_u32 as i32).bitcast(Elem::F32)
    }

    fn iteration(&self, group: Value<'k>, carried: &[Value<'k>]) -> Vec<Value<'k>> {
        let k = self.k;
        let state = State {
            scores: carried[..GROUP].to_vec(),
            sum: carried[GROUP],
            max: carried[GROUP + 1],
            acc: carried[GROUP + 2],
        };
        let next = (group + 1).min(self.groups - 1);
        k.when((group + 1).lt(self.groups), || self.await_group(group + 1));
        let mut out = self.scores(next);
        let (weights, scales, sums, max) = self.softmax(group, &state);
        let products: Vec<_> = (0..GROUP).map(|page| weights[page].dot(self.values(group, page))).collect();
        let ahead = group + (RING as i32 - 2);
        k.when(ahead.lt(self.groups), || self.fetch(ahead));
        let mut acc = state.acc;
        for page in 0..GROUP {
            let seq = self.seq(group, page);
            acc = self.is_first(group, page).select(self.new_row(seq, 1), acc) * scales[page] + products[page];
            let total = sums[page].sum(1);
            self.out.store_at((seq,), (acc * total.reciprocal(true)).cast(Elem::Bf16));
        }
        out.extend([sums[GROUP - 1], max, acc]);
        out
    }

    /// A page's values, zero where it was not copied: the ring may hold anything there.
    fn values(&self, group: Value<'k>, page: usize) -> Value<'k> {
        let words = self.ring.load_at((self.slot(group), page, 1));
        let counts = self.k.iota([PAGE, DIM], 0).lt(self.rows(group, page));
        counts.select(words, 0).bitcast(Elem::Bf16)
    }

    /// Weights and scale for each page, sums by lane after each, and the maximum after all. A sequence's first page
    /// begins with the new token alone.
    fn softmax(
        &self,
        group: Value<'k>,
        state: &State<'k>,
    ) -> (Vec<Value<'k>>, Vec<Value<'k>>, Vec<Value<'k>>, Value<'k>) {
        let k = self.k;
        let one = k.iota([HEADS, DIM], 1).eq(0).select(k.full(Elem::F32.of([HEADS, DIM]), 1.0), 0.0);
        let (mut max, mut sum) = (state.max, state.sum);
        let (mut weights, mut scales, mut sums) = (Vec::new(), Vec::new(), Vec::new());
        for (page, scores) in state.scores.iter().enumerate() {
            let (seq, first) = (self.seq(group, page), self.is_first(group, page));
            let own = (self.q.load_at((seq,)).cast(Elem::F32) * self.new_row(seq, 0)).sum(1);
            let halves = [0, DIM].map(|lane| scores.slice(&[0, lane], &[HEADS, DIM]));
            let before = first.select(own.broadcast(&[HEADS, DIM]), max);
            max = before.max(halves[0].max(halves[1]).reduce_max(1));
            let scale = (before - max).exp2();
            let weighted = halves.map(|half| (half - max).exp2());
            sum = first.select(one, sum) * scale + weighted[0] + weighted[1];
            weights.push(weighted[0].cast(Elem::Bf16).concatenate(&[weighted[1].cast(Elem::Bf16)], 1));
            scales.push(scale);
            sums.push(sum);
        }
        (weights, scales, sums, max)
    }
}

/// A batch: operands, the output's rows of all sequences, and the cache afterwards.
struct Batch {
    operands: Vec<Array>,
    expected: Vec<f32>,
    cache: Vec<i32>,
}

fn bf16(random: &mut impl rand::Rng) -> f32 {
    half::bf16::from_f32(random.random_range(-1.0..1.0)).to_f32()
}

/// One token's lanes of both heads as words.
fn packed(heads: &[Vec<f32>; KV_HEADS]) -> Vec<i32> {
    let bits = |x: f32| i32::from(half::bf16::from_f32(x).to_bits());
    (0..DIM).map(|lane| bits(heads[0][lane]) | (bits(heads[1][lane]) << 16)).collect()
}

fn batch(seed: u64, lengths: &[usize]) -> Batch {
    let mut random = random(seed);
    let token = |random: &mut rand_chacha::ChaCha8Rng| -> [Vec<f32>; KV_HEADS] {
        [0, 1].map(|_| (0..DIM).map(|_| bf16(random)).collect())
    };
    let mut free: Vec<usize> = (1..PAGES).collect();
    let words = PAGES * 2 * PAGE * DIM;
    let (mut cache, mut defined) = (vec![0; words], vec![false; words]);
    let mut written = Vec::new();
    let (mut page_of, mut meta, mut rows) = (Vec::new(), Vec::new(), Vec::new());
    let mut q = vec![0.0; (SEQS + 1) * HEADS * DIM];
    let mut new = vec![0; (SEQS + 1) * 2 * DIM];
    let mut expected = vec![0.0; lengths.len() * HEADS * DIM];
    for (seq, length) in lengths.iter().copied().enumerate() {
        let old = length - 1;
        let table: Vec<usize> =
            (0..old / PAGE + 1).map(|_| free.swap_remove(random.random_range(0..free.len()))).collect();
        let keys: Vec<_> = (0..length).map(|_| token(&mut random)).collect();
        let values: Vec<_> = (0..length).map(|_| token(&mut random)).collect();
        for (at, (key, value)) in keys.iter().zip(&values).enumerate() {
            for (which, token) in [key, value].into_iter().enumerate() {
                let first = ((table[at / PAGE] * 2 + which) * PAGE + at % PAGE) * DIM;
                if at < old {
                    cache[first..first + DIM].copy_from_slice(&packed(token));
                    defined[first..first + DIM].fill(true);
                } else {
                    new[(seq * 2 + which) * DIM..][..DIM].copy_from_slice(&packed(token));
                    written.push((first, packed(token)));
                }
            }
        }
        let pages = old.div_ceil(PAGE).max(1);
        for (page, number) in table.iter().enumerate().take(pages) {
            let rows = old.saturating_sub(page * PAGE).min(PAGE);
            page_of.push(*number as i32);
            let (first, last) = (i32::from(page == 0), i32::from(page + 1 == pages));
            meta.push(seq as i32 | (first << 12) | (last << 13) | ((rows as i32) << 16));
        }
        rows.push(((table[old / PAGE] as i32) << 8) | (old % PAGE) as i32);
        for head in 0..HEADS {
            let query: Vec<f32> = (0..DIM).map(|_| half::bf16::from_f32(bf16(&mut random) * 0.13).to_f32()).collect();
            q[(seq * HEADS + head) * DIM..][..DIM].copy_from_slice(&query);
            let of = head * KV_HEADS / HEADS;
            let score = |key: &[Vec<f32>; 2]| key[of].iter().zip(&query).map(|(a, b)| a * b).sum::<f32>();
            let scores: Vec<f32> = keys.iter().map(score).collect();
            let max = scores.iter().copied().fold(f32::MIN, f32::max);
            let total: f32 = scores.iter().map(|score| (score - max).exp2()).sum();
            let out = &mut expected[(seq * HEADS + head) * DIM..][..DIM];
            for (score, value) in scores.iter().zip(&values) {
                let weight = (score - max).exp2() / total;
                out.iter_mut().zip(&value[of]).for_each(|(out, value)| *out += weight * value);
            }
        }
    }
    while page_of.len() % GROUP != 0 {
        page_of.push(0);
        meta.push(SEQS as i32 | (1 << 12));
    }
    let counts = [(page_of.len() / GROUP) as i32, lengths.len() as i32];
    page_of.resize(ITEMS, 0);
    meta.resize(ITEMS, 0);
    rows.resize(SEQS + 1, 0);
    let mut old = Array::from_i32(Elem::I32.of([PAGES, 2, PAGE, DIM]), &cache);
    old.undefine((0..words).filter(|word| !defined[*word]));
    let mut cache = old.to_i32();
    written.into_iter().for_each(|(first, words)| cache[first..first + DIM].copy_from_slice(&words));
    let operands = vec![
        Array::from_i32(Elem::I32.of([2]), &counts),
        Array::from_i32(Elem::I32.of([ITEMS]), &page_of),
        Array::from_i32(Elem::I32.of([ITEMS]), &meta),
        Array::from_i32(Elem::I32.of([SEQS + 1]), &rows),
        Array::from_f32(Elem::Bf16.of([SEQS + 1, HEADS, DIM]), &q),
        Array::from_i32(Elem::I32.of([SEQS + 1, 2, 1, DIM]), &new),
        old,
    ];
    Batch { operands, expected, cache }
}

#[test]
fn decode_attention_is_that_of_plain_loops() {
    let kernel = decode();
    let interpreter = Interpreter::new(&kernel);
    let options = RunOptions { copy_races: CopyRaces::Undefined, ..RunOptions::default() };
    let mut random = random(5);
    let mut batches = vec![vec![1], vec![129, 1, 128, 2], vec![130, 1, 512, 640, 129, 300]];
    batches.extend((0..9).map(|_| (0..SEQS).map(|_| random.random_range(1..640)).collect()));
    for (seed, lengths) in batches.iter().enumerate() {
        let Batch { operands, expected, cache } = batch(seed as u64, lengths);
        // All orders of completion for the small ones; they differ in nothing that depends on the size.
        let outcome = match seed {
            0..4 => run_with(&kernel, &operands, &options),
            _ => interpreter.run(&operands, &options).unwrap(),
        };
        close(&outcome.outputs[0].to_f32()[..expected.len()], &expected, 0.02);
        assert!(outcome.outputs[1].to_i32() == cache, "the cache of {lengths:?}");
        let rows: usize = lengths.iter().map(|length| (length - 1).next_multiple_of(8)).sum();
        assert_eq!(outcome.counters.bytes_in, (rows * 2 * DIM * 4) as u64);
        assert_eq!(outcome.counters.bytes_out, (lengths.len() * 2 * DIM * 4) as u64);
    }
}

/// The last tile of a page is fetched while the new row in it is written. The kernel masks that row; whoever does not
/// want to rely on it learns of the race.
#[test]
fn the_new_row_races_with_the_fetch_of_its_tile() {
    let found = fault(&decode(), &batch(1, &[130]).operands);
    assert!(matches!(found.kind, FaultKind::WriteInFlight { .. }), "{found}");
}

#[test]
fn decode_attention_compiles() {
    alone("tests::decode::compile");
}

#[test]
#[ignore = "run by decode_attention_compiles"]
fn compile() {
    for compiler in Compiler::all() {
        let options =
            CallOptions { vmem_limit_bytes: Some(32 << 20), disable_bounds_checks: true, ..compiler.options() };
        let compiled = compiler.compile(&decode(), &options).unwrap_or_else(|error| panic!("{error}"));
        assert_eq!(compiled.memory_stats().unwrap().alias_bytes, (PAGES * 2 * PAGE * DIM * 4) as i64);
    }
}
