//! Contractions against plain loops.

use super::device::{Tensor, assert_close, run};
use crate::{DType, Dot, Precision, axes::*};

#[test]
fn matrices_multiply_whatever_the_order_of_their_axes() {
    let x = Tensor::noise(&[(TOKENS, 3), (HIDDEN, 5)], 1);
    let w = Tensor::noise(&[(VOCAB, 7), (HIDDEN, 5)], 2);
    let out = run(&[x.clone(), w.clone()], |_, v| {
        let flipped = v[1].transpose(&[HIDDEN, VOCAB]);
        vec![v[0].dot(v[1], HIDDEN), v[0].dot(flipped, Dot::over(HIDDEN).precision(Precision::Highest))]
    });
    let (x, w) = (x.values::<f32>(), w.values::<f32>());
    let sum = |i: usize| (0..5).map(|k| x[i / 7 * 5 + k] * w[i % 7 * 5 + k]).sum();
    let expected: Vec<f32> = (0..21).map(sum).collect();
    assert_close(&out[0].values::<f32>(), &expected, 1e-6);
    assert_close(&out[1].values::<f32>(), &expected, 1e-6);
}

#[test]
fn grouped_attention_scores() {
    // Queries share KV heads in groups; bf16 operands are summed in f32.
    let (tokens, slots, heads, group, dim) = (3, 4, 2, 3, 5);
    let q = Tensor::noise(&[(TOKENS, 3), (KV_HEADS, 2), (GROUP, 3), (HEAD_DIM, 5)], 3);
    let k = Tensor::noise(&[(SLOTS, 4), (KV_HEADS, 2), (HEAD_DIM, 5)], 4);
    let out = run(&[q, k], |_, v| {
        let (q, k) = (v[0].convert(DType::Bf16), v[1].convert(DType::Bf16));
        let scores = q.dot(k, Dot::over([HEAD_DIM]).batch(KV_HEADS).result(DType::F32));
        vec![scores, q.convert(DType::F32), k.convert(DType::F32)]
    });
    assert_eq!(out[0].shape.to_string(), "f32[kv_heads=2, tokens=3, group=3, slots=4]");
    let (q, k) = (out[1].values::<f32>(), out[2].values::<f32>());
    let mut expected = Vec::new();
    for h in 0..heads {
        for t in 0..tokens {
            for g in 0..group {
                for s in 0..slots {
                    let q = &q[((t * heads + h) * group + g) * dim..][..dim];
                    let k = &k[(s * heads + h) * dim..][..dim];
                    expected.push(q.iter().zip(k).map(|(a, b)| a * b).sum::<f32>());
                }
            }
        }
    }
    assert_close(&out[0].values::<f32>(), &expected, 1e-5);
}

#[test]
fn several_axes_are_contracted_and_integers_widen() {
    let x = Tensor::new(&[(Q_HEADS, 2), (HEAD_DIM, 3)], &[1i8, 2, 3, 4, 5, 127]);
    let w = Tensor::new(&[(HEAD_DIM, 3), (HIDDEN, 2), (Q_HEADS, 2)], &[1i8, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 127]);
    let out = run(&[x, w], |_, v| vec![v[0].dot(v[1], Dot::over([HEAD_DIM, Q_HEADS]).result(DType::I32))]);
    assert_eq!(out[0].values::<i32>(), [1 + 2 + 3 + 4 + 5 + 127, 1 + 2 + 3 + 4 + 5 + 127 * 127]);
}
