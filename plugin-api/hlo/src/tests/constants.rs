//! Constants arrive bit by bit.

use super::device::{Tensor, run};
use crate::{DType, Scalar, Shape, axes::*};

#[test]
fn scalars_of_every_dtype_arrive_exactly() {
    let floats = [0.0, -0.0, 0.1, 1e-6, 1.5e-45, f32::MAX, f32::MIN_POSITIVE, f32::INFINITY, f32::NEG_INFINITY];
    let doubles = [-0.0, 0.1, 5e-324, f64::MAX, f64::NEG_INFINITY];
    let out = run(&[], |f, _| {
        let mut values: Vec<_> = floats.iter().map(|value| f.scalar(DType::F32, *value)).collect();
        values.extend(doubles.iter().map(|value| f.scalar(DType::F64, *value)));
        values.extend([f.scalar(DType::I64, i64::MIN), f.scalar(DType::I64, i64::MAX)]);
        values.extend([f.scalar(DType::U64, u64::MAX), f.scalar(DType::U32, u32::MAX)]);
        values.extend([f.scalar(DType::I8, -128), f.scalar(DType::U8, 255), f.scalar(DType::Bool, true)]);
        values.push(f.scalar(DType::F32, f32::NAN));
        values
    });
    let mut out = out.into_iter();
    for value in floats {
        assert_eq!(out.next().unwrap().values::<f32>()[0].to_bits(), value.to_bits(), "{value}");
    }
    for value in doubles {
        assert_eq!(out.next().unwrap().values::<f64>()[0].to_bits(), value.to_bits(), "{value}");
    }
    let mut next = || out.next().unwrap();
    assert_eq!((next().values::<i64>(), next().values::<i64>()), (vec![i64::MIN], vec![i64::MAX]));
    assert_eq!((next().values::<u64>(), next().values::<u32>()), (vec![u64::MAX], vec![u32::MAX]));
    assert_eq!((next().values::<i8>(), next().values::<u8>()), (vec![-128], vec![255]));
    assert_eq!(next().values::<bool>(), [true]);
    assert!(next().values::<f32>()[0].is_nan());
}

#[test]
fn narrow_floats_are_rounded_once_and_to_even() {
    let values = [1.0 + 1.0 / 256.0, 1.0 + 3.0 / 256.0, -0.1, f64::NEG_INFINITY, 3.3895e38];
    let out = run(&[], |f, _| {
        let narrow = |dtype| values[..4].iter().map(move |value| f.scalar(dtype, *value).convert(DType::F32));
        narrow(DType::Bf16)
            .chain(narrow(DType::F16))
            .chain([f.scalar(DType::Bf16, values[4]).convert(DType::F32)])
            .collect()
    });
    let found: Vec<_> = out.iter().map(|tensor| tensor.values::<f32>()[0]).collect();
    let bf16 = [1.0, 1.0 + 4.0 / 256.0, f32::from_bits(0xBDCD_0000), f32::NEG_INFINITY];
    let f16 = [1.0 + 1.0 / 256.0, 1.0 + 3.0 / 256.0, -1638.0 / 16384.0, f32::NEG_INFINITY];
    assert_eq!(found[..4], bf16);
    assert_eq!(found[4..8], f16);
    assert_eq!(found[8], f32::from_bits(0x7F7F_0000));
}

#[test]
fn arrays_keep_their_order() {
    let out = run(&[], |f, _| {
        let axes = [(TOKENS, 2), (HIDDEN, 3)];
        let numbers = f.array(&axes, &[1, 2, 3, 4, 5, 6]);
        let truth = f.array(&[(TOKENS, 3)], &[true, false, true]);
        let one = f.array(&[(TOKENS, 1)], &[7.5f32]);
        let none = f.array::<f32>(&[(TOKENS, 0)], &[]);
        let full = f.full(Shape::new(DType::U8, axes), Scalar::Int(9));
        vec![numbers, truth, one, none, full, f.iota(DType::F32, VOCAB, 4), f.zeros(Shape::new(DType::Bool, axes))]
    });
    assert_eq!(out[0].values::<i32>(), [1, 2, 3, 4, 5, 6]);
    assert_eq!(out[1].values::<bool>(), [true, false, true]);
    assert_eq!(out[2].values::<f32>(), [7.5]);
    assert!(out[3].values::<f32>().is_empty());
    assert_eq!(out[4].values::<u8>(), [9; 6]);
    assert_eq!(out[5].values::<f32>(), [0.0, 1.0, 2.0, 3.0]);
    assert_eq!(out[6].values::<bool>(), [false; 6]);
}

#[test]
fn arguments_pass_through_unchanged() {
    let input = Tensor::noise(&[(TOKENS, 3), (HIDDEN, 5)], 1);
    let out = run(std::slice::from_ref(&input), |_, x| vec![x[0]]);
    assert_eq!(out[0].values::<f32>(), input.values::<f32>());
}
