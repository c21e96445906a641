//! What is multiplied with: shapes, number formats, and how they lie in memory.

use std::fmt;

use torus_mosaic::{Elem, Tensor};

/// How the numbers of a weight are stored.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub enum Format {
    /// As they are, without scales.
    Bf16,
    /// Signed integers in bytes.
    Int8,
    /// `f8E4M3FN` in bytes, the rows of a stored matrix in the order of [`interleave_float8`]. Numbers below 2^-6, which
    /// have fewer digits, may count as 0 on a TPU.
    Float8,
    /// Signed integers from -8 to 7, two in a byte: neighbours along the first axis of a stored matrix, the first in
    /// the low half ([`pack_int4`]).
    Int4,
}

impl Format {
    /// The element type of the stored tensor. All quantized formats are bytes to XLA.
    pub fn stored(self) -> Elem {
        match self {
            Self::Bf16 => Elem::Bf16,
            Self::Int8 | Self::Float8 | Self::Int4 => Elem::I8,
        }
    }

    /// The type of the numbers themselves.
    pub fn elem(self) -> Elem {
        match self {
            Self::Bf16 => Elem::Bf16,
            Self::Int8 => Elem::I8,
            Self::Float8 => Elem::F8E4M3,
            Self::Int4 => Elem::I4,
        }
    }

    /// Bits of one number.
    pub fn bits(self) -> usize {
        self.elem().bits()
    }

    /// Numbers that share a stored element.
    pub(crate) fn shared(self) -> usize {
        self.stored().bits() / self.bits()
    }

    pub fn is_quantized(self) -> bool {
        self != Self::Bf16
    }
}

/// The order of a stored matrix's axes.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub enum Layout {
    /// `[in, out]`: as the matrix unit takes it. Checkpoints have it the other way round: transpose on load.
    InOut,
    /// `[out, in]`: as checkpoints have it. The matrix unit turns each tile, in twice the time.
    OutIn,
}

/// A weight, or the weights of all experts. Scales are `f32 [experts, groups, out]`, biases `f32 [experts, 1, out]`,
/// with one expert where there are none.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct Weights {
    /// Features that are summed over.
    pub inputs: usize,
    pub outputs: usize,
    /// Matrices of a mixture of experts; `None` for a plain product.
    pub experts: Option<usize>,
    pub format: Format,
    pub layout: Layout,
    /// Consecutive inputs that share a scale; `None` for all of them.
    pub group: Option<usize>,
    /// Whether something is added to each output.
    pub bias: bool,
}

impl Weights {
    /// One matrix `[in, out]` with a scale for each output, if it is quantized.
    pub fn new(inputs: usize, outputs: usize, format: Format) -> Self {
        Self { inputs, outputs, experts: None, format, layout: Layout::InOut, group: None, bias: false }
    }

    /// The stored tensor, `[experts, …]`.
    pub fn stored(&self) -> Tensor {
        let [rows, columns] = self.stored_matrix(self.outputs);
        self.format.stored().of([self.matrices(), rows, columns])
    }

    /// The scales, `[experts, groups, out]`; `None` for [`Format::Bf16`].
    pub fn scales(&self) -> Option<Tensor> {
        let scales = || Elem::F32.of([self.matrices(), self.groups(), self.outputs]);
        self.format.is_quantized().then(scales)
    }

    /// The biases, `[experts, 1, out]`.
    pub fn biases(&self) -> Option<Tensor> {
        self.bias.then(|| Elem::F32.of([self.matrices(), 1, self.outputs]))
    }

    /// Bytes of everything that belongs to one matrix.
    pub fn matrix_bytes(&self) -> usize {
        let vectors = [self.scales(), self.biases()].into_iter().flatten();
        (self.stored().bytes() + vectors.map(|tensor| tensor.bytes()).sum::<usize>()) / self.matrices()
    }

    pub(crate) fn matrices(&self) -> usize {
        self.experts.unwrap_or(1)
    }

    /// Scales along the inputs.
    pub(crate) fn groups(&self) -> usize {
        self.group.map_or(1, |group| self.inputs / group.max(1))
    }

    /// Inputs that share a scale.
    pub(crate) fn group_inputs(&self) -> usize {
        self.group.unwrap_or(self.inputs)
    }

    /// The stored form of all inputs of some outputs.
    pub(crate) fn stored_matrix(&self, outputs: usize) -> [usize; 2] {
        match self.layout {
            Layout::InOut => [self.inputs / self.format.shared(), outputs],
            Layout::OutIn => [outputs / self.format.shared(), self.inputs],
        }
    }
}

impl fmt::Display for Weights {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { inputs, outputs, format, layout, .. } = self;
        if let Some(experts) = self.experts {
            write!(f, "{experts} x ")?;
        }
        write!(f, "{inputs} -> {outputs} in {format:?} {layout:?}")?;
        if let Some(group) = self.group {
            write!(f, ", groups of {group}")?;
        }
        if self.bias { f.write_str(", bias") } else { Ok(()) }
    }
}

/// Bytes of a matrix of [`Format::Int4`]: `numbers` row by row, `columns` in a row, an even number of rows. What does not
/// fit into 4 bits is cut off.
pub fn pack_int4(numbers: &[i8], columns: usize) -> Vec<i8> {
    let pairs = numbers.chunks_exact(2 * columns).flat_map(|pair| {
        let (low, high) = pair.split_at(columns);
        low.iter().zip(high)
    });
    pairs.map(|(low, high)| (low & 0xF) | (high << 4)).collect()
}

/// Rows of a stored matrix of [`Format::Float8`] between which the first half and the second half of as many rows
/// alternate.
pub(crate) const INTERLEAVED: usize = 128;

/// Bytes of a matrix of [`Format::Float8`] in the order in which they are stored: in each 128 rows, those of the first
/// and of the second half alternate. Bytes that share a half word then become two `bf16` rows with a few operations on
/// words, which costs a third of what generations without 8-bit floats take otherwise. `bytes` row by row, `columns` in
/// a row, a multiple of 128 rows.
pub fn interleave_float8(bytes: &[i8], columns: usize) -> Vec<i8> {
    let units = bytes.chunks_exact(INTERLEAVED * columns).flat_map(|unit| {
        let (first, second) = unit.split_at(unit.len() / 2);
        first.chunks_exact(columns).zip(second.chunks_exact(columns))
    });
    units.flat_map(|(first, second)| first.iter().chain(second)).copied().collect()
}
