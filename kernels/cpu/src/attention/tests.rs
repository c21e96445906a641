//! Ragged batches over scattered pages against plain attention in f64.

use half::bf16;
use rand::{RngExt, SeedableRng, seq::SliceRandom};
use rand_chacha::ChaCha8Rng;

use super::*;

/// Sequences as (tokens before the step, tokens of the step).
struct Case {
    params: Params,
    sequences: &'static [(usize, usize)],
    padding: usize,
}

const PLAIN: Params =
    Params { q_heads: 4, kv_heads: 2, head_dim: 32, page_size: 16, scale: 0.2, window: None, soft_cap: None };

fn cases() -> Vec<Case> {
    let case = |params, sequences, padding| Case { params, sequences, padding };
    vec![
        case(PLAIN, &[(0, 1)], 0),
        case(PLAIN, &[(15, 1), (16, 1), (0, 17), (100, 30)], 3),
        // More tokens than one thread writes, which no part of the cut may divide within a group.
        case(PLAIN, &[(5, 150), (0, 1), (2, 140)], 0),
        case(Params { window: Some(20), ..PLAIN }, &[(0, 50), (70, 1), (5, 3)], 0),
        case(Params { soft_cap: Some(1.5), ..PLAIN }, &[(33, 9), (0, 2)], 1),
        case(Params { q_heads: 3, kv_heads: 3, head_dim: 80, ..PLAIN }, &[(10, 7), (300, 1)], 0),
        case(Params { q_heads: 9, kv_heads: 3, head_dim: 64, page_size: 32, ..PLAIN }, &[(127, 1), (0, 70)], 0),
        case(Params { q_heads: 17, kv_heads: 1, head_dim: 16, ..PLAIN }, &[(40, 2), (0, 3)], 0),
        case(Params { q_heads: 2, kv_heads: 1, head_dim: 256, page_size: 48, ..PLAIN }, &[(500, 1), (2, 40)], 5),
        // A prompt's part that sees much, beside sequences that decode.
        case(PLAIN, &[(9, 1), (30, 1), (17, 1), (3, 1), (8, 1), (40, 1), (21, 1), (11, 1), (700, 5)], 0),
    ]
}

/// A step, and keys and values of whole sequences `[seq][position][kv_heads * head_dim]`.
struct World {
    kv_slot: Vec<i32>,
    cu_q_lens: Vec<i32>,
    kv_lens: Vec<i32>,
    page_begin: Vec<i32>,
    page_table: Vec<i32>,
    keys: Vec<Vec<f32>>,
    values: Vec<Vec<f32>>,
    pages: usize,
    tokens: usize,
}

impl World {
    fn new(case: &Case, random: &mut ChaCha8Rng) -> Self {
        let page = case.params.page_size;
        let counts: Vec<_> = case.sequences.iter().map(|(past, new)| (past + new).div_ceil(page)).collect();
        let pages = 1 + counts.iter().sum::<usize>();
        let mut free: Vec<i32> = (1..pages as i32).collect();
        free.shuffle(random);
        let row = case.params.kv_heads * case.params.head_dim;
        let mut world = Self {
            kv_slot: vec![],
            cu_q_lens: vec![0],
            kv_lens: vec![],
            page_begin: vec![],
            page_table: vec![],
            keys: vec![],
            values: vec![],
            pages,
            tokens: 0,
        };
        for ((past, new), count) in case.sequences.iter().zip(counts) {
            let begin = world.page_table.len();
            world.page_begin.push(begin as i32);
            world.page_table.extend(free.drain(..count));
            for position in *past..past + new {
                world.kv_slot.push(world.page_table[begin + position / page] * page as i32 + (position % page) as i32);
            }
            world.tokens += new;
            world.cu_q_lens.push(world.tokens as i32);
            world.kv_lens.push((past + new) as i32);
            let mut cached = || (0..(past + new) * row).map(|_| random.random_range(-1f32..1.0)).collect();
            world.keys.push(cached());
            world.values.push(cached());
        }
        world.kv_slot.extend(std::iter::repeat_n(0, case.padding));
        world
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

/// Fills a pool with the past of all sequences, then runs the step.
/// `values` in another element type.
fn cast<X: Element>(values: &[f32]) -> Vec<X> {
    let mut out = Buffer::<X>::take(values.len());
    X::store(level(), values, &mut out);
    out.to_vec()
}

fn wide<X: Element>(values: &[X]) -> Vec<f32> {
    let mut out = vec![0.0; values.len()];
    X::load(level(), values, &mut out);
    out
}

fn run<X: Element, K: KvElement>(threads: usize, case: &Case, world: &World, q: &[f32], out: &mut [X]) {
    let (params, shape) = (&case.params, PoolShape::new(&case.params));
    let mut pool = vec![K::zero(); world.pages * shape.page_elements()];
    let mut scales = vec![0f32; if K::SCALED { pool.len() / params.head_dim } else { 0 }];
    let row = params.kv_heads * params.head_dim;
    for (seq, (past, _)) in case.sequences.iter().enumerate() {
        let slot = |position: usize| {
            let page = world.page_table[world.page_begin[seq] as usize + position / params.page_size];
            page * params.page_size as i32 + (position % params.page_size) as i32
        };
        let kv_slot: Vec<_> = (0..*past).map(slot).collect();
        let cu_q_lens = [0, *past as i32];
        let step = Step { kv_slot: &kv_slot, cu_q_lens: &cu_q_lens, num_seqs: 1, ..world.step() };
        let rows = |data| Rows { data, stride: row };
        let inputs = Inputs { q: rows(&[]), k: rows(&world.keys[seq]), v: rows(&world.values[seq]) };
        pages::write(params, &step, &inputs, &mut pool, &mut scales);
    }
    let new = |cached: &Vec<Vec<f32>>| -> Vec<X> {
        let of = |(seq, (past, _)): (usize, &(usize, usize))| cached[seq][past * row..].to_vec();
        cast(&case.sequences.iter().enumerate().flat_map(of).collect::<Vec<_>>())
    };
    let (k, v) = (new(&world.keys), new(&world.values));
    let q: Vec<X> = cast(q);
    let inputs = Inputs {
        q: Rows { data: &q, stride: params.q_heads * params.head_dim },
        k: Rows { data: &k, stride: row },
        v: Rows { data: &v, stride: row },
    };
    attention_for(threads, params, &world.step(), &inputs, &mut pool, &mut scales, out).unwrap();
}

fn expected(case: &Case, world: &World, q: &[f32]) -> Vec<f64> {
    let Params { q_heads, kv_heads, head_dim, scale, window, soft_cap, .. } = case.params;
    let mut out = Vec::new();
    let mut token = 0;
    for (seq, (past, new)) in case.sequences.iter().enumerate() {
        for position in *past..past + new {
            for head in 0..q_heads {
                let kv = |cached: &[f32], position: usize, d: usize| {
                    f64::from(cached[(position * kv_heads + head / (q_heads / kv_heads)) * head_dim + d])
                };
                let first = (position + 1).saturating_sub(window.unwrap_or(usize::MAX));
                let score = |at: usize| {
                    let query = &q[(token * q_heads + head) * head_dim..];
                    let dot: f64 = (0..head_dim).map(|d| f64::from(query[d]) * kv(&world.keys[seq], at, d)).sum();
                    let score = dot * f64::from(scale);
                    soft_cap.map_or(score, |cap| f64::from(cap) * (score / f64::from(cap)).tanh())
                };
                let weights: Vec<f64> = (first..=position).map(|at| score(at).exp()).collect();
                let total: f64 = weights.iter().sum();
                for d in 0..head_dim {
                    let sum: f64 = weights.iter().zip(first..).map(|(w, at)| w * kv(&world.values[seq], at, d)).sum();
                    out.push(sum / total);
                }
            }
            token += 1;
        }
    }
    out
}

fn check<X: Element, K: KvElement>(tolerance: f64) {
    let mut random = ChaCha8Rng::seed_from_u64(11);
    for (number, case) in cases().iter().enumerate() {
        let world = World::new(case, &mut random);
        let width = case.params.q_heads * case.params.head_dim;
        let q: Vec<f32> = (0..world.tokens * width).map(|_| random.random_range(-2f32..2.0)).collect();
        let expected = expected(case, &world, &q);
        for threads in [1, 2] {
            let mut out: Vec<X> = cast(&vec![7.0; (world.tokens + case.padding) * width]);
            run::<X, K>(threads, case, &world, &q, &mut out);
            let out = wide(&out);
            for (index, (found, expected)) in out.iter().zip(&expected).enumerate() {
                let error = (f64::from(*found) - expected).abs();
                assert!(
                    error < tolerance,
                    "case {number}, {threads} threads, element {index}: {found} is not {expected}"
                );
            }
            assert!(out[world.tokens * width..].iter().all(|padding| *padding == 0.0));
        }
    }
}

#[test]
fn f32_pages_give_plain_attention() {
    check::<f32, f32>(3e-6);
}

#[test]
fn bf16_pages_give_it_within_the_rounding_of_bf16() {
    // Queries, keys, values and weights have 8 bits each; scores of up to 2 move weights by a hundredth.
    check::<bf16, bf16>(2e-2);
    check::<f32, bf16>(2e-2);
    check::<bf16, f32>(1e-2);
}

#[test]
fn int8_pages_give_it_within_the_rounding_of_int8() {
    check::<f32, i8>(1.5e-2);
    check::<bf16, i8>(2e-2);
}

#[test]
fn threads_share_what_a_long_sequence_sees() {
    let case = cases().pop().unwrap();
    let world = World::new(&case, &mut ChaCha8Rng::seed_from_u64(13));
    let (params, step) = (&case.params, &world.step());
    let tiles = tiles(params, step);
    let parts = |threads| {
        let tasks = cut(params, step, &tiles, threads);
        let places: Vec<_> = tasks.iter().filter(|task| task.parts > 1).map(|task| task.place as usize).collect();
        assert_eq!(places, (0..places.len()).collect::<Vec<_>>());
        tasks.iter().filter(|task| task.part == 0).map(|task| task.parts).collect::<Vec<_>>()
    };
    // The prompt's two tiles, one of each KV head, come first.
    assert_eq!((tiles[0].seq, tiles[1].seq, tiles[2].seq), (8, 8, 7));
    assert_eq!(parts(1), vec![1; tiles.len()]);
    let shared = parts(2);
    assert!(shared[0] == shared[1] && (6..=8).contains(&shared[0]), "{shared:?}");
    assert!(shared[2..].iter().all(|parts| *parts == 1), "{shared:?}");
}

#[test]
fn all_levels_compute_the_same_products() {
    let mut random = ChaCha8Rng::seed_from_u64(12);
    for (rows, head_dim, groups) in [(1, 16, 1), (3, 80, 4), (5, 48, 3), (12, 64, 4)] {
        let mut values = |len: usize| -> Vec<f32> { (0..len).map(|_| random.random_range(-1f32..1.0)).collect() };
        let (q, weights, sums) = (values(rows * head_dim), values(rows * BLOCK_TOKENS), values(rows * head_dim));
        let cached: Vec<_> = (0..groups).map(|_| values(32 * head_dim)).collect();
        fn run<C: pages::Compute>(
            q: &[f32],
            weights: &[f32],
            sums: &[f32],
            cached: &[Vec<f32>],
            rows: usize,
            head_dim: usize,
        ) {
            let convert = |values: &[f32]| values.iter().map(|value| C::from_f32(*value)).collect::<Vec<C>>();
            let (q, weights) = (&convert(q), &convert(weights));
            let cached: Vec<_> = cached.iter().map(|group| convert(group)).collect();
            let groups: Vec<_> = cached.iter().map(Vec::as_slice).collect();
            let next = [std::ptr::null(); 4];
            let same = crate::Level::available().map(|level| {
                let (mut scores, mut sums) = (vec![0f32; rows * BLOCK_TOKENS], sums.to_vec());
                tile::products::<C>(level).0(q, rows, head_dim, &groups, &next, &mut scores);
                tile::products::<C>(level).1(weights, rows, head_dim, &groups, &next, &mut sums);
                [scores, sums].concat()
            });
            // The same values, so that results are the same but for the order of sums.
            let rounded = [q, weights].map(|values| values.iter().map(|value| value.to_f32()).collect::<Vec<_>>());
            let in_f32 = crate::Level::available().filter_map(|level| {
                let products = tile::products_in_f32::<C>(level)?;
                let (mut scores, mut sums) = (vec![0f32; rows * BLOCK_TOKENS], sums.to_vec());
                products.0(&rounded[0], rows, head_dim, &groups, &next, &mut scores);
                products.1(&rounded[1], rows, head_dim, &groups, &next, &mut sums);
                Some([scores, sums].concat())
            });
            let results: Vec<_> = same.chain(in_f32).collect();
            for other in &results[1..] {
                let close = |(a, b): (&f32, &f32)| (a - b).abs() < 1e-4;
                assert!(results[0].iter().zip(other).all(close), "{rows} rows of {head_dim}");
            }
        }
        run::<f32>(&q, &weights, &sums, &cached, rows, head_dim);
        run::<bf16>(&q, &weights, &sums, &cached, rows, head_dim);
    }
}

#[test]
fn pages_outside_of_the_pool_are_refused() {
    let case = &cases()[1];
    let world = World::new(case, &mut ChaCha8Rng::seed_from_u64(1));
    let page_table: Vec<_> = world.page_table.iter().map(|page| page + 1).collect();
    let params = &case.params;
    let pages = world.pages;
    assert_eq!(world.step().check(params, world.tokens, pages), Ok(()));
    let misled = Step { page_table: &page_table, ..world.step() };
    assert!(misled.check(params, world.tokens, pages).unwrap_err().contains("not in the pool"));
    let short = Step { kv_lens: &[1], ..world.step() };
    assert!(short.check(params, world.tokens, pages).is_err());
    assert!(world.step().check(params, world.tokens - 1, pages).unwrap_err().contains("tokens"));
}
