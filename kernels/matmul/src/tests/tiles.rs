//! The table of tiles and the rule for what is not in it.

use rand::{RngExt, seq::IndexedRandom};
use torus_mosaic::Generation;

use crate::{Activations, Format, Layout, Matmul, Weights, tests::reference::random};

const GENERATIONS: [Generation; 3] = [Generation::V5e, Generation::V6e, Generation::Tpu7x];

/// Shapes of real models, and random ones: each gets tiles that divide it, fit the generation, and keep HBM busy.
#[test]
fn every_shape_gets_tiles_that_fit() {
    let real = [
        (4096, 6144, None),
        (4096, 4096, None),
        (4096, 24576, None),
        (12288, 4096, None),
        (4096, 151_936, None),
        (8192, 57344, None),
        (28672, 8192, None),
        (2048, 1536, Some(128)),
        (768, 2048, Some(128)),
        (4096, 28672, Some(8)),
        (14336, 4096, Some(8)),
    ];
    let mut random = random(4);
    let odd = (0..40).map(|_| {
        let experts = random.random_bool(0.5).then(|| random.random_range(1..200));
        (128 * random.random_range(1..200), 128 * random.random_range(1..600), experts)
    });
    let shapes: Vec<_> = real.into_iter().chain(odd.collect::<Vec<_>>()).collect();
    for (at, (inputs, outputs, experts)) in shapes.into_iter().enumerate() {
        for format in [Format::Bf16, Format::Int8, Format::Int4] {
            let layout = if at % 4 == 0 { Layout::OutIn } else { Layout::InOut };
            let weights = Weights { experts, layout, ..Weights::new(inputs, outputs, format) };
            let rows = *[1, 3, 16, 64, 200, 256, 500, 2048, 16384].choose(&mut random).unwrap();
            let generation = *GENERATIONS.choose(&mut random).unwrap();
            let activations = match format == Format::Int8 && generation != Generation::Tpu7x && at % 3 == 0 {
                true => Activations::Int8,
                false => Activations::Bf16,
            };
            let product = Matmul { rows, weights, activations };
            let tiles = product.tiles(generation).unwrap_or_else(|error| panic!("{product:?}: {error}"));
            let kernel = product.kernel(&tiles).unwrap_or_else(|error| panic!("{product:?}: {error}"));
            let options = product.call_options(&kernel, &tiles, generation).unwrap();
            assert!(kernel.program(&options).is_ok(), "{product:?} {tiles:?}");
            // Few rows are not padded to many.
            let padded = product.padded_rows(&tiles);
            assert!(padded < rows + rows.div_ceil(4).max(128), "{rows} rows become {padded}: {tiles:?}");
            let tile = inputs * tiles.columns * format.bits() / 8;
            assert!(tiles.columns == tiles.strip || tile <= 4 << 20, "{product:?}: {tiles:?}");
        }
    }
}

/// The rule does not depend on what it need not depend on.
#[test]
fn the_rule_follows_rows_and_bytes() {
    let tiles = |rows: usize, format: Format, experts: Option<usize>| {
        let weights = Weights { experts, ..Weights::new(4096, 4352, format) };
        Matmul::new(rows, weights).tiles(Generation::V6e).unwrap()
    };
    // 17 strips of 256 divide by 1 and 17 only.
    assert_eq!(tiles(16, Format::Int8, None).columns, 256);
    assert_eq!(tiles(16, Format::Int8, None).strip, 256);
    assert_eq!((tiles(1, Format::Int8, None).rows, tiles(17, Format::Int8, None).rows), (16, 32));
    assert_eq!(tiles(300, Format::Int8, None).rows, 160);
    // Half the bytes, twice the tiles on their way.
    assert!(tiles(16, Format::Int4, None).ring > tiles(16, Format::Int8, None).ring);
    // 64 rows of 128 experts are at most one each, 512 are 4, 2,048 are 16, and 16,384 are 128.
    let rows = [64, 512, 2048, 16384].map(|rows| tiles(rows, Format::Int8, Some(128)).rows);
    assert_eq!(rows, [16, 32, 64, 128]);
}
