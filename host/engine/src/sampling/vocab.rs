//! A vocabulary that devices share: each has the logits of its part, and what rows need of the others is a few numbers.
//!
//! Device `i` holds the tokens `i * part .. (i + 1) * part`; the last ones may hold padding, which is never sampled. Sums and
//! maxima are those of the whole vocabulary on every device, so that all of them sample the same token. Where one device
//! holds everything, nothing is exchanged and nothing is added to the program.

use torus_abi::{DType, model::Parallel};
use torus_hlo::{
    Axis, Func, Group, Value,
    axes::{ROWS, VOCAB},
};

/// The part of the vocabulary that this device holds.
#[derive(Clone, Copy)]
pub(crate) struct Vocabulary<'f> {
    /// Tokens of the whole vocabulary.
    whole: u64,
    shards: Option<Shards<'f>>,
}

#[derive(Clone, Copy)]
struct Shards<'f> {
    parallel: Parallel,
    /// i32 `[]`: this device's number.
    index: Value<'f>,
}

/// Tells these exchanges apart from those of the model.
const CHANNEL: u32 = 3;
pub(super) const SHARDS: Axis = Axis("shards");
const FACTS: Axis = Axis("facts");

impl<'f> Vocabulary<'f> {
    /// `index` (i32 `[]`) is the device's number, if several share the vocabulary.
    pub fn new(whole: u64, parallel: Parallel, index: Option<Value<'f>>) -> Self {
        let shards = index.filter(|_| parallel.tensor > 1).map(|index| Shards { parallel, index });
        Self { whole, shards }
    }

    fn group(shards: &Shards<'f>) -> Group {
        Group::all(shards.parallel.tensor, CHANNEL)
    }

    /// Tokens that a device holds, padding included.
    fn part(&self) -> u64 {
        self.shards.map_or(self.whole, |shards| shards.parallel.vocab(self.whole))
    }

    /// Whether some device holds padding.
    fn is_padded(&self) -> bool {
        self.shards.is_some_and(|shards| self.part() * u64::from(shards.parallel.tensor) != self.whole)
    }

    /// The first token of this device.
    fn first(shards: &Shards<'f>, part: u64) -> Value<'f> {
        shards.index * part as i32
    }

    /// The tokens that this device holds: `[vocab]` of an integer dtype.
    pub fn ids(&self, func: &'f Func<'f>, dtype: DType) -> Value<'f> {
        let ids = func.iota(dtype, VOCAB, self.part());
        match &self.shards {
            Some(shards) => ids + Self::first(shards, self.part()).convert(dtype),
            None => ids,
        }
    }

    /// Where tokens `i32 [rows]` lie in this device's part; outside of it for those that others hold.
    pub fn place(&self, tokens: Value<'f>) -> Value<'f> {
        let Some(shards) = &self.shards else { return tokens };
        let place = tokens - Self::first(shards, self.part());
        // A negative place would be read as one from the end by some, and dropped by others.
        let part = place.full_like(self.part() as i32);
        place.lt(0i32).select(part, place)
    }

    /// Logits of what is no token become as small as can be.
    pub fn mask_padding(&self, logits: Value<'f>) -> Value<'f> {
        if !self.is_padded() {
            return logits;
        }
        let is_token = self.ids(logits.func(), DType::I32).lt(self.whole as i32);
        is_token.select(logits, logits.full_like(f32::NEG_INFINITY))
    }

    /// The sum of what the devices found.
    pub fn sum(&self, found: Value<'f>) -> Value<'f> {
        self.shards.map_or(found, |shards| found.all_reduce_sum(&Self::group(&shards)))
    }

    /// The largest of what the devices found.
    pub fn max(&self, found: Value<'f>) -> Value<'f> {
        self.shards.map_or(found, |shards| found.all_reduce_max(&Self::group(&shards)))
    }

    /// What all devices found, one after the other along [`SHARDS`]; `None` where there is but one.
    pub fn gather(&self, found: Value<'f>) -> Option<Value<'f>> {
        let shards = self.shards?;
        let mut axes = vec![(SHARDS, 1)];
        axes.extend(found.shape().axes);
        Some(found.reshape(&axes).all_gather(SHARDS, &Self::group(&shards)))
    }

    /// The token with the largest of `values [rows, vocab]`, the first of equals: i32 `[rows]`.
    pub fn argmax(&self, values: Value<'f>) -> Value<'f> {
        self.argmax_and(values, None).0
    }

    /// As [`Vocabulary::argmax`]; and the largest of `beside [rows, vocab]` in each row, NaN if there is one.
    pub fn argmax_and(&self, values: Value<'f>, beside: Option<Value<'f>>) -> (Value<'f>, Option<Value<'f>>) {
        let place = values.argmax(VOCAB);
        // XLA's maximum on a CPU passes over NaN, so it is asked for by itself.
        let peak = beside.map(|beside| {
            let peak = beside.reduce_max(VOCAB);
            beside.ne(beside).any(VOCAB).select(peak.full_like(f32::NAN), peak)
        });
        let Some(shards) = &self.shards else { return (place, peak) };
        let token = place + Self::first(shards, self.part());
        let mut facts = vec![values.reduce_max(VOCAB).bitcast(DType::I32), token];
        facts.extend(peak.map(|peak| peak.bitcast(DType::I32)));
        let rows = values.size(ROWS);
        let columns: Vec<_> = facts.iter().map(|fact| fact.reshape(&[(FACTS, 1), (ROWS, rows)])).collect();
        let Some(all) = self.gather(values.func().concatenate(FACTS, &columns)) else { return (place, peak) };
        let fact = |index: u64| all.slice(FACTS, index..index + 1).squeeze(FACTS);
        // Parts follow each other, so the first device of equals has the first token of equals.
        let best = fact(0).bitcast(DType::F32).argmax(SHARDS);
        let peak = peak.map(|_| {
            let peaks = fact(2).bitcast(DType::F32);
            let peak = peaks.reduce_max(SHARDS);
            peaks.ne(peaks).any(SHARDS).select(peak.full_like(f32::NAN), peak)
        });
        (fact(1).take_along(SHARDS, best), peak)
    }

    /// The element of each row of `values [rows, vocab]` at its own token `i32 [rows]`: `[rows]`.
    pub fn pick(&self, values: Value<'f>, tokens: Value<'f>) -> Value<'f> {
        let place = self.place(tokens);
        let found = values.take_along(VOCAB, place);
        if self.shards.is_none() {
            return found;
        }
        // One device has it, and zero changes nothing.
        self.sum(place.lt(self.part() as i32).select(found, found.full_like(0.0f32)))
    }
}
