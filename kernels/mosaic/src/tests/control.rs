//! Random programs of nested loops and branches, built as kernels and run as what they are.

use rand::RngExt;
use rand_chacha::ChaCha8Rng;

use crate::{
    Array, Builder, Elem, Interpreter, Kernel, RunOptions, Space, Value,
    tests::{
        support::random,
        tpu::{Compiler, alone},
    },
};

/// Scalars, then as many vectors, whose elements begin one apart.
const SCALARS: usize = 3;
const STATE: usize = 2 * SCALARS;
const SHAPE: [usize; 2] = [8, 128];

enum Step {
    /// `state[to] = state[to] * 3 + state[from]`, for a scalar or for a vector.
    Mix {
        to: usize,
        from: usize,
    },
    Swap {
        a: usize,
        b: usize,
    },
    /// Repeats its steps as often as the low bits of a scalar say, adding the index to the first scalar.
    For {
        times: usize,
        body: Vec<Step>,
    },
    /// Repeats its steps while a counter that falls from the low bits of a scalar is above 0.
    While {
        times: usize,
        body: Vec<Step>,
    },
    If {
        on: usize,
        then: Vec<Step>,
        otherwise: Vec<Step>,
    },
}

fn steps(random: &mut ChaCha8Rng, depth: usize) -> Vec<Step> {
    let scalar = |random: &mut ChaCha8Rng| random.random_range(0..SCALARS);
    let step = |random: &mut ChaCha8Rng| match random.random_range(0..if depth == 0 { 3 } else { 6 }) {
        0 => Step::Mix { to: random.random_range(0..STATE), from: scalar(random) },
        1 => {
            let vectors = SCALARS * random.random_range(0..2);
            Step::Swap { a: vectors + scalar(random), b: vectors + scalar(random) }
        }
        2 => Step::Mix { to: scalar(random), from: scalar(random) },
        3 => Step::For { times: scalar(random), body: steps(random, depth - 1) },
        4 => Step::While { times: scalar(random), body: steps(random, depth - 1) },
        _ => Step::If { on: scalar(random), then: steps(random, depth - 1), otherwise: steps(random, depth - 1) },
    };
    (0..random.random_range(1..5)).map(|_| step(random)).collect()
}

fn evaluate(steps: &[Step], state: &mut [i32; STATE]) {
    for step in steps {
        match step {
            Step::Mix { to, from } => state[*to] = state[*to].wrapping_mul(3).wrapping_add(state[*from]),
            Step::Swap { a, b } => state.swap(*a, *b),
            Step::For { times, body } => {
                for i in 0..state[*times] & 3 {
                    state[0] = state[0].wrapping_add(i);
                    evaluate(body, state);
                }
            }
            Step::While { times, body } => (0..state[*times] & 3).for_each(|_| evaluate(body, state)),
            Step::If { on, then, otherwise } => {
                let (steps, number) = if state[*on] & 4 == 0 { (then, 1) } else { (otherwise, 2) };
                evaluate(steps, state);
                state[SCALARS..].iter_mut().for_each(|vector| *vector = vector.wrapping_add(number));
            }
        }
    }
}

fn build<'k>(k: &'k Builder, steps: &[Step], mut state: Vec<Value<'k>>) -> Vec<Value<'k>> {
    for step in steps {
        match step {
            Step::Mix { to, from } => state[*to] = state[*to] * 3 + state[*from],
            Step::Swap { a, b } => state.swap(*a, *b),
            Step::For { times, body } => {
                state = k.for_range(0, state[*times] & 3, &state, |i, state| {
                    let mut state = state.to_vec();
                    state[0] = state[0] + i;
                    build(k, body, state)
                });
            }
            Step::While { times, body } => {
                let mut carried = state.clone();
                carried.push(state[*times] & 3);
                let condition = |carried: &[Value<'k>]| carried[STATE].gt(0);
                state = k.while_loop(&carried, condition, |carried| {
                    let mut next = build(k, body, carried[..STATE].to_vec());
                    next.push(carried[STATE] - 1);
                    next
                });
                state.truncate(STATE);
            }
            Step::If { on, then, otherwise } => {
                let condition = (state[*on] & 4).eq(0);
                let branch = |steps, number: i32| {
                    let mut state = build(k, steps, state.clone());
                    state[SCALARS..].iter_mut().for_each(|vector| *vector = *vector + number);
                    state
                };
                state = k.if_else(condition, || branch(then, 1), || branch(otherwise, 2));
            }
        }
    }
    state
}

fn kernel(seed: u64) -> (Kernel, Vec<Step>) {
    let program = steps(&mut random(seed), 3);
    let kernel = Kernel::build("control", |k| {
        let table = k.prefetch(Elem::I32.of([STATE]));
        let numbers = k.input(Space::Vmem, Elem::I32.of(SHAPE));
        let out = k.output(Space::Vmem, Elem::I32.of([STATE, SHAPE[0], SHAPE[1]]));
        let mut state: Vec<_> = (0..STATE).map(|i| table.get((i,))).collect();
        for vector in &mut state[SCALARS..] {
            *vector = vector.broadcast(&SHAPE) + numbers.load();
        }
        let state = build(k, &program, state);
        for (i, value) in state.into_iter().enumerate() {
            out.store_at((i,), if i < SCALARS { value.broadcast(&SHAPE) } else { value });
        }
    });
    (kernel.unwrap_or_else(|error| panic!("{error}")), program)
}

#[test]
fn programs_end_in_the_right_state() {
    for seed in 0..300 {
        let (kernel, program) = kernel(seed);
        let interpreter = Interpreter::new(&kernel);
        for start in [[0; STATE], [1, 2, 3, 4, 5, 6], [7, -5, 9, -3, 11, 2]] {
            let after = |element: usize| {
                let mut state = start;
                state[SCALARS..].iter_mut().for_each(|vector| *vector += element as i32);
                evaluate(&program, &mut state);
                state
            };
            let numbers: Vec<i32> = (0..(SHAPE[0] * SHAPE[1]) as i32).collect();
            let operands =
                [Array::from_i32(Elem::I32.of([STATE]), &start), Array::from_i32(Elem::I32.of(SHAPE), &numbers)];
            let outcome = interpreter.run(&operands, &RunOptions::default()).unwrap();
            let expected: Vec<_> = (0..numbers.len()).map(after).collect();
            for (at, found) in outcome.outputs[0].to_i32().into_iter().enumerate() {
                let (value, element) = (at / numbers.len(), at % numbers.len());
                assert_eq!(found, expected[element][value], "seed {seed}, {start:?}, value {value}, element {element}");
            }
        }
    }
}

#[test]
fn programs_are_accepted_by_the_compiler() {
    alone("tests::control::compile");
}

#[test]
#[ignore = "run by programs_are_accepted_by_the_compiler"]
fn compile() {
    let compiler = Compiler::v6e();
    for seed in 0..12 {
        compiler.accept(&kernel(seed).0);
    }
}
