//! Random ragged batches of every kind of layer.

use std::sync::atomic::{AtomicUsize, Ordering};

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use torus_mosaic::{Completion, Generation, Interpreter, RunOptions};

use super::{batch::Case, decode::spec};
use crate::{KvFormat, Layout, Scales, Shape, Spec, Tiles, Tuning};

/// Kinds of layers, most new tokens of a decoded sequence, and how many batches of each.
fn kinds() -> Vec<(Spec, usize, usize)> {
    let scales = Scales { keys: 0.02, values: 0.03 };
    let (int8, fp8) = (KvFormat::Int8 { scales }, KvFormat::Fp8 { scales: Scales { keys: 0.5, values: 2.0 } });
    let main = spec(8, 2, 128);
    vec![
        (main.clone(), 1, 120),
        (Spec { window: Some(200), ..main.clone() }, 1, 40),
        (Spec { window: Some(1), ..main.clone() }, 1, 10),
        (Spec { window: Some(128), sinks: true, ..main.clone() }, 1, 40),
        (Spec { soft_cap: Some(3.0), ..main.clone() }, 1, 30),
        (Spec { sinks: true, ..main.clone() }, 1, 30),
        (Spec { kv: int8, ..main.clone() }, 1, 30),
        (Spec { kv: int8, generation: Generation::Tpu7x, ..main.clone() }, 1, 10),
        (Spec { kv: fp8, ..main.clone() }, 1, 30),
        (Spec { kv: fp8, ..main.clone() }, 3, 10),
        (spec(16, 2, 128), 1, 20),
        (spec(8, 1, 128), 1, 40),
        (spec(4, 4, 128), 1, 20),
        (spec(32, 8, 128), 1, 10),
        (spec(6, 3, 128), 1, 10),
        (spec(8, 2, 64), 1, 30),
        (spec(9, 3, 64), 1, 15),
        (spec(8, 4, 64), 1, 15),
        (Spec { kv: int8, ..spec(8, 4, 64) }, 1, 10),
        (spec(8, 2, 256), 1, 15),
        (Spec { window: Some(150), soft_cap: Some(5.0), ..spec(4, 1, 256) }, 1, 15),
        (Spec { kv: fp8, window: Some(300), ..spec(4, 2, 256) }, 1, 10),
        (main.clone(), 4, 30),
        (Spec { window: Some(130), ..main.clone() }, 3, 15),
        (Spec { mask: true, sinks: true, ..main.clone() }, 4, 20),
        (Spec { kv: int8, soft_cap: Some(4.0), ..main.clone() }, 2, 10),
        (spec(8, 1, 128), 3, 10),
        (spec(8, 4, 64), 4, 10),
    ]
}

/// Most new tokens of a chunk.
const CHUNK: usize = 20;

fn shape(draft: usize) -> Shape {
    Shape { tokens: 8 * draft + CHUNK, seqs: 8, pages: 48, page_table: 40, draft }
}

/// With tiles of 16 tokens, which the interpreter is fast with.
fn case(spec: &Spec, draft: usize) -> Case {
    let layout = Layout::new(spec).unwrap();
    let tiles = Tiles { tokens: 16, block: 256, rows: 16 };
    Case::tuned(spec.clone(), shape(draft), Tuning { tiles, ..Tuning::for_slots(spec, &layout, draft) })
}

/// Sequences `(new, old)` that have room in the pool, lengths at the ends of pages among them; with `chunks` some that
/// are prefilled.
fn lengths(random: &mut ChaCha8Rng, shape: &Shape, chunks: bool) -> Vec<(usize, usize)> {
    let count = random.random_range(1..=shape.seqs);
    let mut left = shape.page_table.min(shape.pages - 1) - count;
    let mut length = |random: &mut ChaCha8Rng| {
        let most = (left.saturating_sub(1) * 128).min(600);
        let old = match random.random_range(0..8) {
            0 => 0,
            1 => 127,
            2 => 128,
            3 => 129,
            _ => random.random_range(0..600),
        };
        let old: usize = if old <= most { old } else { 0 };
        left -= (old + CHUNK).div_ceil(128).saturating_sub(1);
        old
    };
    let olds: Vec<_> = (0..count).map(|_| length(random)).collect();
    let mut lengths: Vec<_> = olds.into_iter().map(|old| (random.random_range(1..=shape.draft), old)).collect();
    if chunks && random.random_bool(0.4) {
        let at = random.random_range(0..count);
        lengths[at].0 = random.random_range(1..=CHUNK);
    }
    lengths
}

#[test]
fn random_ragged_batches_are_those_of_plain_loops() {
    let kinds = kinds();
    assert!(kinds.iter().map(|(.., batches)| batches).sum::<usize>() >= 500);
    let next = AtomicUsize::new(0);
    let work = || {
        while let Some((spec, draft, batches)) = kinds.get(next.fetch_add(1, Ordering::Relaxed)) {
            let case = case(spec, *draft);
            let interpreter = Interpreter::new(&case.kernel);
            for seed in 0..*batches as u64 {
                let random = &mut ChaCha8Rng::seed_from_u64(seed);
                let completion = match seed % 4 {
                    0 => Completion::AtStart,
                    1 => Completion::Random(seed),
                    _ => Completion::OnWait,
                };
                let lengths = lengths(random, &case.shape, !spec.mask);
                case.check(&interpreter, seed, &lengths, &RunOptions { completion, ..RunOptions::default() });
            }
        }
    };
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..2).map(|_| scope.spawn(work)).collect();
        threads.into_iter().for_each(|thread| thread.join().unwrap());
    });
}
