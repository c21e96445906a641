//! Quantized weights of many rows, where there is a matrix unit: a block of groups is widened to bf16 once for all rows of a
//! task, and multiplied as bf16 is.
//!
//! Vectors that multiply bytes reach a third to a half of what the unit does with bf16 (Emerald Rapids), and widening a group
//! takes as long as the unit takes for some tens of rows.

use std::ops::Range;

use super::quantized;
use crate::{
    activations::Prepared,
    level::Level,
    packed::{Format, PackedSegment},
    workspace::Buffer,
};

/// Rows from which widening takes less time than it saves: reckoned from what both took on one machine, and from what vectors
/// took on another after they had become faster.
const ROWS: usize = 36;

/// Whether products of so many rows with weights of a format are computed in bf16.
pub(crate) fn is_widened(level: Level, format: Format, rows: usize) -> bool {
    level == Level::Amx && format.is_quantized() && rows >= ROWS
}

/// Whether some of these segments are, for these activations.
pub(super) fn any_is_widened(x: &Prepared, segments: &[PackedSegment<'_>]) -> bool {
    segments.iter().any(|segment| is_widened(x.level(), segment.format, x.rows()))
}

/// Some groups of a segment, as they are multiplied.
pub(super) struct Groups<'a> {
    segment: PackedSegment<'a>,
    groups: Range<usize>,
    wide: Option<Buffer<u8>>,
}

impl<'a> Groups<'a> {
    pub fn new(x: &Prepared, segment: &PackedSegment<'a>, groups: Range<usize>) -> Self {
        let wide = is_widened(x.level(), segment.format, x.rows()).then(|| {
            let len = wide_bytes(segment.columns);
            let mut wide = Buffer::take(groups.len() * len);
            for (group, wide) in groups.clone().zip(wide.chunks_exact_mut(len)) {
                quantized::widen(x.level(), segment.format, segment.group(group), wide);
            }
            wide
        });
        Self { segment: *segment, groups, wide }
    }

    /// The segment that they are in, and which of its groups they are.
    pub fn place(&self) -> (PackedSegment<'_>, Range<usize>) {
        match &self.wide {
            Some(bytes) => (PackedSegment { format: Format::Bf16, bytes, ..self.segment }, 0..self.groups.len()),
            None => (self.segment, self.groups.clone()),
        }
    }
}

/// Bytes of a group of bf16 with whole blocks of columns.
fn wide_bytes(columns: usize) -> usize {
    Format::Bf16.group_bytes(columns).unwrap_or_default()
}
