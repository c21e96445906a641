//! Rust types of tensor elements.

use crate::DType;

/// A type whose values lie in tensors as they are.
pub trait Element: Copy + Send + Sync + sealed::Sealed + 'static {
    const DTYPE: DType;
}

mod sealed {
    pub trait Sealed {}
}

/// bfloat16: the upper half of an `f32`.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Bf16(pub u16);

/// The bits of an IEEE half-precision number.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct F16(pub u16);

impl From<Bf16> for f32 {
    fn from(value: Bf16) -> f32 {
        f32::from_bits(u32::from(value.0) << 16)
    }
}

impl Bf16 {
    /// Rounds to the nearest, ties to even.
    pub fn from_f32(value: f32) -> Self {
        let bits = value.to_bits();
        if value.is_nan() {
            // Rounding could turn a NaN into an infinity.
            return Self((bits >> 16) as u16 | 0x40);
        }
        let odd = (bits >> 16) & 1;
        Self(((bits + 0x7FFF + odd) >> 16) as u16)
    }
}

macro_rules! elements {
    ($($type:ty => $dtype:ident),* $(,)?) => {
        $(
            impl sealed::Sealed for $type {}
            impl Element for $type {
                const DTYPE: DType = DType::$dtype;
            }
        )*
    };
}

elements! {
    bool => Bool, i8 => I8, i16 => I16, i32 => I32, i64 => I64, u8 => U8, u16 => U16, u32 => U32, u64 => U64,
    F16 => F16, Bf16 => Bf16, f32 => F32, f64 => F64,
}

/// The numbers of XLA's `PrimitiveType`, which its FFI uses.
pub(super) fn dtype_of(primitive: i32) -> Option<DType> {
    Some(match primitive {
        1 => DType::Bool,
        2 => DType::I8,
        3 => DType::I16,
        4 => DType::I32,
        5 => DType::I64,
        6 => DType::U8,
        7 => DType::U16,
        8 => DType::U32,
        9 => DType::U64,
        10 => DType::F16,
        11 => DType::F32,
        12 => DType::F64,
        16 => DType::Bf16,
        _ => return None,
    })
}

/// Whether all elements are values of their type. Only booleans have bytes that are none.
///
/// # Safety
/// `data` points to `len` elements of `T` that may be read.
pub(super) unsafe fn all_valid<T: Element>(data: *const u8, len: usize) -> bool {
    // SAFETY: a boolean is a byte (caller's promise).
    T::DTYPE != DType::Bool || unsafe { std::slice::from_raw_parts(data, len) }.iter().all(|byte| *byte <= 1)
}

/// Makes every element a value of its type, keeping those that are.
///
/// # Safety
/// `data` points to `len` elements of `T` that may be written and that nothing else sees.
pub(super) unsafe fn make_valid<T: Element>(data: *mut u8, len: usize) {
    if T::DTYPE == DType::Bool {
        // SAFETY: a boolean is a byte (caller's promise).
        unsafe { std::slice::from_raw_parts_mut(data, len) }.iter_mut().for_each(|byte| *byte = u8::from(*byte != 0));
    }
}
