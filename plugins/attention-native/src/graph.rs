//! The graph.

use torus_abi::{
    DType, TensorType,
    attention::{AttentionQuery, EmitAttention},
    fault::Fault,
    fragment::{Fragment, Operand},
    step::{StepInput, StepShape},
};
use torus_hlo::{
    Axis, Builder, Dot, Func, Precision, Scatter, Shape, Value,
    axes::{GROUP, HEAD_DIM, KV_HEADS, PAGE, PAGES, Q_HEADS, SEQS, SLOTS, TOKENS},
};

/// The part of the pool with the scales, if there are any.
const SCALES: Operand = Operand::Pool { layer: 0, part: 2 };

/// The step inputs that `context` takes.
pub(crate) const INPUTS: [StepInput; 5] =
    [StepInput::Positions, StepInput::TokenSeq, StepInput::KvSlot, StepInput::PageBegin, StepInput::PageTable];

/// Parts of the context.
#[derive(Clone, Copy)]
enum Part {
    /// `[tokens]`
    Positions,
    /// `[tokens]`: where the pages of each token's sequence begin in the table.
    Begin,
    /// `[tokens]`: where the token's K and V are written.
    KvSlot,
    /// `[page table]`
    PageTable,
    /// `[]`: the largest position of the batch.
    LastPosition,
}

/// Rows of KV that one round of the loop reads, for all tokens together. More rounds of smaller blocks cost loop
/// overhead, larger blocks cost memory: rows times `kv_heads * head_dim` are held at a time.
const ROWS_PER_ROUND: u64 = 1 << 13;
/// Fewest and most KV tokens of a block.
const BLOCK_TOKENS: (u64, u64) = (16, 256);

pub(crate) fn context_types(shape: &StepShape) -> Vec<TensorType> {
    let ints = |dims: &[u64]| TensorType::new(DType::I32, dims);
    vec![ints(&[shape.tokens]), ints(&[shape.tokens]), ints(&[shape.tokens]), ints(&[shape.page_table]), ints(&[])]
}

/// The dtype that the pool has for a cache. Numbers of 8 bits lie in it as their bits, so that no device's compiler
/// widens a whole pool that it would write a few rows of.
pub(crate) fn stored(kv_dtype: DType) -> DType {
    if kv_dtype == DType::F8E4M3 { DType::U8 } else { kv_dtype }
}

/// Whether the last part of the pool are the layer's scales.
pub(crate) fn has_scales(query: &AttentionQuery) -> bool {
    query.kv_dtype == DType::F8E4M3 && query.sets_scales
}

pub(crate) fn emit(request: &EmitAttention) -> Result<Fragment, Fault> {
    let builder = Builder::new(&format!("native_{}", request.kind));
    builder.export("context", |f| context(f, request));
    builder.export("attention", |f| Attention { f, request: &request.query, kind: request.kind }.build());
    Ok(builder.finish()?)
}

fn context<'f>(f: &'f Func<'f>, request: &EmitAttention) -> Vec<(Operand, Value<'f>)> {
    let shape = &request.query.shape;
    let input = |input: StepInput, axes: &[Axis]| {
        f.input(Operand::Step(input), Shape::opaque(&input.tensor_type(shape))).named(axes)
    };
    let positions = input(StepInput::Positions, &[TOKENS]);
    let token_seq = input(StepInput::TokenSeq, &[TOKENS]);
    let kv_slot = input(StepInput::KvSlot, &[TOKENS]);
    let page_begin = input(StepInput::PageBegin, &[SEQS]);
    let page_table = input(StepInput::PageTable, &[PAGES]);
    let parts = [positions, page_begin.take(SEQS, token_seq), kv_slot, page_table, positions.reduce_max(TOKENS)];
    let named = |(part, value)| (Operand::Context { kind: request.kind, part }, value);
    parts.into_iter().enumerate().map(named).collect()
}

struct Attention<'f, 'a> {
    f: &'f Func<'f>,
    request: &'a AttentionQuery,
    kind: usize,
}

/// What the loop carries, all `f32 [tokens, kv_heads, group]` but the last.
struct Running<'f> {
    /// Largest score so far.
    peak: Value<'f>,
    /// Sum of the weights, relative to `peak`.
    total: Value<'f>,
    /// Sum of weighted values `[tokens, kv_heads, group, head_dim]`.
    sum: Value<'f>,
}

impl<'f> Attention<'f, '_> {
    fn build(&self) -> Vec<(Operand, Value<'f>)> {
        let AttentionQuery { spec, dtype, kv_dtype, shape, .. } = self.request;
        let f = self.f;
        let rows = |meaning, heads, count| {
            let axes = [(TOKENS, shape.tokens), (heads, count), (HEAD_DIM, spec.head_dim)];
            f.input(meaning, Shape::new(*dtype, axes))
        };
        let query = rows(Operand::Query, Q_HEADS, spec.q_heads);
        let key = rows(Operand::Key, KV_HEADS, spec.kv_heads);
        let value = rows(Operand::Value, KV_HEADS, spec.kv_heads);
        let slots = shape.pages * shape.page_size;
        let pool =
            Shape::new(stored(*kv_dtype), [(SLOTS, slots), (KV_HEADS, spec.kv_heads), (HEAD_DIM, spec.head_dim)]);
        let [keys, values] = [0, 1].map(|part| f.input(Operand::Pool { layer: 0, part }, pool.clone()));
        let scales = self.scales();
        let context = self.context();
        let written = |pool: Value<'f>, part: usize, rows: Value<'f>| {
            let rows = self.kept(rows, scales.map(|(_, scales)| scales[part]));
            pool.scatter(&[(SLOTS, context[Part::KvSlot as usize])], rows, Scatter::set())
        };
        let (keys, values) = (written(keys, 0, key), written(values, 1, value));
        let group = [(KV_HEADS, spec.kv_heads), (GROUP, spec.q_heads / spec.kv_heads)];
        let scaled = |rows: Value<'f>, part: usize| scales.map_or(rows, |(_, scales)| rows * scales[part]);
        let query = scaled((query.convert(DType::F32).split(Q_HEADS, &group)) * spec.scale, 0);
        let attended = scaled(self.attend(query, [keys, values], &context), 1);
        let mut results = vec![
            (Operand::Attended, attended.merge(&[KV_HEADS, GROUP], Q_HEADS).convert(*dtype)),
            (Operand::Pool { layer: 0, part: 0 }, keys),
            (Operand::Pool { layer: 0, part: 1 }, values),
        ];
        results.extend(scales.map(|(whole, _)| (SCALES, whole)));
        results
    }

    /// What cached numbers are multiplied by, as it came and as scalars of keys and of values; `None` = 1.
    fn scales(&self) -> Option<(Value<'f>, [Value<'f>; 2])> {
        const KEY_OR_VALUE: Axis = Axis("key_or_value");
        if !has_scales(self.request) {
            return None;
        }
        let whole = self.f.input(SCALES, Shape::new(DType::F32, [(KEY_OR_VALUE, 2)]));
        Some((whole, [0, 1].map(|part| whole.slice(KEY_OR_VALUE, part..part + 1).squeeze(KEY_OR_VALUE))))
    }

    /// Rows as the pool has them.
    fn kept(&self, rows: Value<'f>, scale: Option<Value<'f>>) -> Value<'f> {
        const LARGEST: f32 = 448.0;
        let kv_dtype = self.request.kv_dtype;
        if kv_dtype != DType::F8E4M3 {
            return rows.convert(kv_dtype);
        }
        let rows = rows.convert(DType::F32);
        let rows = scale.map_or(rows, |scale| rows * (scale.full_like(1.0f32) / scale));
        rows.min(LARGEST).max(-LARGEST).convert(kv_dtype).bitcast(DType::U8)
    }

    /// The context's parts as arguments.
    fn context(&self) -> Vec<Value<'f>> {
        let names: [&[Axis]; 5] = [&[TOKENS], &[TOKENS], &[TOKENS], &[PAGES], &[]];
        let part = |(part, tensor): (usize, TensorType)| {
            let meaning = Operand::Context { kind: self.kind, part };
            self.f.input(meaning, Shape::opaque(&tensor)).named(names[part])
        };
        context_types(&self.request.shape).into_iter().enumerate().map(part).collect()
    }

    /// How products in f32 are made: rounded where the device does so by itself, but not for who computes in f32.
    fn precision(&self) -> Precision {
        let AttentionQuery { dtype, target, .. } = self.request;
        if *dtype == DType::F32 && target.platform != "cpu" { Precision::Highest } else { Precision::Default }
    }

    /// Pages of a block: as many as keep a round within its rows.
    fn block_pages(&self) -> u64 {
        let shape = &self.request.shape;
        let tokens = (ROWS_PER_ROUND / shape.tokens).clamp(BLOCK_TOKENS.0, BLOCK_TOKENS.1);
        tokens.div_ceil(shape.page_size).min(shape.pages)
    }

    /// `query` is `[tokens, kv_heads, group, head_dim]`, scaled; the pools are `[slots, kv_heads, head_dim]`.
    fn attend(&self, query: Value<'f>, pools: [Value<'f>; 2], context: &[Value<'f>]) -> Value<'f> {
        let AttentionQuery { spec, shape, .. } = self.request;
        let f = self.f;
        let block_tokens = (self.block_pages() * shape.page_size) as i32;
        let last_block = context[Part::LastPosition as usize] / block_tokens;
        let first_block = match spec.window {
            None => last_block.full_like(0),
            Some(window) => {
                let earliest = context[Part::Positions as usize].reduce_min(TOKENS) - (window as i32 - 1);
                earliest.max(0) / block_tokens
            }
        };
        let state = Shape::new(DType::F32, &query.shape().axes[..3]);
        let start = [first_block, f.full(state.clone(), f32::MIN), f.zeros(state.clone()), f.zeros(query.shape())];
        let done = f.while_loop(
            &start,
            |carried| carried[0].le(last_block),
            |carried| {
                let running = Running { peak: carried[1], total: carried[2], sum: carried[3] };
                let next = self.block(query, pools, context, carried[0], running);
                vec![carried[0] + 1, next.peak, next.total, next.sum]
            },
        );
        // Every token sees at least itself.
        done[3] / done[2]
    }

    /// Takes one block of each token's sequence in.
    fn block(
        &self,
        query: Value<'f>,
        pools: [Value<'f>; 2],
        context: &[Value<'f>],
        number: Value<'f>,
        running: Running<'f>,
    ) -> Running<'f> {
        const BLOCK: Axis = Axis("block");
        let AttentionQuery { spec, shape, .. } = self.request;
        let (f, pages) = (self.f, self.block_pages());
        let positions = context[Part::Positions as usize];
        // Entries past a sequence's pages belong to others; their positions are in the future and masked.
        let entry = context[Part::Begin as usize] + number * (pages as i32) + f.iota(DType::I32, BLOCK, pages);
        let page = context[Part::PageTable as usize].take(PAGES, entry);
        let split = [(PAGES, shape.pages), (PAGE, shape.page_size)];
        let read = |pool: Value<'f>| {
            let rows = pool.split(SLOTS, &split).take(PAGES, page).merge(&[BLOCK, PAGE], PAGE);
            let rows = if self.request.kv_dtype == DType::F8E4M3 { rows.bitcast(DType::F8E4M3) } else { rows };
            rows.convert(DType::F32)
        };
        let precision = self.precision();
        let scores = query.dot(read(pools[0]), Dot::over(HEAD_DIM).batch([TOKENS, KV_HEADS]).precision(precision));
        let scores = match spec.soft_cap {
            Some(cap) => (scores / cap).tanh() * cap,
            None => scores,
        };
        let block_tokens = pages * shape.page_size;
        let position = f.iota(DType::I32, PAGE, block_tokens) + number * (block_tokens as i32);
        let seen = position.le(positions);
        let seen = match spec.window {
            Some(window) => seen & (position + (window as i32)).gt(positions),
            None => seen,
        };
        let masked = seen.select(scores, f32::MIN);
        let peak = running.peak.max(masked.reduce_max(PAGE));
        let weights = seen.select((scores - peak).exp(), 0.0f32);
        let decay = (running.peak - peak).exp();
        // Values that are not seen may be anything, NaN too, and 0 * NaN is NaN.
        let values = read(pools[1]);
        let values = seen.select(values, values.full_like(0.0f32));
        let weighted = weights.dot(values, Dot::over(PAGE).batch([TOKENS, KV_HEADS]).precision(precision));
        Running { peak, total: running.total * decay + weights.sum(PAGE), sum: running.sum * decay + weighted }
    }
}
