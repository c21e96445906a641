//! Plain loops, and random operands for them.

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use torus_mosaic::{Array, Completion, Elem, Interpreter, Outcome, RunOptions, Tensor};

use crate::{Activations, Format, Layout, Matmul, Tiles, Weights, interleave_float8, pack_int4};

pub fn random(seed: u64) -> ChaCha8Rng {
    ChaCha8Rng::seed_from_u64(seed)
}

/// A product's operands, and what it should yield.
pub struct Case {
    pub operands: Vec<Array>,
    /// `[rows that count, out]`.
    pub expected: Vec<f32>,
    /// How far rounding may lead from it.
    pub tolerance: f32,
}

/// Numbers of a weight, `[experts, in, out]`, and the bytes that store them.
struct Numbers {
    numbers: Vec<f32>,
    stored: Array,
}

fn numbers(weights: &Weights, random: &mut ChaCha8Rng) -> Numbers {
    let Weights { inputs, outputs, format, layout, .. } = *weights;
    let all = weights.matrices() * inputs * outputs;
    let (rows, columns) = match layout {
        Layout::InOut => (inputs, outputs),
        Layout::OutIn => (outputs, inputs),
    };
    // Element by element as they are stored, before 4-bit numbers are packed.
    let tensor = format.elem().of([weights.matrices(), rows, columns]);
    let array = match format {
        Format::Bf16 | Format::Float8 => {
            Array::from_f32(tensor, &(0..all).map(|_| random.random_range(-1.0..1.0)).collect::<Vec<f32>>())
        }
        Format::Int8 => Array::from_i32(tensor, &(0..all).map(|_| random.random_range(-127..=127)).collect::<Vec<_>>()),
        Format::Int4 => Array::from_i32(tensor, &(0..all).map(|_| random.random_range(-8..=7)).collect::<Vec<_>>()),
    };
    let values = array.to_f32();
    let at = |expert: usize, input: usize, output: usize| match layout {
        Layout::InOut => values[(expert * inputs + input) * outputs + output],
        Layout::OutIn => values[(expert * outputs + output) * inputs + input],
    };
    let numbers = (0..all).map(|i| at(i / (inputs * outputs), i / outputs % inputs, i % outputs)).collect();
    let stored = match format {
        Format::Bf16 => array,
        Format::Int8 => Array::from_i32(weights.stored(), &array.to_i32()),
        // The interpreter gives 8-bit floats as their bytes.
        Format::Float8 => {
            let bytes: Vec<i8> = array.to_i32().iter().map(|byte| *byte as i8).collect();
            let bytes: Vec<i32> = interleave_float8(&bytes, columns).iter().map(|byte| i32::from(*byte)).collect();
            Array::from_i32(weights.stored(), &bytes)
        }
        Format::Int4 => {
            let numbers: Vec<i8> = array.to_i32().iter().map(|number| *number as i8).collect();
            let bytes: Vec<i32> = pack_int4(&numbers, columns).iter().map(|byte| i32::from(*byte)).collect();
            Array::from_i32(weights.stored(), &bytes)
        }
    };
    Numbers { numbers, stored }
}

fn floats(tensor: Tensor, random: &mut ChaCha8Rng, low: f32, high: f32) -> Array {
    let numbers: Vec<f32> = (0..tensor.elements()).map(|_| random.random_range(low..high)).collect();
    Array::from_f32(tensor, &numbers)
}

/// Random operands. `starts` are the experts' first rows and the end; the end is `rows` of a plain product.
pub fn case(product: &Matmul, tiles: &Tiles, starts: &[usize], seed: u64) -> Case {
    let mut random = random(seed);
    let Matmul { weights, activations, .. } = *product;
    let Weights { inputs, outputs, .. } = weights;
    let rows = *starts.last().unwrap();
    let mut x = floats(product.x(tiles), &mut random, -1.0, 1.0);
    // Rows that do not count may hold anything. Bytes are made of all of them, so there they are numbers.
    x.undefine(rows * inputs..product.padded_rows(tiles) * inputs);
    let Numbers { numbers, stored } = numbers(&weights, &mut random);
    let scales = weights.scales().map(|tensor| floats(tensor, &mut random, 0.5, 1.5));
    let biases = weights.biases().map(|tensor| floats(tensor, &mut random, -1.0, 1.0));
    let (x_numbers, scale_numbers) = (x.to_f32(), scales.as_ref().map(Array::to_f32));
    let bias_numbers = biases.as_ref().map(Array::to_f32);
    let mut expected = vec![0.0_f32; rows * outputs];
    let mut largest = 0.0_f32;
    for row in 0..rows {
        let expert = (0..starts.len() - 1).find(|expert| row < starts[expert + 1]).unwrap();
        for output in 0..outputs {
            let term = |input: usize| {
                let group = input / weights.group_inputs();
                let scale =
                    scale_numbers.as_ref().map_or(1.0, |s| s[(expert * weights.groups() + group) * outputs + output]);
                x_numbers[row * inputs + input] * numbers[(expert * inputs + input) * outputs + output] * scale
            };
            let bias = bias_numbers.as_ref().map_or(0.0, |b| b[expert * outputs + output]);
            let sum = (0..inputs).map(term).sum::<f32>() + bias;
            expected[row * outputs + output] = sum;
            largest = largest.max(sum.abs());
        }
    }
    // Half a unit of the result's last place; scales and weights that were rounded to bf16; rows rounded to bytes.
    let relative = match activations {
        Activations::Bf16 => 0.01,
        Activations::Int8 => 0.03,
    };
    let starts = starts.iter().map(|start| *start as i32).collect::<Vec<_>>();
    let starts = weights.experts.map(|experts| Array::from_i32(Elem::I32.of([experts + 1]), &starts));
    let operands = starts.into_iter().chain([x, stored]).chain(scales).chain(biases).collect();
    Case { operands, expected, tolerance: largest * relative }
}

/// Runs a product and compares the rows that count.
pub fn check(product: &Matmul, tiles: &Tiles, starts: &[usize], seed: u64, completion: Completion) -> Outcome {
    let case = case(product, tiles, starts, seed);
    let kernel = product.kernel(tiles).unwrap_or_else(|error| panic!("{product:?}: {error}"));
    // Rows that do not count are undefined, and so are their results.
    let options = RunOptions { completion, allow_undefined_outputs: true, ..RunOptions::default() };
    let outcome = Interpreter::new(&kernel).run(&case.operands, &options);
    let outcome = outcome.unwrap_or_else(|error| panic!("{product:?} {tiles:?} {starts:?}: {error}"));
    let found = outcome.outputs[0].to_f32();
    let outputs = product.weights.outputs;
    for (i, expected) in case.expected.iter().enumerate() {
        let (row, output, found) = (i / outputs, i % outputs, found[i]);
        assert!(outcome.outputs[0].is_defined(i), "row {row}, output {output} is undefined");
        let close = (found - expected).abs() <= case.tolerance;
        assert!(close, "{product:?} {tiles:?} {starts:?}: row {row}, output {output}: {found}, not {expected}");
    }
    outcome
}
