//! Random ragged batches: operands, and what must come out.

use half::bf16;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use torus_mosaic::{Array, Elem, Interpreter, Kernel, RunOptions};

use crate::{
    Layout, Queue, Shape, Spec, Tuning,
    layout::{LANES, Part},
    queue, reference,
};

/// A kind of layer with its kernel.
pub struct Case {
    pub spec: Spec,
    pub shape: Shape,
    pub tuning: Tuning,
    pub layout: Layout,
    pub kernel: Kernel,
}

impl Case {
    pub fn new(spec: Spec, shape: Shape) -> Self {
        let tuning = Tuning::for_slots(&spec, &Layout::new(&spec).unwrap(), shape.draft);
        Self::tuned(spec, shape, tuning)
    }

    pub fn tuned(spec: Spec, shape: Shape, tuning: Tuning) -> Self {
        let layout = Layout::new(&spec).unwrap();
        let kernel = crate::kernel(&spec, &shape, &tuning).unwrap_or_else(|error| panic!("{error}"));
        Self { spec, shape, tuning, layout, kernel }
    }

    /// Runs a batch of sequences `(new, old)` and compares everything.
    pub fn check(&self, interpreter: &Interpreter, seed: u64, lengths: &[(usize, usize)], options: &RunOptions) {
        let batch = Batch::new(self, seed, lengths);
        let outcome = interpreter
            .run(&batch.operands, options)
            .unwrap_or_else(|error| panic!("{:?}, seed {seed}, {lengths:?}: {error}", self.spec));
        let (found, tolerance) = (outcome.outputs[0].to_f32(), 0.02);
        for (at, expected) in batch.expected {
            let difference = (found[at] - expected).abs();
            assert!(
                difference <= tolerance,
                "{:?}, seed {seed}, {lengths:?}: output {at}: {} instead of {expected}",
                self.spec,
                found[at]
            );
        }
        assert!(outcome.outputs[1].to_i32() == batch.pool, "{:?}, seed {seed}: the pool of {lengths:?}", self.spec);
    }
}

pub struct Batch {
    pub operands: Vec<Array>,
    /// Elements of the result that belong to a sequence.
    pub expected: Vec<(usize, f32)>,
    pub pool: Vec<i32>,
}

fn noise(random: &mut ChaCha8Rng, count: usize, range: f32) -> Vec<f32> {
    (0..count).map(|_| bf16::from_f32(random.random_range(-range..range)).to_f32()).collect()
}

impl Batch {
    pub fn new(case: &Case, seed: u64, lengths: &[(usize, usize)]) -> Self {
        let Case { spec, shape, layout, .. } = case;
        let random = &mut ChaCha8Rng::seed_from_u64(seed);
        let token_words = layout.units * layout.planes * LANES;
        let (mut free, mut sequences) = ((1..shape.pages).collect::<Vec<_>>(), Vec::new());
        let pool_words = layout.pool(shape.pages).elements();
        let (mut pool, mut defined, mut written) = (vec![0; pool_words], vec![false; pool_words], Vec::new());
        let mut new = vec![0; shape.tokens * token_words];
        let mut query = noise(random, shape.tokens * layout.units * layout.rows() * layout.width(), 1.0);
        let sinks = spec.sinks.then(|| noise(random, spec.q_heads, 3.0));
        let mut masks = vec![0; shape.tokens];
        let (mut token, mut expected) = (0, Vec::new());
        let kv_row = spec.kv_heads * spec.head_dim;
        for (new_tokens, old) in lengths.iter().copied() {
            let all = old + new_tokens;
            let count = all.div_ceil(spec.page_size).max(1);
            let pages: Vec<usize> = (0..count).map(|_| free.swap_remove(random.random_range(0..free.len()))).collect();
            let stored = |random: &mut ChaCha8Rng, part: Part| -> Vec<f32> {
                let numbers = noise(random, all * kv_row, 1.0);
                numbers.into_iter().map(|x| spec.kv.decode(part, spec.kv.encode(part, x))).collect()
            };
            let (keys, values) = (stored(random, Part::Key), stored(random, Part::Value));
            for at in 0..all {
                let rows = at * kv_row..(at + 1) * kv_row;
                let words = layout.token_words(spec.kv, &keys[rows.clone()], &values[rows]);
                for (row, words) in words.chunks(LANES).enumerate() {
                    let from = ((pages[at / spec.page_size] * layout.units * layout.planes + row) * spec.page_size
                        + at % spec.page_size)
                        * LANES;
                    if at < old {
                        pool[from..from + LANES].copy_from_slice(words);
                        defined[from..from + LANES].fill(true);
                    } else {
                        let to = (row * shape.tokens + token + at - old) * LANES;
                        new[to..to + LANES].copy_from_slice(words);
                        written.push((from, words.to_vec()));
                    }
                }
            }
            let rows = noise(random, new_tokens * spec.q_heads * spec.head_dim, 4.0);
            // Each new token sees itself, and of those before it some.
            let bits: Vec<i32> = match spec.mask {
                true => (0..new_tokens).map(|i| 1 << i | random.random_range(0..1 << i)).collect(),
                false => vec![0; new_tokens],
            };
            masks[token..token + new_tokens].copy_from_slice(&bits);
            let sees = |token: usize, other: usize| bits[token] >> other & 1 == 1;
            let sequence = reference::Sequence {
                query: &rows,
                keys: &keys,
                values: &values,
                sinks: sinks.as_deref(),
                sees: spec.mask.then_some(&sees),
            };
            let attended = sequence.attend(spec);
            for (i, (q, out)) in rows.iter().zip(attended).enumerate() {
                let (head, dim) = (i / spec.head_dim % spec.q_heads, i % spec.head_dim);
                let at = token + i / spec.head_dim / spec.q_heads;
                let (unit, row) = layout.query_row(head);
                let from = ((at * layout.units + unit) * layout.rows() + row) * layout.width();
                let kv_head = head / spec.group();
                if dim == 0 {
                    query[from..from + layout.width()].fill(0.0);
                }
                query[from + layout.query_lane(kv_head) + dim] = *q;
                expected.push((from + layout.output_lane(kv_head) + dim, out));
            }
            token += new_tokens;
            sequences.push(queue::Sequence { new: new_tokens, old, pages });
        }
        let queue = Queue::of(spec, shape, case.tuning.pages, &sequences).unwrap();
        let mut before = Array::from_i32(layout.pool(shape.pages), &pool);
        before.undefine((0..pool_words).filter(|word| !defined[*word]));
        let mut pool = before.to_i32();
        written.into_iter().for_each(|(from, words)| pool[from..from + LANES].copy_from_slice(&words));
        let ints = |numbers: &[i32]| Array::from_i32(Elem::I32.of([numbers.len()]), numbers);
        let mut operands: Vec<_> = [&queue.counts, &queue.slots, &queue.chunks].map(|list| ints(list)).into();
        operands.extend(spec.mask.then(|| ints(&masks)));
        operands.extend([&queue.items, &queue.pages].map(|list| ints(list)));
        let row = [layout.rows(), layout.width()];
        operands.push(Array::from_f32(Elem::Bf16.of([shape.tokens, layout.units, row[0], row[1]]), &query));
        operands.push(Array::from_i32(Elem::I32.of([layout.units, layout.planes, shape.tokens, LANES]), &new));
        operands.push(before);
        if let Some(sinks) = sinks {
            let mut rows = vec![0.0; layout.units * layout.rows() * LANES];
            for (head, sink) in sinks.iter().enumerate() {
                let (unit, row) = layout.query_row(head);
                rows[(unit * layout.rows() + row) * LANES..][..LANES].fill(sink * std::f32::consts::LOG2_E);
            }
            operands.push(Array::from_f32(Elem::F32.of([layout.units, row[0], LANES]), &rows));
        }
        Self { operands, expected, pool }
    }
}
