//! An attention backend whose inner loop is native code: causal attention over paged KV in safe Rust, called by the
//! step program through a kernel. For CPUs only.
//!
//! It keeps K and V of a layer as `[slots, kv_heads, head_dim]`, where a slot is `page * page_size + offset`. The call
//! writes the new rows into the pools in place, then every (token, KV head) walks over its own sequence, no longer than
//! it is, with the softmax of "Online normalizer calculation for softmax" (Milakov and Gimelshein, 2018).

#![forbid(unsafe_code)]

#[cfg(test)]
mod tests;

use torus_plugin::{
    Attention, AttentionAnswer, AttentionQuery, DType, EmitAttention, Fault, Operand, Package, StepInput, TensorType,
    hlo::{Attribute, Builder, CustomCall, Func, Shape, Value},
    kernel::{Call, Kernel, parallel_chunks},
};

torus_plugin::export_plugin! {
    name: "native-loop",
    description: "Causal attention in native code, on CPUs (example)",
    attention: NativeLoop,
    kernels: [PagedAttention],
}

struct NativeLoop;

/// What the kernel wants to know of a step; passed through `context` as it is.
const INPUTS: [StepInput; 5] =
    [StepInput::Positions, StepInput::TokenSeq, StepInput::KvSlot, StepInput::PageBegin, StepInput::PageTable];

impl Attention for NativeLoop {
    fn query(query: &AttentionQuery) -> Result<AttentionAnswer, Fault> {
        let (spec, shape) = (&query.spec, &query.shape);
        if query.target.platform != "cpu" {
            return Ok(AttentionAnswer::refuse("its code runs on CPUs only"));
        }
        if query.dtype != DType::F32 || query.kv_dtype != DType::F32 {
            return Ok(AttentionAnswer::refuse(format!("it computes in f32, not {}", query.dtype)));
        }
        if spec.kv_heads == 0 || !spec.q_heads.is_multiple_of(spec.kv_heads) {
            return Ok(AttentionAnswer::refuse("the query heads do not divide among the KV heads"));
        }
        let pool = TensorType::new(DType::F32, [shape.pages * shape.page_size, spec.kv_heads, spec.head_dim]);
        Ok(AttentionAnswer {
            // As much as the stock backend, so it serves who asks for it by name.
            score: 1,
            reason: "an example".into(),
            pool: vec![pool.clone(), pool],
            page_bytes: 2 * shape.page_size * spec.kv_heads * spec.head_dim * DType::F32.bytes() as u64,
            inputs: INPUTS.to_vec(),
            context: INPUTS.iter().map(|input| input.tensor_type(shape)).collect(),
            layout: None,
            scales: None,
        })
    }

    fn emit(request: &EmitAttention) -> Result<Package, Fault> {
        let builder = Builder::new(&format!("native_loop_{}", request.kind));
        builder.export("context", |f| {
            let part = |(part, input): (usize, &StepInput)| {
                let value = f.input(Operand::Step(*input), Shape::opaque(&input.tensor_type(&request.query.shape)));
                (Operand::Context { kind: request.kind, part }, value)
            };
            INPUTS.iter().enumerate().map(part).collect()
        });
        builder.export("attention", |f| attention(f, request));
        Ok(Package { fragment: builder.finish()? })
    }
}

/// All of the attention is one call, whose last two results are the pools, updated in place.
fn attention<'f>(f: &'f Func<'f>, request: &EmitAttention) -> Vec<(Operand, Value<'f>)> {
    let AttentionQuery { spec, shape, .. } = &request.query;
    let rows = |meaning, heads| {
        f.input(meaning, Shape::opaque(&TensorType::new(DType::F32, [shape.tokens, heads, spec.head_dim])))
    };
    let query = rows(Operand::Query, spec.q_heads);
    let (key, value) = (rows(Operand::Key, spec.kv_heads), rows(Operand::Value, spec.kv_heads));
    let pool = TensorType::new(DType::F32, [shape.pages * shape.page_size, spec.kv_heads, spec.head_dim]);
    let [keys, values] = [0, 1].map(|part| f.input(Operand::Pool { layer: 0, part }, Shape::opaque(&pool)));
    let mut operands = vec![query, key, value, keys, values];
    operands.extend(INPUTS.iter().enumerate().map(|(part, input)| {
        let meaning = Operand::Context { kind: request.kind, part };
        f.input(meaning, Shape::opaque(&input.tensor_type(shape)))
    }));
    let mut call = CustomCall::kernel(PagedAttention::NAME, vec![query.shape(), keys.shape(), values.shape()])
        .alias(1, 3)
        .alias(2, 4)
        .with("page_size", Attribute::I64(shape.page_size as i64))
        .with("scale", Attribute::F32(spec.scale));
    if let Some(window) = spec.window {
        call = call.with("window", Attribute::I64(window as i64));
    }
    if let Some(cap) = spec.soft_cap {
        call = call.with("soft_cap", Attribute::F32(cap));
    }
    let pools = (0..2).map(|part| Operand::Pool { layer: 0, part });
    std::iter::once(Operand::Attended).chain(pools).zip(f.custom_call(&call, &operands)).collect()
}

/// `(query, key, value, keys, values, positions, token_seq, kv_slot, page_begin, page_table) -> (attended, keys, values)`
struct PagedAttention;

impl Kernel for PagedAttention {
    const NAME: &'static str = "paged_attention";

    fn call(call: &Call<'_>) -> Result<(), Fault> {
        let page_size: usize = call.attribute("page_size")?;
        let scale: f32 = call.attribute("scale")?;
        let window: usize = call.optional_attribute("window")?.unwrap_or(usize::MAX);
        let soft_cap: Option<f32> = call.optional_attribute("soft_cap")?;
        let query = call.argument::<f32>(0)?;
        let [key, value] = [call.argument::<f32>(1)?, call.argument::<f32>(2)?];
        let step = |index| call.argument::<i32>(index);
        let (positions, token_seq, kv_slot) = (step(5)?, step(6)?, step(7)?);
        let (page_begin, page_table) = (step(8)?, step(9)?);
        let (mut attended, mut keys, mut values) = (call.result(0)?, call.result::<f32>(1)?, call.result::<f32>(2)?);
        let [_, q_heads, head_dim] = query.dims()?;
        let [_, kv_heads, _] = key.dims()?;
        let row = kv_heads * head_dim;

        // The new rows go into the cache first, so that a token sees itself there.
        for (token, slot) in kv_slot.iter().enumerate() {
            let (from, to) = (token * row, *slot as usize * row);
            keys[to..to + row].copy_from_slice(&key[from..from + row]);
            values[to..to + row].copy_from_slice(&value[from..from + row]);
        }

        let (keys, values) = (&keys[..], &values[..]);
        let heads = q_heads / kv_heads * head_dim;
        parallel_chunks(&mut attended, heads, |index, attended: &mut [f32]| {
            let (token, kv_head) = (index / kv_heads, index % kv_heads);
            let pages = page_begin[token_seq[token] as usize] as usize;
            let seen = positions[token] as usize + 1;
            let query = &query[index * heads..][..heads];
            let mut softmax = vec![Softmax { peak: f32::NEG_INFINITY, total: 0.0 }; heads / head_dim];
            attended.fill(0.0);
            for position in seen.saturating_sub(window)..seen {
                let slot = page_table[pages + position / page_size] as usize * page_size + position % page_size;
                let (key, value) =
                    (&keys[slot * row..][kv_head * head_dim..], &values[slot * row..][kv_head * head_dim..]);
                let rows = query.chunks_exact(head_dim).zip(attended.chunks_exact_mut(head_dim)).zip(&mut softmax);
                for ((query, sum), softmax) in rows {
                    let score = dot(query, &key[..head_dim]) * scale;
                    let score = soft_cap.map_or(score, |cap| cap * (score / cap).tanh());
                    softmax.add(score, &value[..head_dim], sum);
                }
            }
            for (sum, softmax) in attended.chunks_exact_mut(head_dim).zip(&softmax) {
                sum.iter_mut().for_each(|element| *element /= softmax.total);
            }
        });
        Ok(())
    }
}

/// A running softmax: the largest score so far, and the sum of the weights relative to it.
#[derive(Clone)]
struct Softmax {
    peak: f32,
    total: f32,
}

impl Softmax {
    fn add(&mut self, score: f32, value: &[f32], sum: &mut [f32]) {
        if score > self.peak {
            let decay = (self.peak - score).exp();
            self.peak = score;
            self.total *= decay;
            sum.iter_mut().for_each(|element| *element *= decay);
        }
        let weight = (score - self.peak).exp();
        self.total += weight;
        sum.iter_mut().zip(value).for_each(|(sum, value)| *sum += weight * value);
    }
}

/// Eight sums side by side, which the compiler turns into vector instructions.
fn dot(a: &[f32], b: &[f32]) -> f32 {
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<8>(), b.as_chunks::<8>());
    let mut sums = [0f32; 8];
    for (a, b) in a.iter().zip(b) {
        for lane in 0..8 {
            sums[lane] += a[lane] * b[lane];
        }
    }
    let rest: f32 = a_rest.iter().zip(b_rest).map(|(a, b)| a * b).sum();
    sums.iter().sum::<f32>() + rest
}
