//! The state that a sequence begins with.

use torus_mosaic::{Elem, Value, ds};

use super::Decode;
use crate::{
    launch::LEAST,
    layout::{LANES, Part, byte_factor, joined},
    spec::KvFormat,
};

/// What a sequence begins with.
pub(super) struct Begin<'k> {
    pub max: Value<'k>,
    pub sum: Value<'k>,
    /// Of the new token, if it is not 1.
    pub weight: Option<Value<'k>>,
}

impl<'k> Decode<'_, 'k> {
    /// The new token's key or value for each query row: `f32 [rows, width]`.
    fn new_row(&self, slot: Value<'k>, unit: usize, part: Part) -> Value<'k> {
        let (k, layout) = (self.l.k, self.l.layout);
        let dims = [layout.rows(), LANES];
        let row = k.iota(dims, 0);
        let high = (0..layout.unit_heads)
            .filter(|head| head % 2 == 1 && !layout.is_joined())
            .map(|head| {
                let first = (head * layout.rows_per_head) as i32;
                row.ge(first) & row.lt(first + layout.rows_per_head as i32)
            })
            .reduce(|a, b| a | b);
        let chunk = |plane: usize| {
            let words = self.new.load_at((unit, plane, ds(slot, 1))).broadcast(&dims);
            let words = layout.pairs(self.l.spec, words, part);
            let [low, upper] = [words << 16, words & layout.high_half()];
            let numbers = match high {
                Some(high) => high.select(upper, low),
                None if part == Part::Key => low,
                None => upper,
            }
            .bitcast(Elem::F32);
            match self.l.spec.kv {
                kv @ KvFormat::Fp8 { .. } => numbers * byte_factor(kv),
                _ => numbers,
            }
        };
        let chunks: Vec<_> = layout.planes_of(part).map(chunk).collect();
        joined(&chunks, 1)
    }

    /// The result that a sequence begins with.
    pub(super) fn new_value(&self, slot: Value<'k>, unit: usize) -> Value<'k> {
        if self.draft > 1 {
            return self.l.k.zeros(Elem::F32.of([self.rows, self.l.layout.width()]));
        }
        let value = self.new_row(slot, unit, Part::Value);
        self.begin(slot, unit).weight.map_or(value, |weight| value * self.wide(weight))
    }

    /// The maximum and sum that a sequence begins with: the new token's and the sink's.
    pub(super) fn begin(&self, slot: Value<'k>, unit: usize) -> Begin<'k> {
        let k = self.l.k;
        let lanes = [self.rows, LANES];
        let only = |sum: Value<'k>| k.iota(lanes, 1).eq(0).select(sum, 0.0);
        if self.draft > 1 {
            let (zeros, least) = (k.zeros(Elem::F32.of(lanes)), k.full(Elem::F32.of(lanes), LEAST));
            let Some(sinks) = self.l.sinks else { return Begin { max: least, sum: zeros, weight: None } };
            let sink = sinks.load_at((unit,));
            let max = sink.concatenate(&vec![sink; self.draft - 1], 0);
            return Begin { max, sum: only(k.full(Elem::F32.of(lanes), 1.0)), weight: None };
        }
        let query = self.query(slot, unit).cast(Elem::F32);
        let own = self.scaled((query * self.new_row(slot, unit, Part::Key)).sum(1)).broadcast(&lanes);
        match self.l.sinks {
            None => Begin { max: own, sum: only(k.full(Elem::F32.of(lanes), 1.0)), weight: None },
            Some(sinks) => {
                let sink = sinks.load_at((unit,));
                let max = own.max(sink);
                let weight = (own - max).exp2();
                Begin { max, sum: only(weight + (sink - max).exp2()), weight: Some(weight) }
            }
        }
    }
}
