//! Packing a matrix from rows as files store them.

use super::{Format, GROUP, Layout, float, quantized};
use crate::PackError;

/// How the elements of a row to pack are stored, little endian; the names of quantized blocks are those of GGUF.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum SourceType {
    F32,
    F16,
    Bf16,
    Q8_0,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q4K,
    Q5K,
    Q6K,
}

impl SourceType {
    pub fn is_float(self) -> bool {
        matches!(self, Self::F32 | Self::F16 | Self::Bf16)
    }

    /// Bytes of a row; `None` if rows of so many columns do not exist.
    pub fn row_bytes(self, columns: usize) -> Option<usize> {
        let (elements, bytes) = match self {
            Self::F32 => (1, 4),
            Self::F16 | Self::Bf16 => (1, 2),
            Self::Q8_0 => (32, 34),
            Self::Q4_0 => (32, 18),
            Self::Q4_1 => (32, 20),
            Self::Q5_0 => (32, 22),
            Self::Q5_1 => (32, 24),
            Self::Q4K => (256, 144),
            Self::Q5K => (256, 176),
            Self::Q6K => (256, 210),
        };
        columns.is_multiple_of(elements).then_some(columns / elements * bytes)
    }
}

/// Where the rows of a matrix come from.
pub trait RowSource {
    /// How the rows of a segment are stored.
    fn source(&self, segment: usize) -> SourceType;

    /// The bytes of a row of a segment.
    fn row(&self, segment: usize, row: usize) -> &[u8];
}

/// Packs a whole matrix into [`Layout::bytes`] bytes.
pub fn pack(layout: &Layout, rows: &dyn RowSource, bytes: &mut [u8]) -> Result<(), PackError> {
    for (index, (segment, out)) in layout.segments().iter().zip(layout.split_mut(bytes)).enumerate() {
        let group_bytes = segment.format.group_bytes(layout.columns()).unwrap_or_default();
        for (group, out) in out.chunks_exact_mut(group_bytes).enumerate() {
            let first = group * GROUP;
            let mut group_rows = [&[][..]; GROUP];
            let count = GROUP.min(segment.rows - first);
            for (lane, row) in group_rows[..count].iter_mut().enumerate() {
                *row = rows.row(index, first + lane);
            }
            pack_group(segment.format, &group_rows[..count], rows.source(index), layout.columns(), out)?;
        }
    }
    Ok(())
}

/// Packs up to [`GROUP`] rows into the bytes of one group; rows that are missing become zeros.
///
/// # Panics
/// If there are more rows than that, or `out` is not of [`Format::group_bytes`].
pub fn pack_group(
    format: Format,
    rows: &[&[u8]],
    source: SourceType,
    columns: usize,
    out: &mut [u8],
) -> Result<(), PackError> {
    assert!(rows.len() <= GROUP && Some(out.len()) == format.group_bytes(columns), "a group's rows and bytes");
    let expected = source.row_bytes(columns).ok_or(PackError::Source { from: source, to: format })?;
    if let Some(row) = rows.iter().find(|row| row.len() != expected) {
        return Err(PackError::RowBytes { source_type: source, columns, expected, found: row.len() });
    }
    match (format.is_quantized(), source.is_float()) {
        (false, true) => {
            float::pack_group(format, rows, source, out);
            Ok(())
        }
        (true, _) => quantized::pack_group(format, rows, source, columns, out),
        (false, false) => Err(PackError::Source { from: source, to: format }),
    }
}
