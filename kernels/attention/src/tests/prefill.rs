use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use torus_mosaic::{Completion, Interpreter, RunOptions};

use super::{
    batch::Case,
    decode::spec,
    tpu::{Compiler, alone},
};
use crate::{KvFormat, Layout, Scales, Shape, Spec, Tiles, Tuning};

const SMALL: Shape = Shape { tokens: 64, seqs: 4, pages: 32, page_table: 24, draft: 1 };

/// With tiles of 16 tokens, which the interpreter is fast with.
pub fn small(spec: Spec) -> Case {
    let layout = Layout::new(&spec).unwrap();
    let tiles = Tiles { tokens: 16, block: 256, rows: 16 };
    let tuning = Tuning { tiles, ..Tuning::new(&spec, &layout) };
    Case::tuned(spec, SMALL, tuning)
}

#[test]
fn prefill_is_that_of_plain_loops() {
    let case = small(spec(8, 2, 128));
    let interpreter = Interpreter::new(&case.kernel);
    case.check(&interpreter, 1, &[(16, 0)], &RunOptions::default());
    case.check(&interpreter, 2, &[(5, 0)], &RunOptions::default());
    case.check(&interpreter, 3, &[(20, 300), (1, 140), (23, 512)], &RunOptions::default());
    case.check(&interpreter, 4, &[(1, 700), (2, 1), (40, 255)], &RunOptions::default());
}

/// Layers of every kind.
fn kinds() -> Vec<Spec> {
    let scales = Scales { keys: 0.01, values: 0.02 };
    let (fp8, int8) = (KvFormat::Fp8 { scales: Scales { keys: 0.5, values: 2.0 } }, KvFormat::Int8 { scales });
    vec![
        spec(8, 1, 128),
        spec(4, 4, 128),
        spec(6, 2, 128),
        spec(16, 4, 64),
        spec(4, 2, 64),
        spec(8, 2, 256),
        spec(3, 3, 256),
        Spec { window: Some(1), ..spec(8, 2, 128) },
        Spec { window: Some(77), ..spec(8, 2, 128) },
        Spec { window: Some(300), soft_cap: Some(5.0), ..spec(8, 2, 128) },
        Spec { sinks: true, ..spec(8, 2, 128) },
        Spec { sinks: true, window: Some(128), ..spec(4, 1, 128) },
        Spec { kv: fp8, ..spec(8, 2, 128) },
        Spec { kv: int8, ..spec(8, 2, 128) },
        Spec { kv: int8, sinks: true, ..spec(8, 4, 64) },
        Spec { kv: fp8, window: Some(200), ..spec(8, 2, 256) },
    ]
}

#[test]
fn every_kind_of_layer_is_prefilled() {
    for (seed, spec) in kinds().into_iter().enumerate() {
        let case = small(spec);
        let interpreter = Interpreter::new(&case.kernel);
        let random = &mut ChaCha8Rng::seed_from_u64(seed as u64);
        for round in 0..3 {
            let sequences = (0..random.random_range(1..=3)).map(|_| {
                let new = if random.random_bool(0.7) { random.random_range(2..=21) } else { 1 };
                // Lengths around the edges of pages and blocks, and any.
                let old = match random.random_range(0..3) {
                    0 => 128 * random.random_range(0..5) + random.random_range(0..3),
                    1 => 0,
                    _ => random.random_range(0..600),
                };
                (new, old)
            });
            let lengths: Vec<_> = sequences.collect();
            case.check(&interpreter, 10 * seed as u64 + round, &lengths, &RunOptions::default());
        }
    }
}

#[test]
fn copies_may_complete_in_any_order() {
    let case = small(spec(8, 2, 128));
    let interpreter = Interpreter::new(&case.kernel);
    for completion in [Completion::OnWait, Completion::AtStart, Completion::Random(1), Completion::Random(2)] {
        let options = RunOptions { completion, ..RunOptions::default() };
        case.check(&interpreter, 7, &[(18, 257), (1, 90), (33, 0), (2, 512)], &options);
    }
}

#[test]
fn prefill_compiles() {
    alone("tests::prefill::compile");
}

#[test]
#[ignore = "run by prefill_compiles"]
fn compile() {
    let compilers = Compiler::all();
    let accept = |compiler: &Compiler, case: &Case| {
        let compiled = compiler.compile(&case.kernel, &crate::call_options(&case.spec));
        compiled.unwrap_or_else(|error| panic!("{:?}: {error}", case.spec));
    };
    // As it is tuned; for v6e `cost` does so.
    for compiler in [&compilers[0], &compilers[2]] {
        let shape = Shape { tokens: 2048, seqs: 64, pages: 1024, page_table: 4096, draft: 1 };
        accept(compiler, &Case::new(Spec { generation: compiler.generation, ..spec(8, 2, 128) }, shape));
    }
    for (i, kind) in kinds().into_iter().enumerate() {
        let compiler = &compilers[i % compilers.len()];
        accept(compiler, &small(Spec { generation: compiler.generation, ..kind }));
    }
}
