//! On TPUs: one call of the Mosaic kernel of `torus-attention`, told of the batch by a queue that `context` computes
//! once a step.

use torus_abi::{
    DType, TensorType,
    attention::{AttentionAnswer, AttentionQuery, EmitAttention, scales_type},
    fault::Fault,
    fragment::{Operand, Package},
    step::StepInput,
};
use torus_attention::{Generation, KvFormat, Layout, Scales, Shape, Spec, Tuning, Unsupported, graph};
use torus_hlo::{Builder, Func, Shape as Tensor, Value};

use crate::SCORE;

/// What `context` takes.
const INPUTS: [StepInput; 4] = [StepInput::CuQLens, StepInput::KvLens, StepInput::PageBegin, StepInput::PageTable];

/// What a kernel is made for.
struct Kernel {
    spec: Spec,
    shape: Shape,
    layout: Layout,
    tuning: Tuning,
    /// Whether the last part of the pool are the layer's scales.
    has_scales: bool,
}

impl Kernel {
    fn new(query: &AttentionQuery) -> Result<Self, String> {
        let AttentionQuery { spec, dtype, shape, target, .. } = query;
        let kind = &target.device_kind;
        let generation =
            Generation::from_device_kind(kind).ok_or_else(|| format!("it has no kernels for a '{kind}'"))?;
        if *dtype != DType::Bf16 {
            return Err(format!("its kernels for TPUs compute in bf16, not {dtype}"));
        }
        let kv = format(query)?;
        let spec = Spec {
            q_heads: spec.q_heads as usize,
            kv_heads: spec.kv_heads as usize,
            head_dim: spec.head_dim as usize,
            kv,
            page_size: shape.page_size as usize,
            scale: spec.scale,
            window: spec.window.map(|window| window as usize),
            soft_cap: spec.soft_cap,
            sinks: false,
            mask: false,
            generation,
        };
        let shape = Shape {
            tokens: shape.tokens as usize,
            seqs: shape.seqs as usize,
            pages: shape.pages as usize,
            page_table: shape.page_table as usize,
            draft: 1,
        };
        let because = |error: Unsupported| error.to_string();
        let layout = Layout::new(&spec).map_err(because)?;
        let tuning = Tuning::new(&spec, &layout);
        torus_attention::check(&spec, &shape, &tuning).map_err(because)?;
        let has_scales = spec.kv != KvFormat::Bf16 && query.sets_scales;
        Ok(Self { spec, shape, layout, tuning, has_scales })
    }

    /// The parts of a layer's pool.
    fn pool(&self) -> Vec<TensorType> {
        [self.pages()].into_iter().chain(self.has_scales.then(scales_type)).collect()
    }

    fn pages(&self) -> TensorType {
        graph::pool_type(&self.layout, self.shape.pages).tensor_type()
    }

    fn context_types(&self) -> Result<Vec<TensorType>, Unsupported> {
        graph::context_types(&self.shape, self.tuning.pages)
    }
}

/// How the cache is kept. What numbers of 8 bits are multiplied by, the host says at run time; without scales those of int8
/// would be whole.
fn format(query: &AttentionQuery) -> Result<KvFormat, String> {
    let scales = Scales::ONE;
    match query.kv_dtype {
        DType::Bf16 => Ok(KvFormat::Bf16),
        DType::F8E4M3 => Ok(KvFormat::Fp8 { scales }),
        DType::I8 if query.sets_scales => Ok(KvFormat::Int8 { scales }),
        DType::I8 => Err("a cache of i8 needs scales, and this host is too old to set them: update Torus".to_owned()),
        other => Err(format!("its kernels for TPUs keep caches in bf16, f8e4m3fn and i8, not {other}")),
    }
}

/// The answer, or why there is none.
pub(crate) fn query(query: &AttentionQuery) -> Result<AttentionAnswer, String> {
    let kernel = Kernel::new(query)?;
    Ok(AttentionAnswer {
        score: SCORE,
        reason: String::new(),
        page_bytes: kernel.layout.page_bytes() as u64,
        pool: kernel.pool(),
        inputs: INPUTS.to_vec(),
        context: kernel.context_types().map_err(|error| error.to_string())?,
        layout: None,
        scales: kernel.has_scales.then_some(1),
    })
}

pub(crate) fn emit(request: &EmitAttention) -> Result<Package, Fault> {
    let kernel = Kernel::new(&request.query).map_err(Fault::unsupported)?;
    let builder = Builder::new(&format!("fa_{}", request.kind));
    let mut failed = None;
    builder.export("context", |f| kept(kernel.context(f, request), &mut failed));
    builder.export("attention", |f| kept(kernel.attention(f, request), &mut failed));
    match failed {
        Some(error) => Err(Fault::unsupported(error.to_string())),
        None => Ok(Package { fragment: builder.finish()? }),
    }
}

/// What an export gives, or nothing and the reason kept.
fn kept<T>(results: Result<Vec<T>, Unsupported>, failed: &mut Option<Unsupported>) -> Vec<T> {
    results.unwrap_or_else(|error| {
        *failed = Some(error);
        Vec::new()
    })
}

impl Kernel {
    fn context<'f>(&self, f: &'f Func<'f>, request: &EmitAttention) -> Result<Vec<(Operand, Value<'f>)>, Unsupported> {
        let input =
            |input: StepInput| f.input(Operand::Step(input), Tensor::opaque(&input.tensor_type(&request.query.shape)));
        let [cu_q_lens, kv_lens, page_begin, page_table] = INPUTS.map(input);
        let inputs = graph::Inputs { cu_q_lens, kv_lens, page_begin, page_table };
        let parts = graph::context(f, &self.spec, &self.shape, self.tuning.pages, &inputs)?;
        let named = |(part, value)| (Operand::Context { kind: request.kind, part }, value);
        Ok(parts.into_iter().enumerate().map(named).collect())
    }

    fn attention<'f>(
        &self,
        f: &'f Func<'f>,
        request: &EmitAttention,
    ) -> Result<Vec<(Operand, Value<'f>)>, Unsupported> {
        let AttentionQuery { spec, dtype, shape, .. } = &request.query;
        let rows = |meaning, heads| {
            f.input(meaning, Tensor::opaque(&TensorType::new(*dtype, [shape.tokens, heads, spec.head_dim])))
        };
        let query = rows(Operand::Query, spec.q_heads);
        let [key, value] = [Operand::Key, Operand::Value].map(|meaning| rows(meaning, spec.kv_heads));
        let pool_part = |part, tensor: &TensorType| f.input(Operand::Pool { layer: 0, part }, Tensor::opaque(tensor));
        let pool = pool_part(0, &self.pages());
        let scales = self.has_scales.then(|| pool_part(1, &scales_type()));
        let part = |(part, tensor): (usize, TensorType)| {
            f.input(Operand::Context { kind: request.kind, part }, Tensor::opaque(&tensor))
        };
        let context = self.context_types()?.into_iter().enumerate().map(part).collect();
        let layer = graph::Layer { query, key, value, pool, context, scales };
        let [attended, pool] = graph::attention(f, &self.spec, &self.shape, &self.tuning, &layer)?;
        let pool = [pool].into_iter().chain(scales).enumerate();
        let pool = pool.map(|(part, value)| (Operand::Pool { layer: 0, part }, value));
        Ok([(Operand::Attended, attended)].into_iter().chain(pool).collect())
    }
}
