//! Single rows of packed matrices, for embeddings.

use half::{bf16, f16};
use torus_abi::kernel::parallel_chunks;

use super::{BLOCK, Format, GROUP, PackedMatrix, PackedSegment, quantized};
use crate::{activations::Element, level, workspace::Buffer};

/// Values above which rows are gathered by all threads.
const PARALLEL_VALUES: usize = 1 << 14;

/// Writes a row of the matrix, `[columns]`, as f32.
///
/// # Panics
/// If the matrix has no such row, or other columns.
pub fn decode_row(matrix: &PackedMatrix<'_>, row: usize, out: &mut [f32]) {
    assert!(row < matrix.rows(), "row {row} of {}", matrix.rows());
    assert_eq!(out.len(), matrix.columns(), "columns of a row");
    let mut row = row;
    for segment in matrix.segments() {
        if row < segment.rows {
            decode(segment, row, out);
            return;
        }
        row -= segment.rows;
    }
}

fn decode(segment: &PackedSegment<'_>, row: usize, out: &mut [f32]) {
    let (group, lane) = (segment.group(row / GROUP), row % GROUP);
    let half_at = |at: usize| [group[at * 2], group[at * 2 + 1]];
    match segment.format {
        Format::F32 => {
            let values = group.as_chunks().0.iter().skip(lane).step_by(GROUP);
            out.iter_mut().zip(values).for_each(|(out, bytes)| *out = f32::from_le_bytes(*bytes));
        }
        Format::F16 => {
            let values = (0..).map(|k| f16::from_le_bytes(half_at(k * GROUP + lane)));
            out.iter_mut().zip(values).for_each(|(out, value)| *out = value.to_f32());
        }
        Format::Bf16 => {
            let values = (0..).map(|k| bf16::from_le_bytes(half_at((k / 2 * GROUP + lane) * 2 + k % 2)));
            out.iter_mut().zip(values).for_each(|(out, value)| *out = value.to_f32());
        }
        format => {
            let tiles = group.chunks_exact(format.tile_bytes());
            out.chunks_exact_mut(BLOCK).zip(tiles).for_each(|(out, tile)| decode_block(format, tile, lane, out));
        }
    }
}

fn decode_block(format: Format, tile: &[u8], lane: usize, out: &mut [f32]) {
    let scale = |index| quantized::scale(format, tile, lane, index);
    let minimum = if matches!(format, Format::Q4Min | Format::Q5Min) { scale(1) } else { 0.0 };
    let scales = [scale(0), if format == Format::Q6 { scale(1) } else { scale(0) }];
    let offset = quantized::offset(format);
    for (k, out) in out.iter_mut().enumerate() {
        let element = i32::from(quantized::element(format, tile, lane, k)) - offset;
        *out = element as f32 * scales[k / (BLOCK / 2)] + minimum;
    }
}

/// Gathers the rows of `tokens` into `y`, `[tokens, columns]`. As XLA's gather does, it takes the nearest row for a
/// token that is none.
///
/// # Panics
/// If `y` is of another length.
pub fn embed<Y: Element>(tokens: &[i32], w: &PackedMatrix<'_>, y: &mut [Y]) {
    let (columns, level) = (w.columns(), level());
    assert_eq!(y.len(), tokens.len() * columns, "a row of {columns} values for each token");
    let one = |token: i32, out: &mut [Y]| {
        let row = usize::try_from(token).unwrap_or(0).min(w.rows() - 1);
        let mut values = Buffer::<f32>::take(columns);
        decode_row(w, row, &mut values);
        Y::store(level, &values, out);
    };
    if y.len() > PARALLEL_VALUES {
        parallel_chunks(y, columns, |index, out| one(tokens[index], out));
    } else {
        y.chunks_exact_mut(columns).zip(tokens).for_each(|(out, token)| one(*token, out));
    }
}
