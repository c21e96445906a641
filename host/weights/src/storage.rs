//! How elements lie in a file, and how they are stored for the device.

use std::fmt;

use torus_abi::DType;
use torus_cpu::packed::{Format, SourceType};

/// How a checkpoint stores the elements of a tensor: plainly, or in quantized blocks along the innermost axis.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum StorageType {
    F32,
    F16,
    Bf16,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q4K,
    Q5K,
    Q6K,
    /// Known by name and size only; no weight can be made of it.
    Other {
        name: &'static str,
        block: Block,
    },
}

/// The unit of storage: so many elements in so many bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Block {
    pub elements: u64,
    pub bytes: u64,
}

/// Number (GGUF only) and name of a type in its file format, elements and bytes of a block.
type Row<K> = (K, &'static str, u64, u64);

/// Element types of GGUF that Torus has no use for, by their number.
const OTHER_GGUF: [Row<u32>; 21] = [
    (10, "Q2_K", 256, 84),
    (11, "Q3_K", 256, 110),
    (16, "IQ2_XXS", 256, 66),
    (17, "IQ2_XS", 256, 74),
    (18, "IQ3_XXS", 256, 98),
    (19, "IQ1_S", 256, 50),
    (20, "IQ4_NL", 32, 18),
    (21, "IQ3_S", 256, 110),
    (22, "IQ2_S", 256, 82),
    (23, "IQ4_XS", 256, 136),
    (24, "I8", 1, 1),
    (25, "I16", 1, 2),
    (26, "I32", 1, 4),
    (27, "I64", 1, 8),
    (28, "F64", 1, 8),
    (29, "IQ1_M", 256, 56),
    (34, "TQ1_0", 256, 54),
    (35, "TQ2_0", 256, 66),
    (39, "MXFP4", 32, 17),
    (40, "NVFP4", 64, 36),
    (41, "Q1_0", 128, 18),
];

/// Element types of safetensors that Torus has no use for.
const OTHER_SAFETENSORS: [Row<()>; 19] = [
    ((), "BOOL", 1, 1),
    ((), "U8", 1, 1),
    ((), "I8", 1, 1),
    ((), "U16", 1, 2),
    ((), "I16", 1, 2),
    ((), "U32", 1, 4),
    ((), "I32", 1, 4),
    ((), "U64", 1, 8),
    ((), "I64", 1, 8),
    ((), "F64", 1, 8),
    ((), "C64", 1, 8),
    ((), "F8_E5M2", 1, 1),
    ((), "F8_E4M3", 1, 1),
    ((), "F8_E8M0", 1, 1),
    ((), "F8_E4M3FNUZ", 1, 1),
    ((), "F8_E5M2FNUZ", 1, 1),
    ((), "F4", 2, 1),
    ((), "F6_E2M3", 4, 3),
    ((), "F6_E3M2", 4, 3),
];

impl StorageType {
    /// By its number in a GGUF file.
    pub(crate) fn from_gguf(id: u32) -> Option<Self> {
        Some(match id {
            0 => Self::F32,
            1 => Self::F16,
            2 => Self::Q4_0,
            3 => Self::Q4_1,
            6 => Self::Q5_0,
            7 => Self::Q5_1,
            8 => Self::Q8_0,
            12 => Self::Q4K,
            13 => Self::Q5K,
            14 => Self::Q6K,
            30 => Self::Bf16,
            _ => return other(&OTHER_GGUF, |row| row.0 == id),
        })
    }

    /// By its name in a safetensors header.
    pub(crate) fn from_safetensors(name: &str) -> Option<Self> {
        Some(match name {
            "F32" => Self::F32,
            "F16" => Self::F16,
            "BF16" => Self::Bf16,
            _ => return other(&OTHER_SAFETENSORS, |row| row.1 == name),
        })
    }

    /// The name its file format uses.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "F32",
            Self::F16 => "F16",
            Self::Bf16 => "BF16",
            Self::Q4_0 => "Q4_0",
            Self::Q4_1 => "Q4_1",
            Self::Q5_0 => "Q5_0",
            Self::Q5_1 => "Q5_1",
            Self::Q8_0 => "Q8_0",
            Self::Q4K => "Q4_K",
            Self::Q5K => "Q5_K",
            Self::Q6K => "Q6_K",
            Self::Other { name, .. } => name,
        }
    }

    pub fn block(self) -> Block {
        let (elements, bytes) = match self {
            Self::F32 => (1, 4),
            Self::F16 | Self::Bf16 => (1, 2),
            Self::Q4_0 => (32, 18),
            Self::Q4_1 => (32, 20),
            Self::Q5_0 => (32, 22),
            Self::Q5_1 => (32, 24),
            Self::Q8_0 => (32, 34),
            Self::Q4K => (256, 144),
            Self::Q5K => (256, 176),
            Self::Q6K => (256, 210),
            Self::Other { block, .. } => return block,
        };
        Block { elements, bytes }
    }

    /// True if weights can be made of it.
    pub fn is_readable(self) -> bool {
        !matches!(self, Self::Other { .. })
    }

    /// Bytes of a tensor; the reason why there is no such tensor otherwise.
    pub(crate) fn bytes_of(self, shape: &[u64]) -> Result<u64, String> {
        let block = self.block();
        let too_large = || format!("a shape of {shape:?} overflows");
        let elements = shape.iter().try_fold(1u64, |product, dim| product.checked_mul(*dim)).ok_or_else(too_large)?;
        let innermost = shape.last().copied().unwrap_or(1);
        if innermost % block.elements != 0 {
            return Err(format!(
                "the innermost axis of {shape:?} does not divide into {self} blocks of {}",
                block.elements
            ));
        }
        (elements / block.elements).checked_mul(block.bytes).ok_or_else(too_large)
    }
}

fn other<K>(rows: &[Row<K>], is_it: impl Fn(&Row<K>) -> bool) -> Option<StorageType> {
    let (_, name, elements, bytes) = rows.iter().find(|row| is_it(row))?;
    Some(StorageType::Other { name, block: Block { elements: *elements, bytes: *bytes } })
}

impl fmt::Display for StorageType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What a weight is to be once loaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// A tensor of its shape, row-major.
    Dense(StorageDType),
    /// A matrix for the CPU's kernels ([`torus_cpu::packed`]).
    Packed {
        /// The format of elements that are no quantized blocks, or do not stay what they are.
        floats: Format,
        /// Quantized blocks are not dequantized.
        keep_quantized: bool,
    },
}

impl From<StorageDType> for Target {
    fn from(dtype: StorageDType) -> Self {
        Self::Dense(dtype)
    }
}

impl StorageType {
    /// The format that holds its blocks as they are, and how the packer calls them.
    pub(crate) fn packed_as(self) -> Option<(Format, SourceType)> {
        Some(match self {
            Self::Q8_0 => (Format::Q8, SourceType::Q8_0),
            Self::Q4_0 => (Format::Q4, SourceType::Q4_0),
            Self::Q4_1 => (Format::Q4Min, SourceType::Q4_1),
            Self::Q5_0 => (Format::Q5, SourceType::Q5_0),
            Self::Q5_1 => (Format::Q5Min, SourceType::Q5_1),
            Self::Q4K => (Format::Q4Min, SourceType::Q4K),
            Self::Q5K => (Format::Q5Min, SourceType::Q5K),
            Self::Q6K => (Format::Q6, SourceType::Q6K),
            Self::F32 | Self::F16 | Self::Bf16 | Self::Other { .. } => return None,
        })
    }
}

/// The element type of a dense tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum StorageDType {
    F32,
    Bf16,
    F16,
}

impl StorageDType {
    pub fn dtype(self) -> DType {
        match self {
            Self::F32 => DType::F32,
            Self::Bf16 => DType::Bf16,
            Self::F16 => DType::F16,
        }
    }

    /// Size of an element in bytes.
    pub fn bytes(self) -> usize {
        self.dtype().bytes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_count_whole_blocks_of_the_innermost_axis() {
        assert_eq!(StorageType::Q4K.bytes_of(&[3, 512]), Ok(3 * 2 * 144));
        assert_eq!(StorageType::F32.bytes_of(&[]), Ok(4));
        assert_eq!(StorageType::F32.bytes_of(&[0, 7]), Ok(0));
        assert!(StorageType::Q4_0.bytes_of(&[32, 31]).is_err(), "32 x 31 elements are whole blocks, but no row is");
    }

    #[test]
    fn sizes_that_overflow_are_refused() {
        assert!(StorageType::F32.bytes_of(&[1 << 40, 1 << 40]).is_err());
        assert!(StorageType::F32.bytes_of(&[1 << 62]).is_err());
    }

    #[test]
    fn types_no_weight_can_be_made_of_are_known_by_name() {
        let iq4 = StorageType::from_gguf(23).unwrap();
        assert_eq!((iq4.name(), iq4.is_readable(), iq4.bytes_of(&[256])), ("IQ4_XS", false, Ok(136)));
        assert!(!StorageType::from_safetensors("F8_E4M3").unwrap().is_readable());
        assert_eq!(StorageType::from_gguf(5), None);
        assert_eq!(StorageType::from_safetensors("f32"), None);
    }
}
