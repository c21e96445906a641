//! Default bodies of the coarse imports, in terms of finer ones.

use torus_abi::{DType, fragment::WeightOperand};

use crate::{
    AttentionBlock, Axis, Func, GatedMlp, Linear, Value, Weight,
    axes::{HEAD_DIM, INTERMEDIATE, KV_HEADS, Q_HEADS, QKV},
};

/// Reads the arguments of an import in order.
struct Arguments<'a, 'g> {
    rest: &'a [Value<'g>],
}

impl<'a, 'g> Arguments<'a, 'g> {
    fn values(&mut self, count: usize) -> &'a [Value<'g>] {
        let (values, rest) = self.rest.split_at(count.min(self.rest.len()));
        self.rest = rest;
        values
    }

    fn value(&mut self, g: &'g Func<'g>) -> Value<'g> {
        self.values(1).first().copied().unwrap_or_else(|| g.poison())
    }

    fn weight(&mut self, operand: &WeightOperand) -> Weight<'g> {
        Weight { parts: self.values(operand.parts).to_vec(), operand: operand.clone() }
    }
}

/// The axis of hidden features: the last one of the hidden state.
fn hidden_axis(x: Value<'_>) -> Axis {
    x.shape().names().last().unwrap_or(crate::axes::HIDDEN)
}

/// `x + down · (act(gate · n) * (up · n))` with `n = rms_norm(x) * norm`, and a norm of the second term if there is one.
pub(crate) fn gated_mlp_default<'g>(g: &'g Func<'g>, arguments: &[Value<'g>], mlp: &GatedMlp<'_>) -> Vec<Value<'g>> {
    let mut arguments = Arguments { rest: arguments };
    let x = arguments.value(g);
    let norm = arguments.weight(&mlp.norm.operand);
    let gate_up = arguments.weight(&mlp.gate_up.operand);
    let down = arguments.weight(&mlp.down.operand);
    let hidden = hidden_axis(x);

    let normed = x.rms_norm(hidden, g.vector(&norm, hidden), mlp.norm_eps);
    let both = normed.linear(&gate_up, Linear::column(hidden, INTERMEDIATE));
    let width = both.size(INTERMEDIATE) / 2;
    let gate = both.slice(INTERMEDIATE, 0..width).convert(DType::F32);
    let up = both.slice(INTERMEDIATE, width..2 * width).convert(DType::F32);
    let inner = (gate.activation(mlp.activation) * up).convert(x.dtype());
    let post_norm = mlp.post_norm.as_ref().map(|norm| arguments.weight(&norm.operand));
    vec![add_output(x, inner, &down, Linear::row(INTERMEDIATE, hidden), post_norm.as_ref(), mlp.norm_eps)]
}

/// `x + o · attention(rotary(qkv · rms_norm(x)))`, with the norms and the bias that there are, and the updated pool.
pub(crate) fn attention_block_default<'g>(
    g: &'g Func<'g>,
    arguments: &[Value<'g>],
    block: &AttentionBlock<'_>,
) -> Vec<Value<'g>> {
    let mut arguments = Arguments { rest: arguments };
    let x = arguments.value(g);
    let norm = arguments.weight(&block.norm.operand);
    let qkv = arguments.weight(&block.qkv.operand);
    let bias = block.qkv_bias.as_ref().map(|bias| arguments.weight(&bias.operand));
    let o = arguments.weight(&block.o.operand);
    let (cos, sin) = (arguments.value(g), arguments.value(g));
    let mut weight_if = |weight: Option<&Weight<'_>>| weight.map(|weight| arguments.weight(&weight.operand));
    let [q_norm, k_norm] = [0, 1].map(|index| weight_if(block.head_norms.as_ref().map(|norms| &norms[index])));
    let o_bias = weight_if(block.o_bias.as_ref());
    let post_norm = weight_if(block.post_norm.as_ref());
    let pool = arguments.values(block.pool.len());
    let context = arguments.values(block.context.len());
    let hidden = hidden_axis(x);

    let normed = x.rms_norm(hidden, g.vector(&norm, hidden), block.norm_eps);
    let joint = normed.linear(&qkv, Linear::column(hidden, QKV).bias(bias.as_ref()));
    let [q, k, v] = block.heads.split(joint);
    let turned = |heads: Value<'g>, norm: Option<&Weight<'g>>| {
        let normed = norm.map_or(heads, |norm| heads.rms_norm(HEAD_DIM, g.vector(norm, HEAD_DIM), block.norm_eps));
        normed.rotary(cos, sin)
    };
    let qkv = [turned(q, q_norm.as_ref()), turned(k, k_norm.as_ref()), v];
    let (attended, pool) = g.attention(block.kind, qkv, pool, context);
    let joined = attended.merge(&[Q_HEADS, HEAD_DIM], QKV);
    let how = Linear::row(QKV, hidden).bias(o_bias.as_ref());
    let y = add_output(x, joined, &o, how, post_norm.as_ref(), block.norm_eps);
    [vec![y], pool].concat()
}

/// `x + weight · inner`, whose second term a norm may scale.
fn add_output<'g>(
    x: Value<'g>,
    inner: Value<'g>,
    weight: &Weight<'g>,
    how: Linear<'_, 'g>,
    norm: Option<&Weight<'g>>,
    eps: f32,
) -> Value<'g> {
    let hidden = hidden_axis(x);
    match norm {
        Some(norm) => x + inner.linear(weight, how).rms_norm(hidden, x.func.vector(norm, hidden), eps),
        None => inner.linear(weight, how.residual(x)),
    }
}

impl crate::Heads {
    /// Cuts the joint projection `[tokens, qkv]` into queries `[tokens, q_heads, head_dim]`, and keys and values
    /// `[tokens, kv_heads, head_dim]`.
    #[track_caller]
    pub fn split<'f>(&self, joint: Value<'f>) -> [Value<'f>; 3] {
        let Self { q_heads, kv_heads, head_dim } = *self;
        let (queries, keys) = (q_heads * head_dim, kv_heads * head_dim);
        let q = joint.slice(QKV, 0..queries).split(QKV, &[(Q_HEADS, q_heads), (HEAD_DIM, head_dim)]);
        let kv = [(KV_HEADS, kv_heads), (HEAD_DIM, head_dim)];
        let k = joint.slice(QKV, queries..queries + keys).split(QKV, &kv);
        let v = joint.slice(QKV, queries + keys..queries + 2 * keys).split(QKV, &kv);
        [q, k, v]
    }
}
