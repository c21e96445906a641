use torus_mosaic::{Generation, Interpreter, RunOptions};

use super::{
    batch::Case,
    tpu::{Compiler, alone},
};
use crate::{KvFormat, Shape, Spec};

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

#[test]
fn decode_compiles() {
    alone("tests::decode::compile");
}

#[test]
#[ignore = "run by decode_compiles"]
fn compile() {
    for compiler in Compiler::all() {
        let case = Case::new(Spec { generation: compiler.generation, ..spec(8, 2, 128) }, SMALL);
        let options = crate::call_options(&case.spec);
        let compiled = compiler.compile(&case.kernel, &options).unwrap_or_else(|error| panic!("{error}"));
        println!("{:?}", compiled.memory_stats().unwrap());
    }
}
