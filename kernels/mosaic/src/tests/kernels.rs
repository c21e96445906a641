//! Whole kernels: compiled for three generations, and run against plain references.

use crate::{
    Array, Builder, Contract, Elem, Kernel, Space, Value, ds,
    tests::{
        support::{close, noise, run},
        tpu::{Compiler, alone},
    },
};

const HBM: Space = Space::Any;
const VMEM: Space = Space::Vmem;

fn matmul(contract: Contract) -> Kernel {
    Kernel::build("matmul", |k| {
        let (rows, columns) = match contract {
            Contract::Plain => ([128, 256], [256, 384]),
            Contract::RhsTransposed => ([128, 256], [384, 256]),
            Contract::LhsTransposed => ([256, 128], [256, 384]),
        };
        let x = k.input(VMEM, Elem::Bf16.of(rows));
        let y = k.input(VMEM, Elem::Bf16.of(columns));
        let out = k.output(VMEM, Elem::F32.of([128, 384]));
        out.store(x.load().matmul(y.load(), contract, None, false));
    })
    .unwrap()
}

#[test]
fn a_product_is_that_of_plain_loops() {
    for contract in [Contract::Plain, Contract::RhsTransposed, Contract::LhsTransposed] {
        let kernel = matmul(contract);
        let operands: Vec<_> =
            kernel.operands().iter().enumerate().map(|(i, o)| noise(o.tensor.clone(), i as u64)).collect();
        let (x, y) = (operands[0].to_f32(), operands[1].to_f32());
        let outcome = run(&kernel, &operands);
        let at = |row: usize, column: usize, k: usize| match contract {
            Contract::Plain => x[row * 256 + k] * y[k * 384 + column],
            Contract::RhsTransposed => x[row * 256 + k] * y[column * 256 + k],
            Contract::LhsTransposed => x[k * 128 + row] * y[k * 384 + column],
        };
        let expected: Vec<f32> = (0..128 * 384).map(|i| (0..256).map(|k| at(i / 384, i % 384, k)).sum()).collect();
        close(&outcome.outputs[0].to_f32(), &expected, 1e-4);
        assert_eq!(outcome.counters.matmul_flops, 2 * 128 * 256 * 384);
        assert_eq!(outcome.counters.ops["load"], 2);
    }
}

const PAGES: usize = 24;
const PAGE: usize = 16;
const DIM: usize = 128;
const ROWS: usize = 8;

/// Attention of 8 rows of queries over the pages of one sequence, keys and values being the same: pages are fetched
/// while the one before is computed.
fn page_gather() -> Kernel {
    Kernel::build("page_gather", |k| {
        let table = k.prefetch(Elem::I32.of([PAGES]));
        let length = k.prefetch(Elem::I32.of([1]));
        let q = k.input(VMEM, Elem::Bf16.of([ROWS, DIM]));
        let kv = k.input(HBM, Elem::Bf16.of([PAGES, PAGE, DIM]));
        let out = k.output(VMEM, Elem::Bf16.of([ROWS, DIM]));
        let ring = k.scratch(VMEM, Elem::Bf16.of([2, PAGE, DIM]));
        let arrived = k.dma_semaphores(&[2]);
        let length = length.get((0,));
        let pages = (length + (PAGE - 1) as i32) >> 4;
        let copy = |page, slot| kv.at((table.get((page,)),)).copy_to(ring.at((slot,)), arrived.at((slot,)));
        k.when(pages.gt(0), || copy(k.i32(0), k.i32(0)).start());
        let initial = [
            k.full(Elem::F32.of([ROWS, 1]), -1e30),
            k.zeros(Elem::F32.of([ROWS, 1])),
            k.zeros(Elem::F32.of([ROWS, DIM])),
        ];
        let state = k.for_range(0, pages, &initial, |page, state| {
            let slot = page & 1;
            k.when((page + 1).lt(pages), || copy(page + 1, slot ^ 1).start());
            copy(page, slot).wait();
            let tokens = ring.load_at((slot,));
            softmax_step(k, q.load(), tokens, page * PAGE as i32, length, state)
        });
        out.store((state[2] / state[1]).cast(Elem::Bf16));
    })
    .unwrap()
}

/// One step of an online softmax over `[tokens, DIM]`, of which those at positions before `length` count.
fn softmax_step<'k>(
    k: &'k Builder,
    q: Value<'k>,
    tokens: Value<'k>,
    first: Value<'k>,
    length: Value<'k>,
    state: &[Value<'k>],
) -> Vec<Value<'k>> {
    let [max, sum, acc] = [state[0], state[1], state[2]];
    let scores = q.dot_transposed(tokens);
    let position = k.iota([ROWS, PAGE], 1) + first;
    let scores = position.lt(length).select(scores, -1e30);
    let new_max = max.max(scores.reduce_max(1));
    let weights = (scores - new_max).exp();
    let scale = (max - new_max).exp();
    // What is behind the end of the sequence may be anything, NaN included.
    let counted = (k.iota([PAGE, DIM], 0) + first).lt(length);
    let values = counted.select(tokens.cast(Elem::F32), 0.0).cast(Elem::Bf16);
    vec![new_max, sum * scale + weights.sum(1), acc * scale + weights.cast(Elem::Bf16).dot(values)]
}

fn gather_operands(length: usize, seed: u64) -> (Vec<Array>, Vec<f32>) {
    let q = noise(Elem::Bf16.of([ROWS, DIM]), seed);
    let mut kv = noise(Elem::Bf16.of([PAGES, PAGE, DIM]), seed + 1);
    let pages = length.div_ceil(PAGE);
    // Pages from the back, so that position and page differ.
    let table: Vec<i32> = (0..PAGES as i32).map(|page| PAGES as i32 - 1 - page).collect();
    let row = |token: usize| table[token / PAGE] as usize * PAGE + token % PAGE;
    let used: Vec<usize> = (0..length).map(row).collect();
    kv.undefine((0..PAGES * PAGE).filter(|row| !used.contains(row)).flat_map(|row| row * DIM..(row + 1) * DIM));
    let (queries, tokens) = (q.to_f32(), kv.to_f32());
    let mut expected = vec![0.0; ROWS * DIM];
    for (query, out) in queries.chunks(DIM).zip(expected.chunks_mut(DIM)) {
        let token = |i: usize| &tokens[used[i] * DIM..(used[i] + 1) * DIM];
        let score = |i: usize| query.iter().zip(token(i)).map(|(a, b)| a * b).sum::<f32>();
        let scores: Vec<f32> = (0..length).map(score).collect();
        let max = scores.iter().copied().fold(f32::MIN, f32::max);
        let total: f32 = scores.iter().map(|score| (score - max).exp()).sum();
        for (i, score) in scores.iter().enumerate() {
            let weight = (score - max).exp() / total;
            out.iter_mut().zip(token(i)).for_each(|(out, value)| *out += weight * value);
        }
    }
    assert!(pages <= PAGES);
    let operands = vec![
        Array::from_i32(Elem::I32.of([PAGES]), &table),
        Array::from_i32(Elem::I32.of([1]), &[length as i32]),
        q,
        kv,
    ];
    (operands, expected)
}

#[test]
fn attention_over_pages_is_that_of_plain_loops() {
    let kernel = page_gather();
    for (seed, length) in [1, 15, 16, 17, 100, PAGES * PAGE].into_iter().enumerate() {
        let (operands, expected) = gather_operands(length, seed as u64);
        let outcome = run(&kernel, &operands);
        close(&outcome.outputs[0].to_f32(), &expected, 0.02);
        let pages = length.div_ceil(PAGE);
        assert_eq!(outcome.counters.bytes_in, (pages * PAGE * DIM * 2) as u64);
        assert_eq!(outcome.counters.copies, pages as u64);
        // Weights and scales, for each page.
        assert_eq!(outcome.counters.cost().transcendentals, (pages * (ROWS * PAGE + ROWS)) as u64);
        assert_eq!(outcome.counters.cost().flops, (pages * 2 * 2 * ROWS * PAGE * DIM) as u64);
    }
}

/// Writes rows into the pages of a cache that the output takes over.
fn update_in_place() -> Kernel {
    Kernel::build("update_in_place", |k| {
        let rows = k.prefetch(Elem::I32.of([4]));
        let new = k.input(VMEM, Elem::I32.of([4, 1, DIM]));
        let cache = k.input(HBM, Elem::I32.of([PAGES * PAGE, DIM]));
        let cache = k.output_in_place(cache);
        let written = k.dma_semaphores(&[]);
        let copy = |i| new.at((i,)).copy_to(cache.at((ds(rows.get((i,)), 1),)), written);
        k.for_range(0, 4, &[], |i, _| {
            copy(i).start();
            Vec::new()
        });
        k.for_range(0, 4, &[], |i, _| {
            copy(i).wait();
            Vec::new()
        });
    })
    .unwrap()
}

#[test]
fn rows_written_in_place_leave_the_others_alone() {
    let kernel = update_in_place();
    let rows = [7, 200, 0, 383];
    let operands = [
        Array::from_i32(Elem::I32.of([4]), &rows),
        noise(Elem::I32.of([4, 1, DIM]), 1),
        noise(Elem::I32.of([PAGES * PAGE, DIM]), 2),
    ];
    let outcome = run(&kernel, &operands);
    let (new, mut expected) = (operands[1].to_i32(), operands[2].to_i32());
    for (row, new) in rows.iter().zip(new.chunks(DIM)) {
        expected[*row as usize * DIM..][..DIM].copy_from_slice(new);
    }
    assert_eq!(outcome.outputs[0].to_i32(), expected);
    assert_eq!(outcome.counters.bytes_out, 4 * 512);
}

#[test]
fn kernels_compile_for_every_generation() {
    alone("tests::kernels::compile");
}

#[test]
#[ignore = "run by kernels_compile_for_every_generation"]
fn compile() {
    for compiler in Compiler::all() {
        for contract in [Contract::Plain, Contract::RhsTransposed, Contract::LhsTransposed] {
            compiler.accept(&matmul(contract));
        }
        compiler.accept(&page_gather());
        let updated = compiler.accept(&update_in_place());
        let cache = PAGES * PAGE * DIM * 4;
        assert_eq!(updated.memory_stats().unwrap().alias_bytes, cache as i64);
    }
}
