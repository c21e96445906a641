use half::{bf16, f16};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::{super::UNIT_TILE_ROWS, BLOCK, GROUP, Prepared, Tile, product, widen};
use crate::{
    Epilogue, Level,
    linear::is_widened,
    linear_prepared,
    packed::{Format, Layout, PackedMatrix, RowSource, Segment, SourceType, decode_row, embed, pack},
    workspace::Buffer,
};

const SOURCES: [(SourceType, Format, usize); 9] = [
    (SourceType::Q8_0, Format::Q8, 32),
    (SourceType::F32, Format::Q8, 32),
    (SourceType::Q4_0, Format::Q4, 32),
    (SourceType::Q4_1, Format::Q4Min, 32),
    (SourceType::Q5_0, Format::Q5, 32),
    (SourceType::Q5_1, Format::Q5Min, 32),
    (SourceType::Q4K, Format::Q4Min, 256),
    (SourceType::Q5K, Format::Q5Min, 256),
    (SourceType::Q6K, Format::Q6, 256),
];

struct Rows {
    source: SourceType,
    row_bytes: usize,
    bytes: Vec<u8>,
}

impl RowSource for Rows {
    fn source(&self, _segment: usize) -> SourceType {
        self.source
    }

    fn row(&self, _segment: usize, row: usize) -> &[u8] {
        &self.bytes[row * self.row_bytes..][..self.row_bytes]
    }
}

/// Where a block has its f16 scales (or minimums), and its bytes.
fn halves(source: SourceType) -> (&'static [usize], usize) {
    match source {
        SourceType::Q8_0 => (&[0], 34),
        SourceType::Q4_0 => (&[0], 18),
        SourceType::Q4_1 => (&[0, 2], 20),
        SourceType::Q5_0 => (&[0], 22),
        SourceType::Q5_1 => (&[0, 2], 24),
        SourceType::Q4K => (&[0, 2], 144),
        SourceType::Q5K => (&[0, 2], 176),
        SourceType::Q6K => (&[208], 210),
        _ => (&[], 4),
    }
}

/// Rows of random elements with sensible scales.
fn random(rng: &mut ChaCha8Rng, source: SourceType, rows: usize, columns: usize) -> Rows {
    let row_bytes = source.row_bytes(columns).unwrap();
    let mut bytes: Vec<u8> = (0..rows * row_bytes).map(|_| rng.random()).collect();
    let (halves, block) = halves(source);
    for block in bytes.chunks_exact_mut(block) {
        for at in halves {
            block[*at..at + 2].copy_from_slice(&f16::from_f32(rng.random_range(-0.01..0.02)).to_le_bytes());
        }
        if source == SourceType::F32 {
            block.copy_from_slice(&rng.random_range(-1.0f32..1.0).to_le_bytes());
        }
    }
    Rows { source, row_bytes, bytes }
}

fn packed(rows: &Rows, format: Format, count: usize, columns: usize) -> Buffer<u8> {
    let layout = Layout::new(columns, vec![Segment { format, rows: count }]).unwrap();
    let mut memory = Buffer::take(layout.bytes());
    pack(&layout, rows, &mut memory).unwrap();
    memory
}

#[test]
fn products_are_those_of_the_decoded_rows_at_every_level() {
    let rng = &mut ChaCha8Rng::seed_from_u64(11);
    for (source, format, unit) in SOURCES {
        for rows in [1, 2, 3, 4, 5, 7, 9, 13, 24, 35] {
            let (columns, outputs) = (unit * rng.random_range(1..4), rng.random_range(1..70));
            let memory = packed(&random(rng, source, outputs, columns), format, outputs, columns);
            let w = PackedMatrix::parse(&memory).unwrap();
            let x: Vec<f32> = (0..rows * columns).map(|_| rng.random_range(-2.0..2.0)).collect();
            for level in Level::available() {
                let prepared = Prepared::of(level, &x, &w);
                let mut y = vec![f32::NAN; rows * outputs];
                linear_prepared(&prepared, &w, Epilogue::<f32>::NONE, &mut y);
                let mut weights = vec![0.0; columns];
                for output in 0..outputs {
                    decode_row(&w, output, &mut weights);
                    for row in 0..rows {
                        let (y, what) = (y[row * outputs + output], format!("{level} {source:?} {row} {output}"));
                        match is_widened(level, format, rows) {
                            true => check_widened(&x, row, &weights, y, &what),
                            false => check(&prepared, &x, row, &weights, y, &what),
                        }
                    }
                }
            }
        }
    }
}

/// The largest bytes with activations that are all as large: what is added up in few bits has to hold them.
/// Of so many rows as a level's tiles have at most, and with groups in pairs and alone.
#[test]
fn whole_tiles_are_the_products_of_their_rows() {
    let rng = &mut ChaCha8Rng::seed_from_u64(21);
    for (source, format, _) in SOURCES {
        let (columns, outputs) = (512, 3 * GROUP);
        let memory = packed(&random(rng, source, outputs, columns), format, outputs, columns);
        let matrix = PackedMatrix::parse(&memory).unwrap();
        let [segment] = matrix.segments() else { panic!("one segment") };
        let x: Vec<f32> = (0..UNIT_TILE_ROWS * columns).map(|_| rng.random_range(-1.0..1.0)).collect();
        for level in Level::available() {
            let most = if level >= Level::Avx512 { UNIT_TILE_ROWS } else { super::super::tile_rows(level) };
            let prepared = Prepared::of(level, &x[..most * columns], &matrix);
            let rows = 0..prepared.rows();
            let mut whole = vec![0.0; rows.len() * outputs];
            product(level, &prepared, rows.clone(), segment, 0..3, None, &mut Tile::new(&mut whole, outputs));
            for (row, whole) in rows.zip(whole.chunks_exact(outputs)) {
                for (group, whole) in whole.chunks_exact(GROUP).enumerate() {
                    let mut alone = [0.0; GROUP];
                    let tile = &mut Tile::new(&mut alone, GROUP);
                    product(level, &prepared, row..row + 1, segment, group..group + 1, None, tile);
                    let close = |(a, b): (&f32, &f32)| (a - b).abs() <= 1e-4 * (1.0 + a.abs());
                    assert!(whole.iter().zip(&alone).all(close), "{level} {format:?} row {row} group {group}");
                }
            }
        }
    }
}

#[test]
fn the_largest_products_are_exact() {
    let (columns, outputs) = (64, 17);
    for (byte, sign) in [(i8::MAX, 1.0f32), (i8::MIN, 1.0), (i8::MAX, -1.0), (i8::MIN, -1.0)] {
        let block = [&f16::ONE.to_le_bytes()[..], &[byte as u8; BLOCK]].concat();
        let row_bytes = SourceType::Q8_0.row_bytes(columns).unwrap();
        let rows = Rows { source: SourceType::Q8_0, row_bytes, bytes: block.repeat(outputs * columns / BLOCK) };
        let memory = packed(&rows, Format::Q8, outputs, columns);
        let w = PackedMatrix::parse(&memory).unwrap();
        for (level, count) in Level::available().flat_map(|level| [(level, 1), (level, 7)]) {
            let prepared = Prepared::of(level, &vec![sign; count * columns], &w);
            let mut y = vec![f32::NAN; count * outputs];
            linear_prepared(&prepared, &w, Epilogue::<f32>::NONE, &mut y);
            let exact = f32::from(byte) * sign * columns as f32;
            assert!(y.iter().all(|y| (y / exact - 1.0).abs() < 1e-5), "{level} {count} {byte}: {y:?}, exactly {exact}");
        }
    }
}

#[test]
fn groups_are_widened_to_the_nearest_bf16_at_every_level() {
    let rng = &mut ChaCha8Rng::seed_from_u64(14);
    for (source, format, unit) in SOURCES {
        let (outputs, columns) = (GROUP, 2 * unit);
        let memory = packed(&random(rng, source, outputs, columns), format, outputs, columns);
        let w = PackedMatrix::parse(&memory).unwrap();
        let mut weights = vec![0.0; columns];
        for level in Level::available() {
            let mut wide = vec![0; columns * GROUP * 2];
            widen(level, format, w.segments()[0].group(0), &mut wide);
            for lane in 0..GROUP {
                decode_row(&w, lane, &mut weights);
                for (k, weight) in weights.iter().enumerate() {
                    let at = (k / 2 * GROUP + lane) * 4 + k % 2 * 2;
                    let found = bf16::from_le_bytes([wide[at], wide[at + 1]]).to_f32();
                    // A product and a sum may be rounded once or twice before.
                    let allowed = weight.abs() / 256.0 + 1e-6;
                    assert!((found - weight).abs() <= allowed, "{level} {source:?} {lane} {k}: {found} for {weight}");
                }
            }
        }
    }
}

/// As [`check`], of weights that are widened: both sides are rounded to bf16.
fn check_widened(x: &[f32], row: usize, weights: &[f32], y: f32, what: &str) {
    let products = weights.iter().zip(&x[row * weights.len()..]).map(|(w, x)| f64::from(*w) * f64::from(*x));
    let (exact, magnitude) = products.fold((0.0, 0.0), |(sum, all), product| (sum + product, all + product.abs()));
    let allowed = magnitude / 100.0 + 1e-4;
    assert!((f64::from(y) - exact).abs() <= allowed, "{what}: {y}, exactly {exact} within {allowed}");
}

/// Against the quantized activations, only rounding of f32 may differ: of a few operations for each block, relative to
/// the magnitudes, among which are those of elements with their offset. Against the true ones, half a step each.
fn check(prepared: &Prepared, x: &[f32], row: usize, weights: &[f32], y: f32, what: &str) {
    let (columns, q) = (weights.len(), prepared.quantized());
    let [mut sum, mut magnitude, mut exact, mut allowed] = [0.0f64; 4];
    for (k, w) in weights.iter().enumerate() {
        let (at, w) = (row * columns + k, f64::from(*w));
        let scale = f64::from(q.scales()[at / BLOCK]);
        let value = scale * f64::from(q.elements()[at]);
        sum += value * w;
        magnitude += (value * w).abs() + scale * 127.0 * 0.02 * 64.0;
        exact += f64::from(x[at]) * w;
        allowed += scale * 0.5001 * w.abs();
    }
    let rounding = magnitude * (columns / BLOCK + 6) as f64 * f64::from(f32::EPSILON);
    assert!((f64::from(y) - sum).abs() <= rounding, "{what}: {y}, expected {sum} within {rounding}");
    assert!((f64::from(y) - exact).abs() <= allowed + rounding, "{what}: {y}, exactly {exact} within {allowed}");
}

fn half_at(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

/// Element `k` of a row, from the definition of its format, and what rounding its scale and minimum to f16 may change.
fn element(source: SourceType, row: &[u8], k: usize) -> (f32, f32) {
    let unit = if matches!(source, SourceType::Q4K | SourceType::Q5K | SourceType::Q6K) { 256 } else { 32 };
    let (_, bytes) = halves(source);
    let (block, k) = (&row[k / unit * bytes..][..bytes], k % unit);
    let low = |from: usize, k: usize| i32::from(if k < 16 { block[from + k] & 15 } else { block[from + k - 16] >> 4 });
    let word = |from: usize| u32::from_le_bytes(block[from..from + 4].try_into().unwrap());
    let fifth = |from: usize| (word(from) >> k & 1) as i32 * 16;
    let d = half_at(block, 0);
    let plain = |q: i32, m: f32| (q as f32 * d + m, 0.0);
    match source {
        SourceType::Q8_0 => plain(i32::from(block[2 + k] as i8), 0.0),
        SourceType::Q4_0 => plain(low(2, k) - 8, 0.0),
        SourceType::Q4_1 => plain(low(4, k), half_at(block, 2)),
        SourceType::Q5_0 => plain(low(6, k) + fifth(2) - 16, 0.0),
        SourceType::Q5_1 => plain(low(8, k) + fifth(4), half_at(block, 2)),
        SourceType::Q6K => {
            let (part, run, j) = (k / 128, k / 32 % 4, k % 32);
            let low = i32::from(block[part * 64 + run % 2 * 32 + j]) >> (run / 2 * 4) & 15;
            let high = i32::from(block[128 + part * 32 + j]) >> (run * 2) & 3;
            let value = half_at(block, 208) * f32::from(block[192 + k / 16] as i8) * (low + high * 16 - 32) as f32;
            (value, value.abs() / 2048.0 + 32.0 * 6e-8)
        }
        _ => {
            let (i, j, five) = (k / 32, k % 32, source == SourceType::Q5K);
            let s = &block[4..16];
            let (scale, minimum) = match i {
                0..4 => (s[i] % 64, s[i + 4] % 64),
                _ => (s[i + 4] % 16 + s[i - 4] / 64 * 16, s[i + 4] / 16 + s[i] / 64 * 16),
            };
            let low = i32::from(block[if five { 48 } else { 16 } + i / 2 * 32 + j]) >> (i % 2 * 4) & 15;
            let high = if five { i32::from(block[16 + j]) >> i & 1 } else { 0 };
            let (scaled, minimum) =
                (d * f32::from(scale) * (low + high * 16) as f32, half_at(block, 2) * f32::from(minimum));
            (scaled - minimum, (scaled.abs() + minimum.abs()) / 2048.0 + 32.0 * 6e-8)
        }
    }
}

#[test]
fn decoded_rows_are_those_of_the_source() {
    let rng = &mut ChaCha8Rng::seed_from_u64(12);
    for (source, format, _) in SOURCES {
        let (outputs, columns) = (19, 512);
        let rows = random(rng, source, outputs, columns);
        let memory = packed(&rows, format, outputs, columns);
        let w = PackedMatrix::parse(&memory).unwrap();
        let mut found = vec![0.0; columns];
        for row in 0..outputs {
            decode_row(&w, row, &mut found);
            for (k, found) in found.iter().enumerate() {
                let (expected, allowed) = match source {
                    // Half a step, and what rounding the scale to f16 leaves beyond 127 steps.
                    SourceType::F32 => {
                        (f32::from_le_bytes(rows.row(0, row).as_chunks().0[k]), 0.5 / 127.0 + 1.0 / 2048.0)
                    }
                    _ => element(source, rows.row(0, row), k),
                };
                assert!((found - expected).abs() <= allowed, "{source:?} {row} {k}: {found}, expected {expected}");
            }
        }
        let mut gathered = vec![0.0f32; 3 * columns];
        embed(&[18, -1, 99], &w, &mut gathered);
        for (row, values) in [18, 0, 18].into_iter().zip(gathered.chunks(columns)) {
            decode_row(&w, row, &mut found);
            assert_eq!(values, found);
        }
    }
}

#[test]
fn float_rows_are_decoded_and_unfit_sources_refused() {
    let rng = &mut ChaCha8Rng::seed_from_u64(13);
    let rows = random(rng, SourceType::F32, 21, 33);
    for format in [Format::F32, Format::Bf16, Format::F16] {
        let memory = packed(&rows, format, 21, 33);
        let w = PackedMatrix::parse(&memory).unwrap();
        let mut found = vec![0.0; 33];
        decode_row(&w, 20, &mut found);
        for (k, found) in found.iter().enumerate() {
            let value = f32::from_le_bytes(rows.row(0, 20).as_chunks().0[k]);
            let expected = match format {
                Format::Bf16 => bf16::from_f32(value).to_f32(),
                Format::F16 => f16::from_f32(value).to_f32(),
                _ => value,
            };
            assert_eq!(*found, expected, "{format:?} {k}");
        }
    }
    let rows = random(rng, SourceType::Q4_0, 1, 32);
    let layout = Layout::new(32, vec![Segment { format: Format::Q8, rows: 1 }]).unwrap();
    let refused = pack(&layout, &rows, &mut vec![0; layout.bytes()]);
    assert_eq!(refused, Err(crate::PackError::Source { from: SourceType::Q4_0, to: Format::Q8 }));
}
