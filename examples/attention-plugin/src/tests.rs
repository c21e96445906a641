use torus_plugin::{AttentionSpec, StepShape, Target};

use super::*;

fn query(change: impl FnOnce(&mut AttentionSpec)) -> AttentionQuery {
    let mut spec = AttentionSpec { q_heads: 4, kv_heads: 2, head_dim: 16, scale: 0.25, window: None, soft_cap: None };
    change(&mut spec);
    AttentionQuery {
        spec,
        dtype: DType::Bf16,
        kv_dtype: DType::Bf16,
        shape: StepShape { tokens: 8, seqs: 2, page_size: 4, pages: 6, page_table: 8 },
        target: Target { platform: "cpu".into(), device_kind: "cpu".into() },
        sets_scales: false,
    }
}

#[test]
fn the_answer_describes_the_pool_and_the_context() {
    let answer = PagedAttention::query(&query(|_| {})).unwrap();
    let pool: Vec<_> = answer.pool.iter().map(ToString::to_string).collect();
    assert_eq!(pool, ["bf16[24,2,16]", "bf16[24,2,16]"]);
    assert_eq!(answer.page_bytes * 6, answer.pool.iter().map(|part| part.bytes().unwrap()).sum::<u64>());
    assert_eq!(answer.context.len(), answer.inputs.len());
}

#[test]
fn what_is_emitted_has_the_types_of_the_answer_and_is_the_same_each_time() {
    let request = EmitAttention { kind: 0, query: query(|_| {}) };
    let answer = PagedAttention::query(&request.query).unwrap();
    let package = PagedAttention::emit(&request).unwrap();
    assert_eq!(package, PagedAttention::emit(&request).unwrap());
    let results = |export: &str| {
        let symbol = &package.fragment.exports[export].symbol;
        let function = package.fragment.functions.iter().find(|function| function.symbol == *symbol);
        function.unwrap().results.clone()
    };
    assert_eq!(results("context"), answer.context);
    assert_eq!(results("attention")[1..], answer.pool);
}

#[test]
fn what_it_cannot_do_is_refused_with_a_reason() {
    for spec in [query(|spec| spec.window = Some(4)), query(|spec| spec.soft_cap = Some(50.0))] {
        let answer = PagedAttention::query(&spec).unwrap();
        assert!(answer.score == 0 && !answer.reason.is_empty());
    }
}

/// The cases that every backend is asked; `torus plugins check` runs them as well.
#[test]
fn it_conforms() {
    torus_plugin::testkit::attention::check::<PagedAttention>().assert();
}
