//! Cycles of the compiler's schedules beside what HBM and the matrix unit need at least.
//!
//! A schedule knows nothing of DMA. So what is compared is the cycles of all steps with the time that their weights take
//! to arrive: below 1 a step hides behind the copy of the next. What no step hides, the first tile's copy and the last
//! tile's product, is added in the column `kernel`, with 1,500 cycles for the first copy's latency and 500 for start and
//! end, all assumed.

use std::{collections::BTreeMap, env, fmt::Write, fs, path::Path as Folder};

use torus_mosaic::{
    Generation,
    schedule::{DumpKind, Path, Schedule, Unit, dump_of},
};

use crate::{
    Activations, Format, Matmul, Tiles, Weights,
    tests::compile::{Compiler, alone},
};

/// Bytes that HBM gives a TPU v6e in one cycle: 1,640 GB/s at 1.75 GHz.
const BYTES_PER_CYCLE: f64 = 1640.0 / 1.75;
/// Products that its matrix units add up in one cycle: 918 TFLOP/s. Twice as many of bytes.
const MACS_PER_CYCLE: f64 = 918e3 / 2.0 / 1.75;
/// Weights in `bf16` that its matrix units take in one cycle: two registers in two cycles each. Twice as many bytes.
const PUSHED_PER_CYCLE: f64 = 2048.0;
const LATENCY: f64 = 1500.0;
const ENDS: f64 = 500.0;

struct Case {
    name: &'static str,
    product: Matmul,
    /// Experts that have rows in a typical batch.
    experts: f64,
    /// The most that the steps' cycles may be of the larger floor.
    limit: f64,
}

impl Case {
    /// Visits of blocks for all experts, at most: each block but the first may begin in the middle of an expert.
    fn visits(&self, tiles: &Tiles) -> f64 {
        self.experts + self.product.blocks(tiles) as f64 - 1.0
    }
}

fn cases() -> Vec<Case> {
    let square = |format| Weights::new(4096, 4096, format);
    let plain = |name, rows, weights, activations, limit| Case {
        name,
        product: Matmul { rows, weights, activations },
        experts: 1.0,
        limit,
    };
    let (bf16, int8) = (Activations::Bf16, Activations::Int8);
    let groups = Weights { group: Some(128), ..square(Format::Int4) };
    // Qwen3-30B-A3B: 64 sequences with 8 experts each have rows for 126 of 128 on average. Each visit of a block ends
    // with the matrix unit's latency, which copies of 4-bit weights are too short to hide.
    let experts = |name, inputs, outputs, format, limit| Case {
        name,
        product: Matmul::new(512, Weights { experts: Some(128), ..Weights::new(inputs, outputs, format) }),
        experts: 126.0,
        limit,
    };
    vec![
        plain("int8, 16 rows", 16, square(Format::Int8), bf16, 1.15),
        plain("int8, 256 rows", 256, square(Format::Int8), bf16, 1.15),
        plain("int8, 2,048 rows", 2048, square(Format::Int8), bf16, 1.2),
        plain("fp8, 16 rows", 16, square(Format::Float8), bf16, 1.15),
        plain("int4, 16 rows", 16, square(Format::Int4), bf16, 1.15),
        plain("int4 by 128, 16 rows", 16, groups, bf16, 1.15),
        plain("int8 x int8, 256 rows", 256, square(Format::Int8), int8, 1.15),
        plain("int4 x int8, 16 rows", 16, square(Format::Int4), int8, 1.15),
        experts("experts' gate-up in bf16", 2048, 1536, Format::Bf16, 1.3),
        experts("experts' gate-up in int8", 2048, 1536, Format::Int8, 1.3),
        experts("experts' gate-up in int4", 2048, 1536, Format::Int4, 1.4),
        experts("experts' down in bf16", 768, 2048, Format::Bf16, 1.3),
        experts("experts' down in int8", 768, 2048, Format::Int8, 1.3),
        experts("experts' down in int4", 768, 2048, Format::Int4, 1.4),
    ]
}

/// The schedule of a kernel from a folder, which is emptied.
fn read(folder: &Folder, kernel: &str) -> Schedule {
    let mut texts = BTreeMap::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if let Some((name, kind)) = dump_of(path.file_name().unwrap().to_str().unwrap())
            && name.contains(kernel)
        {
            texts.insert(kind == DumpKind::Bundles, fs::read_to_string(&path).unwrap());
        }
        if path.is_file() {
            fs::remove_file(&path).unwrap();
        }
    }
    Schedule::parse(&texts[&true], &texts[&false]).unwrap()
}

/// Cycles of all steps, and of one, on the path that the case's visits say.
fn steps(case: &Case, tiles: &Tiles, schedule: &Schedule) -> (f64, f64) {
    let (experts, visits) = (case.experts, case.visits(tiles));
    let parts = (case.product.weights.outputs / tiles.columns) as f64;
    let strips = (tiles.columns / tiles.strip) as f64;
    // From the innermost loop that multiplies outwards.
    let mut chain: Vec<usize> = Vec::new();
    let mut next = schedule.busiest_loop(Unit::MatrixPush);
    while let Some(index) = next {
        chain.push(index);
        next = schedule.loops()[index].parent;
    }
    let grouped = case.product.weights.experts.is_some();
    let blocks = case.product.blocks(tiles) as f64;
    let mut trips = Vec::new();
    if strips > 1.0 {
        trips.push(strips);
    }
    if grouped {
        trips.extend([visits / experts, experts]);
    } else if blocks > 1.0 {
        trips.push(blocks);
    }
    // A single part needs no loop.
    if parts > 1.0 {
        trips.push(parts);
    }
    assert_eq!(chain.len(), trips.len(), "{}: {:?}", case.name, schedule.loops());
    // What else loops makes bytes of rows, once for all parts.
    let others = (0..schedule.loops().len()).filter(|index| !chain.contains(index));
    let path = others.fold(Path::new(), |path, index| path.trips(index, tiles.rows as f64 / 32.0 / parts));
    let path = chain.iter().zip(&trips).fold(path, |path, (index, trips)| path.trips(*index, *trips));
    let outermost = *chain.last().unwrap();
    let executed = schedule.executions(&path);
    let cycles: f64 = schedule.loops()[outermost].bundles.clone().map(|at| executed[at]).sum();
    (cycles, cycles / parts / experts)
}

#[test]
fn steps_hide_behind_the_copies_of_their_weights() {
    let folder = env::temp_dir().join(format!("torus-matmul-{}", std::process::id()));
    fs::create_dir_all(&folder).unwrap();
    let options = format!("--xla_jf_dump_to={} --xla_jf_dump_llo_text=true", folder.display());
    let folder_name = folder.display().to_string();
    let environment = [("LIBTPU_INIT_ARGS", options.as_str()), ("TORUS_TEST_DUMP", &folder_name)];
    print!("{}", alone("tests::cycles::compile", &environment));
    fs::remove_dir_all(&folder).unwrap();
}

#[test]
#[ignore = "run by steps_hide_behind_the_copies_of_their_weights"]
fn compile() {
    let folder = env::var("TORUS_TEST_DUMP").unwrap();
    let compiler = Compiler::new(Generation::V6e);
    let mut table = String::new();
    writeln!(table, "{:28} {:>9} {:>9} {:>9} {:>7} {:>7}", "v6e, cycles", "steps", "HBM", "MXU", "ratio", "kernel")
        .unwrap();
    let mut slow = Vec::new();
    for case in cases() {
        let tiles = compiler.product(&case.product);
        let (cycles, step) = steps(&case, &tiles, &read(Folder::new(&folder), "matmul"));
        let weights = case.product.weights;
        let (experts, visits) = (case.experts, case.visits(&tiles));
        let bytes = experts * weights.matrix_bytes() as f64;
        let hbm = bytes / BYTES_PER_CYCLE;
        let narrow = if case.product.activations == Activations::Int8 { 2.0 } else { 1.0 };
        let pushed = visits * (weights.inputs * weights.outputs) as f64 / narrow;
        let mxu = (pushed * tiles.rows as f64 / MACS_PER_CYCLE).max(pushed / PUSHED_PER_CYCLE);
        let floor = hbm.max(mxu);
        let ratio = cycles / floor;
        let kernel = (cycles.max(hbm) + step + LATENCY + ENDS) / floor;
        writeln!(table, "{:28} {cycles:9.0} {hbm:9.0} {mxu:9.0} {ratio:7.2} {kernel:7.2}", case.name).unwrap();
        if ratio > case.limit {
            slow.push(format!("{}: {ratio:.2} of its floor, more than {} ({tiles})", case.name, case.limit));
        }
    }
    println!("{table}");
    assert!(slow.is_empty(), "{}", slow.join("\n"));
}
