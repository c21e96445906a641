use torus_mosaic::{Generation, Interpreter, RunOptions};

use super::{
    batch::Case,
    tpu::{Compiler, alone},
};
use crate::{KvFormat, Layout, Scales, Shape, Spec, Tuning};

pub fn spec(q_heads: usize, kv_heads: usize, head_dim: usize) -> Spec {
    Spec {
        q_heads,
        kv_heads,
        head_dim,
        kv: KvFormat::Bf16,
        page_size: 128,
        scale: (head_dim as f32).sqrt().recip(),
        window: None,
        soft_cap: None,
        sinks: false,
        mask: false,
        generation: Generation::V6e,
    }
}

const SMALL: Shape = Shape { tokens: 8, seqs: 8, pages: 48, page_table: 40, draft: 1 };

#[test]
fn decode_is_that_of_plain_loops() {
    let case = Case::new(spec(8, 2, 128), SMALL);
    let interpreter = Interpreter::new(&case.kernel);
    case.check(&interpreter, 1, &[(1, 0)], &RunOptions::default());
    case.check(&interpreter, 2, &[(1, 129), (1, 0), (1, 128), (1, 300)], &RunOptions::default());
}

/// What is refused, and the largest batch that is not.
#[test]
fn limits_are_said() {
    let large = Shape { tokens: 256, seqs: 256, pages: 4096, page_table: 256 * 320 + 1, draft: 1 };
    let refusal = |spec: &Spec, shape: &Shape| {
        let layout = Layout::new(spec).map_err(|error| error.to_string())?;
        crate::check(spec, shape, &Tuning::for_slots(spec, &layout, shape.draft)).map_err(|error| error.to_string())
    };
    let main = spec(8, 2, 128);
    // 256 sequences of 40,960 tokens.
    assert_eq!(refusal(&main, &large), Ok(()));
    for (spec, shape, reason) in [
        (
            main.clone(),
            Shape { page_table: 256 * 1024, ..large },
            "lower `--max-running-requests` or `--context-length`",
        ),
        (main.clone(), Shape { seqs: 5000, tokens: 5000, ..large }, "lower `--max-running-requests`"),
        (Spec { page_size: 64, ..main.clone() }, large, "--page-size 128"),
        (Spec { window: Some(0), ..main.clone() }, large, "window of no tokens"),
        (Spec { window: Some(9), mask: true, ..main.clone() }, large, "trees of draft tokens"),
        (spec(8, 3, 128), large, "8 query heads do not divide among 3 KV heads"),
        (spec(8, 2, 80), large, "heads of 80"),
        (Spec { kv: KvFormat::Int8 { scales: SCALES }, ..spec(8, 1, 128) }, large, "must be even"),
        (spec(64, 64, 256), large, "VMEM"),
    ] {
        let found = refusal(&spec, &shape).unwrap_err();
        assert!(found.contains(reason), "{found}");
    }
}

const SCALES: Scales = Scales { keys: 0.5, values: 0.25 };

#[test]
fn decode_compiles() {
    alone("tests::decode::compile");
}

#[test]
#[ignore = "run by decode_compiles"]
fn compile() {
    // Of one sequence, so that there is no prefill, whose tests compile it.
    let shape = |draft| Shape { tokens: draft, seqs: 1, pages: 64, page_table: 512, draft };
    let main = spec(8, 2, 128);
    for compiler in Compiler::all() {
        for (spec, draft) in [
            (main.clone(), 1),
            (Spec { window: Some(300), sinks: true, ..spec(8, 1, 128) }, 1),
            (Spec { soft_cap: Some(30.0), kv: KvFormat::Fp8 { scales: SCALES }, ..spec(8, 4, 256) }, 1),
            (spec(8, 2, 64), 1),
            (spec(32, 8, 64), 1),
            (Spec { kv: KvFormat::Fp8 { scales: SCALES }, ..main.clone() }, 1),
            (Spec { kv: KvFormat::Int8 { scales: SCALES }, ..spec(8, 4, 64) }, 1),
            (Spec { mask: true, ..main.clone() }, 4),
        ] {
            let case = Case::new(Spec { generation: compiler.generation, ..spec }, shape(draft));
            let options = crate::call_options(&case.spec);
            let compiled = compiler
                .compile(&case.kernel, &options)
                .unwrap_or_else(|error| panic!("{:?}, {draft} tokens: {error}", case.spec));
            let rows = case.layout.units * case.layout.rows() * case.layout.width();
            let in_place = 64 * case.layout.page_bytes() + 2 * draft * rows;
            assert_eq!(compiled.memory_stats().unwrap().alias_bytes, in_place as i64, "{:?}", case.spec);
        }
    }
}
