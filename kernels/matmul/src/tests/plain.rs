//! Products of chosen shapes: every format, layout and way to scale.

use torus_mosaic::Completion;

use crate::{Activations, Format, Layout, Matmul, Tiles, Weights, tests::reference::check};

const FORMATS: [Format; 4] = [Format::Bf16, Format::Int8, Format::Float8, Format::Int4];
const COMPLETIONS: [Completion; 3] = [Completion::OnWait, Completion::AtStart, Completion::Random(3)];

fn tiles(rows: usize, columns: usize) -> Tiles {
    Tiles { rows, columns, strip: 128, ring: 2, blocks: 2 }
}

#[test]
fn every_format_and_layout_meets_plain_loops() {
    for (seed, format) in FORMATS.into_iter().enumerate() {
        for layout in [Layout::InOut, Layout::OutIn] {
            for bias in [false, true] {
                let weights = Weights { layout, bias, ..Weights::new(256, 512, format) };
                let product = Matmul::new(16, weights);
                for completion in COMPLETIONS {
                    check(&product, &tiles(16, 256), &[0, 16], seed as u64, completion);
                }
            }
        }
    }
}

#[test]
fn groups_of_inputs_have_their_own_scales() {
    for format in [Format::Int8, Format::Float8, Format::Int4] {
        for layout in [Layout::InOut, Layout::OutIn] {
            for group in [32, 64, 128, 256] {
                let weights = Weights { layout, group: Some(group), ..Weights::new(512, 128, format) };
                let product = Matmul::new(16, weights);
                check(&product, &tiles(16, 128), &[0, 16], group as u64, Completion::OnWait);
            }
        }
    }
}

#[test]
fn rows_are_rounded_to_bytes_where_asked() {
    for format in [Format::Int8, Format::Int4] {
        for layout in [Layout::InOut, Layout::OutIn] {
            for group in [None, Some(128)] {
                let weights = Weights { layout, group, bias: true, ..Weights::new(256, 256, format) };
                let product = Matmul { rows: 64, weights, activations: Activations::Int8 };
                check(&product, &tiles(32, 128), &[0, 64], 5, Completion::OnWait);
            }
        }
    }
}

#[test]
fn many_inputs_are_summed_in_a_loop() {
    for (group, inputs) in [(None, 4096 + 2048 + 128), (Some(128), 2 * 4096 + 256), (Some(96 * 32), 3 * 96 * 32)] {
        let weights = Weights { group, ..Weights::new(inputs, 128, Format::Int8) };
        check(&Matmul::new(5, weights), &tiles(16, 128), &[0, 5], 1, Completion::OnWait);
    }
}

/// Rows are fetched once if they stay, and otherwise for each part of the outputs; weights are always fetched once.
#[test]
fn everything_is_fetched_as_often_as_it_must_be() {
    let weights = Weights::new(256, 512, Format::Int8);
    let product = Matmul::new(100, weights);
    let x = 112 * 256 * 2;
    for (blocks, times) in [(7, 1), (2, 4), (4, 4)] {
        let tiles = Tiles { rows: 16, columns: 128, strip: 128, ring: 3, blocks };
        for completion in COMPLETIONS {
            let outcome = check(&product, &tiles, &[0, 100], 2, completion);
            let fetched = outcome.counters.bytes_in as usize;
            assert_eq!(fetched, weights.matrix_bytes() + times * x, "{blocks} blocks");
            assert_eq!(outcome.counters.bytes_out, 112 * 512 * 2);
            assert_eq!(product.cost(&tiles).bytes_accessed as usize, fetched + 112 * 512 * 2);
        }
    }
}

#[test]
fn experts_without_rows_are_not_read() {
    let weights = Weights { experts: Some(6), bias: true, ..Weights::new(128, 256, Format::Int4) };
    let product = Matmul::new(64, weights);
    let cases: [&[usize]; 6] = [
        &[0, 0, 5, 5, 37, 64, 64],
        &[0, 64, 64, 64, 64, 64, 64],
        &[0, 0, 0, 0, 0, 0, 1],
        &[0, 16, 32, 48, 64, 64, 64],
        &[0, 7, 9, 10, 33, 40, 41],
        &[0, 0, 0, 0, 0, 0, 0],
    ];
    for starts in cases {
        for (ring, blocks) in [(2, 4), (4, 2), (8, 4)] {
            let tiles = Tiles { rows: 16, columns: 128, strip: 128, ring, blocks };
            for completion in COMPLETIONS {
                let outcome = check(&product, &tiles, starts, 9, completion);
                let used = starts.windows(2).filter(|pair| pair[0] < pair[1]).count();
                let rows = starts[6].div_ceil(16) * 16;
                let times = if blocks == 4 { 1 } else { 2 };
                let expected = used * weights.matrix_bytes() + times * rows * 128 * 2;
                assert_eq!(outcome.counters.bytes_in as usize, expected, "{starts:?}");
                assert_eq!(outcome.counters.bytes_out as usize, rows * 256 * 2);
            }
        }
    }
}

/// Rows of a block that belong to no expert are zeros, not what was in VMEM.
#[test]
fn the_rest_of_the_last_block_is_zero() {
    let weights = Weights { experts: Some(2), ..Weights::new(128, 128, Format::Bf16) };
    let outcome = check(&Matmul::new(16, weights), &tiles(16, 128), &[0, 3, 9], 1, Completion::OnWait);
    let found = outcome.outputs[0].to_f32();
    assert!(found[9 * 128..].iter().all(|number| *number == 0.0));
    assert_eq!(outcome.outputs[0].undefined_elements(), 0);
}
