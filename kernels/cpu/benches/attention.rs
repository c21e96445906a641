//! Attention over bf16 pages at two threads: how near decoding comes to adding up the pages' bytes, and how near prompts
//! come to the peak of arithmetic. Arguments: `decode`, `prefill`, or names of cases such as `1x16@4096`; all without.

#![expect(clippy::unwrap_used, reason = "a bench that cannot go on ends")]

#[expect(dead_code, reason = "the best of times")]
mod support;

use std::{hint::black_box, time::Duration};

use half::bf16;
use memmap2::{Advice, MmapMut};
use support::{median, peak, sum, time};
use torus_cpu::attention::{Inputs, Params, PoolShape, Rows, Step, attention};

/// A layer of SmolLM2-135M.
const PARAMS: Params =
    Params { q_heads: 9, kv_heads: 3, head_dim: 64, page_size: 16, scale: 0.125, window: None, soft_cap: None };
/// Layers, each with a pool, so that no cache holds them all.
const LAYERS: usize = 30;
const ROUNDS: usize = 9;
/// Sequences, new tokens of each, tokens of each.
const CASES: [(usize, usize, usize); 9] = [
    (1, 1, 128),
    (1, 1, 4096),
    (8, 1, 576),
    (32, 1, 576),
    (8, 1, 2048),
    (1, 512, 512),
    (1, 16, 4096),
    (1, 128, 4096),
    (1, 512, 4096),
];

/// Sequences of as many tokens, of which the last `new` are the step's, in pages that lie scattered.
struct World {
    kv_slot: Vec<i32>,
    cu_q_lens: Vec<i32>,
    kv_lens: Vec<i32>,
    page_begin: Vec<i32>,
    page_table: Vec<i32>,
    pages: usize,
}

impl World {
    fn new(seqs: usize, new: usize, len: usize) -> Self {
        let page = PARAMS.page_size;
        let each = len.div_ceil(page);
        let pages = (seqs * each).next_power_of_two();
        // An odd factor visits every page once.
        let page_table: Vec<i32> = (0..seqs * each).map(|index| (index * 5 % pages) as i32).collect();
        let slot = |seq: usize, position: usize| {
            page_table[seq * each + position / page] * page as i32 + (position % page) as i32
        };
        Self {
            kv_slot: (0..seqs)
                .flat_map(|seq| (len - new..len).map(move |position| (seq, position)))
                .map(|(seq, position)| slot(seq, position))
                .collect(),
            cu_q_lens: (0..=seqs).map(|seq| (seq * new) as i32).collect(),
            kv_lens: vec![len as i32; seqs],
            page_begin: (0..seqs).map(|seq| (seq * each) as i32).collect(),
            page_table,
            pages,
        }
    }

    fn step(&self) -> Step<'_> {
        Step {
            kv_slot: &self.kv_slot,
            cu_q_lens: &self.cu_q_lens,
            kv_lens: &self.kv_lens,
            page_begin: &self.page_begin,
            page_table: &self.page_table,
            num_seqs: self.kv_lens.len(),
        }
    }
}

fn measure(seqs: usize, new: usize, len: usize) {
    let world = World::new(seqs, new, len);
    let page = PoolShape::new(&PARAMS).page_elements();
    let layer = world.pages * page;
    let mut memory = MmapMut::map_anon(2 * LAYERS * layer).unwrap();
    // As the engine does, if the system can.
    let _ = memory.advise(Advice::HugePage);
    // SAFETY: pages are aligned, and zeros are numbers.
    let pools = unsafe { std::slice::from_raw_parts_mut(memory.as_mut_ptr().cast::<bf16>(), LAYERS * layer) };
    pools.fill(bf16::ZERO);
    let width = (PARAMS.q_heads + 2 * PARAMS.kv_heads) * PARAMS.head_dim;
    let rows: Vec<f32> = (0..seqs * new * width).map(|index| (index * 37 % 101) as f32 / 50.0 - 1.0).collect();
    let part = |from: usize| Rows { data: &rows[from * PARAMS.head_dim..], stride: width };
    let inputs = Inputs { q: part(0), k: part(PARAMS.q_heads), v: part(PARAMS.q_heads + PARAMS.kv_heads) };
    let mut out = vec![0f32; seqs * new * PARAMS.q_heads * PARAMS.head_dim];
    let [mut times, mut sums] = [const { Vec::<Duration>::new() }; 2];
    let mut limit = 0.0f64;
    let read = LAYERS * world.page_table.len() * page;
    for _ in 0..ROUNDS {
        times.push(time(|| {
            for pool in pools.chunks_exact_mut(layer) {
                let done = attention(&PARAMS, &world.step(), &inputs, pool, &mut [], &mut out);
                assert_eq!(done, Ok(()), "the step fits the pool");
            }
        }));
        // SAFETY: the elements are numbers of two bytes.
        let bytes = unsafe { std::slice::from_raw_parts(pools.as_ptr().cast::<u8>(), 2 * read) };
        sums.push(time(|| _ = black_box(sum(bytes))));
        limit = limit.max(peak(true).unwrap_or(f64::NAN));
    }
    let (took, summed) = (median(&mut times).as_secs_f64(), median(&mut sums).as_secs_f64());
    // Each new token sees those before it and itself.
    let pairs = seqs * (0..new).map(|token| len - token).sum::<usize>();
    let operations = (LAYERS * pairs * 4 * PARAMS.q_heads * PARAMS.head_dim) as f64 / took;
    println!(
        "attention.{seqs}x{new}@{len} ms={:.2} gb_per_s={:.1} share_of_sum={:.3} gflops={:.0} share_of_peak={:.3}",
        took * 1e3,
        2e-9 * read as f64 / took,
        summed / took,
        operations / 1e9,
        operations / limit,
    );
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|argument| !argument.starts_with('-')).collect();
    support::start_threads();
    for (seqs, new, len) in CASES {
        let name = format!("{seqs}x{new}@{len}");
        let kind = if new == 1 { "decode" } else { "prefill" };
        if arguments.is_empty() || arguments.iter().any(|argument| *argument == name || argument == kind) {
            measure(seqs, new, len);
        }
    }
}
