//! What is computed of a batch's work, beside what the interpreter counts, and a way through a schedule.

use std::{collections::BTreeMap, env, fs, ops::Range, path::PathBuf};

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use torus_mosaic::{
    Interpreter, RunOptions,
    schedule::{DumpKind, Schedule, Unit, dump_of},
};

use super::{
    batch::{Batch, Case},
    decode::spec,
    prefill::small,
    tpu::{Compiler, alone_with},
};
use crate::{KvFormat, Route, Scales, Shape, Spec, Work, queue::Sequence};

/// Sequences of `(new, old)` tokens.
fn sequences(lengths: &[(usize, usize)]) -> Vec<Sequence> {
    let sequence = |(new, old): &(usize, usize)| Sequence {
        new: *new,
        old: *old,
        pages: (0..(new + old).div_ceil(128)).collect(),
    };
    lengths.iter().map(sequence).collect()
}

fn work(case: &Case, lengths: &[(usize, usize)]) -> Work {
    Work::of(&case.spec, &case.shape, &case.tuning, &sequences(lengths)).unwrap()
}

#[test]
fn bytes_are_those_that_the_interpreter_counts() {
    let scales = Scales { keys: 0.5, values: 0.5 };
    let cases = [
        (spec(8, 2, 128), 1),
        (Spec { window: Some(200), ..spec(4, 1, 128) }, 1),
        (Spec { kv: KvFormat::Int8 { scales }, ..spec(6, 2, 256) }, 1),
        (spec(8, 2, 128), 4),
        (Spec { window: Some(150), ..spec(8, 2, 128) }, 3),
    ];
    for (seed, (spec, draft)) in cases.into_iter().enumerate() {
        let case = small(spec);
        let case = Case::tuned(case.spec, Shape { draft, ..case.shape }, case.tuning);
        let interpreter = Interpreter::new(&case.kernel);
        let mut random = ChaCha8Rng::seed_from_u64(seed as u64);
        for _ in 0..4 {
            let lengths: Vec<_> = (0..random.random_range(1..=4))
                .map(|i| {
                    (
                        if i % 2 == 0 { random.random_range(1..=20) } else { random.random_range(1..=draft) },
                        random.random_range(0..600),
                    )
                })
                .collect();
            let batch = Batch::new(&case, 1, &lengths);
            let counters = interpreter.run(&batch.operands, &RunOptions::default()).unwrap().counters;
            let work = work(&case, &lengths);
            assert_eq!(work.bytes_in, counters.bytes_in, "{lengths:?}");
            assert_eq!(work.bytes_out, counters.bytes_out, "{lengths:?}");
            assert_eq!(work.bytes_within, counters.bytes_within_hbm, "{lengths:?}");
        }
    }
}

#[test]
fn blocks_are_those_that_are_seen() {
    let case = small(spec(8, 2, 128));
    // Tiles of 16 tokens see two blocks of 256 from the cache and one of new tokens, of which a part is enough.
    let found = work(&case, &[(32, 512)]);
    assert_eq!((found.tiles, found.whole, found.edges, found.parts), (2, 4, 2, 2));
    // Four query heads of 128 for each of two KV heads: 4 * 8 * 128 * (513 + ... + 544).
    assert_eq!(found.flops, 4 * 8 * 128 * (513..=544).sum::<u64>());
    let windowed = small(Spec { window: Some(256), ..spec(8, 2, 128) });
    let found = work(&windowed, &[(16, 512)]);
    assert_eq!((found.whole, found.edges, found.parts), (0, 2, 3));
}

#[test]
fn a_schedule_has_a_way_for_every_batch() {
    let folder = env::temp_dir().join(format!("torus-route-{}", std::process::id()));
    fs::create_dir_all(&folder).unwrap();
    let flags = format!("--xla_jf_dump_to={} --xla_jf_dump_llo_text=true", folder.display());
    let environment = [("LIBTPU_INIT_ARGS", flags.as_str()), ("TORUS_TEST_DUMP", folder.to_str().unwrap())];
    alone_with("tests::cost::compile", &environment);
    fs::remove_dir_all(&folder).unwrap();
}

#[test]
#[ignore = "run by a_schedule_has_a_way_for_every_batch"]
fn compile() {
    let folder = PathBuf::from(env::var("TORUS_TEST_DUMP").unwrap());
    let shape = Shape { tokens: 2048, seqs: 64, pages: 1024, page_table: 4096, draft: 1 };
    let case = Case::new(spec(8, 2, 128), shape);
    let compiler = Compiler::all().swap_remove(1);
    compiler.compile(&case.kernel, &crate::call_options(&case.spec)).unwrap_or_else(|error| panic!("{error}"));
    let mut texts = BTreeMap::new();
    for entry in fs::read_dir(&folder).unwrap() {
        let path = entry.unwrap().path();
        if let Some((name, kind)) = dump_of(path.file_name().unwrap().to_str().unwrap())
            && name.starts_with("attention")
        {
            texts.insert(kind == DumpKind::Bundles, fs::read_to_string(&path).unwrap());
        }
    }
    let schedule = Schedule::parse(&texts[&true], &texts[&false]).unwrap();
    let run = |lengths: &[(usize, usize)]| {
        let work = work(&case, lengths);
        let route = Route::new(&schedule, &work).unwrap();
        (work, route.main(&schedule), schedule.run(&route.path), route)
    };
    let decodes = vec![(1, 300); 32];
    let (decode_work, decode_loop, decode_run, route) = run(&decodes);
    let body = schedule.usage(route.decode.clone());
    assert_eq!(decode_loop.cycles, decode_work.groups as f64 * body.cycles);
    assert!(decode_run.cycles > decode_loop.cycles);
    assert_eq!(decode_loop.slots(Unit::Matmul), decode_work.groups as f64 * body.slots(Unit::Matmul));
    // Where prefill takes a block whole, the matrix units are the busiest, and busy for most of the time.
    let products = |bundles: &Range<usize>| schedule.usage(bundles.clone()).slots(Unit::Matmul);
    let most = schedule.segments().into_iter().max_by(|a, b| products(a).total_cmp(&products(b))).unwrap();
    assert_eq!(products(&route.whole), products(&most));
    let (unit, share) = schedule.usage(route.whole).busiest();
    assert!(unit == Unit::Matmul && share >= 0.8, "{unit:?} {share}");
    // Every block is multiplied once: the products of a batch grow with its blocks alone.
    let (one, _, one_run, _) = run(&[(256, 4096)]);
    let (two, _, two_run, _) = run(&[(512, 4096)]);
    assert_eq!((one.whole * 2, one.edges * 2, one.tiles * 2), (two.whole, two.edges, two.tiles));
    assert_eq!((one.parts, two.parts), (1, 3));
    assert!(one_run.slots(Unit::Matmul) < two_run.slots(Unit::Matmul));
    assert!(two_run.slots(Unit::Matmul) < 2.2 * one_run.slots(Unit::Matmul));
    assert!(two_run.cycles < 2.2 * one_run.cycles);
    // Both together.
    let mixed: Vec<_> = decodes.iter().copied().chain([(512, 4096)]).collect();
    let products = two_run.slots(Unit::Matmul) + decode_run.slots(Unit::Matmul);
    assert!((run(&mixed).2.slots(Unit::Matmul) - products).abs() < 1e-6 * products);
}
