//! Random kernels: the compiler accepts them, and the interpreter computes what plain loops over `f64` do.
//!
//! A kernel is a list of steps, each of which makes a vector of one shape from earlier ones. While it is built, every
//! vector's contents are computed beside it, element by element and without the interpreter.

use rand::RngExt;
use rand_chacha::ChaCha8Rng;

use crate::{
    Array, Builder, Elem, Kernel, Ref, Semaphore, Space, Value, ds,
    tests::{
        support::{noise, random, run},
        tpu::{Compiler, alone},
    },
};

const ROWS: usize = 16;
const LANES: usize = 128;
const PAGES: usize = 8;
const STEPS: usize = 14;
/// Numbers stay within this, so that casts fit and exponentials are tame.
const LIMIT: f64 = 4.0;

#[derive(Clone)]
struct Known<'k> {
    value: Value<'k>,
    /// Row by row; integers are whole.
    numbers: Vec<f64>,
}

struct Maker<'k, 'r> {
    k: &'k Builder,
    random: &'r mut ChaCha8Rng,
    floats: Vec<Known<'k>>,
    ints: Vec<Known<'k>>,
    pages: Ref<'k>,
    page_numbers: &'r [f64],
    weights: Value<'k>,
    weight_numbers: &'r [f64],
    table: Ref<'k>,
    table_numbers: [i32; 4],
    ring: Ref<'k>,
    scratch: Ref<'k>,
    arrived: Semaphore<'k>,
}

fn f32_of(x: f64) -> f64 {
    f64::from(x as f32)
}

fn bf16_of(x: f64) -> f64 {
    f64::from(half::bf16::from_f32(x as f32).to_f32())
}

fn map2(a: &[f64], b: &[f64], f: impl Fn(f64, f64) -> f64) -> Vec<f64> {
    a.iter().zip(b).map(|(a, b)| f(*a, *b)).collect()
}

impl<'k> Maker<'k, '_> {
    fn float(&mut self) -> Known<'k> {
        let chosen = self.random.random_range(0..self.floats.len());
        self.floats[chosen].clone()
    }

    fn int(&mut self) -> Known<'k> {
        let chosen = self.random.random_range(0..self.ints.len());
        self.ints[chosen].clone()
    }

    fn keep_float(&mut self, value: Value<'k>, numbers: Vec<f64>) {
        let numbers = numbers.into_iter().map(|x| f32_of(x).clamp(-LIMIT, LIMIT)).collect();
        self.floats.push(Known { value: value.max(-LIMIT as f32).min(LIMIT as f32), numbers });
    }

    fn keep_int(&mut self, value: Value<'k>, numbers: Vec<f64>) {
        self.ints.push(Known {
            value: value & 0xFFF,
            numbers: numbers.into_iter().map(|x| f64::from(x as i64 as i32 & 0xFFF)).collect(),
        });
    }

    fn step(&mut self) {
        let (a, b) = (self.float(), self.float());
        let (i, j) = (self.int(), self.int());
        match self.random.random_range(0..20) {
            0 => self.keep_float(a.value + b.value, map2(&a.numbers, &b.numbers, |a, b| a + b)),
            1 => self.keep_float(a.value * b.value - 0.5, map2(&a.numbers, &b.numbers, |a, b| f32_of(a * b) - 0.5)),
            2 => {
                let mask = a.value.lt(b.value) | i.value.gt(j.value);
                let holds = |at: usize| a.numbers[at] < b.numbers[at] || i.numbers[at] > j.numbers[at];
                let numbers = (0..a.numbers.len()).map(|at| if holds(at) { b.numbers[at] } else { 1.5 }).collect();
                self.keep_float(mask.select(b.value, 1.5), numbers);
            }
            3 => self.keep_int(
                i.value ^ (j.value << 2),
                map2(&i.numbers, &j.numbers, |i, j| f64::from(i as i32 ^ ((j as i32) << 2))),
            ),
            4 => self.keep_int(i.value + j.value * 3, map2(&i.numbers, &j.numbers, |i, j| i + 3.0 * j)),
            5 => {
                self.keep_int((a.value * 16.0).cast(Elem::I32), a.numbers.iter().map(|a| (a * 16.0).trunc()).collect())
            }
            6 => {
                let scaled = i.value.cast(Elem::F32) * (1.0 / 4096.0);
                self.keep_float(
                    scaled.cast(Elem::Bf16).cast(Elem::F32),
                    i.numbers.iter().map(|i| bf16_of(i / 4096.0)).collect(),
                );
            }
            7 => self.minus_maximum(&a),
            8 => self.rotated(&a),
            9 => self.joined(&a, &b),
            10 => self.product(&a),
            11 => self.through_memory(&a),
            12 => self.fetched(),
            13 => self.looped(&a, &b),
            14 => self.branched(&a, &b),
            15 => self.parts(&i, Elem::I8),
            16 => self.parts(&i, Elem::I4),
            17 => self.float8(&i),
            18 => self.parts(&i, Elem::I16),
            _ => self.exponential(&a),
        }
    }

    fn minus_maximum(&mut self, a: &Known<'k>) {
        let axis = self.random.random_range(0..2);
        let of = |row: usize, lane: usize| a.numbers[row * LANES + lane];
        let largest = |row: usize, lane: usize| match axis {
            0 => (0..ROWS).map(|row| of(row, lane)).fold(f64::MIN, f64::max),
            _ => (0..LANES).map(|lane| of(row, lane)).fold(f64::MIN, f64::max),
        };
        let numbers = (0..ROWS * LANES).map(|at| a.numbers[at] - largest(at / LANES, at % LANES)).collect();
        self.keep_float(a.value - a.value.reduce_max(axis), numbers);
    }

    /// Words as the signed bytes or half bytes that they are made of: those of the first rows.
    fn parts(&mut self, i: &Known<'k>, elem: Elem) {
        let rows = ROWS * elem.packing();
        let parts = i.value.bitcast(elem).cast(Elem::I32).slice(&[rows - ROWS, 0], &[ROWS, LANES]);
        let (packing, bits) = (elem.packing(), elem.bits());
        let of = |at: usize| {
            let (row, lane) = (rows - ROWS + at / LANES, at % LANES);
            let word = i.numbers[row / packing * LANES + lane] as i32;
            let unused = 32 - bits;
            f64::from(word << (unused - row % packing * bits) >> unused)
        };
        self.keep_int(parts, (0..ROWS * LANES).map(of).collect());
    }

    /// Rounding to 8-bit floats, of numbers that are exact.
    fn float8(&mut self, i: &Known<'k>) {
        let scaled = i.value.cast(Elem::F32) * (1.0 / 1024.0);
        let round = |x: f64| {
            // Three digits behind the first, and none behind 2^-9.
            let unit = (x.abs().log2().floor().max(-6.0) - 3.0).exp2();
            (x / unit).round_ties_even() * unit
        };
        let numbers = i.numbers.iter().map(|i| round(i / 1024.0)).collect();
        self.keep_float(scaled.cast(Elem::F8E4M3).cast(Elem::F32), numbers);
    }

    fn rotated(&mut self, a: &Known<'k>) {
        let by = self.random.random_range(0..LANES);
        let from = |at: usize| at / LANES * LANES + (at % LANES + LANES - by) % LANES;
        let numbers = (0..ROWS * LANES).map(|at| a.numbers[from(at)]).collect();
        self.keep_float(a.value.rotate(by as i32, 1), numbers);
    }

    /// The second half of one and the first half of another.
    fn joined(&mut self, a: &Known<'k>, b: &Known<'k>) {
        let half = ROWS * LANES / 2;
        let joined = a.value.concatenate(&[b.value], 0).slice(&[ROWS / 2, 0], &[ROWS, LANES]);
        self.keep_float(joined, [&a.numbers[half..], &b.numbers[..half]].concat());
    }

    fn product(&mut self, a: &Known<'k>) {
        let of = |at: usize| {
            let (row, column) = (at / LANES, at % LANES);
            (0..LANES)
                .map(|i| bf16_of(a.numbers[row * LANES + i]) * self.weight_numbers[column * LANES + i])
                .sum::<f64>()
        };
        let numbers = (0..ROWS * LANES).map(|at| of(at) / 64.0).collect();
        self.keep_float(a.value.cast(Elem::Bf16).dot_transposed(self.weights) * (1.0 / 64.0), numbers);
    }

    fn through_memory(&mut self, a: &Known<'k>) {
        let (scratch, table) = (self.scratch, self.table);
        scratch.store_at((ds(0, ROWS), ..), a.value);
        let more = self.random.random_range(0..8);
        scratch.store_at((ds(ROWS, ROWS), ..), a.value + more as f32);
        let start = (table.get((1,)) * 8).assume_multiple(8);
        let from = self.table_numbers[1] as usize * 8;
        let of = |at: usize| {
            let row = from + at / LANES;
            let number = a.numbers[row % ROWS * LANES + at % LANES];
            if row < ROWS { number } else { f32_of(number + f64::from(more)) }
        };
        let numbers = (0..ROWS * LANES).map(of).collect();
        self.keep_float(scratch.load_at((ds(start, ROWS), ..)), numbers);
    }

    fn fetched(&mut self) {
        let (page, slot) = (self.random.random_range(0..PAGES), self.random.random_range(0..2));
        let other = self.table.get((2,));
        let first = self.pages.at((page,)).copy_to(self.ring.at((slot,)), self.arrived.at((slot,)));
        let second = self.pages.at((other,)).copy_to(self.ring.at((1 - slot,)), self.arrived.at((1 - slot,)));
        first.start();
        second.start();
        second.wait();
        first.wait();
        let page_of = |page: usize| &self.page_numbers[page * ROWS * LANES..(page + 1) * ROWS * LANES];
        let numbers = map2(page_of(page), page_of(self.table_numbers[2] as usize), |a, b| a - b);
        let difference = self.ring.load_at((slot,)).cast(Elem::F32) - self.ring.load_at((1 - slot,)).cast(Elem::F32);
        self.keep_float(difference, numbers);
    }

    fn looped(&mut self, a: &Known<'k>, b: &Known<'k>) {
        let (table, k) = (self.table, self.k);
        let out = k.for_range(0, table.get((3,)), &[a.value, b.value], |i, state| {
            // The carried values swap places.
            vec![state[1], state[0] * 0.5 + i.cast(Elem::F32)]
        });
        let (mut x, mut y) = (a.numbers.clone(), b.numbers.clone());
        for i in 0..self.table_numbers[3] {
            let next = x.iter().map(|x| f32_of(f32_of(x * 0.5) + f64::from(i))).collect();
            (x, y) = (y, next);
        }
        self.keep_float(out[0] - out[1], map2(&x, &y, |x, y| x - y));
    }

    fn branched(&mut self, a: &Known<'k>, b: &Known<'k>) {
        let limit = self.random.random_range(-1..3);
        let condition = self.table.get((1,)).gt(limit);
        let chosen = self.k.if_else(condition, || vec![a.value.abs()], || vec![-b.value]);
        let holds = self.table_numbers[1] > limit;
        let numbers =
            if holds { a.numbers.iter().map(|a| a.abs()).collect() } else { b.numbers.iter().map(|b| -b).collect() };
        self.keep_float(chosen[0], numbers);
    }

    fn exponential(&mut self, a: &Known<'k>) {
        let all = (a.value - LIMIT as f32).exp();
        let numbers = a.numbers.iter().map(|a| (a - LIMIT).exp()).collect();
        self.keep_float(all, numbers);
    }
}

/// A kernel, its operands, and what it should yield.
fn kernel(seed: u64) -> (Kernel, Vec<Array>, Vec<f64>, Vec<f64>) {
    let mut random = random(seed);
    let shape = [ROWS, LANES];
    let table_numbers = [0, random.random_range(0..3), random.random_range(0..PAGES as i32), random.random_range(0..4)];
    let operands = vec![
        Array::from_i32(Elem::I32.of([4]), &table_numbers),
        noise(Elem::F32.of(shape), seed + 1),
        noise(Elem::I32.of(shape), seed + 2),
        noise(Elem::Bf16.of([LANES, LANES]), seed + 3),
        noise(Elem::Bf16.of([PAGES, ROWS, LANES]), seed + 4),
    ];
    let numbers: Vec<Vec<f64>> =
        operands.iter().map(|operand| operand.to_f32().into_iter().map(f64::from).collect()).collect();
    let (mut floats, mut ints) = (Vec::new(), Vec::new());
    let kernel = Kernel::build("random", |k| {
        let table = k.prefetch(Elem::I32.of([4]));
        let float = k.input(Space::Vmem, Elem::F32.of(shape)).load();
        let int = k.input(Space::Vmem, Elem::I32.of(shape)).load() & 0xFFF;
        let weights = k.input(Space::Vmem, Elem::Bf16.of([LANES, LANES])).load();
        let pages = k.input(Space::Any, Elem::Bf16.of([PAGES, ROWS, LANES]));
        let float_out = k.output(Space::Vmem, Elem::F32.of(shape));
        let int_out = k.output(Space::Any, Elem::I32.of(shape));
        let ring = k.scratch(Space::Vmem, Elem::Bf16.of([2, ROWS, LANES]));
        let scratch = k.scratch(Space::Vmem, Elem::F32.of([2 * ROWS, LANES]));
        let staged = k.scratch(Space::Vmem, Elem::I32.of(shape));
        let arrived = k.dma_semaphores(&[2]);
        let mut maker = Maker {
            k,
            random: &mut random,
            floats: vec![Known { value: float, numbers: numbers[1].clone() }],
            ints: vec![Known {
                value: int,
                numbers: numbers[2].iter().map(|x| f64::from(*x as i32 & 0xFFF)).collect(),
            }],
            pages,
            page_numbers: &numbers[4],
            weights,
            weight_numbers: &numbers[3],
            table,
            table_numbers,
            ring,
            scratch,
            arrived,
        };
        (0..STEPS).for_each(|_| maker.step());
        let newest = |known: &[Known<'_>], count: usize| known.len().saturating_sub(count);
        let (last_floats, last_ints) = (newest(&maker.floats, 4), newest(&maker.ints, 3));
        let float = maker.floats.drain(last_floats..).reduce(|a, b| Known {
            value: a.value + b.value,
            numbers: map2(&a.numbers, &b.numbers, |a, b| f32_of(a + b)),
        });
        let int = maker
            .ints
            .drain(last_ints..)
            .reduce(|a, b| Known { value: a.value + b.value, numbers: map2(&a.numbers, &b.numbers, |a, b| a + b) });
        if let (Some(float), Some(int)) = (float, int) {
            float_out.store(float.value);
            staged.store(int.value);
            let copy = staged.copy_to(int_out, arrived.at((0,)));
            copy.start();
            copy.wait();
            (floats, ints) = (float.numbers, int.numbers);
        }
    });
    (kernel.unwrap_or_else(|error| panic!("seed {seed}: {error}")), operands, floats, ints)
}

#[test]
fn random_kernels_compute_what_plain_loops_do() {
    for seed in 0..150 {
        let (kernel, operands, floats, ints) = kernel(1000 * seed);
        let outcome = run(&kernel, &operands);
        let found = outcome.outputs[0].to_f32();
        for (at, (found, expected)) in found.iter().zip(&floats).enumerate() {
            // Rounding differences may tip a later comparison or cast, but not in these kernels and this seed.
            let off = (f64::from(*found) - expected).abs();
            assert!(off < 2e-3, "seed {seed}, element {at}: {found} instead of {expected}");
        }
        let found: Vec<f64> = outcome.outputs[1].to_i32().into_iter().map(f64::from).collect();
        assert!(found == ints, "seed {seed}");
    }
}

#[test]
fn random_kernels_are_accepted_by_the_compiler() {
    alone("tests::random::compile");
}

#[test]
#[ignore = "run by random_kernels_are_accepted_by_the_compiler"]
fn compile() {
    let compiler = Compiler::v6e();
    for seed in 0..40 {
        compiler.accept(&kernel(1000 * seed).0);
    }
}
