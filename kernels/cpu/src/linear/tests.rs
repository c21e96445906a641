use std::ffi::c_void;

use abi_stable::std_types::RStr;
use half::{bf16, f16};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use torus_abi::{
    fragment::Activation,
    table::{HostTable, ParallelBody, RuntimeTable, interface},
};

use super::{reference, *};
use crate::{
    level::Level,
    packed::{Format, Layout, RowSource, Segment, SourceType, pack},
};

fn random(rng: &mut ChaCha8Rng, len: usize) -> Vec<f32> {
    (0..len).map(|_| rng.random_range(-1.0..1.0)).collect()
}

/// Rows of f32, one slice of them for each segment.
struct Rows<'a>(Vec<&'a [u8]>, usize);

impl RowSource for Rows<'_> {
    fn source(&self, _segment: usize) -> SourceType {
        SourceType::F32
    }

    fn row(&self, segment: usize, row: usize) -> &[u8] {
        &self.0[segment][row * self.1 * 4..(row + 1) * self.1 * 4]
    }
}

/// A packed matrix, and its elements as they are after rounding to its formats.
struct Matrix {
    memory: Buffer<u8>,
    elements: Vec<f32>,
}

impl Matrix {
    fn random(rng: &mut ChaCha8Rng, columns: usize, segments: &[(Format, usize)]) -> Self {
        let segments: Vec<_> = segments.iter().map(|&(format, rows)| Segment { format, rows }).collect();
        let layout = Layout::new(columns, segments).unwrap();
        let mut elements = random(rng, layout.rows() * columns);
        let mut at = 0;
        for segment in layout.segments() {
            let part = &mut elements[at..at + segment.rows * columns];
            at += part.len();
            for element in part {
                *element = match segment.format {
                    Format::F16 => f16::from_f32(*element).to_f32(),
                    Format::Bf16 => bf16::from_f32(*element).to_f32(),
                    _ => *element,
                };
            }
        }
        let bytes: Vec<u8> = elements.iter().flat_map(|element| element.to_le_bytes()).collect();
        let mut rest = &bytes[..];
        let rows = layout.segments().iter().map(|segment| rest.split_off(..segment.rows * columns * 4).unwrap());
        let rows = Rows(rows.collect(), columns);
        let mut memory = Buffer::take(layout.bytes());
        pack(&layout, &rows, &mut memory).unwrap();
        Self { memory, elements }
    }

    fn packed(&self) -> PackedMatrix<'_> {
        PackedMatrix::parse(&self.memory).unwrap()
    }
}

/// What a sum of `columns` products in f32 may be off by, relative to the sum of their magnitudes: half a unit for each
/// operation. With bf16 activations the products are of numbers that are rounded already, so that it holds there too.
fn tolerance(columns: usize) -> f64 {
    (columns + 2) as f64 * f64::from(f32::EPSILON) / 2.0
}

/// Rows, columns, and the segments of a matrix.
type Shape = (usize, usize, Vec<(Format, usize)>);

fn shapes(rng: &mut ChaCha8Rng) -> Vec<Shape> {
    let floats = [Format::F32, Format::Bf16, Format::F16];
    let mut shapes = Vec::new();
    for format in floats {
        for rows in [1, 2, 3, 4, 5, 7, 8, 12, 13, 16, 25, 33, 64, 150] {
            shapes.push((rows, rng.random_range(1..70), vec![(format, rng.random_range(1..100))]));
        }
        shapes.push((1, 576, vec![(format, 600)]));
        shapes.push((140, 96, vec![(format, 333)]));
    }
    // Whole blocks of columns, which the matrix unit takes, with one tile of rows and two, and with an odd group.
    for (rows, columns, outputs) in [(4, 32, 16), (16, 64, 40), (17, 96, 48), (32, 160, 33), (150, 576, 200)] {
        shapes.push((rows, columns, vec![(Format::Bf16, outputs)]));
    }
    for rows in [1, 6, 40] {
        shapes.push((rows, 33, vec![(Format::Bf16, 17), (Format::F32, 40), (Format::F16, 160), (Format::Bf16, 1)]));
    }
    shapes
}

/// Makes `parallel_for` use three threads of its own for each call, from now on.
fn use_threads() {
    extern "C" fn log(_: u32, _: RStr<'_>, _: RStr<'_>) {}
    extern "C" fn threads() -> usize {
        3
    }
    unsafe extern "C" fn run(count: usize, body: ParallelBody, context: *const c_void) {
        let context = context.expose_provenance();
        std::thread::scope(|scope| {
            for first in 0..threads() {
                scope.spawn(move || {
                    for index in (first..count).step_by(threads()) {
                        // SAFETY: what the caller gave, while it waits.
                        unsafe { body(std::ptr::with_exposed_provenance(context), index) };
                    }
                });
            }
        });
    }
    static HOST: HostTable = HostTable { struct_size: size_of::<HostTable>(), log, parallel_for: run, threads };
    let table = torus_abi::export::common_interface(interface::RUNTIME).cast::<RuntimeTable>();
    // SAFETY: both tables are statics.
    unsafe { ((*table).attach)(&HOST) };
}

#[test]
fn products_are_those_of_the_reference_at_every_level() {
    use_threads();
    let rng = &mut ChaCha8Rng::seed_from_u64(1);
    for (rows, columns, segments) in shapes(rng) {
        let w = Matrix::random(rng, columns, &segments);
        // Values that bf16 holds: every level then multiplies the same numbers.
        let x: Vec<f32> = random(rng, rows * columns).iter().map(|v| bf16::from_f32(*v).to_f32()).collect();
        let (bias, residual) = (random(rng, w.packed().rows()), random(rng, rows * w.packed().rows()));
        let (expected, magnitude) = reference::product(&x, &w.elements, columns);
        for level in Level::available() {
            let prepared = Prepared::of(level, &x, &w.packed());
            let mut y = vec![f32::NAN; expected.len()];
            let epilogue = Epilogue { bias: Some(&bias), residual: Some(&residual[..]) };
            linear_prepared(&prepared, &w.packed(), epilogue, &mut y);
            for (index, y) in y.iter().enumerate() {
                let added = f64::from(bias[index % bias.len()]) + f64::from(residual[index]);
                let error = (f64::from(*y) - expected[index] - added).abs();
                let allowed = tolerance(columns) * (magnitude[index] + 2.0);
                assert!(error <= allowed, "{level} {rows} x {columns}, {segments:?}, {index}: {error} > {allowed}");
            }
        }
    }
}

#[test]
fn bf16_inputs_and_outputs_are_rounded_once() {
    let rng = &mut ChaCha8Rng::seed_from_u64(2);
    let w = Matrix::random(rng, 50, &[(Format::Bf16, 37)]);
    let x: Vec<bf16> = random(rng, 9 * 50).iter().map(|v| bf16::from_f32(*v)).collect();
    let (mut exact, mut rounded) = (vec![0.0f32; 9 * 37], vec![bf16::ZERO; 9 * 37]);
    linear(&x, &w.packed(), Epilogue::NONE, &mut exact);
    linear(&x, &w.packed(), Epilogue::NONE, &mut rounded);
    for (exact, rounded) in exact.iter().zip(&rounded) {
        assert_eq!(bf16::from_f32(*exact), *rounded);
    }
}

#[test]
fn a_gated_mlp_is_its_formula() {
    use_threads();
    let rng = &mut ChaCha8Rng::seed_from_u64(3);
    let (hidden, eps) = (37, 1e-5);
    for (rows, inner, format) in
        [(1, 48, Format::F32), (2, 50, Format::F16), (50, 112, Format::F32), (3, 32, Format::Bf16)]
    {
        let gate_up = Matrix::random(rng, hidden, &[(format, inner), (format, inner)]);
        let joined = Matrix::random(rng, hidden, &[(format, 2 * inner)]);
        let down = Matrix::random(rng, inner, &[(format, hidden)]);
        let (x, norm, post_norm) = (random(rng, rows * hidden), random(rng, hidden), random(rng, hidden));
        for gate_up in [&gate_up, &joined] {
            if !gated_mlp_fits(&gate_up.packed(), &down.packed()) {
                assert!(!inner.is_multiple_of(GROUP) && gate_up.packed().segments().len() == 1);
                continue;
            }
            let normed: Vec<f32> = x.chunks(hidden).flat_map(|row| rms(row, &norm, eps)).collect();
            let (sums, _) = reference::product(&normed, &gate_up.elements, hidden);
            let gated = sums.chunks(2 * inner).flat_map(|row| {
                let (gate, up) = row.split_at(inner);
                gate.iter().zip(up).map(|(gate, up)| (gate / (1.0 + (-gate).exp()) * up) as f32)
            });
            let gated: Vec<f32> = gated.collect();
            let (expected, magnitude) = reference::product(&gated, &down.elements, inner);
            let mut y = vec![f32::NAN; rows * hidden];
            let first = Norm { weights: &norm, eps };
            gated_mlp(&x, (first, None), &gate_up.packed(), &down.packed(), Activation::Silu, &mut y);
            let mut normed = vec![f32::NAN; rows * hidden];
            let norms = (first, Some(Norm { weights: &post_norm, eps }));
            gated_mlp(&x, norms, &gate_up.packed(), &down.packed(), Activation::Silu, &mut normed);
            let added: Vec<f32> = y.iter().zip(&x).map(|(y, x)| y - x).collect();
            let again = added.chunks(hidden).flat_map(|row| rms(row, &post_norm, eps)).zip(&x);
            for (found, expected) in normed.iter().zip(again.map(|(y, x)| y + x)) {
                assert!((found - expected).abs() < 1e-4, "{format:?} {rows} {inner}: {found} is not {expected}");
            }
            // With bf16 weights the activations of both products are rounded to 8 bits.
            let allowed = if format == Format::Bf16 { 3e-2 } else { 1e-5 };
            for (index, y) in y.iter().enumerate() {
                let error = (f64::from(*y) - expected[index] - f64::from(x[index])).abs();
                assert!(error <= allowed * (1.0 + magnitude[index]), "{format:?} {rows} {inner} {index}: {error}");
            }
        }
    }
}

fn rms(row: &[f32], norm: &[f32], eps: f32) -> Vec<f32> {
    let mean = row.iter().map(|value| f64::from(*value).powi(2)).sum::<f64>() / row.len() as f64;
    let scale = 1.0 / (mean + f64::from(eps)).sqrt();
    row.iter().zip(norm).map(|(value, norm)| (f64::from(*value) * scale * f64::from(*norm)) as f32).collect()
}

#[test]
fn tasks_cover_every_element_once_however_many_there_are() {
    let rows = [1, 32, 33, 132, 133, 512, 1000];
    for (level, rows) in Level::ALL.into_iter().flat_map(|level| rows.map(|rows| (level, rows))) {
        for (groups, widened) in [1, 2, 5, 36, 97].into_iter().flat_map(|groups| [(groups, false), (groups, true)]) {
            let cut = Cut::new(level, rows, widened, groups, 18 << 10);
            let mut seen = vec![0; rows * cut.parts];
            for task in 0..cut.tasks() {
                let (rows, part) = cut.task(task);
                rows.for_each(|row| seen[row * cut.parts + part] += 1);
            }
            assert!(seen.iter().all(|times| *times == 1), "{rows} rows of {groups} groups");
            let begins: Vec<_> = (0..=cut.parts).map(|part| cut.begin(part, groups)).collect();
            assert!(begins.is_sorted() && begins[0] == 0 && begins[cut.parts] == groups, "{begins:?} of {groups}");
        }
    }
}

#[test]
fn the_first_weights_of_a_part_are_those_that_begin_in_it() {
    let matrix = Matrix::random(
        &mut ChaCha8Rng::seed_from_u64(7),
        40,
        &[(Format::F32, 40), (Format::Bf16, 17), (Format::F32, 300)],
    );
    let (w, mut found) = (matrix.packed(), 0);
    let bytes: usize = w.segments().iter().map(|segment| segment.bytes.len()).sum();
    for rows in [1, 8, 40, 600] {
        let cut = Cut::new(Level::Portable, rows, false, 25, bytes / 25);
        for part in 0..cut.parts {
            let (mut at, mut expected) = (0, None);
            for segment in w.segments() {
                let first = |group: &usize| at + group / cut.unit * cut.unit * segment.group_bytes();
                let group = (0..segment.groups()).find(|group| first(group) >= cut.begin(part, bytes));
                expected = expected.or(group.map(|group| segment.group(group).as_ptr()));
                at += segment.bytes.len();
            }
            let weights = cut.first_weights(w.segments(), part, bytes).map(<[u8]>::as_ptr);
            assert_eq!(weights, expected, "part {part} for {rows} rows");
            found += usize::from(weights.is_some());
        }
    }
    assert!(found > 20, "{found} parts have weights");
}
