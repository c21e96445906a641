//! The products of a group: scores of the next one, and weights times values.

use torus_mosaic::{Elem, Generation, Ref, Value, ds};

use super::Decode;
use crate::{
    launch::{LEAST, LOG2_E, Launch},
    layout::{LANES, Part},
    queue::Item,
    spec::KvFormat,
};

impl<'k> Decode<'_, 'k> {
    /// A page's words by plane, of those that hold a part.
    fn words(&self, group: Value<'k>, page: usize, unit: usize, part: Part) -> Vec<Value<'k>> {
        let planes = self.l.layout.planes_of(part);
        planes.map(|plane| self.ring.load_at((self.ring_slot(group), page, unit, plane))).collect()
    }

    fn keys(&self, group: Value<'k>, page: usize, unit: usize) -> Value<'k> {
        self.l.layout.keys(self.l.spec, &self.words(group, page, unit, Part::Key))
    }

    /// Products of query rows and a page's keys.
    fn times_keys(&self, query: Value<'k>, group: Value<'k>, page: usize, unit: usize) -> Value<'k> {
        match (self.l.spec.kv, self.l.spec.generation) {
            // The matrix unit, which takes transposed weights in twice the time, has the most to do of `bf16` made of bytes,
            // and a TPU7x transposes bytes elsewhere. For others that costs more than it saves.
            (KvFormat::Int8 { .. }, Generation::Tpu7x) => {
                let words = self.words(group, page, unit, Part::Key);
                query.dot(self.l.layout.int8_keys_transposed(&words))
            }
            _ => query.dot_transposed(self.keys(group, page, unit)),
        }
    }

    /// A page's values, finite in rows that were not copied: the ring may hold anything there, and weights are 0.
    fn values(&self, group: Value<'k>, page: usize, unit: usize) -> Value<'k> {
        let layout = self.l.layout;
        let words = self.words(group, page, unit, Part::Value);
        let words: Vec<_> = match (self.l.spec.kv, self.kept) {
            // Whatever eight bits are, they stand for a finite number.
            (KvFormat::Int8 { .. }, _) => words.into_iter().map(|words| words.freeze()).collect(),
            (_, Some(kept)) => return layout.values_among(&words, self.kept_rows(kept, group, page)),
            (_, None) => {
                let copied = self.copied(group, page);
                words.into_iter().map(|words| copied.select(words, 0)).collect()
            }
        };
        layout.values(self.l.spec, &words)
    }

    /// Whether packed values are masked by what [`Self::fill_kept`] stored: a byte may be NaN, and rows are missing only
    /// at the end, not before a window.
    pub(super) fn needs_kept(launch: &Launch<'_>) -> bool {
        matches!(launch.spec.kv, KvFormat::Fp8 { .. }) && launch.spec.window.is_none()
    }

    /// Stores a mask for pages with an even number of rows and one for those with an odd number: first ones for half a
    /// page, then zeros. Words of packed values have bytes of two rows each.
    pub(super) fn fill_kept(&self) {
        let (Some(kept), k) = (self.kept, self.l.k) else { return };
        let (dims, half) = ([self.l.layout.page, LANES], self.l.layout.page as i32 / 2);
        let row = k.iota(dims, 0);
        let even = row.lt(half).select(k.full(Elem::I32.of(dims), -1), 0);
        kept.store_at((0,), even);
        kept.store_at((1,), row.eq(half).select(k.full(Elem::I32.of(dims), 0xFFFF), even));
    }

    /// Ones for packed values that were copied to the ring, `i32 [page / 2, 128]`: the part of a mask that ends as the
    /// page does. Loading it takes fewer operations than comparing rows.
    fn kept_rows(&self, kept: Ref<'k>, group: Value<'k>, page: usize) -> Value<'k> {
        let (end, half) = (self.rows_of(group, page).end, self.l.layout.page / 2);
        kept.load_at((end & 1, ds(self.l.k.i32(half as i32) - (end >> 1), half)))
    }

    /// Which of a page's rows were copied to the ring.
    fn copied(&self, group: Value<'k>, page: usize) -> Value<'k> {
        let rows = self.rows_of(group, page);
        let row = self.l.k.iota([self.l.layout.page, LANES], 0);
        let copied = row.lt(rows.end);
        if rows.low.is_some() { copied & row.ge(rows.from) } else { copied }
    }

    /// What products of queries and keys are as powers of two.
    pub(super) fn scaled(&self, products: Value<'k>) -> Value<'k> {
        let spec = self.l.spec;
        let keys = match spec.kv {
            KvFormat::Bf16 => 1.0,
            KvFormat::Fp8 { scales } | KvFormat::Int8 { scales } => scales.keys,
        };
        match spec.soft_cap {
            None => products * (spec.scale * keys * LOG2_E),
            Some(cap) => (products * (spec.scale * keys / cap)).tanh() * (cap * LOG2_E),
        }
    }

    /// A slot's query rows of a unit.
    pub(super) fn query(&self, slot: Value<'k>, unit: usize) -> Value<'k> {
        if self.draft == 1 {
            return self.query.load_at((slot, unit));
        }
        let draft = self.draft as i32;
        self.query.load_at((ds(slot * draft, self.draft), unit)).reshape(&[self.rows, self.l.layout.width()])
    }

    /// For each row and column of a page's scores the column's token less the number of the row's.
    fn tokens(&self) -> Value<'k> {
        let tokens = self.l.layout.tokens(self.l.k, self.l.layout.rows());
        let later: Vec<_> = (1..self.draft as i32).map(|token| tokens - token).collect();
        if later.is_empty() { tokens } else { tokens.concatenate(&later, 0) }
    }

    /// Scores of each page and unit, masked: tokens that are not seen, and columns of other heads.
    pub(super) fn scores(&self, group: Value<'k>) -> Vec<Vec<Value<'k>>> {
        let units = self.l.layout.units;
        let tokens = self.tokens();
        let products: Vec<Vec<_>> = (0..units).map(|unit| self.query_key_products(group, unit)).collect();
        let masked = |page: usize, unit: usize| {
            let rows = self.rows_of(group, page);
            let mut seen = tokens.lt(rows.below);
            if let Some(low) = rows.low {
                seen = seen & tokens.ge(low);
            }
            if self.l.mask.is_some() {
                seen = self.masked(group, page, seen);
            }
            seen.select(self.scaled(products[unit][page]), LEAST)
        };
        (0..self.l.tuning.pages).map(|page| (0..units).map(|unit| masked(page, unit)).collect()).collect()
    }

    /// For each page of a group the products of a unit's queries and keys: `f32 [rows, columns]`.
    fn query_key_products(&self, group: Value<'k>, unit: usize) -> Vec<Value<'k>> {
        let (pages, columns) = (self.l.tuning.pages, self.l.layout.columns());
        let query = |page: usize| self.query(self.slot(group, page), unit);
        if !self.in_pairs() {
            return (0..pages).map(|page| self.times_keys(query(page), group, page, unit)).collect();
        }
        let of_pair = |first: usize| {
            let [a, b] = [first, first + 1].map(|page| query(page).cast(Elem::F32));
            let rows = a.concatenate(&[b], 0).cast(Elem::Bf16);
            let [a, b] = [first, first + 1].map(|page| self.keys(group, page, unit));
            let products = rows.dot_transposed(a.concatenate(&[b], 0));
            [0, 1].map(|which| products.slice(&[which * self.rows, which * columns], &[self.rows, columns]))
        };
        (0..pages).step_by(2).flat_map(of_pair).collect()
    }

    /// Whether two pages are multiplied at once, each with its own rows: a page without columns of other heads fills but
    /// half of the matrix unit.
    fn in_pairs(&self) -> bool {
        self.l.layout.is_joined()
    }

    /// Whether tokens are seen, where an operand says which new tokens see each other.
    fn masked(&self, group: Value<'k>, page: usize, before: Value<'k>) -> Value<'k> {
        let (k, layout) = (self.l.k, self.l.layout);
        let Some(mask) = self.l.mask else { return before };
        let words = self.l.slot(self.slot(group, page));
        let dims = [layout.rows(), layout.columns()];
        let last = self.l.shape.tokens as i32 - 1;
        let bits = |token: usize| mask.get(((words.token + token as i32).min(last),)).broadcast(&dims);
        let rows: Vec<_> = (0..self.draft).map(bits).collect();
        let bits = rows[0].concatenate(&rows[1..], 0);
        let tokens = layout.tokens(k, layout.rows());
        let tokens = tokens.concatenate(&vec![tokens; self.draft - 1], 0);
        let start = (self.item(group, page) >> Item::NUMBER_BIT as i32) * self.l.spec.page_size as i32;
        let number = tokens - (words.old - start);
        let bit = bits.shift_right_logical(number.max(0).min(31)) & 1;
        number.lt(0) | (number.lt(self.draft as i32) & bit.eq(1))
    }

    /// Weights, as lanes of 128 columns each, times values of each page and unit.
    pub(super) fn products(&self, group: Value<'k>, weights: &[Vec<Vec<Value<'k>>>]) -> Vec<Vec<Value<'k>>> {
        let joined = |parts: &[Value<'k>]| match parts {
            [one] => *one,
            parts => parts[0].concatenate(&parts[1..], 1),
        };
        let alone = |page: usize, unit: usize| {
            let parts: Vec<_> = weights[page][unit].iter().map(|part| part.cast(Elem::Bf16)).collect();
            joined(&parts).dot(self.values(group, page, unit))
        };
        let of_pair = |first: usize, unit: usize| {
            let [a, b] = [first, first + 1].map(|page| joined(&weights[page][unit]));
            let none = self.l.k.zeros(Elem::F32.of([self.rows, self.l.layout.columns()]));
            let rows = a.concatenate(&[none], 1).concatenate(&[none.concatenate(&[b], 1)], 0).cast(Elem::Bf16);
            let [a, b] = [first, first + 1].map(|page| self.values(group, page, unit));
            let products = rows.dot(a.concatenate(&[b], 0));
            [0, 1].map(|which| products.slice(&[which * self.rows, 0], &[self.rows, self.l.layout.width()]))
        };
        let (pages, units) = (self.l.tuning.pages, self.l.layout.units);
        if !self.in_pairs() {
            return (0..pages).map(|page| (0..units).map(|unit| alone(page, unit)).collect()).collect();
        }
        let pair = |first: usize| {
            let units: Vec<_> = (0..units).map(|unit| of_pair(first, unit)).collect();
            [0, 1].map(|which| units.iter().map(|unit| unit[which]).collect())
        };
        (0..pages).step_by(2).flat_map(pair).collect()
    }
}
