//! What the backend answers; programs for TPUs in `tpu.rs`.

mod tpu;

use torus_abi::{
    DType, TensorType,
    attention::{Target, scales_type},
};
use torus_cpu::attention::LAYOUT;
use torus_testkit::attention::{self, cases};

use super::*;

#[test]
fn it_conforms() {
    attention::check::<Flash>().assert();
}

fn ask(change: impl Fn(&mut AttentionQuery)) -> AttentionAnswer {
    let mut query = cases()[0].query(&Target { platform: "cpu".into(), device_kind: String::new() });
    query.spec.head_dim = 64;
    query.shape.page_size = 16;
    change(&mut query);
    Flash::query(&query).unwrap()
}

#[test]
fn what_it_cannot_serve_is_refused_with_the_reason() {
    assert_eq!((ask(|_| {}).score, ask(|_| {}).layout.as_deref()), (SCORE, Some(LAYOUT)));
    for (change, reason) in [
        (
            &(|query: &mut AttentionQuery| query.target.platform = "cuda".into()) as &dyn Fn(&mut _),
            "no kernels for cuda",
        ),
        (&|query: &mut AttentionQuery| query.dtype = DType::F16, "no kernel for f16"),
        (&|query: &mut AttentionQuery| query.spec.head_dim = 40, "heads of 40"),
        (&|query: &mut AttentionQuery| query.shape.page_size = 8, "pages of 8"),
        (&|query: &mut AttentionQuery| query.spec.kv_heads = 5, "do not divide"),
    ] {
        let answer = ask(change);
        assert!(answer.score == 0 && answer.reason.contains(reason), "{answer:?}");
    }
}

#[test]
fn an_int8_cache_has_scales_and_half_the_bytes() {
    let (wide, narrow) = (ask(|query| query.kv_dtype = DType::Bf16), ask(|query| query.kv_dtype = DType::I8));
    assert_eq!((wide.pool.len(), narrow.pool.len()), (1, 2));
    // A byte for each of 64 dimensions, and 4 of the scale.
    assert_eq!(narrow.page_bytes * 2 * 64, wide.page_bytes * (64 + 4));
}

#[test]
fn on_a_tpu_it_serves_bf16_in_pages_of_128() {
    let ask = |change: &dyn Fn(&mut AttentionQuery)| {
        ask(|query| {
            query.target = Target { platform: "tpu".into(), device_kind: "TPU v6 lite".into() };
            (query.dtype, query.kv_dtype, query.shape.page_size) = (DType::Bf16, DType::Bf16, 128);
            (query.spec.head_dim, query.sets_scales) = (128, false);
            change(query);
        })
    };
    let answer = ask(&|_| {});
    assert_eq!((answer.score, answer.pool.len(), answer.context.len()), (SCORE, 1, 5));
    for kv_dtype in [DType::F8E4M3, DType::I8] {
        let narrow = ask(&|query| (query.kv_dtype, query.sets_scales) = (kv_dtype, true));
        assert_eq!((narrow.score, narrow.scales, narrow.pool[1].clone()), (SCORE, Some(1), scales_type()));
        assert_eq!(2 * narrow.page_bytes, answer.page_bytes);
        let odd = ask(&|query| {
            (query.kv_dtype, query.sets_scales) = (kv_dtype, true);
            (query.spec.q_heads, query.spec.kv_heads, query.spec.head_dim) = (4, 1, 128);
        });
        assert!(odd.score == 0 && odd.reason.contains("must be even"), "{odd:?}");
    }
    let fixed = ask(&|query| query.kv_dtype = DType::F8E4M3);
    assert_eq!((fixed.score, fixed.scales, fixed.pool.len()), (SCORE, None, 1));
    for (change, reason) in [
        (&(|query: &mut AttentionQuery| query.target.device_kind = "TPU v4".into()) as &dyn Fn(&mut _), "a 'TPU v4'"),
        (&|query: &mut AttentionQuery| query.dtype = DType::F32, "not f32"),
        (&|query: &mut AttentionQuery| query.kv_dtype = DType::F32, "not f32"),
        (&|query: &mut AttentionQuery| query.kv_dtype = DType::I8, "update Torus"),
        (&|query: &mut AttentionQuery| query.shape.page_size = 16, "--page-size 128"),
        (&|query: &mut AttentionQuery| query.spec.head_dim = 80, "heads of 80"),
        (&|query: &mut AttentionQuery| query.shape.page_table = 1 << 18, "--context-length"),
    ] {
        let answer = ask(change);
        assert!(answer.score == 0 && answer.reason.contains(reason), "{answer:?}");
    }
}
