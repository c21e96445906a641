//! Elementwise operations against plain Rust.

use super::device::{Tensor, assert_close, noise, run};
use crate::{DType, Direction, Value, axes::*};

const COUNT: u64 = 13;

#[test]
fn functions_of_one_float() {
    type Case = (&'static str, for<'f> fn(Value<'f>) -> Value<'f>, fn(f32) -> f32);
    let cases: [Case; 17] = [
        ("abs", |x| x.abs(), f32::abs),
        ("ceil", |x| x.ceil(), f32::ceil),
        ("cos", |x| x.cos(), f32::cos),
        ("exp", |x| x.exp(), f32::exp),
        ("expm1", |x| x.expm1(), f32::exp_m1),
        ("floor", |x| x.floor(), f32::floor),
        ("log", |x| x.abs().log(), |x| x.abs().ln()),
        ("log1p", |x| x.abs().log1p(), |x| x.abs().ln_1p()),
        ("logistic", |x| x.logistic(), |x| 1.0 / (1.0 + (-x).exp())),
        ("round_even", |x| x.round_even(), f32::round_ties_even),
        ("rsqrt", |x| x.abs().rsqrt(), |x| 1.0 / x.abs().sqrt()),
        ("sign", |x| x.sign(), |x| if x == 0.0 { x } else { x.signum() }),
        ("sin", |x| x.sin(), f32::sin),
        ("sqrt", |x| x.abs().sqrt(), |x| x.abs().sqrt()),
        ("tanh", |x| x.tanh(), f32::tanh),
        ("neg", |x| -x, |x| -x),
        ("reciprocal", |x| 1.0 / x, |x| 1.0 / x),
    ];
    let mut values: Vec<f32> = noise(COUNT as usize, 1).iter().map(|x| x * 4.0).collect();
    values.extend([0.5, 1.5, -2.5]);
    let input = Tensor::new(&[(TOKENS, COUNT + 3)], &values);
    let out = run(&[input], |_, x| cases.iter().map(|(_, graph, _)| graph(x[0])).collect());
    for ((name, _, plain), found) in cases.iter().zip(out) {
        let expected: Vec<_> = values.iter().map(|x| plain(*x)).collect();
        println!("{name}");
        assert_close(&found.values::<f32>(), &expected, 2e-6);
    }
}

#[test]
fn functions_of_two_floats() {
    type Case = (for<'f> fn(Value<'f>, Value<'f>) -> Value<'f>, fn(f32, f32) -> f32);
    let cases: [Case; 8] = [
        (|a, b| a + b, |a, b| a + b),
        (|a, b| a - b, |a, b| a - b),
        (|a, b| a * b, |a, b| a * b),
        (|a, b| a / b, |a, b| a / b),
        (|a, b| a % b, |a, b| a % b),
        (|a, b| a.max(b), f32::max),
        (|a, b| a.min(b), f32::min),
        (|a, b| a.abs().pow(b), |a, b| a.abs().powf(b)),
    ];
    let axes = [(TOKENS, COUNT)];
    let (a, b) = (Tensor::noise(&axes, 2), Tensor::noise(&axes, 3));
    let out = run(&[a.clone(), b.clone()], |_, x| cases.iter().map(|(graph, _)| graph(x[0], x[1])).collect());
    for ((_, plain), found) in cases.iter().zip(out) {
        let pairs = a.values::<f32>().into_iter().zip(b.values::<f32>());
        let expected: Vec<_> = pairs.map(|(a, b)| plain(a, b)).collect();
        assert_close(&found.values::<f32>(), &expected, 2e-6);
    }
}

#[test]
fn integers_compute_and_shift_as_in_rust() {
    type Case = (for<'f> fn(Value<'f>, Value<'f>) -> Value<'f>, fn(i32, i32) -> i32);
    let cases: [Case; 14] = [
        (|a, b| a + b, i32::wrapping_add),
        (|a, b| a * b, i32::wrapping_mul),
        (|a, b| a / b, |a, b| a / b),
        (|a, b| a % b, |a, b| a % b),
        (|a, b| a & b, |a, b| a & b),
        (|a, b| a | b, |a, b| a | b),
        (|a, b| a ^ b, |a, b| a ^ b),
        (|a, _| !a, |a, _| !a),
        (|a, _| a << 3, |a, _| a << 3),
        (|a, _| a >> 3, |a, _| a >> 3),
        (|a, _| a.shift_right_logical(3), |a, _| ((a as u32) >> 3) as i32),
        (|a, _| a.sign() + a.abs(), |a, _| a.signum() + a.abs()),
        (|a, b| a.max(b), i32::max),
        (|a, b| a.min(b), i32::min),
    ];
    let (a, b) = ([7, -7, 123456789, -1, 0, i32::MAX], [3, 3, -5, 2, 9, 7]);
    let axes = [(TOKENS, 6)];
    let inputs = [Tensor::new(&axes, &a), Tensor::new(&axes, &b)];
    let out = run(&inputs, |_, x| cases.iter().map(|(graph, _)| graph(x[0], x[1])).collect());
    for (i, ((_, plain), found)) in cases.iter().zip(out).enumerate() {
        let expected: Vec<_> = a.iter().zip(b).map(|(a, b)| plain(*a, b)).collect();
        assert_eq!(found.values::<i32>(), expected, "case {i}");
    }
}

#[test]
fn unsigned_shifts_fill_with_zeros() {
    let values = [0u64, 1, u64::MAX, 1 << 63, 0x1234_5678_9ABC_DEF0];
    let out = run(&[Tensor::new(&[(TOKENS, 5)], &values)], |_, x| vec![x[0] >> 7u64, x[0] * 6364136223846793005u64]);
    assert_eq!(out[0].values::<u64>(), values.map(|x| x >> 7));
    assert_eq!(out[1].values::<u64>(), values.map(|x| x.wrapping_mul(6364136223846793005)));
}

#[test]
fn comparisons_treat_nan_as_ieee_and_total_order_does_not() {
    let (a, b) = ([1.0f32, 2.0, f32::NAN, -0.0], [2.0f32, 2.0, 1.0, 0.0]);
    let axes = [(TOKENS, 4)];
    let out = run(&[Tensor::new(&axes, &a), Tensor::new(&axes, &b)], |_, x| {
        let (a, b) = (x[0], x[1]);
        let total = [Direction::Lt, Direction::Gt].map(|direction| a.compare_total(direction, b));
        [a.eq(b), a.ne(b), a.lt(b), a.le(b), a.gt(b), a.ge(b), a.is_finite()].into_iter().chain(total).collect()
    });
    let expected = [
        [false, true, false, true],
        [true, false, true, false],
        [true, false, false, false],
        [true, true, false, true],
        [false, false, false, false],
        [false, true, false, true],
        [true, true, false, true],
        [true, false, false, true],
        [false, false, true, false],
    ];
    for (found, expected) in out.iter().zip(expected) {
        assert_eq!(found.values::<bool>(), expected);
    }
}

#[test]
fn selection_clamping_and_booleans() {
    let x = Tensor::new(&[(TOKENS, 4)], &[-2.0f32, -0.5, 0.5, 2.0]);
    let out = run(&[x], |_, x| {
        let positive = x[0].gt(0);
        let flags = (positive & x[0].lt(1)) ^ true;
        vec![positive.select(x[0], 9.0), x[0].clamp(-1.0, 1.0), flags | positive, !positive]
    });
    assert_eq!(out[0].values::<f32>(), [9.0, 9.0, 0.5, 2.0]);
    assert_eq!(out[1].values::<f32>(), [-1.0, -0.5, 0.5, 1.0]);
    assert_eq!(out[2].values::<bool>(), [true, true, true, true]);
    assert_eq!(out[3].values::<bool>(), [true, true, false, false]);
}

#[test]
fn conversions_drop_fractions_and_round_to_even() {
    let x = Tensor::new(&[(TOKENS, 4)], &[-2.75f32, 0.0, 1.0 + 1.0 / 256.0, 300.0]);
    let out = run(&[x], |_, x| {
        let bf16 = x[0].convert(DType::Bf16).convert(DType::F32);
        let dtypes = [DType::I32, DType::Bool, DType::F64, DType::I64];
        dtypes.iter().map(|dtype| x[0].convert(*dtype)).chain([bf16]).collect()
    });
    assert_eq!(out[0].values::<i32>(), [-2, 0, 1, 300]);
    assert_eq!(out[1].values::<bool>(), [true, false, true, true]);
    assert_eq!(out[2].values::<f64>(), [-2.75, 0.0, 1.0 + 1.0 / 256.0, 300.0]);
    assert_eq!(out[3].values::<i64>(), [-2, 0, 1, 300]);
    assert_eq!(out[4].values::<f32>(), [-2.75, 0.0, 1.0, 300.0]);
}

#[test]
fn operands_are_broadcast_and_reordered_by_name() {
    let a = Tensor::noise(&[(TOKENS, 2), (Q_HEADS, 3), (HEAD_DIM, 5)], 4);
    let b = Tensor::noise(&[(HEAD_DIM, 5), (TOKENS, 2)], 5);
    let out = run(&[a.clone(), b.clone()], |_, x| vec![x[0] * x[1], x[1] * x[0]]);
    let (a, b) = (a.values::<f32>(), b.values::<f32>());
    let expected: Vec<_> = (0..30).map(|i| a[i] * b[(i % 5) * 2 + i / 15]).collect();
    assert_eq!(out[0].values::<f32>(), expected);
    assert_eq!(out[1].values::<f32>(), expected);
    assert_eq!(out[1].shape.to_string(), "f32[tokens=2, q_heads=3, head_dim=5]");
}
