//! Linear layers at two threads: how near to the memory's speed they stream for one row, and how near to the peak of
//! arithmetic they come for many. Arguments: the formats to measure (`bf16`, `f16`, `f32`); `bf16` without.

#![expect(clippy::unwrap_used, reason = "a bench that cannot go on ends")]

mod support;

use std::{hint::black_box, time::Duration};

use half::bf16;
use support::{least, median, peak, sum, time};
use torus_cpu::{
    Epilogue, linear,
    packed::{Format, Layout, PackedMatrix, RowSource, Segment, SourceType, pack},
    workspace::Buffer,
};

/// Inputs and outputs of a layer of SmolLM2-135M: Q, K and V; the attention's output; gate and up; down.
const LAYER: [(usize, usize); 4] = [(576, 960), (576, 576), (576, 3072), (1536, 576)];
const LAYERS: usize = 30;
const HEAD: (usize, usize) = (576, 49152);

/// Rows of f32 from a small generator.
struct Noise(Vec<u8>, usize);

impl Noise {
    fn new(columns: usize) -> Self {
        let mut state = 1u32;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 24) as f32 - 0.5
        };
        Self((0..columns * 64).flat_map(|_| next().to_le_bytes()).collect(), columns * 4)
    }
}

impl RowSource for Noise {
    fn source(&self, _segment: usize) -> SourceType {
        SourceType::F32
    }

    fn row(&self, _segment: usize, row: usize) -> &[u8] {
        &self.0[row % 64 * self.1..][..self.1]
    }
}

/// Matrices in one piece of memory, as the engine holds them.
struct Model {
    memory: Buffer<u8>,
    starts: Vec<usize>,
}

impl Model {
    fn new(format: Format, shapes: &[(usize, usize)]) -> Self {
        let layout = |&(columns, rows): &(usize, usize)| Layout::new(columns, vec![Segment { format, rows }]).unwrap();
        let layouts: Vec<Layout> = shapes.iter().map(layout).collect();
        let mut memory = Buffer::take(layouts.iter().map(Layout::bytes).sum());
        let (mut starts, mut at) = (Vec::new(), 0);
        for layout in layouts {
            let end = at + layout.bytes();
            pack(&layout, &Noise::new(layout.columns()), &mut memory[at..end]).unwrap();
            starts.push(std::mem::replace(&mut at, end));
        }
        Self { memory, starts }
    }

    fn matrices(&self) -> Vec<PackedMatrix<'_>> {
        self.starts.iter().map(|start| PackedMatrix::parse(&self.memory[*start..]).unwrap()).collect()
    }
}

fn decode(format: Format, rounds: usize) {
    let shapes: Vec<_> = std::iter::repeat_n(LAYER, LAYERS).flatten().chain([HEAD]).collect();
    let model = Model::new(format, &shapes);
    let matrices = model.matrices();
    let (layers, head) = matrices.split_at(LAYERS * LAYER.len());
    let layer_bytes = *model.starts.last().unwrap();
    let memory = &model.memory[..];
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
        println!("linear.decode.{format:?}.{rows} share={all:.4} best={best:.4} sum_gb_per_s={rate:.2}");
    }
}

fn prefill(format: Format, rounds: usize) {
    let shapes = [(576, 3072), (1536, 576), (576, 960)];
    let model = Model::new(format, &shapes);
    println!("\n{format:?}: many rows, GFLOP/s (share of the peak of the instruction in the same run)");
    for rows in [8, 16, 32, 64, 128, 512] {
        for (w, (inputs, outputs)) in model.matrices().iter().zip(shapes) {
            let x = vec![bf16::from_f32(0.25); rows * inputs];
            let mut y = vec![bf16::ZERO; rows * outputs];
            let (mut times, mut limit) = (Vec::new(), 0.0f64);
            for _ in 0..rounds {
                times.push(time(|| linear(&x, w, Epilogue::NONE, &mut y)));
                limit = limit.max(peak(format == Format::Bf16).unwrap_or(f64::NAN));
            }
            let flops = (2 * rows * inputs * outputs) as f64;
            let (best, middle) = (flops / least(&times).as_secs_f64(), flops / median(&mut times).as_secs_f64());
            let (share, limit) = (best / limit, limit / 1e9);
            println!(
                "linear.prefill.{format:?}.{rows}x{inputs}x{outputs} gflops={:.0} median={:.0} peak={limit:.0} share={share:.3}",
                best / 1e9,
                middle / 1e9
            );
        }
    }
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|argument| !argument.starts_with('-')).collect();
    let wanted = |name: &str| arguments.iter().any(|argument| argument == name);
    support::start_threads();
    let formats = [("bf16", Format::Bf16), ("f16", Format::F16), ("f32", Format::F32)];
    let named: Vec<_> = formats.iter().filter(|(name, _)| wanted(name)).collect();
    for (_, format) in if named.is_empty() { formats[..1].iter().collect() } else { named } {
        if !wanted("prefill") {
            decode(*format, 15);
        }
        if !wanted("decode") {
            prefill(*format, 40);
        }
    }
}
