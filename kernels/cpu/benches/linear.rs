//! Linear layers at two threads: how near to the memory's speed they stream for few rows, and how near to the peak of
//! arithmetic they come for many. Arguments: formats (`bf16`, `q8`, `q4min`, `f16`, `f32`; the first three without), and
//! `decode` or `prefill` for one of both.

#![expect(clippy::unwrap_used, reason = "a bench that cannot go on ends")]

mod support;

use std::{hint::black_box, time::Duration};

use half::bf16;
use support::{Lines, least, median, peak, sum, time};
use torus_cpu::{
    linear::{Epilogue, linear},
    packed::{Format, GROUP, Layout, PackedMatrix, Segment, SourceType, pack_group},
};

/// Inputs and outputs of a layer of SmolLM2-135M: Q, K and V; the attention's output; gate and up; down.
const LAYER: [(usize, usize); 4] = [(576, 960), (576, 576), (576, 3072), (1536, 576)];
const LAYERS: usize = 30;
const HEAD: (usize, usize) = (576, 49152);

/// Bytes of 64 rows of noise, as a file stores them, and of one.
fn noise(format: Format, columns: usize) -> (SourceType, Vec<u8>, usize) {
    let mut state = 1u32;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        state >> 8
    };
    let scale = half::f16::from_f32(0.01).to_le_bytes();
    let mut blocks = |halves: usize, elements: usize| -> (Vec<u8>, usize) {
        let len = columns / 32 * (2 * halves + elements);
        let mut byte = |at: usize| if at % (2 * halves + elements) < 2 * halves { scale[at % 2] } else { next() as u8 };
        ((0..64 * len).map(|at| byte(at % len)).collect(), len)
    };
    let (source, (rows, len)) = match format {
        Format::Q8 => (SourceType::Q8_0, blocks(1, 32)),
        Format::Q4Min => (SourceType::Q4_1, blocks(2, 16)),
        _ => {
            let floats = (0..columns * 64).flat_map(|_| (next() as f32 / (1 << 24) as f32 - 0.5).to_le_bytes());
            (SourceType::F32, (floats.collect(), columns * 4))
        }
    };
    (source, rows, len)
}

/// Matrices in one piece of memory, as the engine holds them.
struct Model {
    memory: Lines,
    starts: Vec<usize>,
}

impl Model {
    fn new(format: Format, shapes: &[(usize, usize)]) -> Self {
        let layout = |&(columns, rows): &(usize, usize)| Layout::new(columns, vec![Segment { format, rows }]).unwrap();
        let layouts: Vec<Layout> = shapes.iter().map(layout).collect();
        let mut memory = Lines::zeroed(layouts.iter().map(Layout::bytes).sum());
        let (mut starts, mut at) = (Vec::new(), 0);
        for layout in layouts {
            let columns = layout.columns();
            let (source, rows, len) = noise(format, columns);
            for segment in layout.split_mut(&mut memory.bytes_mut()[at..at + layout.bytes()]) {
                for (group, out) in segment.chunks_exact_mut(format.group_bytes(columns).unwrap()).enumerate() {
                    let row = |lane: usize| &rows[(group * GROUP + lane) % 64 * len..][..len];
                    pack_group(format, source, &(0..GROUP).map(row).collect::<Vec<_>>(), columns, out);
                }
            }
            starts.push(at);
            at += layout.bytes();
        }
        Self { memory, starts }
    }

    fn matrices(&self) -> Vec<PackedMatrix<'_>> {
        self.starts.iter().map(|start| PackedMatrix::parse(&self.memory.bytes()[*start..]).unwrap()).collect()
    }
}

fn decode(format: Format, rounds: usize) {
    let shapes: Vec<_> = std::iter::repeat_n(LAYER, LAYERS).flatten().chain([HEAD]).collect();
    let model = Model::new(format, &shapes);
    let matrices = model.matrices();
    let (layers, head) = matrices.split_at(LAYERS * LAYER.len());
    let layer_bytes = *model.starts.last().unwrap();
    let memory = model.memory.bytes();
    println!("\n{format:?}, {} MB: products of few rows, as a share of adding up the same bytes", memory.len() >> 20);
    println!("{:>5} {:>10} {:>8} {:>8} {:>8} {:>8}", "rows", "sum GB/s", "all", "layers", "head", "best/best");
    for rows in [1, 2, 4, 8, 16, 32] {
        let x = vec![bf16::from_f32(0.25); rows * 1536];
        let mut y = vec![bf16::ZERO; rows * HEAD.1];
        let mut run = |matrices: &[PackedMatrix<'_>]| {
            for w in matrices {
                linear(&x[..rows * w.columns()], w, Epilogue::NONE, &mut y[..rows * w.rows()]);
            }
        };
        let [mut sums, mut head_sums, mut layer_times, mut head_times] = [const { Vec::<Duration>::new() }; 4];
        for _ in 0..rounds {
            sums.push(time(|| _ = black_box(sum(&memory[..layer_bytes]))));
            layer_times.push(time(|| run(layers)));
            head_sums.push(time(|| _ = black_box(sum(&memory[layer_bytes..]))));
            head_times.push(time(|| run(head)));
        }
        let best = (least(&sums) + least(&head_sums)).div_duration_f64(least(&layer_times) + least(&head_times));
        let [sums, head_sums, layers, head] = [sums, head_sums, layer_times, head_times].map(|mut t| median(&mut t));
        let all = (sums + head_sums).div_duration_f64(layers + head);
        let shares = [all, sums.div_duration_f64(layers), head_sums.div_duration_f64(head), best];
        let rate = memory.len() as f64 / (sums + head_sums).as_secs_f64() / 1e9;
        let percent = shares.map(|share| format!("{:>7.1}%", share * 100.0)).join(" ");
        println!("{rows:>5} {rate:>10.1} {percent}");
    }
}

fn prefill(format: Format, rounds: usize) {
    let shapes = [(576, 3072), (1536, 576), (576, 960)];
    let model = Model::new(format, &shapes);
    println!("\n{format:?}: many rows, GFLOP/s best and median, and the peak of bf16 (of f32 for floats) in the same run");
    for rows in [8, 16, 32, 64, 128, 512] {
        for (w, (inputs, outputs)) in model.matrices().iter().zip(shapes) {
            let x = vec![bf16::from_f32(0.25); rows * inputs];
            let mut y = vec![bf16::ZERO; rows * outputs];
            let (mut times, mut limit) = (Vec::new(), 0.0f64);
            for _ in 0..rounds {
                times.push(time(|| linear(&x, w, Epilogue::NONE, &mut y)));
                limit = limit.max(peak(!matches!(format, Format::F32 | Format::F16)).unwrap_or(f64::NAN));
            }
            let flops = (2 * rows * inputs * outputs) as f64;
            let (best, middle) = (flops / least(&times).as_secs_f64(), flops / median(&mut times).as_secs_f64());
            println!(
                "{:>6} {:>12} {:>8.0} {:>8.0} {:>8.0} {:>6.2}",
                rows,
                format!("{inputs}x{outputs}"),
                best / 1e9,
                middle / 1e9,
                limit / 1e9,
                best / limit
            );
        }
    }
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|argument| !argument.starts_with('-')).collect();
    let wanted = |name: &str| arguments.iter().any(|argument| argument == name);
    support::start_threads();
    let formats = [
        ("bf16", Format::Bf16),
        ("q8", Format::Q8),
        ("q4min", Format::Q4Min),
        ("f16", Format::F16),
        ("f32", Format::F32),
    ];
    let named: Vec<_> = formats.iter().filter(|(name, _)| wanted(name)).collect();
    for (_, format) in if named.is_empty() { formats[..3].iter().collect() } else { named } {
        if !wanted("prefill") {
            decode(*format, 15);
        }
        if !wanted("decode") {
            prefill(*format, 20);
        }
    }
}
