//! On CPUs: one call of a native kernel.

use torus_abi::{
    DType, TensorType,
    attention::{AttentionAnswer, AttentionQuery, EmitAttention},
    fault::Fault,
    fragment::{Operand, Package},
    step::StepInput,
};
use torus_cpu::{
    attention::{LAYOUT, Params},
    ffi::attention as kernels,
};
use torus_hlo::{Attribute, Builder, CustomCall, Func, Shape, Value};

use crate::SCORE;

/// What the kernel is told of a step, passed through `context` as it is.
const INPUTS: [StepInput; 6] = [
    StepInput::KvSlot,
    StepInput::CuQLens,
    StepInput::KvLens,
    StepInput::PageBegin,
    StepInput::PageTable,
    StepInput::NumSeqs,
];

pub(crate) fn query(query: &AttentionQuery) -> AttentionAnswer {
    let AttentionQuery { dtype, kv_dtype, shape, .. } = query;
    if kernels::name(*dtype, *kv_dtype).is_none() {
        let reason = format!("it has no kernel for {dtype} with a cache of {kv_dtype}");
        return AttentionAnswer::refuse(reason);
    }
    if let Err(reason) = params(query).supports() {
        return AttentionAnswer::refuse(reason);
    }
    if shape.pages.checked_mul(shape.page_size).is_none_or(|slots| slots > i32::MAX as u64) {
        return AttentionAnswer::refuse("the pool has more slots than an i32 can count");
    }
    let pool = pool(query);
    let bytes: u64 = pool.iter().filter_map(TensorType::bytes).sum();
    AttentionAnswer {
        score: SCORE,
        reason: String::new(),
        page_bytes: bytes / shape.pages.max(1),
        pool,
        inputs: INPUTS.to_vec(),
        context: INPUTS.iter().map(|input| input.tensor_type(shape)).collect(),
        layout: Some(LAYOUT.to_owned()),
        scales: None,
    }
}

pub(crate) fn emit(request: &EmitAttention) -> Result<Package, Fault> {
    let builder = Builder::new(&format!("fa_{}", request.kind));
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

fn params(query: &AttentionQuery) -> Params {
    let spec = &query.spec;
    Params {
        q_heads: spec.q_heads as usize,
        kv_heads: spec.kv_heads as usize,
        head_dim: spec.head_dim as usize,
        page_size: query.shape.page_size as usize,
        scale: spec.scale,
        window: spec.window.map(|window| window as usize),
        soft_cap: spec.soft_cap,
    }
}

/// The parts of a layer's pool: keys and values together, and the scales of an int8 cache.
fn pool(query: &AttentionQuery) -> Vec<TensorType> {
    let [elements, scales] = params(query).pool_dims(query.shape.pages);
    let mut parts = vec![TensorType::new(query.kv_dtype, elements)];
    if query.kv_dtype == DType::I8 {
        parts.push(TensorType::new(DType::F32, scales));
    }
    parts
}

/// One call, which updates the pool in place.
fn attention<'f>(f: &'f Func<'f>, request: &EmitAttention) -> Vec<(Operand, Value<'f>)> {
    let AttentionQuery { spec, dtype, kv_dtype, shape, .. } = &request.query;
    let rows = |meaning, heads| {
        f.input(meaning, Shape::opaque(&TensorType::new(*dtype, [shape.tokens, heads, spec.head_dim])))
    };
    let query = rows(Operand::Query, spec.q_heads);
    let mut operands = vec![query, rows(Operand::Key, spec.kv_heads), rows(Operand::Value, spec.kv_heads)];
    let first_part = operands.len();
    let parts = pool(&request.query);
    let pool =
        parts.iter().enumerate().map(|(part, tensor)| f.input(Operand::Pool { layer: 0, part }, Shape::opaque(tensor)));
    operands.extend(pool);
    operands.extend(INPUTS.iter().enumerate().map(|(part, input)| {
        let meaning = Operand::Context { kind: request.kind, part };
        f.input(meaning, Shape::opaque(&input.tensor_type(shape)))
    }));
    let mut results = vec![query.shape()];
    results.extend(parts.iter().map(Shape::opaque));
    let kernel = kernels::name(*dtype, *kv_dtype).unwrap_or_default();
    let mut call = CustomCall::kernel(kernel, results)
        .with("q_heads", Attribute::I64(spec.q_heads as i64))
        .with("kv_heads", Attribute::I64(spec.kv_heads as i64))
        .with("head_dim", Attribute::I64(spec.head_dim as i64))
        .with("page_size", Attribute::I64(shape.page_size as i64))
        .with("scale", Attribute::F32(spec.scale));
    if let Some(window) = spec.window {
        call = call.with("window", Attribute::I64(window as i64));
    }
    if let Some(cap) = spec.soft_cap {
        call = call.with("soft_cap", Attribute::F32(cap));
    }
    for part in 0..parts.len() {
        call = call.alias(1 + part, first_part + part);
    }
    let meanings = (0..parts.len()).map(|part| Operand::Pool { layer: 0, part });
    std::iter::once(Operand::Attended).chain(meanings).zip(f.custom_call(&call, &operands)).collect()
}
