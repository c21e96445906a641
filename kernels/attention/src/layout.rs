//! How keys and values lie in HBM.
//!
//! A layer's pool is `i32 [pages, units, planes, page, 128]`: 32-bit words, because a memory of words takes copies of
//! single rows, and its words become `bf16` by a free change of type after the load. A *unit* is the KV heads that
//! share words, a *plane* one row of 128 lanes per token. So a token is `planes` rows of 512 bytes in each unit, and is
//! written without reading what is beside it.
//!
//! | form | for | word, from the lowest bits | planes |
//! |---|---|---|---|
//! | [`Form::Pairs`] | heads of 128, 256; an even number | head 2u, head 2u+1 | keys by 128 lanes, then values |
//! | [`Form::Single`] | the same, an odd number | key, value of head u | by 128 lanes |
//! | [`Form::Twins`] | heads of 64 | key, value of head 2u or 2u+1 | one: two heads side by side |
//! | [`Form::Quads`] | heads of 64, four or a few more | head 4u or 4u+2, head 4u+1 or 4u+3 | keys, values: two heads side by side |
//! | [`Form::Bytes`] | 8 bits, heads of 128, 256; an even number | key and value of head 2u, key and value of head 2u+1 | by 128 lanes |
//! | [`Form::ByteQuads`] | 8 bits, heads of 64, a multiple of 4 | the same, heads as in `Quads` | one |
//!
//! Rows of scores belong to query heads and columns to tokens. Where two heads share a word, a page's `2 * page`
//! columns are those of both heads in turn, and half of each row is masked: see [`Layout::columns`].

use torus_mosaic::{Builder, Elem, Tensor, Value};

use crate::spec::{KvFormat, Spec, Unsupported};

/// Lanes of a row.
pub const LANES: usize = 128;
/// Rows of an `f32` register: query rows of a unit are a multiple.
const SUBLANES: usize = 8;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Form {
    Pairs,
    Single,
    Twins,
    Quads,
    Bytes,
    ByteQuads,
}

/// The layout of one kind of layer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Layout {
    pub form: Form,
    pub kv_heads: usize,
    pub head_dim: usize,
    /// Query heads that share a KV head.
    pub group: usize,
    /// Tokens of a page.
    pub page: usize,
    pub units: usize,
    pub planes: usize,
    /// KV heads of a unit; the last ones of the last unit may be padding.
    pub unit_heads: usize,
    /// Rows that a KV head's queries take: `group`, padded so that a unit's are whole registers.
    pub rows_per_head: usize,
}

/// A key or a value.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Part {
    Key,
    Value,
}

/// Where one number lies within a token's rows.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Place {
    pub unit: usize,
    pub plane: usize,
    pub lane: usize,
    /// The lowest of its bits in the word.
    pub shift: usize,
}

impl Layout {
    pub fn new(spec: &Spec) -> Result<Self, Unsupported> {
        spec.check()?;
        let Spec { kv_heads, head_dim, .. } = *spec;
        let form = form(spec)?;
        let chunks = head_dim.div_ceil(LANES);
        let (unit_heads, planes) = match form {
            Form::Pairs => (2, 2 * chunks),
            Form::Single => (1, chunks),
            Form::Twins => (2, 1),
            Form::Quads => (4, 2),
            Form::Bytes => (2, chunks),
            Form::ByteQuads => (4, 1),
        };
        let rows_per_head = spec.group().next_multiple_of(SUBLANES / unit_heads);
        let units = kv_heads.div_ceil(unit_heads);
        let (group, page) = (spec.group(), spec.page_size);
        Ok(Self { form, kv_heads, head_dim, group, page, units, planes, unit_heads, rows_per_head })
    }

    /// Query rows of a unit.
    pub fn rows(&self) -> usize {
        self.unit_heads * self.rows_per_head
    }

    /// Lanes of a query row, of an output row, and of a key or value as the kernel multiplies them: `head_dim`, but at
    /// least 128.
    pub fn width(&self) -> usize {
        self.head_dim.max(LANES)
    }

    /// One layer's pool.
    pub fn pool(&self, pages: usize) -> Tensor {
        Elem::I32.of([pages, self.units, self.planes, self.page, LANES])
    }

    pub fn page_bytes(&self) -> usize {
        self.units * self.planes * self.page * LANES * size_of::<u32>()
    }

    /// Whether the halves of a word are key and value, not two heads.
    pub fn is_joined(&self) -> bool {
        matches!(self.form, Form::Single | Form::Twins)
    }

    /// Columns of a page's scores.
    pub fn columns(&self) -> usize {
        if self.is_joined() { self.page } else { 2 * self.page }
    }

    /// Where a number of a head lies.
    pub fn place(&self, head: usize, part: Part, dim: usize) -> Place {
        let value = usize::from(part == Part::Value);
        let (chunk, lane, high) = (dim / LANES, dim % LANES, head % 2);
        let half = 64 * (head / 2 % 2);
        let (plane, lane, shift) = match self.form {
            Form::Pairs => (value * self.planes / 2 + chunk, lane, 16 * high),
            Form::Single => (chunk, lane, 16 * value),
            Form::Twins => (0, 64 * high + dim, 16 * value),
            Form::Quads => (value, half + dim, 16 * high),
            Form::Bytes => (chunk, lane, 16 * high + 8 * value),
            Form::ByteQuads => (0, half + dim, 16 * high + 8 * value),
        };
        Place { unit: head / self.unit_heads, plane, lane, shift }
    }

    /// The first lane of a query's numbers in its row; the other lanes are zero.
    pub fn query_lane(&self, head: usize) -> usize {
        self.place(head, Part::Key, 0).lane
    }

    /// The first lane of the result in an output row.
    pub fn output_lane(&self, head: usize) -> usize {
        self.place(head, Part::Value, 0).lane
    }

    /// The unit and the row within it of a query head.
    pub fn query_row(&self, q_head: usize) -> (usize, usize) {
        let head = q_head / self.group;
        (head / self.unit_heads, head % self.unit_heads * self.rows_per_head + q_head % self.group)
    }
}

fn form(spec: &Spec) -> Result<Form, Unsupported> {
    let Spec { kv_heads, head_dim, kv, .. } = *spec;
    let bytes = kv.bytes() == 1;
    let fits_quads = matches!(kv_heads % 4, 0 | 3);
    match (head_dim, bytes) {
        (64, true) if kv_heads.is_multiple_of(4) => Ok(Form::ByteQuads),
        (64, true) => Err(Unsupported::Feature {
            what: format!("{kv_heads} KV heads of 64 in 8 bits"),
            reason: "four heads share a row, so their number must be a multiple of 4",
        }),
        (64, false) if fits_quads => Ok(Form::Quads),
        (64, false) => Ok(Form::Twins),
        (_, true) if kv_heads.is_multiple_of(2) => Ok(Form::Bytes),
        (_, true) => Err(Unsupported::Feature {
            what: format!("{kv_heads} KV heads of {head_dim} in 8 bits"),
            reason: "two heads share a row, so their number must be even",
        }),
        (_, false) if kv_heads.is_multiple_of(2) => Ok(Form::Pairs),
        (_, false) => Ok(Form::Single),
    }
}

/// What kernels make of words that were loaded.
impl Layout {
    /// For each column of a page's scores its token, in rows of query heads: `i32 [rows, columns]`. Columns of another
    /// head's keys have a token past every page.
    pub fn tokens<'k>(&self, k: &'k Builder, rows: usize) -> Value<'k> {
        let dims = [rows, self.columns()];
        let column = k.iota(dims, 1);
        if self.is_joined() {
            return (column >> 1) + (column & 1) * (self.page as i32 / 2);
        }
        let row = k.iota(dims, 0);
        let head = (0..self.rows() / self.rows_per_head - 1)
            .map(|head| row.ge(((head + 1) * self.rows_per_head) as i32).select(k.i32(1).broadcast(&dims), 0))
            .reduce(|a, b| a + b)
            .unwrap_or(row);
        (column & 1).eq(head & 1).select(column >> 1, 1 << 30)
    }

    /// A page's keys, `[columns, width]`, from its words by plane, each `i32 [page, 128]`: `f8E4M3` of a cache of those,
    /// which the matrix unit takes beside `bf16`, else `bf16`.
    pub fn keys<'k>(&self, spec: &Spec, words: &[Value<'k>]) -> Value<'k> {
        self.part(spec, words, Part::Key)
    }

    /// A page's keys in `bf16` as `[width, columns]`, from bytes that are transposed before they are widened.
    pub fn int8_keys_transposed<'k>(&self, words: &[Value<'k>]) -> Value<'k> {
        let chunks: Vec<_> = words.iter().map(|words| bytes(*words, Part::Key).transpose().cast(Elem::Bf16)).collect();
        joined(&chunks, 0)
    }

    /// A page's values, likewise.
    pub fn values<'k>(&self, spec: &Spec, words: &[Value<'k>]) -> Value<'k> {
        self.part(spec, words, Part::Value)
    }

    /// A page's values in `f8E4M3` where the bits of `kept`, `i32 [page / 2, 128]`, are ones, and zeros elsewhere.
    pub fn values_among<'k>(&self, words: &[Value<'k>], kept: Value<'k>) -> Value<'k> {
        let chunk = |words: &Value<'k>| (bytes(*words, Part::Value).bitcast(Elem::I32) & kept).bitcast(Elem::F8E4M3);
        let chunks: Vec<_> = words.iter().map(chunk).collect();
        joined(&chunks, 1)
    }

    /// The planes that hold a part.
    pub fn planes_of(&self, part: Part) -> std::ops::Range<usize> {
        let half = self.planes / 2;
        match (self.form, part) {
            (Form::Pairs | Form::Quads, Part::Key) => 0..half,
            (Form::Pairs | Form::Quads, Part::Value) => half..self.planes,
            _ => 0..self.planes,
        }
    }

    /// Words of which each holds a part of two heads in its halves, or, of a single head, the part in the half it has in
    /// the pool; from words of one plane. Rows stay. They are the numbers divided by [`byte_factor`].
    pub(crate) fn pairs<'k>(&self, spec: &Spec, words: Value<'k>, part: Part) -> Value<'k> {
        match self.form {
            Form::Bytes | Form::ByteQuads => widen(spec.kv, words, part),
            _ => words,
        }
    }

    pub(crate) fn high_half(&self) -> i32 {
        HIGH
    }

    fn part<'k>(&self, spec: &Spec, words: &[Value<'k>], part: Part) -> Value<'k> {
        let chunk = |words: &Value<'k>| match spec.kv {
            KvFormat::Fp8 { .. } => bytes(*words, part).bitcast(Elem::F8E4M3),
            _ => self.halves(spec, *words, part).bitcast(Elem::Bf16),
        };
        let chunks: Vec<_> = words.iter().map(chunk).collect();
        joined(&chunks, 1)
    }

    /// Words of two `bf16` each from a plane's words.
    fn halves<'k>(&self, spec: &Spec, words: Value<'k>, part: Part) -> Value<'k> {
        match self.form {
            Form::Pairs | Form::Quads => words,
            Form::Single | Form::Twins => {
                let half = self.page / 2;
                let [low, high] = [0, half].map(|row| words.slice(&[row, 0], &[half, LANES]));
                match part {
                    Part::Key => (low & 0xFFFF) | (high << 16),
                    Part::Value => low.shift_right_logical(16) | (high & HIGH),
                }
            }
            Form::Bytes | Form::ByteQuads => widen(spec.kv, words, part),
        }
    }
}

/// The upper half of a word.
const HIGH: i32 = 0xFFFF_0000_u32 as i32;
/// The signs of two halves.
const SIGNS: i32 = 0x8000_8000_u32 as i32;

/// Chunks side by side along an axis.
pub(crate) fn joined<'k>(chunks: &[Value<'k>], axis: usize) -> Value<'k> {
    if chunks.len() == 1 { chunks[0] } else { chunks[0].concatenate(&chunks[1..], axis) }
}

/// The bytes of a part, `i8 [2 * rows, 128]`: two heads of a token, then the next one's. The compiler packs them with one
/// operation for two registers of words.
fn bytes<'k>(words: Value<'k>, part: Part) -> Value<'k> {
    let low = if part == Part::Key { words } else { words.shift_right_logical(8) };
    low.bitcast(Elem::I16).cast(Elem::I8)
}

/// Two `bf16` from the two bytes of a part, finite whatever the bytes are: the numbers divided by [`byte_factor`].
fn widen<'k>(kv: KvFormat, words: Value<'k>, part: Part) -> Value<'k> {
    match (kv, part) {
        // Exponent and mantissa go to the places of those of a bf16, whose exponent has another bias.
        (KvFormat::Fp8 { .. }, Part::Key) => ((words << 8) & SIGNS) | ((words << 4) & 0x07F0_07F0),
        (KvFormat::Fp8 { .. }, Part::Value) => (words & SIGNS) | (words.shift_right_logical(4) & 0x07F0_07F0),
        _ => bytes(words, part).cast(Elem::Bf16).bitcast(Elem::I32),
    }
}

/// What widened numbers ([`Layout::pairs`]) are multiplied by to give those that the bytes stand for, without the scales.
pub fn byte_factor(kv: KvFormat) -> f32 {
    match kv {
        KvFormat::Bf16 | KvFormat::Int8 { .. } => 1.0,
        // bf16 has a bias of 127, f8E4M3 one of 7.
        KvFormat::Fp8 { .. } => f32::from_bits((127 + 120) << 23),
    }
}
