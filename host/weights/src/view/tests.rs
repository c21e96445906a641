use std::iter;

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::*;

fn bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.as_chunks().0.iter().map(|element| f32::from_le_bytes(*element)).collect()
}

fn written(view: TensorView<'_>) -> Vec<f32> {
    let mut out = vec![0xff; view.elements() * 4];
    view.write(StorageDType::F32, &mut out);
    floats(&out)
}

/// The f32 tensor of `shape` counting from 0, after `transforms`.
fn transformed(shape: &[u64], transforms: &[Transform]) -> Vec<f32> {
    let source = bytes(&crate::testing::counting(shape.iter().product::<u64>() as usize));
    let view = TensorView::new(shape, StorageType::F32, &source);
    written(transforms.iter().try_fold(view, TensorView::apply).unwrap())
}

/// Random blocks of a quantized format, and what they stand for.
fn quantized(storage: StorageType, elements: usize) -> (Vec<u8>, Vec<f32>) {
    let mut random = ChaCha8Rng::seed_from_u64(3);
    let block = storage.block();
    let mut bytes: Vec<u8> =
        iter::repeat_with(|| random.random()).take(elements / block.elements as usize * block.bytes as usize).collect();
    // The scale's exponent may not be that of infinity or NaN.
    bytes.chunks_mut(block.bytes as usize).for_each(|block| block[1] &= 0x3f);
    let mut values = vec![0.0; elements];
    quant::decode(storage, &bytes, &mut values);
    (bytes, values)
}

#[test]
fn rope_pairs_become_halves() {
    // Two heads of six rows; in the file row 2i + j of a head, in the model row j * 3 + i.
    let permute = [Transform::PermuteRopeRows { heads: 2 }];
    assert_eq!(transformed(&[12, 1], &permute), [0., 2., 4., 1., 3., 5., 6., 8., 10., 7., 9., 11.]);
    assert_eq!(transformed(&[4, 2], &[Transform::PermuteRopeRows { heads: 1 }]), [0., 1., 4., 5., 2., 3., 6., 7.]);
    assert_eq!(transformed(&[4], &[Transform::PermuteRopeRows { heads: 2 }]), [0., 1., 2., 3.], "biases too");
}

#[test]
fn transforms_run_in_order() {
    let rows = |start, len| Transform::Rows { start, len };
    assert_eq!(transformed(&[4, 2], &[rows(1, 2)]), [2., 3., 4., 5.]);
    assert_eq!(transformed(&[3, 2], &[Transform::Transpose]), [0., 2., 4., 1., 3., 5.]);
    assert_eq!(transformed(&[3, 2], &[Transform::Transpose, rows(1, 1)]), [1., 3., 5.]);
    assert_eq!(
        transformed(&[3, 2], &[rows(1, 2), Transform::AddConstant(0.5), Transform::Transpose]),
        [2.5, 4.5, 3.5, 5.5]
    );
    let permute = Transform::PermuteRopeRows { heads: 1 };
    assert_eq!(transformed(&[6, 1], &[permute.clone(), rows(1, 4), permute]), [2., 1., 4., 3.]);
    assert_eq!(transformed(&[], &[Transform::AddConstant(1.0)]), [1.0]);
}

#[test]
fn impossible_transforms_are_refused() {
    let rows = |start, len| Transform::Rows { start, len };
    let cases: [(&[u64], Transform); 9] = [
        (&[2, 2, 2], Transform::Transpose),
        (&[2], Transform::Transpose),
        (&[4, 1], rows(3, 2)),
        (&[4, 1], rows(u64::MAX, 2)),
        (&[], rows(0, 0)),
        (&[6, 1], Transform::PermuteRopeRows { heads: 2 }),
        (&[6, 1], Transform::PermuteRopeRows { heads: 4 }),
        (&[6, 1], Transform::PermuteRopeRows { heads: 0 }),
        (&[6, 1], Transform::AddConstant(f32::NAN)),
    ];
    for (shape, transform) in cases {
        assert!(transform.shape_after(shape).is_err(), "{transform:?} of {shape:?}");
    }
}

#[test]
fn large_tensors_are_cut_into_tasks_without_seams() {
    let shape = [3, 2 * TASK as u64 + 37];
    let (rows, columns) = (3, shape[1] as usize);
    let expected = |row: usize| (row * columns..(row + 1) * columns).map(|i| i as f32);
    assert_eq!(transformed(&shape, &[]), (0..rows).flat_map(expected).collect::<Vec<_>>());
    let tail = [Transform::Rows { start: 1, len: 2 }, Transform::PermuteRopeRows { heads: 1 }];
    assert_eq!(transformed(&shape, &tail), [1, 2].into_iter().flat_map(expected).collect::<Vec<_>>());
}

#[test]
fn large_matrices_are_transposed_without_seams() {
    let (rows, columns) = (70, 2 * BAND + 5);
    let found = transformed(&[rows as u64, columns as u64], &[Transform::Transpose]);
    for (i, value) in found.iter().enumerate() {
        assert_eq!(*value, (i % rows * columns + i / rows) as f32, "element {i}");
    }
}

#[test]
fn quantized_rows_are_moved_like_plain_ones() {
    for storage in [StorageType::Q4_0, StorageType::Q6K, StorageType::Q8_0] {
        let (bytes, values) = quantized(storage, 8 * 512);
        let plain = self::bytes(&values);
        let transforms = [
            Transform::Rows { start: 2, len: 4 },
            Transform::PermuteRopeRows { heads: 1 },
            Transform::AddConstant(-1.0),
            Transform::Transpose,
        ];
        let end = |storage, bytes| {
            let view = TensorView::new(&[8, 512], storage, bytes);
            written(transforms.iter().try_fold(view, TensorView::apply).unwrap())
        };
        assert_eq!(end(storage, &bytes), end(StorageType::F32, &plain), "{storage}");
    }
}

#[test]
fn a_quantized_vector_may_be_cut_anywhere() {
    let (bytes, values) = quantized(StorageType::Q8_0, 64);
    let view = TensorView::new(&[64], StorageType::Q8_0, &bytes).apply(&Transform::Rows { start: 5, len: 40 }).unwrap();
    assert_eq!(written(view), values[5..45]);
}

#[test]
fn constants_are_added_in_f32_before_rounding() {
    // 1 + 2^-9 is no bf16; rounding before subtracting 1 would give 0.
    let source = bytes(&[1.0 + 1.0 / 512.0]);
    let view = TensorView::new(&[1], StorageType::F32, &source).apply(&Transform::AddConstant(-1.0)).unwrap();
    let mut out = [0; 2];
    view.write(StorageDType::Bf16, &mut out);
    assert_eq!(half::bf16::from_le_bytes(out).to_f32(), 1.0 / 512.0);
}

#[test]
fn stored_floats_keep_their_bits_or_are_cast() {
    // A signalling NaN, which only a copy keeps.
    let source: Vec<u8> = [0x7f81u16, 0x3f80, 0x0001].iter().flat_map(|bits| bits.to_le_bytes()).collect();
    let mut out = vec![0; source.len()];
    TensorView::new(&[3], StorageType::Bf16, &source).write(StorageDType::Bf16, &mut out);
    assert_eq!(out, source);
    let half_one = half::f16::ONE.to_le_bytes();
    let mut out = [0; 2];
    TensorView::new(&[1], StorageType::F16, &half_one).write(StorageDType::Bf16, &mut out);
    assert_eq!(out, half::bf16::ONE.to_le_bytes());
    TensorView::new(&[1], StorageType::Bf16, &half::bf16::ONE.to_le_bytes()).write(StorageDType::F16, &mut out);
    assert_eq!(out, half_one);
}

#[test]
fn nothing_is_written_for_no_rows() {
    assert_eq!(transformed(&[4, 2], &[Transform::Rows { start: 4, len: 0 }]), [0.0f32; 0]);
    assert_eq!(transformed(&[4, 2], &[Transform::Rows { start: 0, len: 0 }, Transform::Transpose]), [0.0f32; 0]);
}
