//! What tests share.

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::{Array, Completion, Elem, Fault, Interpreter, Kernel, Outcome, RunError, RunOptions, Tensor};

/// Every way in which copies may complete.
pub const COMPLETIONS: [Completion; 4] =
    [Completion::OnWait, Completion::AtStart, Completion::Random(1), Completion::Random(2)];

pub fn random(seed: u64) -> ChaCha8Rng {
    ChaCha8Rng::seed_from_u64(seed)
}

/// Numbers between -1 and 1, or small integers.
pub fn noise(tensor: Tensor, seed: u64) -> Array {
    let mut random = random(seed);
    let elements = tensor.elements();
    if tensor.elem.is_float() {
        let numbers: Vec<f32> = (0..elements).map(|_| random.random_range(-1.0..1.0)).collect();
        Array::from_f32(tensor, &numbers)
    } else {
        let limit = if tensor.elem == Elem::I4 { 7 } else { 100 };
        let numbers: Vec<i32> = (0..elements).map(|_| random.random_range(-limit..=limit)).collect();
        Array::from_i32(tensor, &numbers)
    }
}

/// Runs a kernel in every order of completion, with one outcome.
pub fn run(kernel: &Kernel, operands: &[Array]) -> Outcome {
    run_with(kernel, operands, &RunOptions::default())
}

/// [`run`] with options, but for the order of completion.
pub fn run_with(kernel: &Kernel, operands: &[Array], options: &RunOptions) -> Outcome {
    let interpreter = Interpreter::new(kernel);
    let outcomes = COMPLETIONS.map(|completion| {
        let options = RunOptions { completion, ..options.clone() };
        interpreter.run(operands, &options).unwrap_or_else(|error| panic!("{completion:?}: {error}"))
    });
    for outcome in &outcomes[1..] {
        assert_eq!(outcome.outputs, outcomes[0].outputs);
        assert_eq!(outcome.counters, outcomes[0].counters);
    }
    let [outcome, ..] = outcomes;
    outcome
}

/// The fault of a kernel, which is the same in every order of completion.
pub fn fault(kernel: &Kernel, operands: &[Array]) -> Fault {
    let interpreter = Interpreter::new(kernel);
    let faults = COMPLETIONS.map(|completion| {
        let options = RunOptions { completion, ..RunOptions::default() };
        match interpreter.run(operands, &options) {
            Err(RunError::Fault(fault)) => fault,
            other => panic!("{completion:?}: no fault but {other:?}"),
        }
    });
    assert!(faults.iter().all(|fault| *fault == faults[0]), "{faults:?}");
    let [fault, ..] = faults;
    fault
}

#[track_caller]
pub fn close(found: &[f32], expected: &[f32], tolerance: f32) {
    assert_eq!(found.len(), expected.len());
    for (i, (found, expected)) in found.iter().zip(expected).enumerate() {
        assert!((found - expected).abs() <= tolerance, "element {i}: {found} instead of {expected}");
    }
}
