//! Layers against plain references in f64.

use torus_abi::fragment::Activation;

use super::device::{Tensor, assert_close, noise, run};
use crate::{
    DType, Value,
    axes::*,
    nn::{Rope, RopeScaling},
};

#[test]
fn rms_norm_scales_each_row() {
    let (rows, width) = (3, 7);
    let (x, weight) = (noise(rows * width, 1), noise(width, 2));
    let inputs = [Tensor::new(&[(TOKENS, 3), (HIDDEN, 7)], &x), Tensor::new(&[(HIDDEN, 7)], &weight)];
    let out = run(&inputs, |_, v| {
        let narrow = v[0].convert(DType::Bf16).rms_norm(HIDDEN, v[1], 1e-5);
        assert_eq!(narrow.dtype(), DType::Bf16);
        vec![v[0].rms_norm(HIDDEN, v[1], 1e-5), v[0].rms_norm(HIDDEN, None, 1e-5), narrow.convert(DType::F32)]
    });
    let row = |row: &[f32], weight: &[f32]| -> Vec<f32> {
        let mean = row.iter().map(|x| (*x as f64).powi(2)).sum::<f64>() / width as f64;
        row.iter().zip(weight).map(|(x, w)| (*x as f64 / (mean + 1e-5).sqrt() * *w as f64) as f32).collect()
    };
    let expected: Vec<_> = x.chunks(width).flat_map(|x| row(x, &weight)).collect();
    assert_close(&out[0].values::<f32>(), &expected, 1e-6);
    let expected_plain: Vec<_> = x.chunks(width).flat_map(|x| row(x, &[1.0; 7])).collect();
    assert_close(&out[1].values::<f32>(), &expected_plain, 1e-6);
    assert_close(&out[2].values::<f32>(), &expected, 2e-2);
}

#[test]
fn softmax_survives_large_scores() {
    let mut x = noise(2 * 5, 3);
    x.iter_mut().for_each(|x| *x *= 200.0);
    x[3] = f32::NEG_INFINITY;
    let out =
        run(&[Tensor::new(&[(ROWS, 2), (VOCAB, 5)], &x)], |_, v| vec![v[0].softmax(VOCAB), v[0].log_softmax(VOCAB)]);
    let row = |row: &[f32]| -> Vec<f64> {
        let peak = row.iter().copied().fold(f32::MIN, f32::max) as f64;
        let powers: Vec<_> = row.iter().map(|x| (*x as f64 - peak).exp()).collect();
        powers.iter().map(|power| power / powers.iter().sum::<f64>()).collect()
    };
    let expected: Vec<f32> = x.chunks(5).flat_map(row).map(|p| p as f32).collect();
    assert_close(&out[0].values::<f32>(), &expected, 1e-6);
    let peak = |row: &[f32]| row.iter().copied().fold(f32::MIN, f32::max) as f64;
    let total = |row: &[f32]| row.iter().map(|x| (*x as f64 - peak(row)).exp()).sum::<f64>().ln() + peak(row);
    let logs: Vec<f32> = x.chunks(5).flat_map(|row| row.iter().map(move |x| (*x as f64 - total(row)) as f32)).collect();
    assert_close(&out[1].values::<f32>(), &logs, 1e-6);
}

/// Φ by the series of the error function around 0 and the continued fraction of its complement beyond 3.
fn normal_cdf(x: f64) -> f64 {
    let z = x.abs() / 2f64.sqrt();
    let erfc = if z < 3.0 {
        let mut term = z;
        let mut sum = z;
        for n in 1..100 {
            term *= -z * z / n as f64;
            sum += term / (2 * n + 1) as f64;
        }
        1.0 - sum * 2.0 / std::f64::consts::PI.sqrt()
    } else {
        let fraction = (1..60).rev().fold(z, |tail, n| z + n as f64 / 2.0 / tail);
        (-z * z).exp() / std::f64::consts::PI.sqrt() / fraction
    };
    if x < 0.0 { erfc / 2.0 } else { 1.0 - erfc / 2.0 }
}

#[test]
fn activations_agree_with_their_definitions() {
    let mut x: Vec<f32> = noise(20, 4).iter().map(|x| x * 8.0).collect();
    x.extend([0.0, -0.0, 30.0, -30.0, 1e-4]);
    let kinds = [Activation::Silu, Activation::GeluTanh, Activation::Gelu, Activation::Relu];
    let out = run(&[Tensor::new(&[(TOKENS, 25)], &x)], |_, v| kinds.map(|kind| v[0].activation(kind)).to_vec());
    let plain: [fn(f64) -> f64; 4] = [
        |x| x / (1.0 + (-x).exp()),
        |x| 0.5 * x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3))).tanh()),
        |x| x * normal_cdf(x),
        |x| x.max(0.0),
    ];
    for (found, plain) in out.iter().zip(plain) {
        let expected: Vec<_> = x.iter().map(|x| plain(*x as f64) as f32).collect();
        assert_close(&found.values::<f32>(), &expected, 1e-6);
    }
}

fn turn(x: &[f32], cos: &[f32], sin: &[f32]) -> Vec<f32> {
    let half = cos.len();
    let mut out = x.to_vec();
    for i in 0..half {
        out[i] = x[i] * cos[i] - x[half + i] * sin[i];
        out[half + i] = x[half + i] * cos[i] + x[i] * sin[i];
    }
    out
}

#[test]
fn rotary_turns_halves_and_passes_the_rest() {
    // Six dimensions of a head, of which four turn; then all six.
    for pairs in [2, 3] {
        let (x, cos, sin) = (noise(2 * 3 * 6, 5), noise(2 * pairs, 6), noise(2 * pairs, 7));
        let table = [(TOKENS, 2), (ROTARY, pairs as u64)];
        let inputs = [
            Tensor::new(&[(TOKENS, 2), (Q_HEADS, 3), (HEAD_DIM, 6)], &x),
            Tensor::new(&table, &cos),
            Tensor::new(&table, &sin),
        ];
        let out = run(&inputs, |_, v| vec![v[0].rotary(v[1], v[2])]);
        assert_eq!(out[0].shape, inputs[0].shape);
        let head = |(i, head): (usize, &[f32])| {
            let table = |table: &[f32]| table[i / 3 * pairs..][..pairs].to_vec();
            turn(head, &table(&cos), &table(&sin))
        };
        let expected: Vec<_> = x.chunks(6).enumerate().flat_map(head).collect();
        assert_close(&out[0].values::<f32>(), &expected, 1e-6);
    }
}

#[test]
fn tables_hold_at_far_positions() {
    let rope = Rope {
        rotary_dim: 8,
        theta: 500000.0,
        scaling: RopeScaling::Llama3 {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_position_embeddings: 8192,
        },
        max_length: 131072,
    };
    let positions = [0, 1, 77, 4095, 131071];
    let out = run(&[Tensor::new(&[(TOKENS, 5)], &positions)], |f, v| {
        let (cos, sin): (Value<'_>, Value<'_>) = f.rotary_tables(v[0], &rope);
        vec![cos, sin]
    });
    assert_eq!(out[0].shape.to_string(), "f32[tokens=5, rotary=4]");
    let radians = rope.frequencies().radians;
    // The product is rounded to f32, as in the reference.
    let angles = positions.iter().flat_map(|p| radians.iter().map(move |r| (*p as f32 * r) as f64));
    let (cos, sin): (Vec<f32>, Vec<f32>) = angles.map(|angle| (angle.cos() as f32, angle.sin() as f32)).unzip();
    assert_close(&out[0].values::<f32>(), &cos, 1e-6);
    assert_close(&out[1].values::<f32>(), &sin, 1e-6);
}

#[test]
fn tables_carry_the_attention_factor() {
    let scaling: RopeScaling = serde_json::from_str(
        r#"{"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "attention_factor": 0.5}"#,
    )
    .unwrap();
    let rope = Rope { rotary_dim: 4, theta: 10000.0, scaling, max_length: 128 };
    let out = run(&[Tensor::new(&[(TOKENS, 1)], &[0])], |f, v| {
        let (cos, sin) = f.rotary_tables(v[0], &rope);
        vec![cos, sin]
    });
    assert_eq!((out[0].values::<f32>(), out[1].values::<f32>()), (vec![0.5; 2], vec![0.0; 2]));
}
