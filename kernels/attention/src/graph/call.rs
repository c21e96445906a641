//! A layer's call of the kernel: queries, keys and values into the kernel's order, and the result back.

use torus_abi::DType;
use torus_hlo::{
    Axis, Func, Shape as Tensor, Value,
    axes::{GROUP, HEAD_DIM, KV_HEADS, PAGE, PAGES, Q_HEADS, TOKENS},
};

use crate::{
    layout::{Form, LANES, Layout, Part},
    spec::{KvFormat, Shape, Spec, Unsupported},
    tuned::Tuning,
};

const UNITS: Axis = Axis("units");
const UNIT_HEADS: Axis = Axis("unit_heads");
const HALVES: Axis = Axis("halves");
const PLANES: Axis = Axis("planes");
const LANE: Axis = Axis("lane");
const ROWS: Axis = Axis("rows");
const KEY_OR_VALUE: Axis = Axis("key_or_value");

/// A layer's operands.
pub struct Layer<'f> {
    /// `[tokens, q_heads, head_dim]`
    pub query: Value<'f>,
    /// `[tokens, kv_heads, head_dim]`
    pub key: Value<'f>,
    pub value: Value<'f>,
    /// `i32 [pages, units, planes, page, 128]`
    pub pool: Value<'f>,
    /// What [`super::context`] gave.
    pub context: Vec<Value<'f>>,
    /// `f32 [2]`: what cached keys and cached values are multiplied by, beside the spec's constant scales.
    pub scales: Option<Value<'f>>,
}

/// The attended rows, of the query's shape and type, and the pool.
pub fn attention<'f>(
    f: &'f Func<'f>,
    spec: &Spec,
    shape: &Shape,
    tuning: &Tuning,
    layer: &Layer<'f>,
) -> Result<[Value<'f>; 2], Unsupported> {
    let layout = Layout::new(spec)?;
    let kernel = crate::kernel(spec, shape, tuning)?;
    let glue = Glue { f, spec, layout: &layout, scales: layer.scales };
    let query = glue.query(layer.query.named(&QUERY_AXES));
    let [key, value] = [layer.key, layer.value].map(|part| part.named(&KEY_AXES));
    let new = glue.new_rows(key, value);
    let pool = layer.pool.named(&[PAGES, UNITS, PLANES, PAGE, LANE]);
    let call = kernel.custom_call(&crate::call_options(spec), vec![query.shape(), pool.shape()])?;
    let operands: Vec<_> = layer.context.iter().copied().chain([query, new, pool]).collect();
    let results = f.custom_call(&call, &operands);
    let (Some(rows), Some(pool)) = (results.first(), results.get(1)) else { return Ok([layer.query, layer.pool]) };
    Ok([glue.attended(*rows).convert(layer.query.dtype()), *pool])
}

pub(crate) const QUERY_AXES: [Axis; 3] = [TOKENS, Q_HEADS, HEAD_DIM];
pub(crate) const KEY_AXES: [Axis; 3] = [TOKENS, KV_HEADS, HEAD_DIM];

pub(crate) struct Glue<'f, 'a> {
    pub f: &'f Func<'f>,
    pub spec: &'a Spec,
    pub layout: &'a Layout,
    /// [`Layer::scales`]. The kernel does not know of them: scores are products with keys, and results sums of values.
    pub scales: Option<Value<'f>>,
}

impl<'f> Glue<'f, '_> {
    /// `[tokens, q_heads, head_dim]` as `bf16 [tokens, units, rows, width]`.
    pub fn query(&self, query: Value<'f>) -> Value<'f> {
        let Layout { kv_heads, units, unit_heads, group, rows_per_head, .. } = *self.layout;
        let query = self.scale(Part::Key).map_or(query, |scale| query.convert(DType::F32) * scale);
        let query = query.convert(DType::Bf16).split(Q_HEADS, &[(KV_HEADS, kv_heads as u64), (GROUP, group as u64)]);
        let query = query.pad(GROUP, 0, (rows_per_head - group) as u64, 0);
        let query = query.pad(KV_HEADS, 0, (units * unit_heads - kv_heads) as u64, 0);
        let query = query.split(KV_HEADS, &[(UNITS, units as u64), (UNIT_HEADS, unit_heads as u64)]);
        self.in_lanes(query, Part::Key).merge(&[UNIT_HEADS, GROUP], ROWS)
    }

    /// Puts heads of 64 into their lanes of a row, zeros beside them.
    fn in_lanes(&self, rows: Value<'f>, part: Part) -> Value<'f> {
        let lane = |head: usize| match part {
            Part::Key => self.layout.query_lane(head) as u64,
            Part::Value => self.layout.output_lane(head) as u64,
        };
        let width = self.layout.width() as u64;
        let place = |rows: Value<'f>, at: u64| rows.pad(HEAD_DIM, at, width - rows.size(HEAD_DIM) - at, 0);
        match self.layout.form {
            Form::Twins | Form::Quads | Form::ByteQuads => {
                let of_half = |(head, rows): (usize, Value<'f>)| place(rows, lane(head));
                self.f.concatenate(UNIT_HEADS, &self.halves(rows).map(of_half))
            }
            _ => place(rows, lane(0)),
        }
    }

    /// A unit's heads in the lower half of the lanes, then those in the upper one, each with its first head.
    fn halves(&self, rows: Value<'f>) -> [(usize, Value<'f>); 2] {
        let heads = self.layout.unit_heads / 2;
        [0, heads].map(|head| (head, rows.slice(UNIT_HEADS, head as u64..(head + heads) as u64)))
    }

    /// The kernel's rows as `[tokens, q_heads, head_dim]`.
    pub fn attended(&self, rows: Value<'f>) -> Value<'f> {
        let Layout { kv_heads, head_dim, unit_heads, group, rows_per_head, .. } = *self.layout;
        let rows = rows.named(&[TOKENS, UNITS, ROWS, HEAD_DIM]);
        let rows = rows.split(ROWS, &[(UNIT_HEADS, unit_heads as u64), (GROUP, rows_per_head as u64)]);
        let take = |rows: Value<'f>, head: usize| {
            let lane = self.layout.output_lane(head) as u64;
            rows.slice(HEAD_DIM, lane..lane + head_dim as u64)
        };
        let rows = match self.layout.form {
            Form::Twins | Form::Quads | Form::ByteQuads => {
                self.f.concatenate(UNIT_HEADS, &self.halves(rows).map(|(head, rows)| take(rows, head)))
            }
            _ => take(rows, 0),
        };
        let rows = rows.slice(GROUP, 0..group as u64).merge(&[UNITS, UNIT_HEADS], KV_HEADS);
        let rows = rows.slice(KV_HEADS, 0..kv_heads as u64).merge(&[KV_HEADS, GROUP], Q_HEADS);
        self.scale(Part::Value).map_or(rows, |scale| rows.convert(DType::F32) * scale)
    }

    /// A scalar.
    fn scale(&self, part: Part) -> Option<Value<'f>> {
        let at = u64::from(part == Part::Value);
        let scales = self.scales?.named(&[KEY_OR_VALUE]);
        Some(scales.slice(KEY_OR_VALUE, at..at + 1).squeeze(KEY_OR_VALUE))
    }

    /// The new keys and values, `[tokens, kv_heads, head_dim]` each, as the pool's words:
    /// `i32 [units, planes, tokens, 128]`.
    pub fn new_rows(&self, key: Value<'f>, value: Value<'f>) -> Value<'f> {
        let Layout { kv_heads, units, unit_heads, .. } = *self.layout;
        let bits = |part: Part, numbers: Value<'f>| {
            let bits = self.encode(part, numbers).pad(KV_HEADS, 0, (units * unit_heads - kv_heads) as u64, 0);
            bits.split(KV_HEADS, &[(UNITS, units as u64), (UNIT_HEADS, unit_heads as u64)])
        };
        let (key, value) = (bits(Part::Key, key), bits(Part::Value, value));
        let words = match self.layout.form {
            Form::Single => self.by_plane((key | (value << 16)).squeeze(UNIT_HEADS)),
            Form::Pairs => {
                let parts = [key, value].map(|part| self.by_plane(self.heads(part).squeeze(HALVES)));
                self.f.concatenate(PLANES, &parts)
            }
            Form::Twins => self.by_plane((key | (value << 16)).merge(&[UNIT_HEADS, HEAD_DIM], HEAD_DIM)),
            Form::Quads => {
                let parts = [key, value].map(|part| self.by_plane(self.side_by_side(self.heads(part))));
                self.f.concatenate(PLANES, &parts)
            }
            Form::Bytes => self.by_plane(self.heads(key | (value << 8)).squeeze(HALVES)),
            Form::ByteQuads => self.by_plane(self.side_by_side(self.heads(key | (value << 8)))),
        };
        words.bitcast(DType::I32).transpose(&[UNITS, PLANES, TOKENS, LANE])
    }

    /// Words of two heads each: `[tokens, units, halves, head_dim]`.
    fn heads(&self, bits: Value<'f>) -> Value<'f> {
        let halves = self.layout.unit_heads as u64 / 2;
        let bits = bits.split(UNIT_HEADS, &[(HALVES, halves), (UNIT_HEADS, 2)]);
        let head = |head: u64| bits.slice(UNIT_HEADS, head..head + 1).squeeze(UNIT_HEADS);
        head(0) | (head(1) << 16)
    }

    fn side_by_side(&self, words: Value<'f>) -> Value<'f> {
        words.merge(&[HALVES, HEAD_DIM], HEAD_DIM)
    }

    /// `[tokens, units, head_dim]` as `[tokens, units, planes, 128]`.
    fn by_plane(&self, words: Value<'f>) -> Value<'f> {
        let planes = words.size(HEAD_DIM) / LANES as u64;
        words.split(HEAD_DIM, &[(PLANES, planes), (LANE, LANES as u64)])
    }

    /// The bits that numbers are kept as, in `u32`: [`KvFormat::encode`].
    fn encode(&self, part: Part, numbers: Value<'f>) -> Value<'f> {
        let scaled = |scale: f32| {
            let numbers = numbers.convert(DType::F32);
            let inverse = |scale: Value<'f>| scale.full_like(1.0f32) / scale;
            self.scale(part).map_or(numbers, |scale| numbers * inverse(scale)) * scale.recip()
        };
        let sign = |scaled: Value<'f>| (scaled.bitcast(DType::U32) >> 31) << 7;
        match self.spec.kv {
            KvFormat::Bf16 => numbers.convert(DType::Bf16).bitcast(DType::U16).convert(DType::U32),
            KvFormat::Int8 { scales } => {
                let scaled = scaled(scales.of(part));
                scaled.round_even().clamp(-127.0, 127.0).convert(DType::I32).bitcast(DType::U32) & 0xFF
            }
            KvFormat::Fp8 { scales } => {
                let scaled = scaled(scales.of(part));
                let bits = scaled.abs().min(448.0).bitcast(DType::U32);
                let rounded = (bits + 0x0007_FFFF + ((bits >> 20) & 1)) >> 20;
                let least = (127 - 6) << 3;
                let kept = rounded - (120 << 3);
                rounded.ge(least).select(kept, kept.full_like(0)) | sign(scaled)
            }
        }
    }
}

/// The pool's type in a program.
pub fn pool_type(layout: &Layout, pages: usize) -> Tensor {
    let dims = layout.pool(pages).dims;
    let names = [PAGES, UNITS, PLANES, PAGE, LANE];
    Tensor::new(DType::I32, names.into_iter().zip(dims.into_iter().map(|dim| dim as u64)).collect::<Vec<_>>())
}
