//! Packing of rows of floats.

use half::{bf16, f16};

use super::{Format, GROUP, SourceType};

/// Packs rows of floats into a group of a float format.
pub(super) fn pack_group(format: Format, rows: &[&[u8]], source: SourceType, out: &mut [u8]) {
    out.fill(0);
    for (lane, row) in rows.iter().enumerate() {
        // f32 goes through f32 unchanged, and so do the two others: each conversion below is exact or the one rounding.
        match source {
            SourceType::F32 => put_row(format, lane, row.as_chunks().0, f32::from_le_bytes, out),
            SourceType::F16 => put_row(format, lane, row.as_chunks().0, |b| f16::from_le_bytes(b).to_f32(), out),
            _ => put_row(format, lane, row.as_chunks().0, |b| bf16::from_le_bytes(b).to_f32(), out),
        }
    }
}

fn put_row<const N: usize>(
    format: Format,
    lane: usize,
    row: &[[u8; N]],
    read: impl Fn([u8; N]) -> f32,
    out: &mut [u8],
) {
    let values = row.iter().map(|bytes| read(*bytes));
    match format {
        Format::F32 => {
            let slots = out.as_chunks_mut::<4>().0.iter_mut().skip(lane).step_by(GROUP);
            slots.zip(values).for_each(|(slot, value)| *slot = value.to_le_bytes());
        }
        Format::F16 => {
            let slots = out.as_chunks_mut::<2>().0.iter_mut().skip(lane).step_by(GROUP);
            slots.zip(values).for_each(|(slot, value)| *slot = f16::from_f32(value).to_le_bytes());
        }
        _ => {
            let pairs = out.as_chunks_mut::<4>().0.iter_mut().skip(lane).step_by(GROUP);
            let slots = pairs.flat_map(|pair| pair.as_chunks_mut::<2>().0);
            slots.zip(values).for_each(|(slot, value)| *slot = bf16::from_f32(value).to_le_bytes());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{PackError, packed::pack_group};

    #[test]
    fn every_element_lands_in_its_lane() {
        let columns = 5;
        let rows: Vec<Vec<f32>> = (0..3).map(|r| (0..columns).map(|k| (r * 8 + k) as f32).collect()).collect();
        let stored = |source: SourceType| -> Vec<Vec<u8>> {
            let bytes = |value: &f32| match source {
                SourceType::F32 => value.to_le_bytes().to_vec(),
                SourceType::F16 => f16::from_f32(*value).to_le_bytes().to_vec(),
                _ => bf16::from_f32(*value).to_le_bytes().to_vec(),
            };
            rows.iter().map(|row| row.iter().flat_map(bytes).collect()).collect()
        };
        for source in [SourceType::F32, SourceType::F16, SourceType::Bf16] {
            let stored = stored(source);
            let stored: Vec<&[u8]> = stored.iter().map(Vec::as_slice).collect();
            for format in [Format::F32, Format::Bf16, Format::F16] {
                let mut out = vec![0xff; format.group_bytes(columns).unwrap()];
                pack_group(format, &stored, source, columns, &mut out).unwrap();
                for k in 0..columns {
                    for lane in 0..GROUP {
                        let expected = rows.get(lane).map_or(0.0, |row| row[k]);
                        let halves = |at: usize| [out[at * 2], out[at * 2 + 1]];
                        let found = match format {
                            Format::F32 => f32::from_le_bytes(out.as_chunks().0[k * GROUP + lane]),
                            Format::F16 => f16::from_le_bytes(halves(k * GROUP + lane)).to_f32(),
                            _ => bf16::from_le_bytes(halves((k / 2 * GROUP + lane) * 2 + k % 2)).to_f32(),
                        };
                        assert_eq!(found, expected, "{source:?} {format:?} {lane} {k}");
                    }
                }
            }
        }
    }

    #[test]
    fn rows_of_another_length_are_refused() {
        let mut out = vec![0; Format::F32.group_bytes(4).unwrap()];
        let found = pack_group(Format::F32, &[&[0; 12]], SourceType::F32, 4, &mut out);
        let expected = PackError::RowBytes { source_type: SourceType::F32, columns: 4, expected: 16, found: 12 };
        assert_eq!(found, Err(expected));
        let found = pack_group(Format::F32, &[], SourceType::Q8_0, 4, &mut out);
        assert_eq!(found, Err(PackError::Source { from: SourceType::Q8_0, to: Format::F32 }));
    }
}
