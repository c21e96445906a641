//! Constants, printed so that every bit arrives.

use std::fmt::Write;

use torus_abi::{DType, TensorType};

/// The value of one element, before it is given a dtype.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Scalar {
    Bool(bool),
    /// Holds every `i64` and every `u64`.
    Int(i128),
    /// Rounded to nearest even where the dtype is narrower.
    Float(f64),
}

macro_rules! scalar_from {
    ($($type:ty => $variant:ident),*) => {$(
        impl From<$type> for Scalar {
            fn from(value: $type) -> Self {
                Scalar::$variant(value.into())
            }
        }
    )*};
}

scalar_from!(bool => Bool, i8 => Int, i16 => Int, i32 => Int, i64 => Int, u8 => Int, u16 => Int, u32 => Int, u64 => Int,
    f32 => Float, f64 => Float);

/// A Rust type that stands for a dtype in constants.
pub trait Element: Copy + Into<Scalar> {
    const DTYPE: DType;
}

macro_rules! element {
    ($($type:ty => $dtype:ident),*) => {$(
        impl Element for $type {
            const DTYPE: DType = DType::$dtype;
        }
    )*};
}

element!(bool => Bool, i8 => I8, i16 => I16, i32 => I32, i64 => I64, u8 => U8, u16 => U16, u32 => U32, u64 => U64,
    f32 => F32, f64 => F64);

impl Scalar {
    /// Checks that the value can be written in a dtype. An integer becomes a float; a float becomes no integer.
    pub(crate) fn check(self, dtype: DType) -> Result<(), String> {
        let fits = match self {
            Scalar::Bool(_) => dtype == DType::Bool,
            Scalar::Int(value) if dtype.is_integer() => {
                let (low, high) = integer_range(dtype);
                (low..=high).contains(&value)
            }
            Scalar::Int(value) => dtype.is_float() && (value as f64).abs() < float_limit(dtype),
            Scalar::Float(value) => dtype.is_float() && (!value.is_finite() || value.abs() < float_limit(dtype)),
        };
        if fits { Ok(()) } else { Err(format!("the constant {self:?} does not fit {dtype}")) }
    }

    /// Appends the value as MLIR reads it; [`Scalar::check`] must have passed.
    fn print(self, dtype: DType, out: &mut String) {
        // Writing to a String cannot fail.
        let _ = match self {
            Scalar::Bool(value) => write!(out, "{value}"),
            Scalar::Int(value) if dtype.is_float() => {
                print_float(value as f64, dtype, out);
                Ok(())
            }
            Scalar::Int(value) => write!(out, "{value}"),
            Scalar::Float(value) => {
                print_float(value, dtype, out);
                Ok(())
            }
        };
    }
}

fn integer_range(dtype: DType) -> (i128, i128) {
    let bits = 8 * dtype.bytes() as u32;
    if dtype.is_unsigned() { (0, (1 << bits) - 1) } else { (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) }
}

/// Finite values of at least this magnitude round to infinity in the dtype: half a step above its largest value.
fn float_limit(dtype: DType) -> f64 {
    match dtype {
        DType::F16 => 65520.0,
        DType::Bf16 => f64::from_bits(0x47EF_F000_0000_0000),
        DType::F32 => f64::from_bits(0x47EF_FFFF_F000_0000),
        _ => f64::INFINITY,
    }
}

/// Exponent bits of infinity and the quiet bit of NaN, by dtype, in hexadecimal as MLIR takes bit patterns.
fn print_float(value: f64, dtype: DType, out: &mut String) {
    if value.is_finite() {
        let start = out.len();
        // The shortest decimal that reads back as this f64. MLIR reads decimals as f64 and then rounds once.
        let _ = write!(out, "{value:?}");
        if !out[start..].contains('.') {
            let at = out[start..].find('e').map_or(out.len(), |e| start + e);
            out.insert_str(at, ".0");
        }
        return;
    }
    let negative = value.is_sign_negative() && !value.is_nan();
    out.push_str(match (dtype, value.is_nan(), negative) {
        (DType::F16, true, _) => "0x7E00",
        (DType::F16, false, false) => "0x7C00",
        (DType::F16, false, true) => "0xFC00",
        (DType::Bf16, true, _) => "0x7FC0",
        (DType::Bf16, false, false) => "0x7F80",
        (DType::Bf16, false, true) => "0xFF80",
        (DType::F64, true, _) => "0x7FF8000000000000",
        (DType::F64, false, false) => "0x7FF0000000000000",
        (DType::F64, false, true) => "0xFFF0000000000000",
        // It has no infinities: of what is past its range only not-a-number is left.
        (DType::F8E4M3, ..) => "0x7F",
        (_, true, _) => "0x7FC00000",
        (_, false, false) => "0x7F800000",
        (_, false, true) => "0xFF800000",
    });
}

/// A constant tensor: one value everywhere, or one for each element in row-major order.
#[derive(Clone, Debug, PartialEq)]
pub struct Literal {
    tensor: TensorType,
    values: Vec<Scalar>,
}

impl Literal {
    /// Checks that there is a value for each element and that all fit the dtype.
    pub fn dense(tensor: TensorType, values: Vec<Scalar>) -> Result<Self, String> {
        if tensor.elements() != Some(values.len() as u64) {
            return Err(format!("{} values were given for {tensor}", values.len()));
        }
        values.iter().try_for_each(|value| value.check(tensor.dtype))?;
        Ok(Self { tensor, values })
    }

    /// The same value everywhere, if it fits the dtype.
    pub fn splat(tensor: TensorType, value: impl Into<Scalar>) -> Result<Self, String> {
        let value = value.into();
        value.check(tensor.dtype)?;
        Ok(Self { tensor, values: vec![value] })
    }

    pub(crate) fn print(&self, out: &mut String) {
        out.push_str("dense<");
        match self.values.as_slice() {
            [value] => value.print(self.tensor.dtype, out),
            values => self.print_nested(&self.tensor.dims, values, out),
        }
        out.push_str("> : ");
        out.push_str(&self.tensor.mlir());
    }

    fn print_nested(&self, dims: &[u64], values: &[Scalar], out: &mut String) {
        let Some((outer, inner)) = dims.split_first() else {
            return values.iter().for_each(|value| value.print(self.tensor.dtype, out));
        };
        if values.is_empty() {
            return;
        }
        out.push('[');
        for (i, chunk) in values.chunks(values.len() / *outer as usize).enumerate() {
            if i > 0 {
                out.push_str(", ");
            }
            self.print_nested(inner, chunk, out);
        }
        out.push(']');
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(dtype: DType, value: impl Into<Scalar>) -> String {
        let literal = Literal::splat(TensorType::scalar(dtype), value).unwrap();
        let mut out = String::new();
        literal.print(&mut out);
        out
    }

    #[test]
    fn floats_are_exact_and_have_a_point() {
        assert_eq!(text(DType::F32, 1.0), "dense<1.0> : tensor<f32>");
        assert_eq!(text(DType::F32, 0.1f32), "dense<0.10000000149011612> : tensor<f32>");
        assert_eq!(text(DType::F32, 1e-6f64), "dense<1.0e-6> : tensor<f32>");
        assert_eq!(text(DType::F64, 1e300), "dense<1.0e300> : tensor<f64>");
        assert_eq!(text(DType::F32, -0.0), "dense<-0.0> : tensor<f32>");
        assert_eq!(text(DType::Bf16, 3), "dense<3.0> : tensor<bf16>");
    }

    #[test]
    fn infinities_and_nan_are_bit_patterns_of_the_width() {
        assert_eq!(text(DType::Bf16, f64::NEG_INFINITY), "dense<0xFF80> : tensor<bf16>");
        assert_eq!(text(DType::F16, f64::INFINITY), "dense<0x7C00> : tensor<f16>");
        assert_eq!(text(DType::F32, f32::NEG_INFINITY), "dense<0xFF800000> : tensor<f32>");
        assert_eq!(text(DType::F64, f64::NAN), "dense<0x7FF8000000000000> : tensor<f64>");
    }

    #[test]
    fn integer_extremes_print_and_what_does_not_fit_is_refused() {
        assert_eq!(text(DType::U64, u64::MAX), "dense<18446744073709551615> : tensor<ui64>");
        assert_eq!(text(DType::I64, i64::MIN), "dense<-9223372036854775808> : tensor<i64>");
        let refused = |dtype, value: Scalar| value.check(dtype).is_err();
        assert!(refused(DType::U8, 256.into()) && refused(DType::U32, (-1).into()) && refused(DType::I8, 128.into()));
        assert!(
            refused(DType::I32, 0.5.into()) && refused(DType::F32, 1e39.into()) && refused(DType::F16, 65520.into())
        );
        assert!(refused(DType::Bool, 1.into()) && refused(DType::F32, true.into()));
        assert!(!refused(DType::F32, f32::MAX.into()) && !refused(DType::F16, 65519.0.into()));
        assert!(!refused(DType::Bf16, 3.3895e38.into()) && refused(DType::Bf16, 3.4e38.into()));
    }

    #[test]
    fn arrays_nest_and_empty_ones_print() {
        let print = |dims: &[u64], values: Vec<Scalar>| {
            let mut out = String::new();
            Literal::dense(TensorType::new(DType::I32, dims), values).unwrap().print(&mut out);
            out
        };
        let six = (0..6).map(Scalar::from).collect();
        assert_eq!(print(&[2, 3], six), "dense<[[0, 1, 2], [3, 4, 5]]> : tensor<2x3xi32>");
        assert_eq!(print(&[0, 3], vec![]), "dense<> : tensor<0x3xi32>");
        assert!(Literal::dense(TensorType::new(DType::I32, [2, 3]), vec![1.into(), 2.into()]).is_err());
    }
}
