//! Copies of pages against plain loops.

use rand::{RngExt, seq::SliceRandom};
use torus_mosaic::{Array, Completion, Elem, FaultKind, Interpreter, RunError, RunOptions, Tensor};

use crate::{PageCopy, tests::reference::random};

const COMPLETIONS: [Completion; 3] = [Completion::OnWait, Completion::AtStart, Completion::Random(7)];

fn list(entries: &[usize], most: usize) -> Array {
    // What is behind the end must not matter.
    let mut numbers = vec![1 << 20; most];
    numbers.iter_mut().zip(entries).for_each(|(number, entry)| *number = *entry as i32);
    Array::from_i32(Elem::I32.of([most]), &numbers)
}

fn pool(tensor: Tensor, first: i32) -> Array {
    let numbers: Vec<i32> = (0..tensor.elements() as i32).map(|i| first + i).collect();
    Array::from_i32(tensor, &numbers)
}

fn operands(copy: &PageCopy, pairs: &[(usize, usize)]) -> Vec<Array> {
    let (sources, destinations): (Vec<_>, Vec<_>) = pairs.iter().copied().unzip();
    let count = Array::from_i32(Elem::I32.of([1]), &[pairs.len() as i32]);
    let mut operands =
        vec![count, list(&sources, copy.most), list(&destinations, copy.most), pool(copy.from.clone(), 0)];
    if copy.to_pages.is_some() {
        operands.push(pool(copy.to(), -1_000_000));
    }
    operands
}

fn check(copy: &PageCopy, pairs: &[(usize, usize)]) {
    let operands = operands(copy, pairs);
    let page: usize = copy.from.dims[1..].iter().product();
    let (from, mut expected) = (operands[3].to_i32(), operands.last().unwrap().to_i32());
    for (source, destination) in pairs {
        expected[destination * page..][..page].copy_from_slice(&from[source * page..][..page]);
    }
    let interpreter = Interpreter::new(&copy.kernel().unwrap());
    for completion in COMPLETIONS {
        let outcome = interpreter.run(&operands, &RunOptions { completion, ..RunOptions::default() }).unwrap();
        assert_eq!(outcome.outputs[0].to_i32(), expected, "{pairs:?}");
        assert_eq!(outcome.counters.bytes_within_hbm as usize, pairs.len() * page * 4);
    }
}

#[test]
fn pages_are_copied_within_a_pool_and_between_two() {
    let mut random = random(3);
    for round in 0..20 {
        let most = random.random_range(1..30);
        let tensor = Elem::I32.of([64, 2, 4, 128]);
        let mut pages: Vec<usize> = (0..64).collect();
        pages.shuffle(&mut random);
        let count = if round == 0 { 0 } else { random.random_range(0..=most) };
        // Sources from one half, some of them twice; destinations from the other.
        let pairs: Vec<_> = (0..count).map(|i| (pages[random.random_range(0..32)], pages[32 + i])).collect();
        let in_flight = random.random_range(1..9);
        check(&PageCopy { in_flight, ..PageCopy::within(tensor.clone(), most) }, &pairs);
        let pairs: Vec<_> = (0..count.min(30)).map(|i| (pages[random.random_range(0..64)], i)).collect();
        check(&PageCopy { in_flight, ..PageCopy::between(tensor, 30, most) }, &pairs);
    }
}

/// A page that is read by one copy and written by another, and one that is written twice.
#[test]
fn copies_that_depend_on_each_other_are_faults() {
    let copy = PageCopy::within(Elem::I32.of([8, 4, 128]), 4);
    let interpreter = Interpreter::new(&copy.kernel().unwrap());
    for pairs in [[(0, 1), (1, 2)], [(0, 5), (1, 5)], [(0, 1), (2, 0)]] {
        match interpreter.run(&operands(&copy, &pairs), &RunOptions::default()) {
            Err(RunError::Fault(fault)) => {
                let races = matches!(fault.kind, FaultKind::ReadInFlight { .. } | FaultKind::WriteInFlight { .. });
                assert!(races, "{fault}");
            }
            other => panic!("{pairs:?}: {other:?}"),
        }
    }
}
