//! Operations that move elements.

use super::device::{Tensor, run};
use crate::{Axis, DType, axes::*};

const PART: Axis = Axis("part");

/// `[tokens=2, q_heads=3, head_dim=4]` with the elements 0, 1, 2, …
fn cube() -> Tensor {
    Tensor::new(&[(TOKENS, 2), (Q_HEADS, 3), (HEAD_DIM, 4)], &(0..24).collect::<Vec<i32>>())
}

#[test]
fn transposes_move_every_element() {
    let out = run(&[cube()], |_, x| vec![x[0].transpose(&[HEAD_DIM, TOKENS, Q_HEADS])]);
    let expected: Vec<i32> = (0..24).map(|i| (i / 3 % 2) * 12 + (i % 3) * 4 + i / 6).collect();
    assert_eq!(out[0].values::<i32>(), expected);
}

#[test]
fn reshapes_keep_row_major_order() {
    let out = run(&[cube()], |_, x| {
        let merged = x[0].merge(&[Q_HEADS, HEAD_DIM], HIDDEN);
        let split = merged.split(HIDDEN, &[(GROUP, 6), (PART, 2)]);
        let kept = x[0].slice(TOKENS, 1..2).squeeze(TOKENS);
        vec![merged, split, kept, x[0].reshape(&[(ROWS, 24)]).rename(ROWS, VOCAB)]
    });
    let shapes: Vec<_> = out.iter().map(|tensor| tensor.shape.to_string()).collect();
    assert_eq!(
        shapes,
        ["i32[tokens=2, hidden=12]", "i32[tokens=2, group=6, part=2]", "i32[q_heads=3, head_dim=4]", "i32[vocab=24]"]
    );
    assert_eq!(out[1].values::<i32>(), cube().values::<i32>());
    assert_eq!(out[2].values::<i32>(), (12..24).collect::<Vec<_>>());
}

#[test]
fn broadcasts_repeat_along_new_axes_in_any_place() {
    let row = Tensor::new(&[(TOKENS, 2), (HIDDEN, 2)], &[1, 2, 3, 4]);
    let out = run(&[row], |_, x| vec![x[0].broadcast(&[(HIDDEN, 2), (ROWS, 2), (TOKENS, 2)])]);
    assert_eq!(out[0].values::<i32>(), [1, 3, 1, 3, 2, 4, 2, 4]);
}

#[test]
fn slices_pads_and_concatenations() {
    let out = run(&[cube()], |f, x| {
        let odd = x[0].slice_strided(HEAD_DIM, 1..4, 2);
        let middle = x[0].slice(Q_HEADS, 1..2);
        let joined = f.concatenate(Q_HEADS, &[middle, x[0], middle]);
        vec![odd, joined, middle.pad(HEAD_DIM, 1, 2, -1), f.concatenate(TOKENS, &[middle])]
    });
    assert_eq!(out[0].values::<i32>(), [1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23]);
    let rows = |list: &[i32]| list.iter().flat_map(|row| (0..4).map(move |i| row * 4 + i)).collect::<Vec<_>>();
    assert_eq!(out[1].values::<i32>(), rows(&[1, 0, 1, 2, 1, 4, 3, 4, 5, 4]));
    assert_eq!(out[2].values::<i32>(), [-1, 4, 5, 6, 7, -1, -1, -1, 16, 17, 18, 19, -1, -1]);
    assert_eq!(out[3].values::<i32>(), rows(&[1, 4]));
}

#[test]
fn bits_are_read_as_other_dtypes() {
    let floats = [1.0f32, -2.5, 0.0, f32::NAN];
    let out = run(&[Tensor::new(&[(TOKENS, 4)], &floats)], |_, x| {
        let bytes = x[0].bitcast_parts(DType::U8, PART);
        vec![x[0].bitcast(DType::U32), bytes, bytes.bitcast_parts(DType::F32, PART)]
    });
    assert_eq!(out[0].values::<u32>(), floats.map(f32::to_bits));
    assert_eq!(out[1].shape.to_string(), "u8[tokens=4, part=4]");
    assert_eq!(out[1].values::<u8>(), floats.map(f32::to_le_bytes).concat());
    assert_eq!(out[2].values::<f32>()[..3], floats[..3]);
}
