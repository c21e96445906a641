//! A product of rows with the weights of their experts, in integers of 8 and 4 bits and in 8-bit floats: weights are
//! fetched while those of the expert before are used.

use crate::{
    Array, Elem, Kernel, Space, ds,
    tests::{
        support::{close, noise, run},
        tpu::{Compiler, alone},
    },
};

const EXPERTS: usize = 4;
const ROWS: usize = 64;
const K: usize = 256;
const N: usize = 256;
/// Rows of one product.
const TILE: usize = 16;

/// How weights are stored: bytes that hold numbers of another type.
#[derive(Clone, Copy, PartialEq, Debug)]
enum Weights {
    Int8,
    Int4,
    Float8,
}

impl Weights {
    const ALL: [Self; 3] = [Self::Int8, Self::Int4, Self::Float8];

    fn elem(self) -> Elem {
        match self {
            Self::Int8 => Elem::I8,
            Self::Int4 => Elem::I4,
            Self::Float8 => Elem::F8E4M3,
        }
    }

    /// Rows of bytes that hold `K` rows.
    fn byte_rows(self) -> usize {
        K * self.elem().bits() / 8
    }
}

/// `out[row] = x[row] . weights[expert of row] * scales[expert]`. The rows of expert `e` are `starts[e]..starts[e + 1]`.
fn grouped(weights: Weights) -> Kernel {
    let built = Kernel::build("grouped", |k| {
        let starts = k.prefetch(Elem::I32.of([EXPERTS + 1]));
        let x = k.input(Space::Vmem, Elem::Bf16.of([ROWS, K]));
        let stored = k.input(Space::Any, Elem::I8.of([EXPERTS, weights.byte_rows(), N]));
        let scales = k.input(Space::Vmem, Elem::F32.of([EXPERTS, 1, N]));
        let out = k.output(Space::Vmem, Elem::F32.of([ROWS, N]));
        let ring = k.scratch(Space::Vmem, Elem::I8.of([2, weights.byte_rows(), N]));
        let arrived = k.dma_semaphores(&[2]);
        let fetch = |expert, slot| stored.at((expert,)).copy_to(ring.at((slot,)), arrived.at((slot,)));
        fetch(k.i32(0), k.i32(0)).start();
        k.for_range(0, EXPERTS as i32, &[], |expert, _| {
            let slot = expert & 1;
            let next = expert + 1;
            k.when(next.lt(EXPERTS as i32), || fetch(next, slot ^ 1).start());
            fetch(expert, slot).wait();
            let matrix = match weights {
                Weights::Int8 => ring.load_at((slot,)),
                Weights::Int4 => ring.bitcast(Elem::I4).load_at((slot,)),
                Weights::Float8 => ring.load_at((slot,)).bitcast(Elem::F8E4M3),
            };
            let matrix = matrix.cast(Elem::Bf16);
            let (from, to) = (starts.get((expert,)), starts.get((expert + 1,)));
            let last_tile = (to + (TILE - 1) as i32) / TILE as i32;
            k.for_range(from / TILE as i32, last_tile, &[], |tile, _| {
                let first = (tile * TILE as i32).assume_multiple(TILE as u32);
                let rows = (ds(first, TILE), ..);
                let product = x.load_at(rows).dot(matrix) * scales.load_at((expert,));
                let row = k.iota([TILE, N], 0) + first;
                // A tile may hold rows of several experts.
                out.store_masked((ds(first, TILE), ..), product, row.ge(from) & row.lt(to));
                Vec::new()
            });
            Vec::new()
        });
    });
    built.unwrap_or_else(|error| panic!("{error}"))
}

#[test]
fn rows_meet_the_weights_of_their_experts() {
    for (seed, weights) in Weights::ALL.into_iter().enumerate() {
        let kernel = grouped(weights);
        let starts = [0, 5, 5, 37, 64];
        let matrix = noise(weights.elem().of([EXPERTS, K, N]), seed as u64);
        // The bytes that hold those numbers: pairs of rows for 4 bits.
        let per_byte = 8 / weights.elem().bits();
        let bits = matrix.to_i32();
        let byte = |at: usize| {
            let (row, column) = (at / N, at % N);
            let mask = (1 << weights.elem().bits()) - 1;
            let part = |sub: usize| (bits[(row * per_byte + sub) * N + column] & mask) << (sub * weights.elem().bits());
            (0..per_byte).map(part).sum::<i32>()
        };
        let bytes: Vec<i32> = (0..EXPERTS * weights.byte_rows() * N).map(byte).collect();
        let (x, scales) = (noise(Elem::Bf16.of([ROWS, K]), 7), noise(Elem::F32.of([EXPERTS, 1, N]), 8));
        let operands = [
            Array::from_i32(Elem::I32.of([EXPERTS + 1]), &starts),
            x.clone(),
            Array::from_i32(Elem::I8.of([EXPERTS, weights.byte_rows(), N]), &bytes),
            scales.clone(),
        ];
        let outcome = run(&kernel, &operands);
        let (x, matrix, scales) = (x.to_f32(), matrix.to_f32(), scales.to_f32());
        let expected: Vec<f32> = (0..ROWS * N)
            .map(|at| {
                let (row, column) = (at / N, at % N);
                let expert = (0..EXPERTS).filter(|e| starts[*e] <= row as i32).max().unwrap_or(0);
                let sum: f32 = (0..K).map(|i| x[row * K + i] * matrix[(expert * K + i) * N + column]).sum();
                sum * scales[expert * N + column]
            })
            .collect();
        close(&outcome.outputs[0].to_f32(), &expected, 5e-3);
        assert_eq!(outcome.outputs[0].undefined_elements(), 0);
        assert_eq!(outcome.counters.bytes_in, (EXPERTS * weights.byte_rows() * N) as u64, "{weights:?}");
    }
}

#[test]
fn grouped_products_compile() {
    alone("tests::grouped::compile");
}

#[test]
#[ignore = "run by grouped_products_compile"]
fn compile() {
    for compiler in Compiler::all() {
        for weights in Weights::ALL {
            compiler.accept(&grouped(weights));
        }
    }
}
