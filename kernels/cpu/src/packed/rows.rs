//! Single rows of a packed matrix: embeddings, and the plain reading of every format.

use half::{bf16, f16};
use torus_abi::kernel::parallel_for;

use super::{BLOCK, Format, GROUP, PackedMatrix};
use crate::{
    activations::{Element, store},
    linear::Shared,
    workspace::with_frame,
};

/// Element `k` of row `lane` of a quantized tile, before its offset is subtracted.
#[inline(always)]
pub(crate) fn element(format: Format, tile: &[u8], lane: usize, k: usize) -> u8 {
    let (plane, byte) = (k / 4, lane * 4 + k % 4);
    if let Format::Q8 = format {
        return tile[plane * 64 + byte];
    }
    let low = tile[plane % 4 * 64 + byte] >> (plane / 4 * 4) & 15;
    match format {
        Format::Q5 | Format::Q5Min => low | (tile[4 * 64 + byte] >> plane & 1) << 4,
        Format::Q6 => low | (tile[(4 + plane / 4) * 64 + byte] >> (plane % 4 * 2) & 3) << 4,
        _ => low,
    }
}

/// The scale of row `lane` of a tile (`index` 0), or its minimum or second scale (`index` 1).
#[inline(always)]
pub(crate) fn half_row(format: Format, tile: &[u8], index: usize, lane: usize) -> f32 {
    let at = format.plane_bytes() + (index * GROUP + lane) * 2;
    f16::from_le_bytes([tile[at], tile[at + 1]]).to_f32()
}

/// The elements of a row.
///
/// # Panics
/// If there is no such row, or `out` has not the matrix's columns.
pub fn decode_row(matrix: &PackedMatrix<'_>, row: usize, out: &mut [f32]) {
    assert_eq!(out.len(), matrix.columns(), "columns of the matrix");
    let mut row = row;
    for segment in matrix.segments() {
        if row >= segment.rows {
            row -= segment.rows;
            continue;
        }
        let (bytes, lane) = (segment.group(row / GROUP), row % GROUP);
        let at = |index: usize| [bytes[index], bytes[index + 1]];
        match segment.format {
            Format::F32 => {
                for (out, registers) in out.iter_mut().zip(bytes.as_chunks::<{ GROUP * 4 }>().0) {
                    *out = f32::from_le_bytes(registers.as_chunks::<4>().0[lane]);
                }
            }
            Format::Bf16 => {
                for (k, out) in out.iter_mut().enumerate() {
                    *out = bf16::from_le_bytes(at(((k / 2 * GROUP + lane) * 2 + k % 2) * 2)).to_f32();
                }
            }
            Format::F16 => {
                for (k, out) in out.iter_mut().enumerate() {
                    *out = f16::from_le_bytes(at((k * GROUP + lane) * 2)).to_f32();
                }
            }
            format => {
                let tiles = bytes.chunks_exact(format.tile_bytes());
                for (out, tile) in out.as_chunks_mut::<BLOCK>().0.iter_mut().zip(tiles) {
                    decode_block(format, tile, lane, out);
                }
            }
        }
        return;
    }
    panic!("the matrix has no row {row} more");
}

fn decode_block(format: Format, tile: &[u8], lane: usize, out: &mut [f32; BLOCK]) {
    let scale = half_row(format, tile, 0, lane);
    let second = match format {
        Format::Q4Min | Format::Q5Min | Format::Q6 => half_row(format, tile, 1, lane),
        _ => 0.0,
    };
    for (k, out) in out.iter_mut().enumerate() {
        let value = f32::from(element(format, tile, lane, k)) - format.offset();
        *out = match format {
            Format::Q4Min | Format::Q5Min => value * scale + second,
            Format::Q6 if k >= BLOCK / 2 => value * second,
            _ => value * scale,
        };
    }
}

/// The rows of `tokens` in an embedding `[vocab, hidden]`, as `[tokens, hidden]`. A token that is none gets zeros.
///
/// # Panics
/// If `y` is of another size.
pub fn embed<Y: Element>(tokens: &[i32], weight: &PackedMatrix<'_>, y: &mut [Y]) {
    let columns = weight.columns();
    assert_eq!(y.len(), tokens.len() * columns, "elements of the result");
    let shared = Shared::new(y);
    parallel_for(tokens.len(), |index| {
        with_frame(|frame| {
            let values = frame.take::<f32>(columns);
            match usize::try_from(tokens[index]).ok().filter(|token| *token < weight.rows()) {
                Some(token) => decode_row(weight, token, values),
                None => values.fill(0.0),
            }
            // SAFETY: each index comes once.
            store(values, unsafe { shared.slice(index * columns..(index + 1) * columns) });
        });
    });
}
