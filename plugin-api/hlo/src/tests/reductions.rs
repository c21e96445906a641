//! Reductions, running sums and sorts.

use super::device::{Tensor, assert_close, noise, run};
use crate::{Order, axes::*};

const ROW: usize = 7;

fn rows() -> (Vec<f32>, Tensor) {
    let values = noise(3 * ROW, 1);
    let tensor = Tensor::new(&[(ROWS, 3), (VOCAB, ROW as u64)], &values);
    (values, tensor)
}

#[test]
fn sums_means_and_extremes() {
    let (values, tensor) = rows();
    let out = run(&[tensor], |_, x| {
        let x = x[0];
        vec![x.sum(VOCAB), x.mean(VOCAB), x.reduce_max(VOCAB), x.reduce_min(ROWS), x.sum([ROWS, VOCAB])]
    });
    let each = |fold: fn(&[f32]) -> f32| values.chunks(ROW).map(fold).collect::<Vec<f32>>();
    assert_close(&out[0].values::<f32>(), &each(|row| row.iter().sum()), 1e-6);
    assert_close(&out[1].values::<f32>(), &each(|row| row.iter().sum::<f32>() / ROW as f32), 1e-6);
    assert_eq!(out[2].values::<f32>(), each(|row| row.iter().copied().fold(f32::MIN, f32::max)));
    let column = |i: usize| (0..3).map(|r| values[r * ROW + i]).fold(f32::MAX, f32::min);
    assert_eq!(out[3].values::<f32>(), (0..ROW).map(column).collect::<Vec<_>>());
    assert_close(&out[4].values::<f32>(), &[values.iter().sum()], 1e-6);
}

#[test]
fn integers_and_booleans_reduce() {
    let numbers = Tensor::new(&[(ROWS, 2), (VOCAB, 3)], &[5u32, 0, u32::MAX, 1, 2, 3]);
    let flags = Tensor::new(&[(ROWS, 2), (VOCAB, 3)], &[true, true, false, true, true, true]);
    let signed = Tensor::new(&[(VOCAB, 3)], &[i32::MIN, -5, i32::MIN]);
    let out = run(&[numbers, flags, signed], |_, x| {
        let (numbers, flags) = (x[0], x[1]);
        vec![
            numbers.reduce_max(VOCAB),
            numbers.reduce_min(VOCAB),
            flags.all(VOCAB),
            flags.any(VOCAB),
            (!flags).any(ROWS),
            x[2].reduce_max(VOCAB),
        ]
    });
    assert_eq!((out[0].values::<u32>(), out[1].values::<u32>()), (vec![u32::MAX, 3], vec![0, 1]));
    assert_eq!((out[2].values::<bool>(), out[3].values::<bool>()), (vec![false, true], vec![true, true]));
    assert_eq!(out[4].values::<bool>(), [false, false, true]);
    assert_eq!(out[5].values::<i32>(), [-5]);
}

#[test]
fn argmax_takes_the_first_of_equals_and_any_nan() {
    let inf = f32::NEG_INFINITY;
    let values = [1.0, 3.0, 3.0, -1.0, inf, inf, inf, inf, 0.0, f32::NAN, 9.0, f32::NAN];
    let out = run(&[Tensor::new(&[(ROWS, 3), (VOCAB, 4)], &values)], |_, x| vec![x[0].argmax(VOCAB)]);
    assert_eq!(out[0].values::<i32>(), [1, 0, 1]);
}

#[test]
fn several_tensors_reduce_together() {
    // The largest element and the product of the others' signs, as one reduction of a pair.
    let a = Tensor::new(&[(VOCAB, 5)], &[1.0f32, 7.0, -3.0, 7.5, 2.0]);
    let b = Tensor::new(&[(VOCAB, 5)], &[1, 2, 3, 4, 5]);
    let out = run(&[a, b], |f, x| {
        let neutral = [f.scalar(crate::DType::F32, f32::MIN), f.scalar(crate::DType::I32, 0)];
        f.reduce(x, &neutral, VOCAB, |a, b| vec![a[0].max(b[0]), a[1] + b[1]])
    });
    assert_eq!((out[0].values::<f32>(), out[1].values::<i32>()), (vec![7.5], vec![15]));
}

#[test]
fn running_sums_include_their_own_element() {
    for size in [1, 2, 5, 8] {
        let values: Vec<i32> = (1..=2 * size).collect();
        let input = Tensor::new(&[(ROWS, 2), (VOCAB, size as u64)], &values);
        let out = run(&[input], |_, x| vec![x[0].cumulative_sum(VOCAB)]);
        let sums = values.chunks(size as usize).flat_map(|row| {
            row.iter().scan(0, |sum, value| {
                *sum += value;
                Some(*sum)
            })
        });
        assert_eq!(out[0].values::<i32>(), sums.collect::<Vec<_>>());
    }
}

#[test]
fn sorts_are_stable_and_carry_companions() {
    let values = [3.0f32, 1.0, f32::NAN, 1.0, -2.0, 5.0, 5.0, 0.0, -1.0, 5.0];
    let input = Tensor::new(&[(ROWS, 2), (VOCAB, 5)], &values);
    let out = run(&[input], |f, x| {
        let (ascending, first) = x[0].sort(VOCAB, Order::Ascending);
        let (_, second) = x[0].sort(VOCAB, Order::Descending);
        let by_row = f.sort(&[x[0]], ROWS, |a, b| a[0].lt(b[0]));
        vec![ascending, first, second, by_row[0]]
    });
    assert_close(&out[0].values::<f32>(), &[-2.0, 1.0, 1.0, 3.0, f32::NAN, -1.0, 0.0, 5.0, 5.0, 5.0], 0.0);
    assert_eq!(out[1].values::<i32>(), [4, 1, 3, 0, 2, 3, 2, 0, 1, 4]);
    assert_eq!(out[2].values::<i32>(), [2, 0, 1, 3, 4, 0, 1, 4, 2, 3]);
    assert_eq!(out[3].values::<f32>()[..2], [3.0, 1.0]);
}
