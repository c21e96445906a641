//! What can be wrong with a matrix to pack, or with bytes that should be one.

use crate::packed::{ALIGNMENT, Format, SEGMENTS_MAX, SourceType};

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PackError {
    #[error("a matrix has 1 to {SEGMENTS_MAX} segments, not {found}")]
    Segments { found: usize },
    #[error("a matrix of {rows} rows by {columns} columns cannot be packed")]
    Shape { rows: usize, columns: usize },
    #[error("{format:?} holds whole blocks, and {columns} columns are none")]
    Columns { format: Format, columns: usize },
    #[error("these bytes are no packed matrix of this version")]
    NotPacked,
    #[error("a packed matrix begins at a multiple of {ALIGNMENT} bytes")]
    Unaligned,
    #[error("rows of {from:?} cannot be packed as {to:?}")]
    Source { from: SourceType, to: Format },
    #[error("a row of {columns} columns of {source_type:?} has {expected} bytes, not {found}")]
    RowBytes { source_type: SourceType, columns: usize, expected: usize, found: usize },
}
