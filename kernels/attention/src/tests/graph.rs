//! The graphs on the CPU against the plain computations.

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use torus_hlo::{Axis, Builder, DType, Func, Shape as Tensor, Value, module_text};
use torus_pjrt::{Client, CompileOptions, ElementType, LoadedExecutable, OptionValue, Plugin};

use super::{decode::spec, tpu::pjrt};
use crate::{
    KvFormat, Layout, Queue, Scales, Shape, Spec,
    graph::{self, Glue},
    layout::{LANES, Part},
    queue::Sequence,
};

struct Cpu(Client);

/// A tensor's type and bytes.
type Input = (Tensor, Vec<u8>);

impl Cpu {
    fn new() -> Self {
        let plugin = Plugin::load(pjrt("lammps-jax-pjrt-cpu-0.11.2/pjrt_c_api_cpu_plugin.so")).unwrap();
        Self(Client::new(&plugin, &[("cpu_device_count".to_owned(), OptionValue::Int(1))]).unwrap())
    }

    /// Compiles a graph over these inputs.
    fn compile(
        &self,
        inputs: &[Input],
        body: impl for<'f> FnOnce(&'f Func<'f>, &[Value<'f>]) -> Vec<Value<'f>>,
    ) -> LoadedExecutable {
        let builder = Builder::new("test");
        builder.main(|f| {
            let arguments: Vec<_> = inputs.iter().map(|(shape, _)| f.argument(shape.clone())).collect();
            body(f, &arguments)
        });
        let text = module_text("test", 1, &builder.finish().unwrap().functions);
        self.0.compile(&text, &CompileOptions::default()).unwrap_or_else(|error| panic!("{error}\n{text}"))
    }

    /// The results' bytes.
    fn run(&self, executable: &LoadedExecutable, inputs: &[Input]) -> Vec<Vec<u8>> {
        let devices = self.0.devices().unwrap();
        let upload = |(shape, bytes): &Input| {
            let dims: Vec<_> = shape.dims().map(|dim| dim as i64).collect();
            let element = match shape.dtype {
                DType::I32 => ElementType::S32,
                DType::F32 => ElementType::F32,
                dtype => panic!("{dtype}"),
            };
            self.0.buffer_from_host(bytes, element, &dims, &devices[0]).unwrap()
        };
        let buffers: Vec<_> = inputs.iter().map(upload).collect();
        let results = executable.execute(&buffers.iter().collect::<Vec<_>>()).unwrap();
        results.outputs.iter().map(|buffer| buffer.to_host_vec().unwrap()).collect()
    }
}

const A: Axis = Axis("a");
const B: Axis = Axis("b");
const C: Axis = Axis("c");

fn ints(numbers: &[i32]) -> Input {
    (Tensor::new(DType::I32, [(A, numbers.len() as u64)]), numbers.iter().flat_map(|x| x.to_le_bytes()).collect())
}

fn read_ints(bytes: &[u8]) -> Vec<i32> {
    bytes.chunks_exact(4).map(|word| i32::from_le_bytes(word.try_into().unwrap())).collect()
}

fn read_floats(bytes: &[u8]) -> Vec<f32> {
    bytes.chunks_exact(4).map(|word| f32::from_le_bytes(word.try_into().unwrap())).collect()
}

/// The step inputs of a batch: bounds, lengths, beginnings, table.
fn inputs(shape: &Shape, sequences: &[Sequence], random: &mut ChaCha8Rng) -> [Vec<i32>; 4] {
    let (mut bounds, mut lengths, mut begins, mut table) = (vec![0], Vec::new(), Vec::new(), Vec::new());
    for sequence in sequences {
        bounds.push(bounds.last().unwrap() + sequence.new as i32);
        lengths.push((sequence.old + sequence.new) as i32);
        // Entries of nobody between sequences, as where one has room to grow.
        table.extend((0..random.random_range(0..3)).map(|_| 7777));
        begins.push(table.len() as i32);
        table.extend(sequence.pages.iter().map(|page| *page as i32));
    }
    bounds.resize(shape.seqs + 1, *bounds.last().unwrap());
    lengths.resize(shape.seqs, 0);
    begins.resize(shape.seqs, 0);
    assert!(table.len() <= shape.page_table);
    table.resize(shape.page_table, 0);
    [bounds, lengths, begins, table]
}

fn sequences(shape: &Shape, random: &mut ChaCha8Rng) -> Vec<Sequence> {
    let count = random.random_range(0..=shape.seqs);
    let mut left = shape.tokens;
    let mut all = Vec::new();
    for _ in 0..count {
        let new = match random.random_range(0..6) {
            0 => 0,
            1 => random.random_range(1..40),
            2 => 2,
            _ => 1,
        };
        let new = new.min(left);
        left -= new;
        let old = [0, 1, 127, 128, 129, 256, random.random_range(0..700)][random.random_range(0..7)];
        let old = if random.random_range(0..40) == 0 { 200 * 128 + 3 } else { old };
        let pages = (0..(old + new).div_ceil(128).max(1)).map(|_| random.random_range(1..9999)).collect();
        all.push(Sequence { new, old, pages });
    }
    all
}

#[test]
fn the_queue_is_that_of_the_plain_computation() {
    let cpu = Cpu::new();
    let random = &mut ChaCha8Rng::seed_from_u64(3);
    for (window, draft, group) in [(None, 1, 4), (Some(1), 1, 2), (Some(200), 1, 8), (Some(1000), 4, 4), (None, 2, 6)] {
        let shape = Shape { tokens: 256, seqs: 48, pages: 10_000, page_table: 6000, draft };
        let spec = Spec { window, ..spec(8, 2, 128) };
        let sample = inputs(&shape, &[], random).map(|list| ints(&list));
        let executable = cpu.compile(&sample, |f, inputs| {
            let [cu_q_lens, kv_lens, page_begin, page_table] = [0, 1, 2, 3].map(|i| inputs[i]);
            let inputs = graph::Inputs { cu_q_lens, kv_lens, page_begin, page_table };
            graph::context(f, &spec, &shape, group, &inputs).unwrap()
        });
        for _ in 0..6 {
            let sequences = sequences(&shape, random);
            let expected = Queue::of(&spec, &shape, group, &sequences).unwrap();
            let given = inputs(&shape, &sequences, random).map(|list| ints(&list));
            let found = cpu.run(&executable, &given);
            let found: Vec<_> = found.iter().map(|bytes| read_ints(bytes)).collect();
            let Queue { counts, slots, chunks, items, pages } = expected;
            let names = ["counts", "slots", "chunks", "items", "pages"];
            let types = graph::context_types(&shape, group).unwrap();
            for (i, expected) in [counts, slots, chunks, items, pages].into_iter().enumerate() {
                assert_eq!(types[i].dims, [expected.len() as u64]);
                assert_eq!(found[i], expected, "{} of {sequences:?}, window {window:?}, draft {draft}", names[i]);
            }
        }
    }
}

#[test]
fn rows_are_reordered_as_the_layout_says() {
    let cpu = Cpu::new();
    let scales = Scales { keys: 0.03, values: 0.02 };
    let (int8, fp8) = (KvFormat::Int8 { scales }, KvFormat::Fp8 { scales });
    for (q_heads, kv_heads, head_dim, kv) in [
        (8, 2, 128, KvFormat::Bf16),
        (4, 4, 128, KvFormat::Bf16),
        (6, 3, 128, KvFormat::Bf16),
        (4, 1, 256, KvFormat::Bf16),
        (8, 4, 256, KvFormat::Bf16),
        (8, 2, 64, KvFormat::Bf16),
        (9, 3, 64, KvFormat::Bf16),
        (32, 8, 64, KvFormat::Bf16),
        (8, 2, 128, int8),
        (8, 2, 128, fp8),
        (8, 4, 64, fp8),
        (4, 2, 256, int8),
    ] {
        let spec = Spec { kv, ..spec(q_heads, kv_heads, head_dim) };
        let layout = Layout::new(&spec).unwrap();
        let tokens = 3;
        let random = &mut ChaCha8Rng::seed_from_u64(7);
        let mut rows = |heads: usize| {
            let numbers: Vec<f32> = (0..tokens * heads * head_dim)
                .map(|_| half::bf16::from_f32(random.random_range(-3.0..3.0f32)).to_f32())
                .collect();
            let shape = Tensor::new(DType::F32, [(A, tokens as u64), (B, heads as u64), (C, head_dim as u64)]);
            ((shape, numbers.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>()), numbers)
        };
        let ((query, q), (key, keys), (value, values)) = (rows(q_heads), rows(kv_heads), rows(kv_heads));
        let pair = [scales.keys, scales.values].iter().flat_map(|x| x.to_le_bytes()).collect();
        let given = [query, key, value, (Tensor::new(DType::F32, [(A, 2)]), pair)];
        // Half of those of 8 bits have scales that are only known at run time.
        let compiled = match kv {
            KvFormat::Int8 { .. } if head_dim != 128 => KvFormat::Int8 { scales: Scales::ONE },
            KvFormat::Fp8 { .. } if head_dim != 128 => KvFormat::Fp8 { scales: Scales::ONE },
            kv => kv,
        };
        let at_run_time = compiled != kv;
        let executable = cpu.compile(&given, |f, inputs| {
            let scales = at_run_time.then(|| inputs[3]);
            let glue = Glue { f, spec: &Spec { kv: compiled, ..spec.clone() }, layout: &layout, scales };
            let query = glue.query(inputs[0].named(&graph::QUERY_AXES));
            let [key, value] = [1, 2].map(|i| inputs[i].named(&graph::KEY_AXES));
            // Where queries and results have the same lanes, what comes back is what went in.
            let back = glue.attended(query).convert(DType::F32);
            vec![query.convert(DType::F32), glue.new_rows(key, value), back]
        });
        let found = cpu.run(&executable, &given);
        let (query, new, back) = (read_floats(&found[0]), read_ints(&found[1]), read_floats(&found[2]));
        let mut expected = vec![0.0; tokens * layout.units * layout.rows() * layout.width()];
        let scaled = |number: f32| half::bf16::from_f32(number * if at_run_time { scales.keys } else { 1.0 }).to_f32();
        for (i, number) in q.iter().enumerate() {
            let (token, head, dim) = (i / head_dim / q_heads, i / head_dim % q_heads, i % head_dim);
            let (unit, row) = layout.query_row(head);
            let row = (token * layout.units + unit) * layout.rows() + row;
            expected[row * layout.width() + layout.query_lane(head / spec.group()) + dim] = scaled(*number);
        }
        assert!(query == expected, "queries of {spec:?}");
        for token in 0..tokens {
            let part = token * kv_heads * head_dim..(token + 1) * kv_heads * head_dim;
            let words = layout.token_words(kv, &keys[part.clone()], &values[part]);
            for (row, words) in words.chunks(LANES).enumerate() {
                assert_eq!(
                    &new[(row * tokens + token) * LANES..][..LANES],
                    words,
                    "token {token}, row {row} of {spec:?}"
                );
            }
        }
        if layout.place(0, Part::Key, 0).lane == layout.place(0, Part::Value, 0).lane {
            let factor = if at_run_time { scales.values } else { 1.0 };
            let expected: Vec<_> = q.iter().map(|number| scaled(*number) * factor).collect();
            assert!(back == expected, "results of {spec:?}");
        }
    }
}
