//! Tiles: a table of measured shapes, and a rule for all others.
//!
//! The rule: weights come in tiles of about a mebibyte while there are few rows (the last tile's product is not hidden
//! behind a copy, so it should be short), of two or four where rows or experts make steps long. As many tiles are on their way
//! as keep HBM busy over its latency. Many outputs are summed up at once, because the matrix unit's latency
//! follows each of those sums. Rows stay in VMEM if they take no more than 16 MiB. What does not fit a
//! generation's VMEM is made smaller in this order: blocks of rows, tiles on their way, outputs at once, rows at once.

use torus_mosaic::Generation;

use crate::{Format, Matmul, MatmulError, Tiles, multiply::DEPTH, product::LANES};

/// Rows that one product takes at most.
const MOST_ROWS: usize = 256;
/// Up to so many rows, fetching weights takes much longer than multiplying with them.
const FEW_ROWS: usize = 64;
/// Rows that one product takes at most with experts, each of which has its own few.
const MOST_GROUPED_ROWS: usize = 128;
/// Elements of the results that are summed up at once. More than registers hold is still faster than waiting for the
/// matrix unit more often.
const SUMS: usize = 128 << 10;
/// Weights that one straight piece of code multiplies with, so that it stays small.
const STRAIGHT: usize = 4 << 20;
/// Bytes of weights that should be on their way.
const IN_FLIGHT: usize = 4 << 20;
/// Bytes of rows that stay in VMEM.
const KEPT_ROWS: usize = 16 << 20;

/// A shape whose tiles were chosen by the cycles of its schedules.
struct Entry {
    generation: Generation,
    format: Format,
    inputs: usize,
    outputs: usize,
    experts: Option<usize>,
    /// From so many rows …
    from: usize,
    /// … to so many.
    to: usize,
    tiles: Tiles,
}

const TABLE: &[Entry] = &[];

pub(crate) fn tiles(product: &Matmul, generation: Generation) -> Result<Tiles, MatmulError> {
    let known = TABLE.iter().find(|entry| entry.fits(product, generation)).map(|entry| entry.tiles);
    shrink(product, generation, known.unwrap_or_else(|| rule(product)))
}

impl Entry {
    fn fits(&self, product: &Matmul, generation: Generation) -> bool {
        let weights = &product.weights;
        self.generation == generation
            && (self.format, self.inputs, self.outputs) == (weights.format, weights.inputs, weights.outputs)
            && self.experts == weights.experts
            && (self.from..=self.to).contains(&product.rows)
    }
}

/// Tiles for a shape that nobody measured.
fn rule(product: &Matmul) -> Tiles {
    let weights = &product.weights;
    let (rows, row_unit) = (product.rows, product.row_unit());
    let rows_at_once = match weights.experts {
        None => rows.div_ceil(rows.div_ceil(MOST_ROWS)).next_multiple_of(row_unit),
        Some(experts) => {
            // A block is visited once more for each border between experts in it, or an expert for each border between
            // blocks: with few rows, what a visit costs does not depend on them.
            let own = rows.div_ceil(experts).next_power_of_two();
            let wide = (8 * own).min(FEW_ROWS).max(own.min(MOST_GROUPED_ROWS));
            wide.clamp(row_unit, rows.next_multiple_of(row_unit))
        }
    };
    let unit = if weights.outputs.is_multiple_of(2 * LANES) { 2 * LANES } else { LANES };
    let bytes_of = |columns: usize| weights.inputs * columns * weights.format.bits() / 8;
    let most = match weights.experts {
        None if rows <= FEW_ROWS => 1 << 20,
        None if rows <= MOST_ROWS => 2 << 20,
        _ => 4 << 20,
    };
    let columns = divisors(weights.outputs, unit).filter(|columns| bytes_of(*columns) <= most).last();
    let columns = columns.unwrap_or(unit);
    let fits = |strip: &usize| rows_at_once * strip <= SUMS && weights.inputs.min(DEPTH) * strip <= STRAIGHT;
    let strip = divisors(columns, unit).filter(fits).last().unwrap_or(unit);
    let ring = (1 + IN_FLIGHT.div_ceil(bytes_of(columns))).clamp(3, 8);
    let all = rows.div_ceil(rows_at_once);
    let block_bytes = rows_at_once * weights.inputs * 2;
    let blocks = if all * block_bytes <= KEPT_ROWS { all } else { 4 };
    Tiles { rows: rows_at_once, columns, strip, ring, blocks }
}

/// Divisors of a number of outputs that are whole strips, in rising order.
fn divisors(outputs: usize, strip: usize) -> impl Iterator<Item = usize> {
    (1..=outputs / strip).map(move |strips| strips * strip).filter(move |columns| outputs.is_multiple_of(*columns))
}

/// The tiles, made smaller until they fit.
fn shrink(product: &Matmul, generation: Generation, mut tiles: Tiles) -> Result<Tiles, MatmulError> {
    let available = generation.usable_vmem_bytes();
    loop {
        let bytes = product.vmem_bytes(&tiles)?;
        if bytes <= available {
            return Ok(tiles);
        }
        let Tiles { rows, columns, strip, ring, blocks } = tiles;
        let outputs = product.weights.outputs;
        let unit = if outputs.is_multiple_of(2 * LANES) { 2 * LANES } else { LANES };
        let narrower = divisors(outputs, unit).take_while(|smaller| *smaller < columns).last();
        let row_unit = product.row_unit();
        tiles = match narrower {
            _ if blocks > 4 => Tiles { blocks: 4, ..tiles },
            _ if ring > 3 => Tiles { ring: ring - 1, ..tiles },
            Some(columns) => {
                Tiles { columns, strip: if columns.is_multiple_of(strip) { strip } else { unit }, ..tiles }
            }
            None if blocks > 2 => Tiles { blocks: 2, ..tiles },
            None if ring > 2 => Tiles { ring: 2, ..tiles },
            None if rows > row_unit => Tiles { rows: (rows / 2).next_multiple_of(row_unit), blocks: 2, ..tiles },
            None => {
                return Err(MatmulError::Vmem {
                    weights: product.weights.to_string(),
                    tiles: tiles.to_string(),
                    bytes,
                    available,
                    generation,
                    remedy: "no tiles are small enough: split the inputs over devices",
                });
            }
        };
    }
}
