//! Default bodies of coarse imports, run with plain definitions of the finer ones.

use torus_abi::{
    TensorType,
    fragment::{Activation, Fragment, Import, Operand, Operation, WeightHandle},
    model::{HostImports, StateHandle},
    step::{StepInput, StepShape},
};

use super::device::{Tensor, assert_close, execute, noise};
use crate::{AttentionBlock, Axis, Builder, Callee, DType, Func, GatedMlp, Heads, Shape, Value, axes::*, module_text};

const TOKEN_COUNT: u64 = 3;
const WIDTH: u64 = 8;
const HEADS: Heads = Heads { q_heads: 4, kv_heads: 2, head_dim: 4 };
const EPS: f32 = 1e-5;

fn plain(dims: &[u64]) -> WeightHandle {
    WeightHandle { parts: vec![TensorType::new(DType::F32, dims)], storage: "f32".into() }
}

/// Defines the imports of a fragment as plain StableHLO, coarse ones by their default, and calls its export.
fn link_and_run(fragment: &Fragment, export: &str, inputs: &[Tensor]) -> Vec<Tensor> {
    let host = Builder::new("host");
    for import in &fragment.imports {
        host.define(&import.symbol, |f| define(f, import));
    }
    let symbol = &fragment.exports[export].symbol;
    let exported = fragment.functions.iter().find(|function| function.symbol == *symbol).unwrap();
    let callee = Callee::external(symbol, &exported.arguments, &exported.results);
    let main = host.main(|f| {
        let arguments: Vec<_> = exported.arguments.iter().map(|tensor| f.argument(Shape::opaque(tensor))).collect();
        f.call(&callee, &arguments)
    });
    let host = host.finish().unwrap();
    let text = module_text("linked", 1, host.functions.iter().chain(&fragment.functions));
    execute(&text, &[inputs], &main.results).remove(0)
}

fn define<'f>(f: &'f Func<'f>, import: &Import) -> Vec<Value<'f>> {
    let v: Vec<_> = import.arguments.iter().map(|tensor| f.argument(Shape::opaque(tensor))).collect();
    match &import.operation {
        Operation::Linear { bias, residual, .. } => {
            let mut y = v[0].named(&[ROWS, HIDDEN]).dot(v[1].named(&[VOCAB, HIDDEN]), HIDDEN);
            let mut rest = v[2..].iter();
            if bias.is_some() {
                y = y + rest.next().unwrap().named(&[VOCAB]);
            }
            if *residual {
                y = y + rest.next().unwrap().named(&[ROWS, VOCAB]);
            }
            vec![y]
        }
        // Not attention, but a function of everything it is given.
        Operation::Attention { .. } => {
            let q = v[0].named(&[TOKENS, Q_HEADS, HEAD_DIM]).split(Q_HEADS, &[(KV_HEADS, 2), (GROUP, 2)]);
            let (k, value) = (v[1].named(&[TOKENS, KV_HEADS, HEAD_DIM]), v[2].named(&[TOKENS, KV_HEADS, HEAD_DIM]));
            let mixed = (q * k + value).merge(&[KV_HEADS, GROUP], Q_HEADS);
            let context = v[4].convert(DType::F32);
            vec![mixed * context, v[3] + 1]
        }
        _ => {
            let default = import.default.as_ref().unwrap();
            f.call(&Callee::external(default, &import.arguments, &import.results), &v)
        }
    }
}

fn rms_norm(x: &[f32], weight: &[f32]) -> Vec<f32> {
    let row = |row: &[f32]| -> Vec<f32> {
        let mean = row.iter().map(|x| x * x).sum::<f32>() / row.len() as f32;
        row.iter().zip(weight).map(|(x, w)| x / (mean + EPS).sqrt() * w).collect()
    };
    x.chunks(weight.len()).flat_map(row).collect()
}

/// `x · wᵀ` for rows of `inner` elements.
fn linear(x: &[f32], w: &[f32], inner: usize) -> Vec<f32> {
    let product = |x: &[f32], w: &[f32]| x.iter().zip(w).map(|(a, b)| a * b).sum::<f32>();
    x.chunks(inner).flat_map(|x| w.chunks(inner).map(|w| product(x, w)).collect::<Vec<_>>()).collect()
}

fn tensor(dims: &[u64], values: &[f32]) -> Tensor {
    let axes: Vec<_> = dims.iter().enumerate().map(|(i, dim)| (Axis::anonymous(i), *dim)).collect();
    Tensor::new(&axes, values)
}

/// Whether a block has the norms that not every host knows, and whether this one does.
const VARIANTS: [(bool, HostImports); 3] = [
    (false, HostImports { block_norms: false }),
    (true, HostImports { block_norms: false }),
    (true, HostImports { block_norms: true }),
];

/// `x + y`, with `y` normalized if there is a norm.
fn added(x: &[f32], y: &[f32], norm: Option<&[f32]>) -> Vec<f32> {
    let y = norm.map_or(y.to_vec(), |norm| rms_norm(y, norm));
    x.iter().zip(y).map(|(x, y)| x + y).collect()
}

#[test]
fn the_gated_mlp_is_what_its_operation_says() {
    let inner = 5;
    let (x, norm, post_norm) = (noise(24, 1), noise(8, 2), noise(8, 5));
    let (gate_up, down) = (noise(80, 3), noise(40, 4));
    for (has_norm, host) in VARIANTS {
        let builder = Builder::new("toy");
        builder.export("mlp", |f| {
            let x = f.input(Operand::Hidden, Shape::new(DType::F32, [(TOKENS, TOKEN_COUNT), (HIDDEN, WIDTH)]));
            let mlp = GatedMlp {
                norm: f.weight("norm", &plain(&[WIDTH]), &[WIDTH]),
                gate_up: f.weight("gate_up", &plain(&[2 * inner, WIDTH]), &[2 * inner, WIDTH]),
                down: f.weight("down", &plain(&[WIDTH, inner]), &[WIDTH, inner]),
                activation: Activation::Silu,
                norm_eps: EPS,
                post_norm: has_norm.then(|| f.weight("post_norm", &plain(&[WIDTH]), &[WIDTH])),
            };
            vec![(Operand::Hidden, x.gated_mlp(&mlp, host))]
        });
        let fragment = builder.finish().unwrap();
        assert_eq!(fragment.imports.iter().any(|import| import.default.is_some()), !has_norm || host.block_norms);
        let mut inputs =
            vec![tensor(&[3, 8], &x), tensor(&[8], &norm), tensor(&[10, 8], &gate_up), tensor(&[8, 5], &down)];
        inputs.extend(has_norm.then(|| tensor(&[8], &post_norm)));
        let out = link_and_run(&fragment, "mlp", &inputs);

        let both = linear(&rms_norm(&x, &norm), &gate_up, 8);
        let silu = |x: f32| x / (1.0 + (-x).exp());
        let act: Vec<f32> = both.chunks(10).flat_map(|row| (0..5).map(|i| silu(row[i]) * row[5 + i])).collect();
        let expected = added(&x, &linear(&act, &down, 5), has_norm.then_some(&post_norm));
        assert_close(&out[0].values::<f32>(), &expected, 1e-5);
    }
}

fn attention_fragment(has_norms: bool, host: HostImports) -> Fragment {
    let state =
        StateHandle { pool: vec![TensorType::new(DType::F32, [2, 2])], context: vec![TensorType::new(DType::I32, [])] };
    let builder = Builder::new("toy");
    builder.export("block", |f| {
        let x = f.input(Operand::Hidden, Shape::new(DType::F32, [(TOKENS, TOKEN_COUNT), (HIDDEN, WIDTH)]));
        let table = Shape::new(DType::F32, [(TOKENS, TOKEN_COUNT), (ROTARY, 2)]);
        let vector = |name: &str, len: u64| has_norms.then(|| f.weight(name, &plain(&[len]), &[len]));
        let block = AttentionBlock {
            norm: f.weight("norm", &plain(&[8]), &[8]),
            qkv: f.weight("qkv", &plain(&[32, 8]), &[32, 8]),
            qkv_bias: Some(f.weight("qkv_bias", &plain(&[32]), &[32])),
            o: f.weight("o", &plain(&[8, 16]), &[8, 16]),
            cos: f.input(Operand::Query, table.clone()),
            sin: f.input(Operand::Key, table),
            pool: f.pool(0, &state),
            context: f.context(0, &state),
            kind: 0,
            heads: HEADS,
            norm_eps: EPS,
            head_norms: vector("q_norm", 4).zip(vector("k_norm", 4)).map(<[_; 2]>::from),
            o_bias: vector("o_bias", 8),
            post_norm: vector("post_norm", 8),
        };
        let (y, pool) = f.attention_block(x, &block, host);
        vec![(Operand::Hidden, y), (Operand::Pool { layer: 0, part: 0 }, pool[0])]
    });
    builder.finish().unwrap()
}

#[test]
fn the_attention_block_is_what_its_operation_says() {
    let (x, norm, qkv, bias, o) = (noise(24, 1), noise(8, 2), noise(256, 3), noise(32, 4), noise(128, 5));
    let (cos, sin, pool) = (noise(6, 6), noise(6, 7), noise(4, 8));
    let (q_norm, k_norm, o_bias, post_norm) = (noise(4, 9), noise(4, 10), noise(8, 11), noise(8, 12));
    for (has_norms, host) in VARIANTS {
        let fragment = attention_fragment(has_norms, host);
        assert_eq!(fragment.imports.iter().any(|import| import.default.is_some()), !has_norms || host.block_norms);
        let mut inputs = vec![
            tensor(&[3, 8], &x),
            tensor(&[8], &norm),
            tensor(&[32, 8], &qkv),
            tensor(&[32], &bias),
            tensor(&[8, 16], &o),
            tensor(&[3, 2], &cos),
            tensor(&[3, 2], &sin),
            tensor(&[2, 2], &pool),
            Tensor::new(&[], &[7]),
        ];
        if has_norms {
            inputs.extend([tensor(&[4], &q_norm), tensor(&[4], &k_norm)]);
            inputs.extend([tensor(&[8], &o_bias), tensor(&[8], &post_norm)]);
        }
        let out = link_and_run(&fragment, "block", &inputs);

        let mut joint = linear(&rms_norm(&x, &norm), &qkv, 8);
        joint.iter_mut().enumerate().for_each(|(i, y)| *y += bias[i % 32]);
        let mut attended = Vec::new();
        for (t, row) in joint.chunks(32).enumerate() {
            let turned = |head: usize| {
                let (x, cos, sin) = (&row[head * 4..][..4], &cos[t * 2..][..2], &sin[t * 2..][..2]);
                let x = if has_norms { rms_norm(x, if head < 4 { &q_norm } else { &k_norm }) } else { x.to_vec() };
                let first = |i: usize| x[i] * cos[i] - x[2 + i] * sin[i];
                let second = |i: usize| x[2 + i] * cos[i] + x[i] * sin[i];
                [first(0), first(1), second(0), second(1)]
            };
            for head in 0..4 {
                let (q, k, v) = (turned(head), turned(4 + head / 2), &row[(6 + head / 2) * 4..][..4]);
                attended.extend((0..4).map(|i| (q[i] * k[i] + v[i]) * 7.0));
            }
        }
        let mut y = linear(&attended, &o, 16);
        if has_norms {
            y.iter_mut().enumerate().for_each(|(i, y)| *y += o_bias[i % 8]);
        }
        let expected = added(&x, &y, has_norms.then_some(&post_norm));
        assert_close(&out[0].values::<f32>(), &expected, 2e-5);
        assert_close(&out[1].values::<f32>(), &pool.iter().map(|x| x + 1.0).collect::<Vec<_>>(), 1e-6);
    }
}

#[test]
fn arguments_of_the_attention_block_come_in_the_documented_order() {
    let fragment = attention_fragment(false, HostImports::default());
    let named = |op: &str| fragment.imports.iter().find(|import| import.symbol.contains(op)).unwrap();
    let types: Vec<_> = named("attention_block").arguments.iter().map(ToString::to_string).collect();
    assert_eq!(types.join(" "), "f32[3,8] f32[8] f32[32,8] f32[32] f32[8,16] f32[3,2] f32[3,2] f32[2,2] i32[]");
    let types: Vec<_> = named("attention.").arguments.iter().map(ToString::to_string).collect();
    assert_eq!(types.join(" "), "f32[3,4,4] f32[3,2,4] f32[3,2,4] f32[2,2] i32[]");
    let default = named("attention_block").default.as_ref().unwrap();
    let body = fragment.functions.iter().find(|function| function.symbol == *default).unwrap();
    assert_eq!(
        (&body.arguments, &body.results),
        (&named("attention_block").arguments, &named("attention_block").results)
    );
    let calls = ["toy.import.attention.0", "toy.import.linear.0", "toy.import.linear.1"];
    assert_eq!(body.calls, calls);
    let fragment = attention_fragment(true, HostImports { block_norms: true });
    let block = fragment.imports.iter().find(|import| import.symbol.contains("attention_block")).unwrap();
    let types: Vec<_> = block.arguments[5..].iter().map(ToString::to_string).collect();
    assert_eq!(types.join(" "), "f32[3,2] f32[3,2] f32[4] f32[4] f32[8] f32[8] f32[2,2] i32[]");
}

#[test]
fn step_inputs_have_names_and_meanings() {
    let shape = StepShape { tokens: 8, seqs: 3, page_size: 16, pages: 10, page_table: 20 };
    let inputs = [StepInput::KvSlot, StepInput::CuQLens, StepInput::KvLens, StepInput::PageTable, StepInput::NumSeqs];
    let builder = Builder::new("native");
    let callee = builder.export("context", |f| {
        inputs.iter().for_each(|input| _ = f.step(*input, &shape));
        vec![]
    });
    let shapes: Vec<_> = callee.arguments.iter().map(ToString::to_string).collect();
    assert_eq!(shapes, ["i32[tokens=8]", "i32[seq_bounds=4]", "i32[seqs=3]", "i32[page_table=20]", "i32[]"]);
    let export = &builder.finish().unwrap().exports["context"];
    assert_eq!(export.arguments, inputs.map(Operand::Step));
}
