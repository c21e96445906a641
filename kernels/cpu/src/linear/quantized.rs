//! Products with quantized segments: of integers within a block, which are scaled and added up in f32.
//!
//! For a block, `x_scale * (w_scale * (dot - offset * sum) + minimum * sum)`, with the dot product of both blocks'
//! integers and the sum of the activations'. The offset is where the integer sum begins, so that it is exact.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod portable;
#[cfg(test)]
mod tests;

use std::ops::Range;

use super::Tile;
use crate::{
    activations::{Prepared, SUMS},
    level::Level,
    packed::{BLOCK, Format, GROUP, PackedSegment},
};

/// Formats as constants that functions can be generic over.
#[cfg(target_arch = "x86_64")]
mod constants {
    use crate::packed::Format;

    pub const Q8: u32 = Format::Q8 as u32;
    pub const Q4: u32 = Format::Q4 as u32;
    pub const Q4_MIN: u32 = Format::Q4Min as u32;
    pub const Q5: u32 = Format::Q5 as u32;
    pub const Q5_MIN: u32 = Format::Q5Min as u32;
    pub const Q6: u32 = Format::Q6 as u32;

    pub const fn format_of(format: u32) -> Format {
        match format {
            Q8 => Format::Q8,
            Q4 => Format::Q4,
            Q4_MIN => Format::Q4Min,
            Q5 => Format::Q5,
            Q5_MIN => Format::Q5Min,
            _ => Format::Q6,
        }
    }

    pub const fn has_minimum(format: u32) -> bool {
        matches!(format, Q4_MIN | Q5_MIN)
    }

    /// The first of a block's offset sums that a format needs, if it has an offset.
    pub const fn first_sum(format: u32) -> Option<usize> {
        match format {
            Q8 => Some(0),
            Q4 => Some(2),
            Q5 => Some(3),
            Q6 => Some(4),
            _ => None,
        }
    }
}
#[cfg(target_arch = "x86_64")]
use constants::*;

/// Some rows of activations, a group of weights or two, and where their products go.
#[derive(Clone, Copy)]
struct Panel {
    blocks: usize,
    /// `[rows, blocks, BLOCK]`
    x: *const i8,
    /// `[rows, blocks]`
    scales: *const f32,
    /// `[rows, blocks]`
    scaled_sums: *const f32,
    /// `[rows, blocks, SUMS]`
    offset_sums: *const i32,
    /// `[blocks]` tiles
    w: *const u8,
    /// Of the group after this one, if it is the panel's, too; its products are the next [`GROUP`] columns.
    second: Option<*const u8>,
    /// The tiles of the group that comes next, probably; they are fetched, not read.
    next: *const u8,
    /// `[rows, stride]`, of which the first [`GROUP`] columns are written.
    out: *mut f32,
    stride: usize,
}

#[cfg(target_arch = "x86_64")]
impl Panel {
    /// The panel without its first rows.
    ///
    /// # Safety
    /// There are so many.
    unsafe fn after(self, rows: usize) -> Self {
        let blocks = rows * self.blocks;
        // SAFETY: at most the end of each.
        unsafe {
            Self {
                x: self.x.add(blocks * BLOCK),
                scales: self.scales.add(blocks),
                scaled_sums: self.scaled_sums.add(blocks),
                offset_sums: self.offset_sums.add(blocks * SUMS),
                out: self.out.add(rows * self.stride),
                ..self
            }
        }
    }
}

/// Groups of a panel at most.
fn panel_groups(level: Level) -> usize {
    if level >= Level::Avx512 { 2 } else { 1 }
}

/// See `super::float::product`; the group that comes after these, if it is not the segment's following one, is `next`.
pub(super) fn product(
    level: Level,
    x: &Prepared,
    rows: Range<usize>,
    segment: &PackedSegment<'_>,
    groups: Range<usize>,
    next: Option<&[u8]>,
    out: &mut Tile<'_>,
) {
    let (quantized, blocks) = (x.quantized(), segment.columns / BLOCK);
    assert_eq!(quantized.blocks(), blocks, "activations that are quantized, with the columns of the weights");
    assert!(rows.end * blocks <= quantized.scales().len() && rows.len() <= out.rows(), "rows that are there");
    assert!(groups.len() * GROUP <= out.stride() && level.is_available(), "a tile for the groups");
    let (first, stride) = (rows.start * blocks, out.stride());
    for first_group in groups.clone().step_by(panel_groups(level)) {
        let (w, index) = (segment.group(first_group), first_group - groups.start);
        let second = (first_group + 1..groups.end.min(first_group + panel_groups(level))).next();
        let second = second.map(|group| segment.group(group));
        let last = second.unwrap_or(w);
        let next = next
            .filter(|_| first_group + panel_groups(level) >= groups.end)
            .map_or(last.as_ptr_range().end, <[u8]>::as_ptr);
        let panel = Panel {
            blocks,
            x: quantized.elements()[first * BLOCK..].as_ptr(),
            scales: quantized.scales()[first..].as_ptr(),
            scaled_sums: quantized.scaled_sums()[first..].as_ptr(),
            offset_sums: quantized.offset_sums()[first * SUMS..].as_ptr(),
            w: w.as_ptr(),
            second: second.map(<[u8]>::as_ptr),
            next,
            out: out.row_mut(0)[index * GROUP..].as_mut_ptr(),
            stride,
        };
        // SAFETY: as asserted, all operands are there for these rows, and the level is available.
        unsafe {
            match level {
                #[cfg(target_arch = "x86_64")]
                Level::Avx512 | Level::Avx512Bf16 | Level::Amx => avx512::run(segment.format, panel, rows.len()),
                #[cfg(target_arch = "x86_64")]
                Level::Avx2 => avx2::run(segment.format, panel, rows.len()),
                _ => portable::run(segment.format, panel, rows.len()),
            }
        }
    }
}

/// Widens a group to the bf16 of [`crate::packed::Format::Bf16`].
///
/// # Panics
/// If `group` and `out` are not of one number of columns.
pub(super) fn widen(level: Level, format: Format, group: &[u8], out: &mut [u8]) {
    let blocks = group.len() / format.tile_bytes();
    assert!(out.len() == blocks * GROUP * BLOCK * 2 && level.is_available(), "groups of the same columns");
    match level {
        // SAFETY: the level is available, and both are of so many blocks.
        #[cfg(target_arch = "x86_64")]
        Level::Avx512Bf16 | Level::Amx => unsafe { avx512::widen(format, group.as_ptr(), blocks, out.as_mut_ptr()) },
        _ => portable::widen(format, group, out),
    }
}

/// Calls a function whose constant is the format.
#[cfg(target_arch = "x86_64")]
macro_rules! for_format {
    ($format:ident, $function:ident, $arguments:tt) => {
        match $format {
            Format::Q8 => $function::<Q8> $arguments,
            Format::Q4 => $function::<Q4> $arguments,
            Format::Q4Min => $function::<Q4_MIN> $arguments,
            Format::Q5 => $function::<Q5> $arguments,
            Format::Q5Min => $function::<Q5_MIN> $arguments,
            Format::Q6 => $function::<Q6> $arguments,
            _ => unreachable!("a quantized format"),
        }
    };
}
#[cfg(target_arch = "x86_64")]
use for_format;
