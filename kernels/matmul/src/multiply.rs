//! A block of rows times a strip of outputs: numbers become what the matrix unit takes, and scales are applied.

use torus_mosaic::{Builder, Contract, Elem, Position, Ref, Value, ds};

use crate::{Activations, Format, Layout, Matmul, Tiles, product::LANES, weights::INTERLEAVED};

/// Inputs that one straight piece of code sums over; more are summed in a loop.
pub(crate) const DEPTH: usize = 4096;
/// Inputs that fill the matrix unit. Groups that do not are scaled before they are multiplied.
const UNIT: usize = 256;

/// 8-bit floats are read as `bf16` with the same bits of exponent and mantissa, which makes them smaller by 2^120. Rows
/// and scales make up for one half each, so that neither products nor sums leave the range of `f32`.
const FLOAT8_HALF: f32 = (1_u64 << 60) as f32;

/// Memories that hold rows and weights.
pub(crate) struct Multiplier<'k> {
    pub k: &'k Builder,
    pub product: Matmul,
    pub tiles: Tiles,
    /// Tiles of weights, and their scales and biases.
    pub ring: Ref<'k>,
    pub scales: Option<Ref<'k>>,
    pub biases: Option<Ref<'k>>,
    /// Blocks of rows.
    pub rows: Ref<'k>,
    pub quantized: Option<Quantized<'k>>,
}

/// Blocks of rows as bytes.
pub(crate) struct Quantized<'k> {
    pub numbers: Ref<'k>,
    /// The scale of each row in all lanes.
    pub scales: Ref<'k>,
}

/// Which part of the memories is multiplied.
#[derive(Clone, Copy)]
struct Place<'k> {
    rows_slot: Value<'k>,
    slot: Value<'k>,
    column: Value<'k>,
}

impl<'k> Multiplier<'k> {
    /// Makes bytes of a block of rows: each row divided by its largest magnitude.
    pub fn quantize(&self, slot: Value<'k>) {
        let Some(Quantized { numbers, scales }) = &self.quantized else { return };
        const ROWS: usize = 32;
        let inputs = self.product.weights.inputs;
        let pieces: Vec<_> = (0..inputs).step_by(1024).map(|from| (from, (inputs - from).min(1024))).collect();
        self.k.for_range(0, (self.tiles.rows / ROWS) as i32, &[], |group, _| {
            let first = (group * ROWS as i32).assume_multiple(ROWS as u32);
            let load = |(from, size): &(usize, usize)| {
                self.rows.load_at((slot, ds(first, ROWS), ds(*from, *size))).cast(Elem::F32)
            };
            let largest = pieces.iter().map(|piece| load(piece).abs().reduce_max(1)).reduce(|a, b| a.max(b));
            // Rows of zeros have a scale, too.
            let largest = largest.unwrap_or_else(|| self.k.f32(1.0)).max(1e-30);
            let per_scale = self.k.full(Elem::F32.of([ROWS, 1]), 127.0) / largest;
            for (from, size) in &pieces {
                let bytes = (load(&(*from, *size)) * per_scale).round().cast(Elem::I8);
                numbers.store_at((slot, ds(first, ROWS), ds(*from, *size)), bytes);
            }
            let scale = (largest * (1.0 / 127.0)).broadcast(&[ROWS, LANES]);
            scales.store_at((slot, ds(first, ROWS), ..), scale);
            Vec::new()
        });
    }

    /// `f32 [rows, strip]`: a block's rows times the tile's outputs from `column` on, with scales and bias.
    pub fn strip(&self, rows_slot: Value<'k>, slot: Value<'k>, column: Value<'k>) -> Value<'k> {
        let place = Place { rows_slot, slot, column };
        let mut sum = self.sum(place);
        if self.product.weights.group.is_none() && self.product.weights.format.is_quantized() {
            sum = sum.cast(Elem::F32) * self.scale(place, 0.into());
        }
        if let Some(Quantized { scales, .. }) = &self.quantized {
            let scale = scales.load_at((rows_slot,));
            let repeats = self.tiles.strip / LANES;
            sum = sum * scale.concatenate(&vec![scale; repeats - 1], 1);
        }
        match self.biases {
            Some(biases) => sum + biases.load_at((slot, .., ds(column, self.tiles.strip))),
            None => sum,
        }
    }

    /// The sum over all inputs.
    fn sum(&self, place: Place<'k>) -> Value<'k> {
        let inputs = self.product.weights.inputs;
        // Whole groups, and whole tiles of whatever rows and weights are stored as.
        let unit = lcm(self.product.weights.group.unwrap_or(UNIT), UNIT);
        let depth = (DEPTH / unit).max(1) * unit;
        if inputs <= depth + depth / 2 {
            return self.piece(place, 0.into(), inputs, None);
        }
        let whole = inputs / depth;
        let zero = self.k.zeros(self.sum_elem().of([self.tiles.rows, self.tiles.strip]));
        let sum = self.k.for_range(0, whole as i32, &[zero], |number, sum| {
            let from = (number * depth as i32).assume_multiple(UNIT as u32);
            vec![self.piece(place, from.into(), depth, Some(sum[0]))]
        })[0];
        match inputs - whole * depth {
            0 => sum,
            rest => self.piece(place, (whole * depth).into(), rest, Some(sum)),
        }
    }

    /// Sums are integers until they meet a scale.
    fn sum_elem(&self) -> Elem {
        match (self.product.activations, self.product.weights.group) {
            (Activations::Int8, None) => Elem::I32,
            _ => Elem::F32,
        }
    }

    /// `sum` and the sum over `size` inputs from `from` on.
    fn piece(&self, place: Place<'k>, from: Position<'k>, size: usize, sum: Option<Value<'k>>) -> Value<'k> {
        let (rows, weights) = (self.rows_of(place, from, size), self.numbers(place, from, size));
        let Some(group) = self.product.weights.group else { return self.dot(rows, weights, sum) };
        let strip = self.tiles.strip;
        let scale = |number: usize| self.scale(place, self.group_at(from, number));
        if self.scales_first() {
            let scaled =
                |number: usize| weights.slice(&[number * group, 0], &[group, strip]) * scale(number).cast(Elem::Bf16);
            let scaled: Vec<_> = (0..size / group).map(scaled).collect();
            return self.dot(rows, scaled[0].concatenate(&scaled[1..], 0), sum);
        }
        let one = |sum: Option<Value<'k>>, number: usize| {
            let rows = rows.slice(&[0, number * group], &[self.tiles.rows, group]);
            let weights = match self.product.weights.layout {
                Layout::InOut => weights.slice(&[number * group, 0], &[group, strip]),
                Layout::OutIn => weights.slice(&[0, number * group], &[strip, group]),
            };
            let scaled = self.dot(rows, weights, None).cast(Elem::F32) * scale(number);
            Some(sum.map_or(scaled, |sum| sum + scaled))
        };
        (0..size / group).fold(sum, one).unwrap_or_else(|| self.k.f32(0.0))
    }

    /// Whether weights are multiplied by their scales before rows are multiplied with them.
    fn scales_first(&self) -> bool {
        let weights = self.product.weights;
        self.product.activations == Activations::Bf16
            && weights.layout == Layout::InOut
            && !weights.group_inputs().is_multiple_of(UNIT)
    }

    /// The number of a group behind the one at input `from`.
    fn group_at(&self, from: Position<'k>, more: usize) -> Position<'k> {
        let group = self.product.weights.group_inputs() as i32;
        match from {
            Position::Known(from) => Position::Known(from / group + more as i32),
            Position::Value(from) => Position::Value(from / group + more as i32),
        }
    }

    /// A group's scales, `f32 [1, strip]`.
    fn scale(&self, place: Place<'k>, group: Position<'k>) -> Value<'k> {
        let Some(scales) = self.scales else { return self.k.f32(1.0) };
        let scale = scales.load_at((place.slot, ds(group, 1), ds(place.column, self.tiles.strip)));
        if self.is_float8() { scale * FLOAT8_HALF } else { scale }
    }

    fn is_float8(&self) -> bool {
        self.product.weights.format == Format::Float8
    }

    /// A block's rows, `size` inputs of them.
    fn rows_of(&self, place: Place<'k>, from: Position<'k>, size: usize) -> Value<'k> {
        let rows = self.quantized.as_ref().map_or(self.rows, |quantized| quantized.numbers);
        let rows = rows.load_at((place.rows_slot, .., ds(from, size)));
        if self.is_float8() { rows * FLOAT8_HALF } else { rows }
    }

    fn dot(&self, rows: Value<'k>, weights: Value<'k>, sum: Option<Value<'k>>) -> Value<'k> {
        let contract = match self.product.weights.layout {
            Layout::InOut => Contract::Plain,
            Layout::OutIn => Contract::RhsTransposed,
        };
        rows.matmul(weights, contract, sum, false)
    }

    /// The weights of `size` inputs as the rows' type.
    fn numbers(&self, place: Place<'k>, from: Position<'k>, size: usize) -> Value<'k> {
        let Matmul { weights, activations, .. } = self.product;
        let shared = weights.format.shared();
        let part = |position: Position<'k>| match position {
            _ if shared == 1 => position,
            Position::Known(known) => Position::Known(known / shared as i32),
            // Columns are multiples of 128, inputs of 256.
            Position::Value(value) => Position::Value((value >> 1).assume_multiple((LANES / 2) as u32)),
        };
        let stored = match weights.layout {
            Layout::InOut => {
                self.ring.load_at((place.slot, ds(part(from), size / shared), ds(place.column, self.tiles.strip)))
            }
            Layout::OutIn => {
                let first = part(place.column.into());
                self.ring.load_at((place.slot, ds(first, self.tiles.strip / shared), ds(from, size)))
            }
        };
        let numbers = match weights.format {
            Format::Bf16 | Format::Int8 => stored,
            Format::Int4 => stored.bitcast(Elem::I4),
            Format::Float8 => return from_float8(stored),
        };
        match activations {
            Activations::Bf16 => numbers.cast(Elem::Bf16),
            Activations::Int8 => numbers.cast(Elem::I8),
        }
    }
}

/// The bytes of interleaved 8-bit floats as `bf16`, smaller by [`FLOAT8_HALF`] squared.
fn from_float8(bytes: Value<'_>) -> Value<'_> {
    const SIGNS: i32 = 0x8000_8000_u32 as i32;
    const MAGNITUDES: i32 = 0x07F0_07F0;
    let words = bytes.bitcast(Elem::I32);
    let low = ((words << 8) & SIGNS) | ((words << 4) & MAGNITUDES);
    let high = (words & SIGNS) | (words.shift_right_logical(4) & MAGNITUDES);
    let (low, high) = (low.bitcast(Elem::Bf16), high.bitcast(Elem::Bf16));
    let (half, dims) = (INTERLEAVED / 2, low.dims());
    let [rows, columns] = dims[..] else { return low };
    let pieces: Vec<_> = (0..rows / half)
        .flat_map(|unit| [low, high].map(|part| part.slice(&[unit * half, 0], &[half, columns])))
        .collect();
    pieces[0].concatenate(&pieces[1..], 0)
}

/// The least common multiple.
fn lcm(a: usize, b: usize) -> usize {
    (1..=b).map(|times| times * a).find(|multiple| multiple.is_multiple_of(b)).unwrap_or(a * b)
}
