//! The kernels at two threads, at the sizes of SmolLM2-135M, each beside its limit: see `torus_cpu::bench`. Arguments:
//! formats (`bf16`, `f16`, `f32`, `q8`, `q4`, `q4min`, `q5`, `q5min`, `q6`), `attention` or `layers` (whole ones, in Q8);
//! `bf16`, `q8`, `q4min` and `attention` without. `torus bench kernels` prints the same for other sizes, on the server's own
//! threads.

#![expect(clippy::unwrap_used, reason = "a bench that cannot go on ends")]

mod support;

use torus_cpu::{
    attention::Params,
    bench::{AttentionCase, Sizes, Timing, attention_layers, linear_layers, whole_layers},
    packed::Format,
};

/// Inputs and outputs of a layer: Q, K and V; the attention's output; gate and up; down.
const LAYER: [(usize, usize); 4] = [(576, 960), (576, 576), (576, 3072), (1536, 576)];
/// The same for formats in blocks of 256 columns.
const LAYER_OF_256: [(usize, usize); 4] = [(512, 960), (512, 576), (512, 3072), (1536, 576)];
const LAYERS: usize = 30;
const PARAMS: Params =
    Params { q_heads: 9, kv_heads: 3, head_dim: 64, page_size: 16, scale: 0.125, window: None, soft_cap: None };
const ROUNDS: usize = 9;

fn print(name: &str, timing: &Timing) {
    let rate = if timing.is_bound_by_memory() {
        format!("gb_per_s={:.1}", timing.bytes as f64 / timing.median / 1e9)
    } else {
        format!("gop_per_s={:.0}", timing.operations / timing.median / 1e9)
    };
    let (share, best) = (timing.limit() / timing.median, timing.limit() / timing.best);
    println!("{name} ms={:.3} {rate} share_of_limit={share:.3} best={best:.3}", timing.median * 1e3);
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|argument| !argument.starts_with('-')).collect();
    let usual = ["bf16", "q8", "q4min", "attention"].map(str::to_owned).to_vec();
    support::start_threads();
    for what in if arguments.is_empty() { usual } else { arguments } {
        let format = match what.as_str() {
            "bf16" => Format::Bf16,
            "f16" => Format::F16,
            "f32" => Format::F32,
            "q8" => Format::Q8,
            "q4" => Format::Q4,
            "q4min" => Format::Q4Min,
            "q5" => Format::Q5,
            "q5min" => Format::Q5Min,
            "q6" => Format::Q6,
            "layers" => {
                layers();
                continue;
            }
            _ => {
                attention();
                continue;
            }
        };
        let layer = if format == Format::Q6 { LAYER_OF_256 } else { LAYER };
        let layers: Vec<_> = std::iter::repeat_n(layer, LAYERS).flatten().collect();
        for rows in [1, 8, 32, 512] {
            print(&format!("linear.{what}.{rows}"), &linear_layers(format, &layers, rows, ROUNDS).unwrap());
        }
    }
}

fn layers() {
    let sizes = Sizes { hidden: 576, intermediate: 1536, layers: LAYERS };
    for (sequences, new, len) in [(1, 1, 128), (1, 1, 576), (8, 1, 230), (32, 1, 576), (1, 512, 512)] {
        let case = AttentionCase { sequences, new, len, beside: (0, 0) };
        print(
            &format!("layers.{sequences}x{new}@{len}"),
            &whole_layers(Format::Q8, &PARAMS, sizes, case, ROUNDS).unwrap(),
        );
    }
}

fn attention() {
    for (sequences, new, len) in [(1, 1, 128), (1, 1, 4096), (8, 1, 576), (32, 1, 576), (1, 512, 512), (1, 16, 4096)] {
        let case = AttentionCase { sequences, new, len, beside: (0, 0) };
        print(&format!("attention.{sequences}x{new}@{len}"), &attention_layers(&PARAMS, LAYERS, case, ROUNDS).unwrap());
    }
}
