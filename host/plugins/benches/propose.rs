//! What a speculative plugin adds to a step: one call into its library with a full batch. Run `make examples` before.

use std::{error::Error, hint::black_box, path::Path};

use criterion::{Criterion, criterion_group, criterion_main};
use torus_abi::speculative::{Sequence, SpeculativeOptions};
use torus_plugins::{LibraryCache, Registry, Speculator};

const LIBRARY: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../target/plugins/release/libprompt_lookup.so");
const SEQUENCES: u32 = 32;
const TOKENS: u32 = 512;
const DRAFT_TOKENS: u32 = 8;

fn open() -> Result<Speculator, Box<dyn Error>> {
    let cache = LibraryCache::new(Path::new(env!("CARGO_TARGET_TMPDIR")));
    let plugin = Registry::default().load(Path::new(LIBRARY), &cache)?;
    let options = SpeculativeOptions {
        vocab: 49_152,
        context_length: 2048,
        max_sequences: SEQUENCES.into(),
        max_draft_tokens: DRAFT_TOKENS.into(),
        parameters: Default::default(),
    };
    Ok(plugin.speculative().ok_or("it is no speculative plugin")?.open(&options)?)
}

/// Sequences of which none repeats a token (all of each is searched in vain), or that end with a repeated trigram.
fn batch(repeats: bool) -> Vec<Vec<u32>> {
    let sequence = |row: u32| -> Vec<u32> {
        let mut tokens: Vec<_> = (0..TOKENS).map(|i| 1000 + row * TOKENS + i).collect();
        if repeats {
            tokens.copy_within(200..203, TOKENS as usize - 3);
        }
        tokens
    };
    (0..SEQUENCES).map(sequence).collect()
}

fn propose(criterion: &mut Criterion) {
    let mut speculator = open().unwrap_or_else(|error| panic!("{error}"));
    for (name, repeats, drafted) in [("nothing found", false, 0), ("found halfway", true, DRAFT_TOKENS as usize)] {
        let batch = batch(repeats);
        let rows = || (0u64..).zip(&batch).map(|(id, tokens)| (Sequence { id, tokens }, DRAFT_TOKENS));
        let drafts = speculator.propose(rows()).unwrap_or_else(|error| panic!("{error}"));
        assert!((0..batch.len()).all(|row| drafts.row(row).len() == drafted));
        criterion.bench_function(&format!("propose, {SEQUENCES} sequences of {TOKENS} tokens, {name}"), |bencher| {
            bencher.iter(|| black_box(speculator.propose(rows()).map(|drafts| drafts.row(0).len())));
        });
    }
}

criterion_group!(benches, propose);
criterion_main!(benches);
