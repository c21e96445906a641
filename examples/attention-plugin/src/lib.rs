//! An attention backend in a page of code: causal attention over paged KV, one page at a time.
//!
//! It keeps K and V of a layer as `[slots, kv_heads, head_dim]`, where a slot is `page * page_size + offset`. In a
//! step it writes the new rows, then walks over page 0, 1, 2, … of every token's sequence, with the softmax of
//! "Online normalizer calculation for softmax" (Milakov and Gimelshein, 2018).

#[cfg(test)]
mod tests;

use torus_plugin::{
    Attention, AttentionAnswer, AttentionQuery, DType, EmitAttention, Fault, Operand, Package, StepInput, TensorType,
    hlo::{
        Builder, Dot, Func, Scatter, Shape, Value,
        axes::{GROUP, HEAD_DIM, KV_HEADS, PAGE, PAGES, Q_HEADS, SEQS, SLOTS, TOKENS},
    },
};

struct PagedAttention;

torus_plugin::export_plugin! {
    name: "paged_attention",
    description: "Causal attention, one page at a time",
    attention: PagedAttention,
}

/// What the kernel wants to know of a step; passed through `context` as it is.
const INPUTS: [StepInput; 5] =
    [StepInput::Positions, StepInput::TokenSeq, StepInput::KvSlot, StepInput::PageBegin, StepInput::PageTable];

impl Attention for PagedAttention {
    fn query(query: &AttentionQuery) -> Result<AttentionAnswer, Fault> {
        let (spec, shape) = (&query.spec, &query.shape);
        if spec.window.is_some() || spec.soft_cap.is_some() {
            return Ok(AttentionAnswer::refuse("sliding windows and soft caps are left to the reader"));
        }
        let slots = shape.pages * shape.page_size;
        let pool = TensorType::new(query.kv_dtype, [slots, spec.kv_heads, spec.head_dim]);
        let row_bytes = spec.kv_heads * spec.head_dim * query.kv_dtype.bytes() as u64;
        Ok(AttentionAnswer {
            // Less than the stock backend's 1 is impossible, so it serves only who asks for it by name.
            score: 1,
            reason: "an example".into(),
            pool: vec![pool.clone(), pool],
            page_bytes: 2 * shape.page_size * row_bytes,
            inputs: INPUTS.to_vec(),
            context: INPUTS.iter().map(|input| input.tensor_type(shape)).collect(),
            layout: None,
            scales: None,
        })
    }

    fn emit(request: &EmitAttention) -> Result<Package, Fault> {
        let builder = Builder::new(&format!("paged_attention_{}", request.kind));
        builder.export("context", |f| {
            let inputs = INPUTS.iter().enumerate();
            let part = |(part, input): (usize, &StepInput)| {
                let tensor = input.tensor_type(&request.query.shape);
                let value = f.input(Operand::Step(*input), Shape::opaque(&tensor));
                (Operand::Context { kind: request.kind, part }, value)
            };
            inputs.map(part).collect()
        });
        builder.export("attention", |f| attention(f, request));
        Ok(Package { fragment: builder.finish()? })
    }
}

fn attention<'f>(f: &'f Func<'f>, request: &EmitAttention) -> Vec<(Operand, Value<'f>)> {
    let AttentionQuery { spec, dtype, kv_dtype, shape, .. } = &request.query;
    let rows = |heads, count| Shape::new(*dtype, [(TOKENS, shape.tokens), (heads, count), (HEAD_DIM, spec.head_dim)]);
    let query = f.input(Operand::Query, rows(Q_HEADS, spec.q_heads));
    let key = f.input(Operand::Key, rows(KV_HEADS, spec.kv_heads));
    let value = f.input(Operand::Value, rows(KV_HEADS, spec.kv_heads));
    let slots = shape.pages * shape.page_size;
    let pool = Shape::new(*kv_dtype, [(SLOTS, slots), (KV_HEADS, spec.kv_heads), (HEAD_DIM, spec.head_dim)]);
    let [keys, values] = [0, 1].map(|part| f.input(Operand::Pool { layer: 0, part }, pool.clone()));
    let names = [&[TOKENS][..], &[TOKENS], &[TOKENS], &[SEQS], &[PAGES]];
    let [positions, token_seq, kv_slot, page_begin, page_table] = std::array::from_fn(|part| {
        let tensor = INPUTS[part].tensor_type(shape);
        let meaning = Operand::Context { kind: request.kind, part };
        f.input(meaning, Shape::opaque(&tensor)).named(names[part])
    });

    // The new rows go into the cache first, so that a token sees itself there.
    let keys = keys.scatter(&[(SLOTS, kv_slot)], key.convert(*kv_dtype), Scatter::set());
    let values = values.scatter(&[(SLOTS, kv_slot)], value.convert(*kv_dtype), Scatter::set());

    let pages = [(PAGES, shape.pages), (PAGE, shape.page_size)];
    let (key_pages, value_pages) = (keys.split(SLOTS, &pages), values.split(SLOTS, &pages));
    let group = [(KV_HEADS, spec.kv_heads), (GROUP, spec.q_heads / spec.kv_heads)];
    let query = query.convert(DType::F32).split(Q_HEADS, &group) * spec.scale;
    let begin = page_begin.take(SEQS, token_seq);
    let last_page = positions.reduce_max(TOKENS) / (shape.page_size as i32);

    let state = Shape::new(DType::F32, [(TOKENS, shape.tokens), group[0], group[1]]);
    let start = [
        f.scalar(DType::I32, 0),
        f.full(state.clone(), f32::MIN),
        f.zeros(state.clone()),
        f.zeros(state.with_axes([&state.axes[..], &[(HEAD_DIM, spec.head_dim)]].concat())),
    ];
    let done = f.while_loop(
        &start,
        |carried| carried[0].le(last_page),
        |carried| {
            let (page, peak, total, sum) = (carried[0], carried[1], carried[2], carried[3]);
            let number = page_table.take(PAGES, begin + page);
            let block = |pool: Value<'f>| pool.take(PAGES, number).convert(DType::F32);
            let over_dim = Dot::over(HEAD_DIM).batch([TOKENS, KV_HEADS]);
            let scores = query.dot(block(key_pages), over_dim);
            let position = f.iota(DType::I32, PAGE, shape.page_size) + page * (shape.page_size as i32);
            let seen = position.le(positions);
            let scores = seen.select(scores, f32::MIN);
            let new_peak = peak.max(scores.reduce_max(PAGE));
            let weights = seen.select((scores - new_peak).exp(), 0.0f32);
            let decay = (peak - new_peak).exp();
            let over_page = Dot::over(PAGE).batch([TOKENS, KV_HEADS]);
            // What is not seen may be anything, and 0 * NaN is NaN.
            let values = seen.select(block(value_pages), 0.0f32);
            let sum = sum * decay + weights.dot(values, over_page);
            vec![page + 1, new_peak, total * decay + weights.sum(PAGE), sum]
        },
    );
    // Every token sees at least itself; only padding has a total of 0.
    let attended = (done[3] / done[2].max(f32::MIN_POSITIVE)).merge(&[KV_HEADS, GROUP], Q_HEADS).convert(*dtype);
    vec![
        (Operand::Attended, attended),
        (Operand::Pool { layer: 0, part: 0 }, keys),
        (Operand::Pool { layer: 0, part: 1 }, values),
    ]
}
