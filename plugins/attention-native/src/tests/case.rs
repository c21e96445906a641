//! A batch, the program for it, and what should come out.

use std::{
    fmt::Write,
    ops::Range,
    path::PathBuf,
    sync::{Arc, OnceLock},
};

use half::bf16;
use rand::{RngExt, SeedableRng, seq::SliceRandom};
use rand_chacha::ChaCha8Rng;
use torus_abi::{
    DType, TensorType,
    attention::{AttentionQuery, EmitAttention, Target},
    fragment::{Export, Fragment, Operand},
    model::AttentionSpec,
    step::{StepInput, StepShape},
};
use torus_pjrt::{Buffer, Client, CompileOptions, ElementType, LoadedExecutable, MemoryStats, Plugin};

use crate::graph;

#[derive(Clone, Copy)]
pub struct Sequence {
    /// Tokens in the cache before the step.
    pub cached: usize,
    pub new: usize,
    /// The sequence whose whole cached pages come first in this one too.
    pub shares: Option<usize>,
}

#[derive(Clone)]
pub struct Case {
    pub seed: u64,
    pub q_heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub page_size: usize,
    pub window: Option<u64>,
    pub soft_cap: Option<f32>,
    pub dtype: DType,
    pub kv_dtype: DType,
    /// Of keys and of values, in a cache of 8 bits.
    pub scales: [f32; 2],
    pub sequences: Vec<Sequence>,
    /// Tokens past the last real one.
    pub padding: usize,
    /// Pages that no sequence owns.
    pub pages_spare: usize,
}

impl Default for Case {
    fn default() -> Self {
        Self {
            seed: 1,
            q_heads: 4,
            kv_heads: 2,
            head_dim: 8,
            page_size: 16,
            window: None,
            soft_cap: None,
            dtype: DType::F32,
            kv_dtype: DType::F32,
            scales: [0.5, 0.003],
            sequences: Vec::new(),
            padding: 0,
            pages_spare: 1,
        }
    }
}

/// K and V of all slots.
pub type Pool = [Vec<f32>; 2];

/// The step inputs.
struct Inputs {
    positions: Vec<i32>,
    token_seq: Vec<i32>,
    kv_slot: Vec<i32>,
    page_begin: Vec<i32>,
    page_table: Vec<i32>,
}

impl Case {
    /// Runs the whole step and compares rows and pools.
    pub fn check(&self) {
        let tokens = self.tokens();
        let before = self.pool();
        let inputs = self.inputs(0..tokens);
        let rows = self.rows();
        let (attended, pool) = self.execute(&before, &inputs, &rows);
        let expected = self.reference(before, &inputs, &rows);
        let width = self.q_heads * self.head_dim;
        assert_close(&attended[..tokens * width], &expected.0, if self.dtype == DType::Bf16 { 2e-2 } else { 1e-5 });
        assert!(attended.iter().all(|value| value.is_finite()), "padding is not finite");
        let trash = self.page_size * self.kv_heads * self.head_dim;
        for (found, expected) in pool.iter().zip(&expected.1) {
            assert_eq!(found[trash..], expected[trash..]);
        }
    }

    /// Runs the whole step with NaN in every slot that no token may see, as a request that went wrong leaves them.
    pub fn check_beside_nan(&self) {
        let (inputs, rows, noise) = (self.inputs(0..self.tokens()), self.rows(), self.pool());
        let width = self.kv_heads * self.head_dim;
        let mut before = noise.clone().map(|part| vec![f32::NAN; part.len()]);
        for (sequence, begin) in self.sequences.iter().zip(&inputs.page_begin) {
            for position in 0..sequence.cached {
                let page = inputs.page_table[*begin as usize + position / self.page_size] as usize;
                let slot = (page * self.page_size + position % self.page_size) * width;
                for part in 0..2 {
                    before[part][slot..slot + width].copy_from_slice(&noise[part][slot..slot + width]);
                }
            }
        }
        let (attended, _) = self.execute(&before, &inputs, &rows);
        let expected = self.reference(before, &inputs, &rows).0;
        assert_close(&attended[..expected.len()], &expected, 1e-5);
    }

    /// Runs some of the tokens of a single sequence on a pool.
    pub fn run_from(&self, pool: Pool, part: Range<usize>) -> (Vec<f32>, Pool) {
        let widths = [self.q_heads, self.kv_heads, self.kv_heads].map(|heads| heads * self.head_dim);
        let all = self.rows();
        let rows = std::array::from_fn(|i| all[i][part.start * widths[i]..part.end * widths[i]].to_vec());
        self.execute(&pool, &self.inputs(part), &rows)
    }

    pub fn memory(&self) -> MemoryStats {
        self.compile(self.tokens()).memory_stats().unwrap()
    }

    pub fn pool_bytes(&self) -> u64 {
        let slots = self.pages() * self.page_size;
        let scales = if self.kv_dtype == DType::F8E4M3 { size_of_val(&self.scales) } else { 0 };
        (2 * slots * self.kv_heads * self.head_dim * self.kv_dtype.bytes() + scales) as u64
    }

    pub fn page_table_len(&self) -> usize {
        self.sequences.iter().map(|s| (s.cached + s.new).div_ceil(self.page_size)).sum()
    }

    pub fn query(&self, tokens: usize) -> AttentionQuery {
        AttentionQuery {
            spec: AttentionSpec {
                q_heads: self.q_heads as u64,
                kv_heads: self.kv_heads as u64,
                head_dim: self.head_dim as u64,
                scale: (self.head_dim as f32).sqrt().recip(),
                window: self.window,
                soft_cap: self.soft_cap,
            },
            dtype: self.dtype,
            kv_dtype: self.kv_dtype,
            shape: StepShape {
                tokens: tokens as u64,
                seqs: (self.sequences.len() + 1).min(tokens).max(self.sequences.len()) as u64,
                page_size: self.page_size as u64,
                pages: self.pages() as u64,
                page_table: self.page_table_len() as u64,
            },
            target: Target { platform: "cpu".into(), device_kind: String::new() },
            sets_scales: true,
        }
    }

    /// Contents of the pools before the step: noise, also where nobody owns it.
    pub fn pool(&self) -> Pool {
        let len = self.pages() * self.page_size * self.kv_heads * self.head_dim;
        [0, 1].map(|part| {
            let numbers = noise(self.seed * 10 + part as u64 + 1, len, DType::F32);
            numbers.into_iter().map(|number| self.kept(part, number)).collect()
        })
    }

    /// What a number becomes in the cache of keys or of values.
    fn kept(&self, part: usize, number: f32) -> f32 {
        match self.kv_dtype {
            DType::F8E4M3 => self.decode(part, self.encode(part, number)),
            dtype => rounded(number, dtype),
        }
    }

    fn encode(&self, part: usize, number: f32) -> u8 {
        let scaled = number * self.scales[part].recip();
        let distance = |byte: &u8| ((f8(*byte) - scaled.abs()).abs(), byte & 1);
        let nearest = (0..=0x7E).min_by(|a, b| distance(a).partial_cmp(&distance(b)).unwrap()).unwrap();
        nearest | if scaled.is_sign_negative() { 0x80 } else { 0 }
    }

    fn decode(&self, part: usize, byte: u8) -> f32 {
        f8(byte) * self.scales[part]
    }

    /// Q, K and V of the new tokens and of the padding.
    fn rows(&self) -> [Vec<f32>; 3] {
        let tokens = self.tokens() + self.padding;
        let heads = [(3, self.q_heads), (4, self.kv_heads), (5, self.kv_heads)];
        heads.map(|(part, heads)| noise(self.seed * 10 + part, tokens * heads * self.head_dim, self.dtype))
    }

    fn tokens(&self) -> usize {
        self.sequences.iter().map(|sequence| sequence.new).sum()
    }

    fn pages(&self) -> usize {
        1 + self.pages_spare + self.page_table_len()
    }

    /// The inputs for a part of the tokens, with the padding.
    fn inputs(&self, part: Range<usize>) -> Inputs {
        let mut free: Vec<i32> = (1..self.pages() as i32).collect();
        free.shuffle(&mut ChaCha8Rng::seed_from_u64(self.seed));
        let mut tables: Vec<Vec<i32>> = Vec::new();
        for sequence in &self.sequences {
            let shared = sequence.shares.map_or(vec![], |i| tables[i][..sequence.cached / self.page_size].to_vec());
            let rest = (sequence.cached + sequence.new).div_ceil(self.page_size) - shared.len();
            tables.push([shared, free.split_off(free.len() - rest)].concat());
        }
        let (mut positions, mut token_seq, mut kv_slot) = (vec![], vec![], vec![]);
        for (i, sequence) in self.sequences.iter().enumerate() {
            for position in sequence.cached..sequence.cached + sequence.new {
                positions.push(position as i32);
                token_seq.push(i as i32);
                let page = tables[i][position / self.page_size];
                kv_slot.push(page * self.page_size as i32 + (position % self.page_size) as i32);
            }
        }
        for tokens in [&mut positions, &mut token_seq, &mut kv_slot] {
            *tokens = tokens[part.clone()].to_vec();
            tokens.resize(part.len() + self.padding, 0);
        }
        let mut begin = 0;
        let mut page_begin = Vec::new();
        for table in &tables {
            page_begin.push(begin);
            begin += table.len() as i32;
        }
        page_begin.resize(self.query(positions.len()).shape.seqs as usize, 0);
        Inputs { positions, token_seq, kv_slot, page_begin, page_table: tables.concat() }
    }

    fn reference(&self, mut pool: Pool, inputs: &Inputs, rows: &[Vec<f32>; 3]) -> (Vec<f32>, Pool) {
        let (kv, dim) = (self.kv_heads, self.head_dim);
        let width = kv * dim;
        for (token, slot) in inputs.kv_slot.iter().enumerate() {
            for part in 0..2 {
                let row = rows[part + 1][token * width..][..width].iter();
                let row: Vec<_> = row.map(|value| self.kept(part, *value)).collect();
                pool[part][*slot as usize * width..][..width].copy_from_slice(&row);
            }
        }
        let mut attended = Vec::new();
        for token in 0..self.tokens() {
            let (position, begin) =
                (inputs.positions[token] as usize, inputs.page_begin[inputs.token_seq[token] as usize] as usize);
            let first = self.window.map_or(0, |window| (position + 1).saturating_sub(window as usize));
            for head in 0..self.q_heads {
                let query = &rows[0][(token * self.q_heads + head) * dim..][..dim];
                let row = |part: usize, position: usize| {
                    let page = inputs.page_table[begin + position / self.page_size] as usize;
                    let slot = page * self.page_size + position % self.page_size;
                    &pool[part][slot * width + head / (self.q_heads / kv) * dim..][..dim]
                };
                let score = |position| {
                    let dot: f32 = query.iter().zip(row(0, position)).map(|(a, b)| a * b).sum();
                    let score = dot / (dim as f32).sqrt();
                    self.soft_cap.map_or(score, |cap| cap * (score / cap).tanh())
                };
                let scores: Vec<f32> = (first..=position).map(score).collect();
                let peak = scores.iter().copied().fold(f32::MIN, f32::max);
                let weights: Vec<f32> = scores.iter().map(|score| (score - peak).exp()).collect();
                let total: f32 = weights.iter().sum();
                let weighted = |d: usize| -> f32 {
                    weights.iter().enumerate().map(|(i, weight)| weight * row(1, first + i)[d]).sum()
                };
                attended.extend((0..dim).map(|d| weighted(d) / total));
            }
        }
        (attended, pool)
    }

    fn execute(&self, pool: &Pool, inputs: &Inputs, rows: &[Vec<f32>; 3]) -> (Vec<f32>, Pool) {
        let tokens = inputs.positions.len();
        let program = self.compile(tokens);
        let Inputs { positions, token_seq, kv_slot, page_begin, page_table } = inputs;
        let integers = [positions, token_seq, kv_slot, page_begin, page_table].map(|values| integer_buffer(values));
        let heads = [self.q_heads, self.kv_heads, self.kv_heads];
        let rows = [0, 1, 2].map(|i| float_buffer(&rows[i], self.dtype, &[tokens, heads[i], self.head_dim]));
        let dims = [self.pages() * self.page_size, self.kv_heads, self.head_dim];
        let eight_bits = self.kv_dtype == DType::F8E4M3;
        let bytes = |part: usize| pool[part].iter().map(|number| self.encode(part, *number)).collect::<Vec<_>>();
        let pools = [0, 1].map(|part| match eight_bits {
            true => buffer(&bytes(part), ElementType::U8, &dims),
            false => float_buffer(&pool[part], self.kv_dtype, &dims),
        });
        let scales = eight_bits.then(|| float_buffer(&self.scales, DType::F32, &[2]));
        let arguments: Vec<_> = integers.iter().chain(&rows).chain(&pools).chain(&scales).collect();
        let outputs = program.execute(&arguments).unwrap().outputs;
        let found = |part: usize| match eight_bits {
            true => outputs[1 + part].to_host_vec().unwrap().iter().map(|byte| self.decode(part, *byte)).collect(),
            false => read(&outputs[1 + part], self.kv_dtype),
        };
        if eight_bits {
            assert_eq!(read(&outputs[3], DType::F32), self.scales);
        }
        (read(&outputs[0], self.dtype), [found(0), found(1)])
    }

    /// `(step inputs…, query, key, value, pool…) -> (attended, pool…)`, with the pools updated in place.
    fn compile(&self, tokens: usize) -> LoadedExecutable {
        let query = self.query(tokens);
        let fragment = graph::emit(&EmitAttention { kind: 0, query }).unwrap();
        let text = main_text(&fragment);
        client().compile(&text, &CompileOptions::default()).unwrap()
    }
}

/// The fragment's functions and a `@main` that calls both exports.
fn main_text(fragment: &Fragment) -> String {
    let (context, attention) = (&fragment.exports["context"], &fragment.exports["attention"]);
    let types = |export: &Export| {
        let function = fragment.functions.iter().find(|function| function.symbol == export.symbol).unwrap();
        (function.arguments.clone(), function.results.clone())
    };
    let mlir = |types: &[TensorType]| types.iter().map(TensorType::mlir).collect::<Vec<_>>().join(", ");
    let (inputs, parts) = types(context);
    let (arguments, results) = types(attention);
    let own = arguments.len() - parts.len();
    let mut main = Vec::new();
    for (i, tensor) in inputs.iter().chain(&arguments[..own]).enumerate() {
        let pool = (i + results.len() - 1).checked_sub(inputs.len() + own);
        let alias = pool.map_or(String::new(), |part| format!(" {{tf.aliasing_output = {} : i32}}", part + 1));
        main.push(format!("%a{i}: {}{alias}", tensor.mlir()));
    }
    assert_eq!(context.arguments, graph::INPUTS.map(Operand::Step));
    assert_eq!(graph::INPUTS[4], StepInput::PageTable);
    let mut text =
        String::from("module @test attributes {mhlo.num_partitions = 1 : i32, mhlo.num_replicas = 1 : i32} {\n");
    for function in &fragment.functions {
        text.push_str(&function.text);
    }
    let names = |range: Range<usize>| range.map(|i| format!("%a{i}")).collect::<Vec<_>>().join(", ");
    let passed: Vec<_> = (0..parts.len()).map(|i| format!("%c#{i}")).collect();
    let returned: Vec<_> = (0..results.len()).map(|i| format!("%r#{i}")).collect();
    writeln!(text, "func.func public @main({}) -> ({}) {{", main.join(", "), mlir(&results)).unwrap();
    writeln!(
        text,
        "%c:{} = func.call @\"{}\"({}) : ({}) -> ({})",
        parts.len(),
        context.symbol,
        names(0..inputs.len()),
        mlir(&inputs),
        mlir(&parts)
    )
    .unwrap();
    writeln!(
        text,
        "%r:{} = func.call @\"{}\"({}, {}) : ({}) -> ({})",
        results.len(),
        attention.symbol,
        names(inputs.len()..inputs.len() + own),
        passed.join(", "),
        mlir(&arguments),
        mlir(&results)
    )
    .unwrap();
    writeln!(text, "func.return {} : {}\n}}\n}}", returned.join(", "), mlir(&results)).unwrap();
    text
}

pub fn assert_close(found: &[f32], expected: &[f32], tolerance: f32) {
    assert_eq!(found.len(), expected.len());
    for (i, (found, expected)) in found.iter().zip(expected).enumerate() {
        let error = (found - expected).abs();
        assert!(error <= tolerance * (1.0 + expected.abs()), "at {i}: {found} against {expected}");
    }
}

fn client() -> &'static Client {
    static CLIENT: OnceLock<Client> = OnceLock::new();
    CLIENT.get_or_init(|| {
        let home = || PathBuf::from(std::env::var_os("HOME").unwrap_or_default()).join(".cache");
        let base = || std::env::var_os("XDG_CACHE_HOME").map_or_else(home, PathBuf::from).join("torus");
        let cache = std::env::var_os("TORUS_CACHE").map_or_else(base, PathBuf::from);
        let path = cache.join("pjrt/lammps-jax-pjrt-cpu-0.11.2/pjrt_c_api_cpu_plugin.so");
        assert!(path.exists(), "{} is missing: run .make/setup.sh test", path.display());
        let plugin: Arc<Plugin> = Plugin::load(path).unwrap();
        Client::new(&plugin, &[]).unwrap()
    })
}

/// Seeded values in -1..1 that `dtype` represents.
fn noise(seed: u64, len: usize, dtype: DType) -> Vec<f32> {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    (0..len).map(|_| rounded(random.random_range(-1.0..1.0), dtype)).collect()
}

/// What eight bits stand for as `f8e4m3fn`.
fn f8(byte: u8) -> f32 {
    let (exponent, mantissa) = (i32::from(byte >> 3 & 0xF), f32::from(byte & 7));
    let magnitude = match exponent {
        0 => mantissa * 2f32.powi(-9),
        _ => (8.0 + mantissa) * 2f32.powi(exponent - 10),
    };
    if byte & 0x80 != 0 { -magnitude } else { magnitude }
}

fn rounded(value: f32, dtype: DType) -> f32 {
    if dtype == DType::Bf16 { bf16::from_f32(value).to_f32() } else { value }
}

fn buffer(bytes: &[u8], element: ElementType, dims: &[usize]) -> Buffer {
    let dims: Vec<_> = dims.iter().map(|dim| *dim as i64).collect();
    client().buffer_from_host(bytes, element, &dims, &client().devices().unwrap()[0]).unwrap()
}

fn integer_buffer(values: &[i32]) -> Buffer {
    let bytes: Vec<_> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
    buffer(&bytes, ElementType::S32, &[values.len()])
}

fn float_buffer(values: &[f32], dtype: DType, dims: &[usize]) -> Buffer {
    let half = || values.iter().flat_map(|value| bf16::from_f32(*value).to_le_bytes()).collect::<Vec<_>>();
    match dtype {
        DType::Bf16 => buffer(&half(), ElementType::BF16, dims),
        _ => buffer(&values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<_>>(), ElementType::F32, dims),
    }
}

fn read(buffer: &Buffer, dtype: DType) -> Vec<f32> {
    let bytes = buffer.to_host_vec().unwrap();
    match dtype {
        DType::Bf16 => bytes.chunks_exact(2).map(|c| bf16::from_le_bytes([c[0], c[1]]).to_f32()).collect(),
        _ => bytes.chunks_exact(4).map(|c| f32::from_le_bytes([c[0], c[1], c[2], c[3]])).collect(),
    }
}
