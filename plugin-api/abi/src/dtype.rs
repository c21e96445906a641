//! Element types and tensor types, as signatures name them.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// The element type of a tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum DType {
    Bool,
    I8,
    I16,
    I32,
    I64,
    U8,
    U16,
    U32,
    U64,
    F16,
    Bf16,
    F32,
    F64,
    /// Four bits of exponent, three of mantissa, no infinities: [-448, 448].
    F8E4M3,
}

impl DType {
    const ALL: [(DType, &'static str, &'static str, usize); 14] = [
        (DType::Bool, "bool", "i1", 1),
        (DType::I8, "i8", "i8", 1),
        (DType::I16, "i16", "i16", 2),
        (DType::I32, "i32", "i32", 4),
        (DType::I64, "i64", "i64", 8),
        (DType::U8, "u8", "ui8", 1),
        (DType::U16, "u16", "ui16", 2),
        (DType::U32, "u32", "ui32", 4),
        (DType::U64, "u64", "ui64", 8),
        (DType::F16, "f16", "f16", 2),
        (DType::Bf16, "bf16", "bf16", 2),
        (DType::F32, "f32", "f32", 4),
        (DType::F64, "f64", "f64", 8),
        (DType::F8E4M3, "f8e4m3fn", "f8E4M3FN", 1),
    ];

    fn entry(self) -> (&'static str, &'static str, usize) {
        let (_, name, mlir, bytes) = Self::ALL[self as usize];
        (name, mlir, bytes)
    }

    /// The name used in signatures: `bf16`, `u32`.
    pub fn name(self) -> &'static str {
        self.entry().0
    }

    /// The spelling in StableHLO text: `bf16`, `ui32`, `i1`.
    pub fn mlir(self) -> &'static str {
        self.entry().1
    }

    /// Size of one element in bytes.
    pub fn bytes(self) -> usize {
        self.entry().2
    }

    pub fn is_float(self) -> bool {
        matches!(self, DType::F8E4M3 | DType::F16 | DType::Bf16 | DType::F32 | DType::F64)
    }

    pub fn is_unsigned(self) -> bool {
        matches!(self, DType::U8 | DType::U16 | DType::U32 | DType::U64)
    }

    /// True for signed and unsigned integers, not for booleans.
    pub fn is_integer(self) -> bool {
        !self.is_float() && self != DType::Bool
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A text that names no element type or tensor type.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("'{0}' is not a tensor type; expected for example 'f32[2,3]'")]
pub struct TensorTypeError(String);

impl FromStr for DType {
    type Err = TensorTypeError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let found = Self::ALL.iter().find(|(_, name, ..)| *name == text);
        found.map(|(dtype, ..)| *dtype).ok_or_else(|| TensorTypeError(text.to_owned()))
    }
}

/// An element type and the sizes of the axes. Written `bf16[8,64]`; a scalar is `f32[]`.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TensorType {
    pub dtype: DType,
    pub dims: Vec<u64>,
}

impl TensorType {
    pub fn new(dtype: DType, dims: impl Into<Vec<u64>>) -> Self {
        Self { dtype, dims: dims.into() }
    }

    pub fn scalar(dtype: DType) -> Self {
        Self::new(dtype, [])
    }

    /// Number of elements, or `None` when it exceeds `u64`.
    pub fn elements(&self) -> Option<u64> {
        self.dims.iter().try_fold(1u64, |product, dim| product.checked_mul(*dim))
    }

    /// Size in bytes, or `None` when it exceeds `u64`.
    pub fn bytes(&self) -> Option<u64> {
        self.elements()?.checked_mul(self.dtype.bytes() as u64)
    }

    /// The spelling in StableHLO text: `tensor<8x64xbf16>`.
    pub fn mlir(&self) -> String {
        let mut text = String::from("tensor<");
        for dim in &self.dims {
            text.push_str(&dim.to_string());
            text.push('x');
        }
        text.push_str(self.dtype.mlir());
        text.push('>');
        text
    }
}

impl fmt::Display for TensorType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}[", self.dtype)?;
        for (i, dim) in self.dims.iter().enumerate() {
            write!(f, "{}{dim}", if i == 0 { "" } else { "," })?;
        }
        f.write_str("]")
    }
}

impl fmt::Debug for TensorType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for TensorType {
    type Err = TensorTypeError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let error = || TensorTypeError(text.to_owned());
        let (dtype, rest) = text.split_once('[').ok_or_else(error)?;
        let inner = rest.strip_suffix(']').ok_or_else(error)?;
        let dims = if inner.is_empty() {
            Vec::new()
        } else {
            inner.split(',').map(|dim| dim.parse().map_err(|_| error())).collect::<Result<_, _>>()?
        };
        Ok(Self { dtype: dtype.parse().map_err(|_| error())?, dims })
    }
}

macro_rules! serde_as_text {
    ($type:ty) => {
        impl Serialize for $type {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl<'de> Deserialize<'de> for $type {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let text = std::borrow::Cow::<'de, str>::deserialize(deserializer)?;
                text.parse().map_err(serde::de::Error::custom)
            }
        }
    };
}

serde_as_text!(DType);
serde_as_text!(TensorType);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_dtype_is_found_under_its_own_name_and_index() {
        for (i, (dtype, name, ..)) in DType::ALL.iter().enumerate() {
            assert_eq!(*dtype as usize, i);
            assert_eq!(name.parse::<DType>().unwrap(), *dtype);
        }
    }

    #[test]
    fn tensor_types_round_trip_as_text() {
        for text in ["f32[]", "bf16[8,64]", "bool[3]", "u32[1,2,3,4]", "f8e4m3fn[3]"] {
            let parsed: TensorType = text.parse().unwrap();
            assert_eq!(parsed.to_string(), text);
            let json = serde_json::to_string(&parsed).unwrap();
            assert_eq!(serde_json::from_str::<TensorType>(&json).unwrap(), parsed);
        }
        assert_eq!("bf16[8,64]".parse::<TensorType>().unwrap().mlir(), "tensor<8x64xbf16>");
        assert_eq!(TensorType::scalar(DType::Bool).mlir(), "tensor<i1>");
    }

    #[test]
    fn malformed_tensor_types_are_refused() {
        for text in ["", "f32", "f32[", "f32[2,]", "f99[2]", "f32[-1]", "[2]"] {
            assert!(text.parse::<TensorType>().is_err(), "{text}");
        }
    }

    #[test]
    fn sizes_that_overflow_are_none() {
        assert_eq!(TensorType::new(DType::F32, [2, 3]).bytes(), Some(24));
        assert_eq!(TensorType::new(DType::F32, [u64::MAX, 2]).bytes(), None);
        assert_eq!(TensorType::new(DType::F32, [u64::MAX]).bytes(), None);
    }
}
