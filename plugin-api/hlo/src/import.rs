//! Operations that the host supplies: the heavy ones. A fragment calls them by a symbol of its own and lists them;
//! equal ones (same operation, same types) share a symbol. The order of arguments is that of
//! [`torus_abi::fragment::Operation`].

use std::panic::Location;

use torus_abi::{
    DType, TensorType,
    fragment::{Activation, LinearRole, Operation, WeightOperand},
    model::HostImports,
};

use crate::{Axis, Callee, Func, Shape, Value, func::OpSpec, infer, nn};

/// A weight of the model: tensors that only the host can read, and a logical shape.
#[derive(Clone)]
pub struct Weight<'f> {
    pub parts: Vec<Value<'f>>,
    pub operand: WeightOperand,
}

impl<'f> Weight<'f> {
    /// Logical size of dimension `index`: 0 = output features, 1 = input features.
    fn size(&self, index: usize) -> u64 {
        self.operand.shape.get(index).copied().unwrap_or(1)
    }
}

/// How a linear layer is applied: `Linear::column(HIDDEN, QKV).bias(&bias).residual(x)`.
#[derive(Clone)]
pub struct Linear<'a, 'f> {
    role: LinearRole,
    input: Axis,
    output: Axis,
    bias: Option<&'a Weight<'f>>,
    residual: Option<Value<'f>>,
    result: Option<DType>,
}

impl<'a, 'f> Linear<'a, 'f> {
    /// From input features `input` to output features `output`.
    pub fn new(role: LinearRole, input: Axis, output: Axis) -> Self {
        Self { role, input, output, bias: None, residual: None, result: None }
    }

    /// Output features are split between devices.
    pub fn column(input: Axis, output: Axis) -> Self {
        Self::new(LinearRole::Column, input, output)
    }

    /// Input features are split between devices.
    pub fn row(input: Axis, output: Axis) -> Self {
        Self::new(LinearRole::Row, input, output)
    }

    /// Adds a vector.
    pub fn bias(mut self, bias: impl Into<Option<&'a Weight<'f>>>) -> Self {
        self.bias = bias.into();
        self
    }

    /// Adds a tensor of the result's shape.
    pub fn residual(mut self, residual: Value<'f>) -> Self {
        self.residual = Some(residual);
        self
    }

    /// The dtype of the result; else that of the input.
    pub fn result(mut self, dtype: DType) -> Self {
        self.result = Some(dtype);
        self
    }
}

/// The weights and constants of a gated MLP: `x + down · (act(gate · n) * (up · n))` with `n = rms_norm(x) * norm`.
#[derive(Clone)]
pub struct GatedMlp<'f> {
    /// `[hidden]`.
    pub norm: Weight<'f>,
    /// `[2 * intermediate, hidden]`: the rows of gate, then those of up.
    pub gate_up: Weight<'f>,
    /// `[hidden, intermediate]`.
    pub down: Weight<'f>,
    pub activation: Activation,
    pub norm_eps: f32,
    /// `[hidden]`: of what is added to the hidden state.
    pub post_norm: Option<Weight<'f>>,
}

impl<'f> GatedMlp<'f> {
    fn operation(&self) -> Operation {
        Operation::GatedMlp {
            norm: self.norm.operand.clone(),
            gate_up: self.gate_up.operand.clone(),
            down: self.down.operand.clone(),
            activation: self.activation,
            norm_eps: self.norm_eps,
            post_norm: self.post_norm.as_ref().map(|norm| norm.operand.clone()),
        }
    }

    fn arguments(&self, x: Value<'f>) -> Vec<Value<'f>> {
        let weights = [&self.norm, &self.gate_up, &self.down].into_iter().chain(&self.post_norm);
        std::iter::once(x).chain(weights.flat_map(|weight| weight.parts.iter().copied())).collect()
    }

    fn is_served(&self, host: HostImports) -> bool {
        host.block_norms || self.post_norm.is_none()
    }
}

/// Everything that an attention block uses beside the hidden state.
#[derive(Clone)]
pub struct AttentionBlock<'f> {
    /// `[hidden]`.
    pub norm: Weight<'f>,
    /// `[(q_heads + 2 * kv_heads) * head_dim, hidden]`: the rows of queries, keys, values.
    pub qkv: Weight<'f>,
    pub qkv_bias: Option<Weight<'f>>,
    /// `[hidden, q_heads * head_dim]`.
    pub o: Weight<'f>,
    /// `f32 [tokens, rotary]`; `rotary` is half of the dimensions that turn.
    pub cos: Value<'f>,
    /// `f32 [tokens, rotary]`.
    pub sin: Value<'f>,
    /// The layer's pool, opaque.
    pub pool: Vec<Value<'f>>,
    /// The kind's context, opaque.
    pub context: Vec<Value<'f>>,
    /// Index of the layer's kind.
    pub kind: usize,
    pub heads: Heads,
    pub norm_eps: f32,
    /// `[head_dim]` each: of the heads of queries and of keys, before they turn.
    pub head_norms: Option<[Weight<'f>; 2]>,
    /// `[hidden]`.
    pub o_bias: Option<Weight<'f>>,
    /// `[hidden]`: of what is added to the hidden state.
    pub post_norm: Option<Weight<'f>>,
}

impl<'f> AttentionBlock<'f> {
    fn operation(&self) -> Operation {
        let operand = |weight: &Weight<'f>| weight.operand.clone();
        Operation::AttentionBlock {
            norm: operand(&self.norm),
            qkv: operand(&self.qkv),
            qkv_bias: self.qkv_bias.as_ref().map(operand),
            o: operand(&self.o),
            kind: self.kind,
            pool_parts: self.pool.len(),
            context_parts: self.context.len(),
            norm_eps: self.norm_eps,
            head_norms: self.head_norms.as_ref().map(|norms| Box::new(norms.each_ref().map(operand))),
            o_bias: self.o_bias.as_ref().map(operand),
            post_norm: self.post_norm.as_ref().map(operand),
        }
    }

    fn arguments(&self, x: Value<'f>) -> Vec<Value<'f>> {
        let mut arguments = vec![x];
        arguments.extend(&self.norm.parts);
        arguments.extend(&self.qkv.parts);
        arguments.extend(self.qkv_bias.iter().flat_map(|bias| &bias.parts));
        arguments.extend(&self.o.parts);
        arguments.extend([self.cos, self.sin]);
        let beside = self.head_norms.iter().flatten().chain(&self.o_bias).chain(&self.post_norm);
        arguments.extend(beside.flat_map(|weight| &weight.parts));
        arguments.extend(&self.pool);
        arguments.extend(&self.context);
        arguments
    }

    fn is_served(&self, host: HostImports) -> bool {
        host.block_norms || (self.head_norms.is_none() && self.o_bias.is_none() && self.post_norm.is_none())
    }
}

/// Head counts, of one shard where a graph is built.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Heads {
    pub q_heads: u64,
    pub kv_heads: u64,
    pub head_dim: u64,
}

impl Heads {
    /// The units that the rows of queries, keys and values come in
    /// ([`WeightSource::units`](torus_abi::model::WeightSource::units)).
    pub fn units(&self) -> [u64; 3] {
        [self.q_heads, self.kv_heads, self.kv_heads]
    }
}

impl<'f> Func<'f> {
    /// The elements of a vector weight (a norm's scale, a bias): `f32 [axis]`. The host keeps it as a plain tensor.
    #[track_caller]
    pub fn vector(&'f self, weight: &Weight<'f>, axis: Axis) -> Value<'f> {
        match weight.parts[..] {
            [part] => part.named(&[axis]),
            _ => {
                let spec = OpSpec::new("torus.vector");
                let reason = "the weight has several parts: its role is not `Vector`";
                self.check(&spec, &weight.parts, || Err::<Value<'f>, _>(reason.to_owned())).unwrap_or(self.poison())
            }
        }
    }

    /// Rows of the embedding table `[vocab, hidden]`: from `tokens i32 [tokens]` to `[tokens, hidden]`.
    #[track_caller]
    pub fn embed(&'f self, tokens: Value<'f>, weight: &Weight<'f>, hidden: Axis, result: DType) -> Value<'f> {
        let spec = OpSpec::new("torus.embed");
        let shape = tokens.shape();
        let plan = self.check(&spec, &[tokens], || match shape.axes[..] {
            [_] if shape.dtype == DType::I32 => Ok(Shape::new(result, [shape.axes[0], (hidden, weight.size(1))])),
            _ => Err("tokens are i32 with one axis".to_owned()),
        });
        let Some(result_shape) = plan else { return self.poison() };
        let operation = Operation::Embed { weight: weight.operand.clone(), result };
        let arguments = [&[tokens], &weight.parts[..]].concat();
        self.import("embed", operation, &arguments, vec![result_shape], None)[0]
    }

    /// Attention of the new tokens over their whole sequences. From `q [tokens, q_heads, head_dim]`,
    /// `k`, `v [tokens, kv_heads, head_dim]` to a tensor like `q` and the pool with `k` and `v` written into it.
    #[track_caller]
    pub fn attention(
        &'f self,
        kind: usize,
        [q, k, v]: [Value<'f>; 3],
        pool: &[Value<'f>],
        context: &[Value<'f>],
    ) -> (Value<'f>, Vec<Value<'f>>) {
        let operation = Operation::Attention { kind, pool_parts: pool.len(), context_parts: context.len() };
        let arguments = [&[q, k, v], pool, context].concat();
        let results = std::iter::once(&q).chain(pool).map(Value::shape).collect();
        let mut results = self.import("attention", operation, &arguments, results, None);
        let pool = results.split_off(1);
        (results[0], pool)
    }

    /// The whole attention half of a layer, on `x [tokens, hidden]`:
    /// `x + o · attention(rotary(qkv · rms_norm(x)))`, and the updated pool. An import, unless the block has what the imports
    /// of this `host` do not know: then it is made of finer ones.
    #[track_caller]
    pub fn attention_block(
        &'f self,
        x: Value<'f>,
        block: &AttentionBlock<'f>,
        host: HostImports,
    ) -> (Value<'f>, Vec<Value<'f>>) {
        let arguments = block.arguments(x);
        let mut results = if block.is_served(host) {
            let results = std::iter::once(&x).chain(&block.pool).map(Value::shape).collect();
            let default: DefaultBody<'_> = &|g, arguments| nn::attention_block_default(g, arguments, block);
            self.import("attention_block", block.operation(), &arguments, results, Some(default))
        } else {
            nn::attention_block_default(self, &arguments, block)
        };
        let pool = results.split_off(1);
        (results[0], pool)
    }

    /// Records an import, unless an equal one is known, and calls it.
    #[track_caller]
    fn import(
        &'f self,
        name: &'static str,
        operation: Operation,
        arguments: &[Value<'f>],
        results: Vec<Shape>,
        default: Option<DefaultBody<'_>>,
    ) -> Vec<Value<'f>> {
        if self.check(&OpSpec::new(name), arguments, || Ok(())).is_none() {
            return vec![self.poison(); results.len()];
        }
        let location = Location::caller();
        let shapes: Vec<_> = arguments.iter().map(Value::shape).collect();
        let types = |shapes: &[Shape]| -> Vec<TensorType> { shapes.iter().map(Shape::tensor_type).collect() };
        let (argument_types, result_types) = (types(&shapes), types(&results));
        let known = self.builder.find_import(&operation, &argument_types, &result_types);
        let symbol = known.unwrap_or_else(|| {
            let default = default.map(|body| self.builder.default_body(name, &shapes, location, body));
            self.builder.add_import(name, operation, argument_types, result_types, default)
        });
        self.call(&Callee { symbol, arguments: shapes, results }, arguments)
    }
}

/// Builds a default body from arguments like those of the import.
pub(crate) type DefaultBody<'a> = &'a dyn for<'g> Fn(&'g Func<'g>, &[Value<'g>]) -> Vec<Value<'g>>;

impl<'f> Value<'f> {
    /// `self · weightᵀ + bias + residual`, for this tensor `[rows, in]` and a weight `[out, in]`.
    #[track_caller]
    pub fn linear(self, weight: &Weight<'f>, how: Linear<'_, 'f>) -> Self {
        let spec = OpSpec::new("torus.linear");
        let shape = self.shape();
        let result = how.result.unwrap_or(shape.dtype);
        let plan = self.func.check(&spec, &[self], || linear_result(&shape, &weight.operand, &how, result));
        let Some(result_shape) = plan else { return self.func.poison() };
        let operation = Operation::Linear {
            weight: weight.operand.clone(),
            role: how.role,
            bias: how.bias.map(|bias| bias.operand.clone()),
            residual: how.residual.is_some(),
            result,
        };
        let mut arguments = vec![self];
        arguments.extend(&weight.parts);
        arguments.extend(how.bias.iter().flat_map(|bias| &bias.parts));
        arguments.extend(how.residual);
        self.func.import("linear", operation, &arguments, vec![result_shape], None)[0]
    }

    /// A gated MLP with its norm and residual, on this hidden state `[tokens, hidden]`. An import, unless it has what the
    /// imports of this `host` do not know: then it is made of finer ones.
    #[track_caller]
    pub fn gated_mlp(self, mlp: &GatedMlp<'f>, host: HostImports) -> Self {
        let arguments = mlp.arguments(self);
        if !mlp.is_served(host) {
            return nn::gated_mlp_default(self.func, &arguments, mlp)[0];
        }
        let default: DefaultBody<'_> = &|g, arguments| nn::gated_mlp_default(g, arguments, mlp);
        self.func.import("gated_mlp", mlp.operation(), &arguments, vec![self.shape()], Some(default))[0]
    }
}

fn linear_result(shape: &Shape, weight: &WeightOperand, how: &Linear, result: DType) -> infer::Inferred {
    let ([rows, (input, size)], [out, within]) = (&shape.axes[..], &weight.shape[..]) else {
        return Err(format!("it takes [rows, in] and a weight [out, in], not a weight {:?}", weight.shape));
    };
    if *input != how.input || size != within {
        return Err(format!("the last axis is not '{}' of {within} elements", how.input));
    }
    let result = Shape::new(result, [*rows, (how.output, *out)]);
    match how.residual.map(|residual| residual.shape()) {
        Some(residual) if residual != result => Err(format!("the residual is {residual}, not {result}")),
        _ => Ok(result),
    }
}
