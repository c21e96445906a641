//! One tile of a product, by the code path of the level.

use std::ops::Range;

use super::portable;
use crate::{Level, activations::Prepared, packed::PackedSegment};

/// `out [rows, groups * 16]` = the rows of `x` times the groups of a segment. There are at most
/// [`super::TILE_ROWS`] rows.
pub(super) fn tile(
    level: Level,
    x: &Prepared<'_>,
    rows: Range<usize>,
    segment: &PackedSegment<'_>,
    groups: Range<usize>,
    out: &mut [f32],
) {
    debug_assert_eq!(out.len(), rows.len() * groups.len() * crate::packed::GROUP);
    match level {
        #[cfg(target_arch = "x86_64")]
        Level::Avx512 => super::avx512::tile(x, rows, segment, groups, out),
        _ => portable::tile(level, x, rows, segment, groups, out),
    }
}
