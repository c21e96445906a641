//! A kernel that fails: its batch ends with its message, and the engine goes on.

use torus_abi::{
    DType, TensorType,
    attention::{AttentionAnswer, AttentionQuery, EmitAttention},
    author::Attention,
    fault::Fault,
    fragment::{Operand, Package},
    kernel::{Call, Kernel},
    step::StepInput,
};
use torus_engine::api::{Abort, FinishReason};
use torus_hlo::{Builder, CustomCall, Shape};
use torus_weights::ResolvedModel;

use crate::support::{answer, block_on, config, greedy, ready, request, smollm2};

/// Attends to nothing: the result is the query. Its context looks at the positions with a kernel.
struct Picky;

torus_abi::declare_plugin! {
    name: "picky",
    description: "A test of failing kernels",
    attention: Picky,
    kernels: [Look],
}

/// The position at which the kernel gives up, and the one at which it panics.
const REFUSED: i32 = 5;
const PANICS: i32 = 9;

struct Look;

impl Kernel for Look {
    const NAME: &'static str = "look";

    fn call(call: &Call<'_>) -> Result<(), Fault> {
        let positions = call.argument::<i32>(0)?;
        assert!(!positions.contains(&PANICS), "position {PANICS} is bad luck");
        if positions.contains(&REFUSED) {
            return Err(Fault::invalid(format!("position {REFUSED} is taken")));
        }
        call.result::<i32>(0)?.copy_from_slice(&positions);
        Ok(())
    }
}

impl Attention for Picky {
    fn query(query: &AttentionQuery) -> Result<AttentionAnswer, Fault> {
        Ok(AttentionAnswer {
            score: 1,
            reason: String::new(),
            pool: vec![TensorType::new(DType::F32, [query.shape.pages])],
            page_bytes: 4,
            inputs: vec![StepInput::Positions],
            context: vec![StepInput::Positions.tensor_type(&query.shape)],
            layout: None,
            scales: None,
        })
    }

    fn emit(request: &EmitAttention) -> Result<Package, Fault> {
        let AttentionQuery { spec, shape, dtype, .. } = &request.query;
        let builder = Builder::new(&format!("picky_{}", request.kind));
        let meaning = Operand::Context { kind: request.kind, part: 0 };
        builder.export("context", |f| {
            let positions = f.step(StepInput::Positions, shape);
            let mut call = CustomCall::kernel(Look::NAME, vec![positions.shape()]);
            // Nobody uses the result.
            call.has_side_effect = true;
            let seen = f.custom_call(&call, &[positions]);
            vec![(meaning.clone(), seen[0])]
        });
        builder.export("attention", |f| {
            let rows = |meaning, heads| {
                f.input(meaning, Shape::opaque(&TensorType::new(*dtype, [shape.tokens, heads, spec.head_dim])))
            };
            let query = rows(Operand::Query, spec.q_heads);
            rows(Operand::Key, spec.kv_heads);
            rows(Operand::Value, spec.kv_heads);
            let pool = Operand::Pool { layer: 0, part: 0 };
            let pages = f.input(pool.clone(), Shape::opaque(&TensorType::new(DType::F32, [shape.pages])));
            f.input(meaning.clone(), Shape::opaque(&StepInput::Positions.tensor_type(shape)));
            vec![(Operand::Attended, query), (pool, pages)]
        });
        Ok(Package { fragment: builder.finish()? })
    }
}

#[test]
fn a_failing_kernel_fails_its_request_with_its_message_and_the_next_one_works() {
    let mut config = config(ResolvedModel::Gguf(smollm2()));
    config.attention_backend = Some("picky".into());
    let engine = ready(config);
    let run = |tokens: usize| block_on(answer(&engine, request("r", &vec![7; tokens], greedy(1))));
    let failure = |tokens| match run(tokens).reason {
        FinishReason::Aborted(Abort::Failed(message)) => message,
        other => panic!("{other:?}"),
    };
    assert_eq!(run(3).tokens.len(), 1);
    let refused = failure(REFUSED as usize + 1);
    assert!(refused.contains("kernel 'look' of plugin 'picky': position 5 is taken"), "{refused}");
    assert_eq!(run(3).tokens.len(), 1);
    let panicked = failure(PANICS as usize + 1);
    assert!(panicked.contains("kernel 'look' of plugin 'picky': it panicked: position 9 is bad luck"), "{panicked}");
    assert_eq!(run(3).tokens.len(), 1);
}
