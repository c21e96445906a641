//! Seeded numbers, and tensors of them.

use half::bf16;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use torus_abi::{DType, TensorType};

use crate::Tensor;

/// Numbers in `-range..range` that `dtype` represents.
pub(crate) fn noise(seed: u64, len: usize, range: f32, dtype: DType) -> Vec<f32> {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    (0..len).map(|_| rounded(random.random_range(-range..range), dtype)).collect()
}

pub(crate) fn rounded(value: f32, dtype: DType) -> f32 {
    if dtype == DType::Bf16 { bf16::from_f32(value).to_f32() } else { value }
}

/// A tensor of `f32` or `bf16`.
pub(crate) fn floats(ty: TensorType, values: &[f32]) -> Tensor {
    let bytes = match ty.dtype {
        DType::Bf16 => values.iter().flat_map(|value| bf16::from_f32(*value).to_le_bytes()).collect(),
        _ => values.iter().flat_map(|value| value.to_le_bytes()).collect(),
    };
    Tensor { ty, bytes }
}

pub(crate) fn integers(ty: TensorType, values: &[i32]) -> Tensor {
    Tensor { ty, bytes: values.iter().flat_map(|value| value.to_le_bytes()).collect() }
}

pub(crate) fn zeros(ty: &TensorType) -> Result<Tensor, String> {
    let bytes = ty.bytes().filter(|bytes| *bytes < 1 << 32).ok_or_else(|| format!("{ty} is too large to check"))?;
    Ok(Tensor { ty: ty.clone(), bytes: vec![0; bytes as usize] })
}

/// The elements of a tensor of `f32` or `bf16`.
pub(crate) fn decode(bytes: &[u8], dtype: DType) -> Vec<f32> {
    match dtype {
        DType::Bf16 => bytes.as_chunks::<2>().0.iter().map(|bytes| bf16::from_le_bytes(*bytes).to_f32()).collect(),
        _ => bytes.as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect(),
    }
}
