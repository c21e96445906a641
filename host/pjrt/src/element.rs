//! Element types of buffers.

use crate::error::{PjrtError, Result};

macro_rules! element_types {
    ($($name:ident $raw:ident $bytes:literal,)*) => {
        /// The type of a buffer's elements.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[non_exhaustive]
        pub enum ElementType { $($name,)* }

        impl ElementType {
            #[cfg(test)]
            const ALL: &[Self] = &[$(Self::$name,)*];

            /// Bytes of one element in host memory, where even 2- and 4-bit integers take a whole byte.
            pub fn bytes(self) -> usize {
                match self { $(Self::$name => $bytes,)* }
            }

            pub(crate) fn raw(self) -> pjrt_sys::PJRT_Buffer_Type {
                match self { $(Self::$name => pjrt_sys::$raw,)* }
            }

            pub(crate) fn from_raw(raw: pjrt_sys::PJRT_Buffer_Type) -> Result<Self> {
                match raw {
                    $(pjrt_sys::$raw => Ok(Self::$name),)*
                    _ => Err(PjrtError::Invalid(format!("element type {raw} of the plugin is not known here"))),
                }
            }
        }
    };
}

element_types! {
    Pred PJRT_Buffer_Type_PJRT_Buffer_Type_PRED 1,
    S2 PJRT_Buffer_Type_PJRT_Buffer_Type_S2 1,
    S4 PJRT_Buffer_Type_PJRT_Buffer_Type_S4 1,
    S8 PJRT_Buffer_Type_PJRT_Buffer_Type_S8 1,
    S16 PJRT_Buffer_Type_PJRT_Buffer_Type_S16 2,
    S32 PJRT_Buffer_Type_PJRT_Buffer_Type_S32 4,
    S64 PJRT_Buffer_Type_PJRT_Buffer_Type_S64 8,
    U2 PJRT_Buffer_Type_PJRT_Buffer_Type_U2 1,
    U4 PJRT_Buffer_Type_PJRT_Buffer_Type_U4 1,
    U8 PJRT_Buffer_Type_PJRT_Buffer_Type_U8 1,
    U16 PJRT_Buffer_Type_PJRT_Buffer_Type_U16 2,
    U32 PJRT_Buffer_Type_PJRT_Buffer_Type_U32 4,
    U64 PJRT_Buffer_Type_PJRT_Buffer_Type_U64 8,
    F8E4M3FN PJRT_Buffer_Type_PJRT_Buffer_Type_F8E4M3FN 1,
    F8E5M2 PJRT_Buffer_Type_PJRT_Buffer_Type_F8E5M2 1,
    F16 PJRT_Buffer_Type_PJRT_Buffer_Type_F16 2,
    BF16 PJRT_Buffer_Type_PJRT_Buffer_Type_BF16 2,
    F32 PJRT_Buffer_Type_PJRT_Buffer_Type_F32 4,
    F64 PJRT_Buffer_Type_PJRT_Buffer_Type_F64 8,
    C64 PJRT_Buffer_Type_PJRT_Buffer_Type_C64 8,
    C128 PJRT_Buffer_Type_PJRT_Buffer_Type_C128 16,
}

impl ElementType {
    /// Bytes of a dense array in host memory; an error if a dimension is negative or the product overflows.
    pub fn array_bytes(self, dims: &[i64]) -> Result<usize> {
        dims.iter()
            .try_fold(self.bytes(), |bytes, &dim| bytes.checked_mul(usize::try_from(dim).ok()?))
            .ok_or_else(|| PjrtError::Invalid(format!("{self:?}{dims:?} is not a shape that fits into memory")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn types_survive_the_way_to_c_and_back() {
        for &element_type in ElementType::ALL {
            assert_eq!(ElementType::from_raw(element_type.raw()).unwrap(), element_type);
        }
        assert!(ElementType::from_raw(pjrt_sys::PJRT_Buffer_Type_PJRT_Buffer_Type_TOKEN).is_err());
    }

    #[test]
    fn shapes_are_measured_with_care() {
        assert_eq!(ElementType::BF16.array_bytes(&[3, 5]).unwrap(), 30);
        assert_eq!(ElementType::F32.array_bytes(&[]).unwrap(), 4);
        assert_eq!(ElementType::F32.array_bytes(&[7, 0]).unwrap(), 0);
        assert!(ElementType::F32.array_bytes(&[-1]).is_err());
        assert!(ElementType::F32.array_bytes(&[i64::MAX, 8]).is_err());
    }
}
