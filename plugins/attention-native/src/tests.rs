//! The programs on the CPU against attention computed row by row.

mod case;

use super::Native;
use case::{Case, Sequence};
use torus_abi::{DType, attention::AttentionQuery, author::Attention};

fn seq(cached: usize, new: usize) -> Sequence {
    Sequence { cached, new, shares: None }
}

#[test]
fn prefill_decode_and_mixed_batches_equal_the_reference() {
    for (seed, sequences) in [
        vec![seq(0, 1)],
        vec![seq(0, 37)],
        vec![seq(16, 1)],
        vec![seq(15, 2), seq(16, 1), seq(0, 16)],
        vec![seq(300, 1), seq(0, 5), seq(63, 33), seq(1, 1)],
        (0..9).map(|i| seq(7 * i, 1)).collect(),
    ]
    .into_iter()
    .enumerate()
    {
        Case { seed: seed as u64, sequences, ..Case::default() }.check();
    }
}

#[test]
fn padding_disturbs_nothing_and_stays_finite() {
    for (seed, padding) in [1, 7, 30].into_iter().enumerate() {
        let sequences = vec![seq(40, 3), seq(5, 1)];
        Case { seed: seed as u64, sequences, padding, ..Case::default() }.check();
    }
}

#[test]
fn numbers_that_are_none_do_not_spread_from_pages_that_are_not_seen() {
    for window in [None, Some(20)] {
        let sequences = vec![seq(40, 3), seq(5, 1), seq(0, 18), seq(300, 1)];
        Case { sequences, window, ..Case::default() }.check_beside_nan();
    }
}

#[test]
fn sequences_may_share_pages() {
    let shared = Sequence { cached: 64, new: 3, shares: Some(0) };
    Case { sequences: vec![seq(70, 2), shared, Sequence { new: 1, ..shared }], ..Case::default() }.check();
}

#[test]
fn head_counts_and_sizes() {
    for (q_heads, kv_heads, head_dim) in
        [(1, 1, 64), (4, 4, 80), (6, 2, 96), (8, 1, 128), (5, 1, 64), (9, 3, 64), (14, 2, 6)]
    {
        let sequences = vec![seq(33, 4), seq(90, 1)];
        Case { q_heads, kv_heads, head_dim, sequences, ..Case::default() }.check();
    }
}

#[test]
fn page_sizes_that_divide_no_block() {
    for page_size in [1, 3, 16, 48, 100, 512] {
        let sequences = vec![seq(page_size - 1, 3), seq(2 * page_size, 1), seq(0, 2)];
        Case { page_size, sequences, ..Case::default() }.check();
    }
}

#[test]
fn windows_and_soft_caps() {
    for window in [1, 2, 16, 17, 1000] {
        // The second one makes the loop begin far from the first one's window.
        let sequences = vec![seq(600, 3), seq(20, 20), seq(0, 1)];
        Case { window: Some(window), sequences, ..Case::default() }.check();
        Case { window: Some(window), sequences: vec![seq(600, 1)], ..Case::default() }.check();
    }
    Case { soft_cap: Some(2.0), sequences: vec![seq(50, 5), seq(3, 1)], ..Case::default() }.check();
}

#[test]
fn half_precision_is_summed_in_single() {
    let sequences = vec![seq(200, 1), seq(0, 20)];
    Case { dtype: DType::Bf16, kv_dtype: DType::Bf16, sequences: sequences.clone(), ..Case::default() }.check();
    Case { kv_dtype: DType::Bf16, sequences, ..Case::default() }.check();
}

#[test]
fn caches_of_8_bits_hold_numbers_divided_by_their_scales() {
    let sequences = vec![seq(200, 1), seq(0, 20), seq(17, 3)];
    let case = Case { kv_dtype: DType::F8E4M3, sequences, ..Case::default() };
    case.check();
    // The largest numbers are out of range.
    Case { scales: [0.002, 0.001], ..case.clone() }.check();
    Case { dtype: DType::Bf16, soft_cap: Some(3.0), window: Some(50), ..case.clone() }.check();
    // A host that sets no scales has those of 1.
    let query = AttentionQuery { sets_scales: false, ..case.query(1) };
    let answer = Native::query(&query).unwrap();
    assert_eq!((answer.pool.len(), answer.scales), (2, None));
}

#[test]
fn chunks_and_single_tokens_equal_one_prefill() {
    let whole = Case { sequences: vec![seq(0, 40)], pages_spare: 2, ..Case::default() };
    let (rows, pool) = whole.run_from(whole.pool(), 0..40);
    let mut chunked = (Vec::new(), whole.pool());
    for part in [0..17, 17..32, 32..38, 38..39, 39..40] {
        let (rows, pool) = whole.run_from(chunked.1, part);
        chunked.0.extend(rows);
        chunked.1 = pool;
    }
    case::assert_close(&chunked.0, &rows, 1e-5);
    assert_eq!(chunked.1, pool);
}

#[test]
fn pools_are_updated_in_place_and_context_costs_no_memory() {
    // With pages enough for a whole block.
    let small = Case { sequences: vec![seq(0, 8)], pages_spare: 64, ..Case::default() };
    let spare = Case { pages_spare: 4096, ..small.clone() };
    let long = Case { sequences: vec![seq(50_000, 8)], ..small.clone() };
    let stats = small.memory();
    let narrow = Case { kv_dtype: DType::F8E4M3, ..spare.clone() };
    assert_eq!(narrow.memory().alias_bytes as u64, narrow.pool_bytes());
    for case in [&small, &spare, &long] {
        let memory = case.memory();
        assert_eq!(memory.alias_bytes as u64, case.pool_bytes());
        // The table itself may be copied into the loop once.
        let table = 8 * case.page_table_len() as i64;
        assert!(memory.temp_bytes <= stats.temp_bytes + table + 4096, "{memory:?} against {stats:?}");
    }
}

#[test]
fn what_it_does_not_serve_is_said() {
    let refusal = |case: Case| {
        let answer = Native::query(&case.query(1)).unwrap();
        assert_eq!(answer.score, 0);
        answer.reason
    };
    let sequences = vec![seq(0, 1)];
    let case = Case { sequences, ..Case::default() };
    assert!(refusal(Case { kv_dtype: DType::I8, ..case.clone() }).contains("cache of i8"));
    assert!(refusal(Case { q_heads: 5, kv_heads: 2, ..case.clone() }).contains("5 query heads"));
    assert!(refusal(Case { pages_spare: 1 << 30, ..case }).contains("slots"));
}
