//! Matrices as the kernels read them: repacked once at load, quantized blocks kept quantized.
//!
//! A matrix `[rows, columns]` (output features, input features) is made of up to [`SEGMENTS_MAX`] *segments*, runs of
//! rows that are stored in one [`Format`] each: the projections for Q, K and V, or gate and up, are one matrix and one
//! product also when a file quantizes them differently.
//!
//! Within a segment, [`GROUP`] consecutive rows form a *group*, whose elements are interleaved so that one vector
//! register holds an element (or a pair, or four) of each of the 16 rows, and a group is one contiguous stream. The last
//! group of a segment is filled up with rows of zeros. The bytes describe themselves: they begin with a header of
//! [`HEADER_BYTES`].

mod float;
pub(crate) mod quantized;
mod rows;
mod source;

pub use rows::{decode_row, embed};
pub use source::{RowSource, SourceType, pack, pack_group};

use crate::PackError;

/// Rows of a group: the lanes of a 512-bit register of f32.
pub const GROUP: usize = 16;
/// Columns of a quantized block; scales belong to so many elements (or to half of it).
pub const BLOCK: usize = 32;
/// Segments of a matrix at most.
pub const SEGMENTS_MAX: usize = 4;
/// Bytes before the first segment. Segments and groups begin at multiples of [`ALIGNMENT`].
pub const HEADER_BYTES: usize = 128;
/// What a packed matrix must be aligned to: a cache line, and a 512-bit register.
pub const ALIGNMENT: usize = 64;

const MAGIC: u64 = u64::from_le_bytes(*b"tpacked1");

/// How the elements of a segment are stored. `k` runs over columns; a group holds, for each step of `k`, its 16 rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u32)]
pub enum Format {
    /// `[k][16] f32`
    F32 = 1,
    /// `[k / 2][16][2] bf16`; an odd number of columns is filled up with a zero.
    Bf16 = 2,
    /// `[k][16] f16`
    F16 = 3,
    /// 8 bits with a scale for 32 elements (Q8_0, and int8 weights).
    Q8 = 16,
    /// 4 bits around 8 with a scale for 32 elements (Q4_0).
    Q4 = 17,
    /// 4 bits with a scale and a minimum for 32 elements (Q4_1, Q4_K).
    Q4Min = 18,
    /// 5 bits around 16 with a scale for 32 elements (Q5_0).
    Q5 = 19,
    /// 5 bits with a scale and a minimum for 32 elements (Q5_1, Q5_K).
    Q5Min = 20,
    /// 6 bits around 32 with a scale for 16 elements (Q6_K).
    Q6 = 21,
}

impl Format {
    pub const ALL: [Self; 9] =
        [Self::F32, Self::Bf16, Self::F16, Self::Q8, Self::Q4, Self::Q4Min, Self::Q5, Self::Q5Min, Self::Q6];

    fn from_number(number: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|format| *format as u32 == number)
    }

    /// Whether elements are integers with scales, which are multiplied with quantized activations.
    pub fn is_quantized(self) -> bool {
        self as u32 >= Self::Q8 as u32
    }

    /// Bytes of one group of rows with so many columns, a multiple of [`ALIGNMENT`]; `None` if the format cannot hold
    /// rows of that length.
    pub fn group_bytes(self, columns: usize) -> Option<usize> {
        if self.is_quantized() {
            let blocks = columns.is_multiple_of(BLOCK).then_some(columns / BLOCK)?;
            return Some((blocks * self.tile_bytes()).next_multiple_of(ALIGNMENT));
        }
        let bytes = match self {
            Self::F32 => columns * GROUP * 4,
            Self::Bf16 => columns.next_multiple_of(2) * GROUP * 2,
            _ => columns * GROUP * 2,
        };
        Some(bytes.next_multiple_of(ALIGNMENT))
    }

    /// Bytes of 16 rows by 32 columns of a quantized format, scales included.
    pub const fn tile_bytes(self) -> usize {
        // Bits of the elements, then f16 values for each row.
        let (bits, halves) = match self {
            Self::F32 => return GROUP * BLOCK * 4,
            Self::Bf16 | Self::F16 => return GROUP * BLOCK * 2,
            Self::Q8 => (8, 1),
            Self::Q4 => (4, 1),
            Self::Q4Min => (4, 2),
            Self::Q5 => (5, 1),
            Self::Q5Min => (5, 2),
            Self::Q6 => (6, 2),
        };
        GROUP * BLOCK * bits / 8 + GROUP * 2 * halves
    }
}

/// The rows of one segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    pub format: Format,
    pub rows: usize,
}

/// The shape of a packed matrix and how its segments are stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    columns: usize,
    segments: Vec<Segment>,
}

impl Layout {
    pub fn new(columns: usize, segments: Vec<Segment>) -> Result<Self, PackError> {
        if !(1..=SEGMENTS_MAX).contains(&segments.len()) {
            return Err(PackError::Segments { found: segments.len() });
        }
        for segment in &segments {
            if columns == 0 || segment.rows == 0 || u32::try_from(segment.rows.max(columns)).is_err() {
                return Err(PackError::Shape { rows: segment.rows, columns });
            }
            if segment.format.group_bytes(columns).is_none() {
                return Err(PackError::Columns { format: segment.format, columns });
            }
        }
        Ok(Self { columns, segments })
    }

    pub fn columns(&self) -> usize {
        self.columns
    }

    pub fn rows(&self) -> usize {
        self.segments.iter().map(|segment| segment.rows).sum()
    }

    pub fn segments(&self) -> &[Segment] {
        &self.segments
    }

    /// Bytes of the packed matrix, header included; a multiple of [`ALIGNMENT`].
    pub fn bytes(&self) -> usize {
        self.starts().last().map_or(HEADER_BYTES, |(_, end)| end)
    }

    /// Where each segment begins and ends.
    fn starts(&self) -> impl Iterator<Item = (usize, usize)> {
        self.segments.iter().scan(HEADER_BYTES, |at, segment| {
            let start = *at;
            let group = segment.format.group_bytes(self.columns).unwrap_or_default();
            *at += segment.rows.div_ceil(GROUP) * group;
            Some((start, *at))
        })
    }

    /// Writes the header to the start of `bytes` and splits the rest into the segments' groups.
    ///
    /// # Panics
    /// If `bytes` is not of [`Layout::bytes`].
    pub fn split_mut<'a>(&self, bytes: &'a mut [u8]) -> Vec<&'a mut [u8]> {
        assert_eq!(bytes.len(), self.bytes(), "bytes of a packed matrix");
        let (header, mut rest) = bytes.split_at_mut(HEADER_BYTES);
        header.fill(0);
        let mut words = header.chunks_exact_mut(8);
        let mut put = |word: u64| {
            if let Some(slot) = words.next() {
                slot.copy_from_slice(&word.to_le_bytes());
            }
        };
        put(MAGIC);
        put(self.columns as u64);
        put(self.segments.len() as u64);
        for segment in &self.segments {
            put(u64::from(segment.format as u32) << 32 | segment.rows as u64);
        }
        let lengths: Vec<_> = self.starts().map(|(start, end)| end - start).collect();
        lengths
            .into_iter()
            .map(|len| {
                let (segment, after) = std::mem::take(&mut rest).split_at_mut(len);
                rest = after;
                segment
            })
            .collect()
    }
}

/// A packed matrix in memory.
#[derive(Clone, Copy, Debug)]
pub struct PackedMatrix<'a> {
    columns: usize,
    segments: [PackedSegment<'a>; SEGMENTS_MAX],
    count: usize,
}

/// A segment in memory.
#[derive(Clone, Copy, Debug)]
pub struct PackedSegment<'a> {
    pub format: Format,
    pub rows: usize,
    pub columns: usize,
    /// The groups, one after the other.
    pub bytes: &'a [u8],
}

impl<'a> PackedSegment<'a> {
    const NONE: Self = Self { format: Format::F32, rows: 0, columns: 0, bytes: &[] };

    pub fn groups(&self) -> usize {
        self.rows.div_ceil(GROUP)
    }

    pub fn group_bytes(&self) -> usize {
        self.format.group_bytes(self.columns).unwrap_or_default()
    }

    /// The bytes of a group.
    pub fn group(&self, index: usize) -> &'a [u8] {
        let len = self.group_bytes();
        &self.bytes[index * len..(index + 1) * len]
    }
}

impl<'a> PackedMatrix<'a> {
    /// Reads the header of a matrix that begins with `bytes`; what comes after its end is not looked at.
    pub fn parse(bytes: &'a [u8]) -> Result<Self, PackError> {
        if !bytes.as_ptr().addr().is_multiple_of(ALIGNMENT) {
            return Err(PackError::Unaligned);
        }
        let header = bytes.get(..HEADER_BYTES).ok_or(PackError::NotPacked)?;
        let word = |index: usize| {
            let mut word = [0; 8];
            word.copy_from_slice(&header[index * 8..index * 8 + 8]);
            u64::from_le_bytes(word)
        };
        let (columns, count) = (word(1) as usize, word(2) as usize);
        if word(0) != MAGIC || count > SEGMENTS_MAX {
            return Err(PackError::NotPacked);
        }
        let mut segments = [PackedSegment::NONE; SEGMENTS_MAX];
        let mut at = HEADER_BYTES;
        for (index, segment) in segments.iter_mut().enumerate().take(count) {
            let described = word(3 + index);
            let format = Format::from_number((described >> 32) as u32).ok_or(PackError::NotPacked)?;
            let rows = described as u32 as usize;
            let group = format.group_bytes(columns).ok_or(PackError::NotPacked)?;
            let len = rows.div_ceil(GROUP).checked_mul(group).ok_or(PackError::NotPacked)?;
            let end = at.checked_add(len).ok_or(PackError::NotPacked)?;
            *segment = PackedSegment { format, rows, columns, bytes: bytes.get(at..end).ok_or(PackError::NotPacked)? };
            at = end;
        }
        Ok(Self { columns, segments, count })
    }

    pub fn columns(&self) -> usize {
        self.columns
    }

    pub fn rows(&self) -> usize {
        self.segments().iter().map(|segment| segment.rows).sum()
    }

    pub fn segments(&self) -> &[PackedSegment<'a>] {
        &self.segments[..self.count]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[repr(align(64))]
    struct Aligned([u8; 1 << 16]);

    #[test]
    fn a_matrix_is_read_as_it_was_laid_out() {
        let segments = vec![
            Segment { format: Format::Q4Min, rows: 17 },
            Segment { format: Format::Bf16, rows: 3 },
            Segment { format: Format::F32, rows: 16 },
        ];
        let layout = Layout::new(64, segments).unwrap();
        let mut memory = Box::new(Aligned([7; 1 << 16]));
        for (index, segment) in layout.split_mut(&mut memory.0[..layout.bytes()]).into_iter().enumerate() {
            segment.fill(index as u8);
        }
        let matrix = PackedMatrix::parse(&memory.0).unwrap();
        assert_eq!((matrix.rows(), matrix.columns(), matrix.segments().len()), (36, 64, 3));
        let groups: Vec<_> = matrix.segments().iter().map(|s| (s.format, s.groups(), s.group_bytes())).collect();
        assert_eq!(groups, [(Format::Q4Min, 2, 640), (Format::Bf16, 1, 2048), (Format::F32, 1, 4096)]);
        for (index, segment) in matrix.segments().iter().enumerate() {
            assert!(segment.bytes.iter().all(|byte| *byte == index as u8));
        }
        assert_eq!(layout.bytes(), HEADER_BYTES + 2 * 640 + 2048 + 4096);
    }

    #[test]
    fn what_is_no_packed_matrix_is_refused() {
        let layout = Layout::new(32, vec![Segment { format: Format::Q8, rows: 16 }]).unwrap();
        let mut memory = Box::new(Aligned([0; 1 << 16]));
        assert_eq!(PackedMatrix::parse(&memory.0).unwrap_err(), PackError::NotPacked);
        layout.split_mut(&mut memory.0[..layout.bytes()]);
        assert!(PackedMatrix::parse(&memory.0).is_ok());
        assert_eq!(PackedMatrix::parse(&memory.0[..layout.bytes() - 1]).unwrap_err(), PackError::NotPacked);
        assert_eq!(PackedMatrix::parse(&memory.0[1..]).unwrap_err(), PackError::Unaligned);
        let odd = Layout::new(33, vec![Segment { format: Format::Q8, rows: 16 }]);
        assert_eq!(odd.unwrap_err(), PackError::Columns { format: Format::Q8, columns: 33 });
        assert_eq!(Layout::new(32, vec![]).unwrap_err(), PackError::Segments { found: 0 });
    }
}
