//! Products of random shapes and tiles.

use rand::{RngExt, seq::IndexedRandom};
use torus_mosaic::{Completion, Generation};

use crate::{
    Activations, Format, Layout, Matmul, Tiles, Weights,
    tests::reference::{check, random},
};

/// First rows of experts, some of which have none.
fn starts(random: &mut impl rand::Rng, experts: usize, rows: usize) -> Vec<usize> {
    let mut cuts: Vec<usize> = (1..experts).map(|_| random.random_range(0..=rows)).collect();
    if random.random_bool(0.3) {
        let few = random.random_range(0..=rows);
        cuts.iter_mut().for_each(|cut| *cut = if *cut < rows / 2 { 0 } else { few });
    }
    cuts.sort_unstable();
    let end = if random.random_bool(0.3) { cuts.last().copied().unwrap_or(rows) } else { rows };
    [0].into_iter().chain(cuts).chain([end]).collect()
}

#[test]
fn random_products_meet_plain_loops() {
    let mut random = random(11);
    for seed in 0..60 {
        let experts = random.random_bool(0.5).then(|| random.random_range(1..7));
        let format = *[Format::Bf16, Format::Int8, Format::Float8, Format::Int4].choose(&mut random).unwrap();
        let inputs = 128 * random.random_range(1..6);
        let group = *[32, 64, 128, 256].choose(&mut random).unwrap();
        let grouped = format.is_quantized() && inputs % group == 0 && random.random_bool(0.5);
        let strip = 128 * random.random_range(1..3);
        let columns = strip * random.random_range(1..3);
        let weights = Weights {
            inputs,
            outputs: columns * random.random_range(1..4),
            experts,
            format,
            layout: *[Layout::InOut, Layout::OutIn].choose(&mut random).unwrap(),
            group: grouped.then_some(group),
            bias: random.random_bool(0.5),
        };
        let integer = matches!(format, Format::Int8 | Format::Int4);
        let activations = match integer && random.random_bool(0.4) {
            true => Activations::Int8,
            false => Activations::Bf16,
        };
        let product = Matmul { rows: random.random_range(1..90), weights, activations };
        let tiles = Tiles {
            rows: 32 * random.random_range(1..3),
            columns,
            strip,
            ring: random.random_range(2..5),
            blocks: *[2, 4, 8].choose(&mut random).unwrap(),
        };
        let starts = match experts {
            Some(experts) => starts(&mut random, experts, product.rows),
            None => vec![0, product.rows],
        };
        check(&product, &tiles, &starts, seed, Completion::Random(seed));
    }
}

/// The tiles that the rule chooses, on shapes that divide badly.
#[test]
fn random_products_with_chosen_tiles_meet_plain_loops() {
    let mut random = random(12);
    for seed in 0..15 {
        let experts = random.random_bool(0.5).then(|| random.random_range(1..5));
        let format = *[Format::Bf16, Format::Int8, Format::Int4].choose(&mut random).unwrap();
        let (inputs, outputs) = (128 * random.random_range(1..8), 128 * random.random_range(1..8));
        let weights = Weights { experts, ..Weights::new(inputs, outputs, format) };
        let product = Matmul::new(random.random_range(1..300), weights);
        let tiles = product.tiles(Generation::V6e).unwrap();
        let starts = match experts {
            Some(experts) => starts(&mut random, experts, product.rows),
            None => vec![0, product.rows],
        };
        check(&product, &tiles, &starts, seed, Completion::OnWait);
    }
}
