//! Reading and writing at computed places.

use super::device::{Tensor, noise, picks, run};
use crate::{Axis, DType, Scatter, axes::*};

const TOP: Axis = Axis("top");

fn table() -> (Vec<f32>, Tensor) {
    let values = noise(5 * 3, 1);
    let tensor = Tensor::new(&[(VOCAB, 5), (HIDDEN, 3)], &values);
    (values, tensor)
}

#[test]
fn rows_are_taken_with_indices_of_any_shape() {
    let (values, tensor) = table();
    let indices = [4, 0, 2, 2, 9, -1];
    let inputs = [tensor, Tensor::new(&[(SEQS, 2), (TOKENS, 3)], &indices)];
    let out = run(&inputs, |_, x| {
        let columns = x[1].slice(SEQS, 0..1).squeeze(SEQS);
        vec![x[0].take(VOCAB, x[1]), x[0].take(HIDDEN, columns)]
    });
    assert_eq!(out[0].shape.to_string(), "f32[seqs=2, tokens=3, hidden=3]");
    let row = |i: &i32| values[(*i).clamp(0, 4) as usize * 3..][..3].to_vec();
    assert_eq!(out[0].values::<f32>(), indices.iter().flat_map(row).collect::<Vec<_>>());
    assert_eq!(out[1].shape.to_string(), "f32[vocab=5, tokens=3]");
    let picked = values.chunks(3).flat_map(|row| [row[2], row[0], row[2]]);
    assert_eq!(out[1].values::<f32>(), picked.collect::<Vec<_>>());
}

#[test]
fn shared_axes_walk_together() {
    let values = noise(2 * 4, 2);
    let indices = picks(2 * 3, 4, 3);
    let inputs = [Tensor::new(&[(ROWS, 2), (VOCAB, 4)], &values), Tensor::new(&[(ROWS, 2), (TOP, 3)], &indices)];
    let out = run(&inputs, |_, x| vec![x[0].take_along(VOCAB, x[1])]);
    assert_eq!(out[0].shape.to_string(), "f32[rows=2, top=3]");
    let expected: Vec<_> = (0..6).map(|i| values[i / 3 * 4 + indices[i] as usize]).collect();
    assert_eq!(out[0].values::<f32>(), expected);
}

#[test]
fn rows_are_written_and_places_outside_dropped() {
    let (values, tensor) = table();
    let updates = noise(4 * 3, 4);
    let inputs = [
        tensor,
        Tensor::new(&[(TOKENS, 4)], &[3, 0, 5, -1]),
        // The updates' axes come in another order.
        Tensor::new(&[(TOKENS, 4), (HIDDEN, 3)], &updates),
    ];
    let out = run(&inputs, |_, x| {
        let set = x[0].scatter(&[(VOCAB, x[1])], x[2].transpose(&[HIDDEN, TOKENS]), Scatter::set());
        let add = x[0].scatter(&[(VOCAB, x[1])], x[2], Scatter::add().unique());
        let max = x[0].scatter(&[(VOCAB, x[1])], x[2], Scatter::max());
        vec![set, add, max]
    });
    let expect = |combine: fn(f32, f32) -> f32| {
        let mut expected = values.clone();
        for (update, row) in [3, 0].into_iter().enumerate() {
            for i in 0..3 {
                expected[row * 3 + i] = combine(expected[row * 3 + i], updates[update * 3 + i]);
            }
        }
        expected
    };
    assert_eq!(out[0].values::<f32>(), expect(|_, new| new));
    assert_eq!(out[1].values::<f32>(), expect(|old, new| old + new));
    assert_eq!(out[2].values::<f32>(), expect(f32::max));
}

#[test]
fn equal_places_add_up() {
    let rows = Tensor::new(&[(TOKENS, 5)], &[1, 1, 2, 2, 2]);
    let out = run(&[rows], |f, x| {
        let counts = f.zeros(crate::Shape::new(DType::I32, [(VOCAB, 4)]));
        vec![counts.scatter(&[(VOCAB, x[0])], x[0].full_like(1), Scatter::add().sorted())]
    });
    assert_eq!(out[0].values::<i32>(), [0, 2, 3, 0]);
}

#[test]
fn single_elements_are_addressed_by_pairs() {
    let (values, tensor) = table();
    let (rows, columns) = ([4, 0, 2], [2, 1, 0]);
    let inputs = [tensor, Tensor::new(&[(TOKENS, 3)], &rows), Tensor::new(&[(TOKENS, 3)], &columns)];
    let out = run(&inputs, |_, x| {
        // Named in another order than the table has its axes.
        let places = [(HIDDEN, x[2]), (VOCAB, x[1])];
        let picked = x[0].gather(&places);
        vec![picked, x[0].scatter(&places, picked.full_like(7.0), Scatter::set().unique())]
    });
    let at = |i: usize| (rows[i] * 3 + columns[i]) as usize;
    assert_eq!(out[0].values::<f32>(), (0..3).map(|i| values[at(i)]).collect::<Vec<_>>());
    let mut expected = values.clone();
    (0..3).for_each(|i| expected[at(i)] = 7.0);
    assert_eq!(out[1].values::<f32>(), expected);
}

#[test]
fn pieces_move_and_stay_inside() {
    let (values, tensor) = table();
    let start = Tensor::new(&[], &[4]);
    let piece = Tensor::new(&[(VOCAB, 2), (HIDDEN, 3)], &[1.0f32, 2.0, 3.0, 4.0, 5.0, 6.0]);
    let out = run(&[tensor, start, piece], |_, x| {
        let (start, early) = (x[1], x[1] - 3);
        vec![
            x[0].dynamic_slice(&[(VOCAB, start, 2)]),
            x[0].dynamic_slice(&[(HIDDEN, early, 1), (VOCAB, early, 3)]),
            x[0].dynamic_update_slice(x[2], &[(VOCAB, early)]),
        ]
    });
    assert_eq!(out[0].values::<f32>(), values[9..15]);
    assert_eq!(out[1].values::<f32>(), [values[4], values[7], values[10]]);
    let mut expected = values.clone();
    expected[3..9].copy_from_slice(&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
    assert_eq!(out[2].values::<f32>(), expected);
}
