//! Every level and format against a plain product of the decoded weights.

use half::bf16;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::*;
use crate::{
    Level,
    packed::{Format, Layout, PackedMatrix, Segment, SourceType, decode_row, pack_group},
};


#[repr(align(64))]
#[derive(Clone, Copy)]
struct Line([u8; 64]);

pub(crate) struct Packed {
    memory: Vec<Line>,
}

impl Packed {
    /// A matrix of random rows; quantized formats are filled with random blocks.
    pub fn random(random: &mut ChaCha8Rng, columns: usize, segments: &[Segment]) -> Self {
        let layout = Layout::new(columns, segments.to_vec()).unwrap();
        let mut memory = vec![Line([0; 64]); layout.bytes() / 64];
        // SAFETY: lines are bytes.
        let bytes = unsafe { std::slice::from_raw_parts_mut(memory.as_mut_ptr().cast::<u8>(), layout.bytes()) };
        for (segment, bytes) in segments.iter().zip(layout.split_mut(bytes)) {
            let len = segment.format.group_bytes(columns).unwrap();
            for (group, out) in bytes.chunks_exact_mut(len).enumerate() {
                let count = (segment.rows - group * GROUP).min(GROUP);
                let rows: Vec<Vec<u8>> = (0..count).map(|_| random_row(random, segment.format, columns)).collect();
                let rows: Vec<_> = rows.iter().map(Vec::as_slice).collect();
                pack_group(segment.format, source(segment.format), &rows, columns, out);
            }
        }
        Self { memory }
    }

    pub fn matrix(&self) -> PackedMatrix<'_> {
        // SAFETY: lines are bytes.
        let bytes = unsafe { std::slice::from_raw_parts(self.memory.as_ptr().cast::<u8>(), self.memory.len() * 64) };
        PackedMatrix::parse(bytes).unwrap()
    }
}

fn source(format: Format) -> SourceType {
    match format {
        Format::F32 | Format::Bf16 | Format::F16 => SourceType::F32,
        Format::Q8 => SourceType::Q8_0,
        Format::Q4 => SourceType::Q4_0,
        Format::Q4Min => SourceType::Q4_1,
        Format::Q5 => SourceType::Q5_0,
        Format::Q5Min => SourceType::Q5_1,
        Format::Q6 => SourceType::Q6K,
    }
}

fn random_row(random: &mut ChaCha8Rng, format: Format, columns: usize) -> Vec<u8> {
    let block = |random: &mut ChaCha8Rng, halves: usize, rest: usize| {
        let scale = |random: &mut ChaCha8Rng| half::f16::from_f32(random.random_range(0.001..0.02)).to_le_bytes();
        let mut bytes: Vec<u8> = (0..halves).flat_map(|_| scale(random)).collect();
        bytes.extend((0..rest).map(|_| random.random::<u8>()));
        bytes
    };
    let blocks = |random: &mut ChaCha8Rng, columns_of: usize, halves, rest| {
        (0..columns / columns_of).flat_map(|_| block(random, halves, rest)).collect()
    };
    match source(format) {
        SourceType::F32 => (0..columns).flat_map(|_| random.random_range(-1f32..1.0).to_le_bytes()).collect(),
        SourceType::Q8_0 => blocks(random, 32, 1, 32),
        SourceType::Q4_0 => blocks(random, 32, 1, 16),
        SourceType::Q4_1 => blocks(random, 32, 2, 16),
        SourceType::Q5_0 => blocks(random, 32, 1, 20),
        SourceType::Q5_1 => blocks(random, 32, 2, 20),
        _ => {
            let mut row = Vec::new();
            for _ in 0..columns / 256 {
                row.extend((0..208).map(|_| random.random::<u8>()));
                row.extend(half::f16::from_f32(random.random_range(1e-5..1e-4)).to_le_bytes());
            }
            row
        }
    }
}

fn decoded(matrix: &PackedMatrix<'_>) -> Vec<Vec<f32>> {
    let row = |row| {
        let mut out = vec![0.0; matrix.columns()];
        decode_row(matrix, row, &mut out);
        out
    };
    (0..matrix.rows()).map(row).collect()
}

/// The values that a product is made of: activations as the format's form holds them.
fn seen(x: &Prepared<'_>, format: Format, row: usize) -> Vec<f64> {
    match format {
        Format::F32 | Format::F16 => x.f32[row * x.columns..][..x.columns].iter().map(|x| f64::from(*x)).collect(),
        Format::Bf16 => x.bf16[row * x.pairs() * 2..][..x.columns].iter().map(|x| f64::from(x.to_f32())).collect(),
        _ => {
            let value = |k: usize| f64::from(x.int8.q[row * x.columns + k]) * f64::from(x.int8.scales[row * x.blocks() + k / 32]);
            (0..x.columns).map(value).collect()
        }
    }
}

#[test]
fn tiles_of_every_format_and_level_equal_the_plain_product() {
    let mut random = ChaCha8Rng::seed_from_u64(5);
    for format in Format::ALL {
        let columns_of = match format {
            Format::Q6 => 256,
            format if format.is_quantized() => 32,
            _ => 1,
        };
        for (rows, columns, features) in [(1, 3, 40), (2, 1, 16), (3, 5, 33), (5, 2, 100), (9, 7, 64), (12, 3, 17), (30, 2, 70)] {
            let columns = if columns_of == 1 { columns * 13 } else { columns * columns_of };
            let packed = Packed::random(&mut random, columns, &[Segment { format, rows: features }]);
            let (matrix, x) = (packed.matrix(), random_values(&mut random, rows * columns));
            let weights = decoded(&matrix);
            with_frame(|frame| {
                let x = prepare(frame, &x, columns, Forms::of(&matrix), None);
                let segment = &matrix.segments()[0];
                for level in Level::available() {
                    for tile_rows in row_tiles(rows) {
                        let groups = 0..segment.groups();
                        let mut out = vec![f32::NAN; tile_rows.len() * groups.len() * GROUP];
                        tile(level, &x, tile_rows.clone(), segment, groups.clone(), &mut out);
                        for (row, out) in tile_rows.zip(out.chunks(groups.len() * GROUP)) {
                            let seen = seen(&x, format, row);
                            for (feature, weights) in weights.iter().enumerate() {
                                let terms = seen.iter().zip(weights).map(|(x, w)| x * f64::from(*w));
                                let (sum, size) = terms.fold((0.0, 0.0), |(sum, size), term| (sum + term, size + term.abs()));
                                let error = (f64::from(out[feature]) - sum).abs();
                                // Offsets make the terms that are added larger than those of the sum.
                                let tolerance = if format.is_quantized() { 3e-5 } else { 1e-6 };
                                assert!(error <= tolerance * (size + 1.0), "{format:?} {level} {rows}x{columns}x{features} [{row}, {feature}]: {} is not {sum}", out[feature]);
                            }
                        }
                    }
                }
            });
        }
    }
}

fn random_values(random: &mut ChaCha8Rng, len: usize) -> Vec<f32> {
    (0..len).map(|_| random.random_range(-2f32..2.0)).collect()
}

#[test]
fn mixed_segments_bias_and_residual_make_one_result() {
    let mut random = ChaCha8Rng::seed_from_u64(6);
    let segments = [
        Segment { format: Format::Q4Min, rows: 19 },
        Segment { format: Format::Bf16, rows: 7 },
        Segment { format: Format::F32, rows: 40 },
    ];
    let packed = Packed::random(&mut random, 64, &segments);
    let matrix = packed.matrix();
    let weights = decoded(&matrix);
    for rows in [1, 4, 29] {
        let x: Vec<bf16> = random_values(&mut random, rows * 64).into_iter().map(bf16::from_f32).collect();
        let (bias, residual) = (random_values(&mut random, 66), random_values(&mut random, rows * 66));
        let mut y = vec![0f32; rows * 66];
        linear(&x, &matrix, Epilogue { bias: Some(&bias), residual: Some(&residual) }, &mut y);
        for row in 0..rows {
            for (feature, weights) in weights.iter().enumerate() {
                let sum: f64 = weights.iter().zip(&x[row * 64..]).map(|(w, x)| f64::from(*w) * f64::from(x.to_f32())).sum();
                let expected = sum + f64::from(bias[feature] + residual[row * 66 + feature]);
                let found = f64::from(y[row * 66 + feature]);
                // Int8 activations are off by up to half a step in each of 64 terms.
                assert!((found - expected).abs() < 0.15, "[{row}, {feature}]: {found} is not {expected}");
            }
        }
    }
}

#[test]
fn a_gated_mlp_equals_its_definition() {
    let mut random = ChaCha8Rng::seed_from_u64(7);
    let (hidden, inner) = (32, 48);
    for gate_up in [
        vec![Segment { format: Format::F32, rows: 2 * inner }],
        vec![Segment { format: Format::F32, rows: inner }, Segment { format: Format::F16, rows: inner }],
    ] {
        let gate_up = Packed::random(&mut random, hidden, &gate_up);
        let down = Packed::random(&mut random, inner, &[Segment { format: Format::F32, rows: hidden }]);
        let (wide, narrow) = (decoded(&gate_up.matrix()), decoded(&down.matrix()));
        assert!(gated_mlp_fits(&gate_up.matrix(), &down.matrix()));
        for rows in [1, 3, 25] {
            let (x, weight) = (random_values(&mut random, rows * hidden), random_values(&mut random, hidden));
            let mut y = vec![0f32; rows * hidden];
            let norm = Norm { weight: &weight, epsilon: 1e-5 };
            gated_mlp(&x, norm, &gate_up.matrix(), &down.matrix(), Activation::Silu, &mut y);
            for (x, y) in x.chunks(hidden).zip(y.chunks(hidden)) {
                let squares: f64 = x.iter().map(|x| f64::from(*x).powi(2)).sum();
                let factor = 1.0 / (squares / hidden as f64 + 1e-5).sqrt();
                let normed: Vec<f64> = x.iter().zip(&weight).map(|(x, w)| f64::from(*x) * factor * f64::from(*w)).collect();
                let dot = |weights: &[f32], x: &[f64]| weights.iter().zip(x).map(|(w, x)| f64::from(*w) * x).sum::<f64>();
                let gated = |i: usize| {
                    let gate = dot(&wide[i], &normed);
                    gate / (1.0 + (-gate).exp()) * dot(&wide[inner + i], &normed)
                };
                let inner: Vec<f64> = (0..inner).map(gated).collect();
                for (feature, weights) in narrow.iter().enumerate() {
                    let expected = f64::from(x[feature]) + dot(weights, &inner);
                    assert!((f64::from(y[feature]) - expected).abs() < 2e-4 * (1.0 + expected.abs()));
                }
            }
        }
    }
}
