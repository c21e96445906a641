//! Quantized linear layers at two threads, as `linear` measures those of floats: how near to the memory's speed they
//! stream for one row, and how fast many rows are, beside bf16 in the same run. Arguments: the formats to measure
//! (`q8`, `q4`, `q4min`, `q5`, `q5min`, `q6`), and `decode` or `prefill`; Q8 and Q4Min without.

#![expect(clippy::unwrap_used, reason = "a bench that cannot go on ends")]

#[expect(dead_code, reason = "the peaks of float instructions")]
mod support;

use std::{hint::black_box, time::Duration};

use half::bf16;
use support::{least, median, sum, time};
use torus_cpu::{
    Epilogue, linear,
    packed::{Format, Layout, PackedMatrix, RowSource, Segment, SourceType, pack},
    workspace::Buffer,
};

/// Inputs and outputs of a layer of SmolLM2-135M: Q, K and V; the attention's output; gate and up; down.
const LAYER: [(usize, usize); 4] = [(576, 960), (576, 576), (576, 3072), (1536, 576)];
const LAYERS: usize = 30;
const HEAD: (usize, usize) = (576, 49152);

/// Rows of small blocks from a generator, or of f32 for a float format.
struct Noise {
    source: SourceType,
    bytes: Vec<u8>,
    row: usize,
}

impl Noise {
    fn new(format: Format, columns: usize) -> Self {
        let source = match format {
            Format::Q8 => SourceType::Q8_0,
            Format::Q4 => SourceType::Q4_0,
            Format::Q4Min => SourceType::Q4_1,
            Format::Q5 => SourceType::Q5_0,
            Format::Q5Min => SourceType::Q5_1,
            Format::Q6 => SourceType::Q6K,
            _ => SourceType::F32,
        };
        // Bytes whose pairs are small numbers of f16, and fours of f32.
        let row = source.row_bytes(columns).unwrap();
        let bytes = (0..row * 64).map(|i| if i % 2 == 1 { 0x20 } else { (i * 37 % 251) as u8 }).collect();
        Self { source, bytes, row }
    }
}

impl RowSource for Noise {
    fn source(&self, _segment: usize) -> SourceType {
        self.source
    }

    fn row(&self, _segment: usize, row: usize) -> &[u8] {
        &self.bytes[row % 64 * self.row..][..self.row]
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
            pack(&layout, &Noise::new(format, layout.columns()), &mut memory[at..end]).unwrap();
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
    for rows in [1, 8] {
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
        println!("quantized.decode.{format:?}.{rows} share={all:.4} best={best:.4} sum_gb_per_s={rate:.2}");
    }
}

fn prefill(format: Format, rounds: usize) {
    // Whole blocks of all formats.
    let shapes = [(512, 3072), (1536, 576), (768, 960)];
    let (model, float) = (Model::new(format, &shapes), Model::new(Format::Bf16, &shapes));
    println!("\n{format:?}: many rows, GOP/s, and the speed relative to bf16");
    for rows in [2, 4, 8, 16, 32, 64, 128, 512] {
        for ((w, float), (inputs, outputs)) in model.matrices().iter().zip(float.matrices()).zip(shapes) {
            let x = vec![bf16::from_f32(0.25); rows * inputs];
            let mut y = vec![bf16::ZERO; rows * outputs];
            let [mut times, mut floats] = [const { Vec::<Duration>::new() }; 2];
            for _ in 0..rounds {
                times.push(time(|| linear(&x, w, Epilogue::NONE, &mut y)));
                floats.push(time(|| linear(&x, &float, Epilogue::NONE, &mut y)));
            }
            let (best, float) = (least(&times), least(&floats));
            println!(
                "quantized.prefill.{format:?}.{rows}x{inputs}x{outputs} gops={:.0} bf16={:.0} ratio={:.2}",
                (2 * rows * inputs * outputs) as f64 / best.as_secs_f64() / 1e9,
                (2 * rows * inputs * outputs) as f64 / float.as_secs_f64() / 1e9,
                float.div_duration_f64(best),
            );
        }
    }
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|argument| !argument.starts_with('-')).collect();
    let wanted = |name: &str| arguments.iter().any(|argument| argument == name);
    support::start_threads();
    let formats = [
        ("q8", Format::Q8),
        ("q4min", Format::Q4Min),
        ("q4", Format::Q4),
        ("q5", Format::Q5),
        ("q5min", Format::Q5Min),
        ("q6", Format::Q6),
    ];
    let named: Vec<_> = formats.iter().filter(|(name, _)| wanted(name)).collect();
    for (_, format) in if named.is_empty() { formats[..2].iter().collect() } else { named } {
        if !wanted("prefill") {
            decode(*format, 15);
        }
        if !wanted("decode") {
            prefill(*format, 40);
        }
    }
}
