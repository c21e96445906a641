//! The forward pass.

use std::collections::BTreeMap;

use torus_plugin::{
    DType, EmitModel, Fault, Fragment, LinearRole, ModelPart, Operand, StateHandle, StepShape, WeightHandle,
    hlo::{
        Builder, Func, Heads, Linear, Shape, Value, Weight,
        axes::{HEAD_DIM, HIDDEN, INTERMEDIATE, Q_HEADS, QKV, ROWS, TOKENS, VOCAB},
    },
};

use crate::{config::Config, weights};

pub fn emit(config: &Config, request: &EmitModel) -> Result<Fragment, Fault> {
    let mut handles = BTreeMap::new();
    for spec in weights::weights(config) {
        let handle = request.weights.get(&spec.name);
        let missing = || Fault::invalid(format!("the request has no handle for the weight '{}'", spec.name));
        handles.insert(spec.name.clone(), (handle.ok_or_else(missing)?, spec.shape));
    }
    let [state] = &request.state[..] else {
        return Err(Fault::invalid("the model has one kind of layers"));
    };
    let graph = Graph { config, handles, state, dtype: request.dtype };
    match &request.part {
        ModelPart::Hidden { shape, capture } => graph.hidden(shape, capture),
        ModelPart::Head { rows } => graph.head(*rows),
    }
}

struct Graph<'a> {
    config: &'a Config,
    /// Every weight of the model, with its logical shape.
    handles: BTreeMap<String, (&'a WeightHandle, Vec<u64>)>,
    state: &'a StateHandle,
    /// Of activations between operations. What is scaled is scaled in f32 and rounded once.
    dtype: DType,
}

impl Graph<'_> {
    /// Declares a weight as an argument of the export.
    fn weight<'f>(&self, f: &'f Func<'f>, name: &str) -> Weight<'f> {
        let (handle, shape) = &self.handles[name];
        f.weight(name, handle, shape)
    }

    /// From tokens and positions to the normalized last hidden state, with new keys and values in the pools.
    fn hidden(&self, shape: &StepShape, capture: &[usize]) -> Result<Fragment, Fault> {
        // The parts of one program are linked together, so their symbols must differ.
        let builder = Builder::new("granite_model_hidden");
        builder.export("hidden", |f| {
            let tokens = f.input(Operand::Tokens, Shape::new(DType::I32, [(TOKENS, shape.tokens)]));
            let positions = f.input(Operand::Positions, Shape::new(DType::I32, [(TOKENS, shape.tokens)]));
            let context = f.context(0, self.state);
            let (cos, sin) = f.rotary_tables(positions, &self.config.rope);

            let embedded = f.embed(tokens, &self.weight(f, "embed"), HIDDEN, DType::F32);
            let mut x = (embedded * self.config.embedding_multiplier).convert(self.dtype);
            let mut results = vec![];
            for layer in 0..self.config.layers {
                let pool = f.pool(layer, self.state);
                let (attended, pool) = self.attention(f, layer, x, [cos, sin], &pool, &context);
                x = self.add(x, attended);
                x = self.add(x, self.mlp(f, layer, x));
                results.extend(pool.into_iter().enumerate().map(|(part, v)| (Operand::Pool { layer, part }, v)));
                if capture.contains(&layer) {
                    results.push((Operand::Captured { layer }, x));
                }
            }
            results.push((Operand::Hidden, self.norm(f, "norm", x)));
            results
        });
        Ok(builder.finish()?)
    }

    /// `o · attention(rotary(qkv · norm(x)))` in f32, and the updated pool.
    fn attention<'f>(
        &self,
        f: &'f Func<'f>,
        layer: usize,
        x: Value<'f>,
        [cos, sin]: [Value<'f>; 2],
        pool: &[Value<'f>],
        context: &[Value<'f>],
    ) -> (Value<'f>, Vec<Value<'f>>) {
        let weight = |name: &str| self.weight(f, &format!("layers.{layer}.{name}"));
        let config = self.config;
        let heads = Heads { q_heads: config.q_heads, kv_heads: config.kv_heads, head_dim: config.head_dim };

        let normed = self.norm(f, &format!("layers.{layer}.attention_norm"), x);
        let [q, k, v] = heads.split(normed.linear(&weight("qkv"), Linear::column(HIDDEN, QKV)));
        let (attended, pool) = f.attention(0, [q.rotary(cos, sin), k.rotary(cos, sin), v], pool, context);
        let joined = attended.merge(&[Q_HEADS, HEAD_DIM], QKV);
        (joined.linear(&weight("o"), Linear::row(QKV, HIDDEN).result(DType::F32)), pool)
    }

    /// `down · (silu(gate · n) * (up · n))` with `n = norm(x)`, in f32.
    fn mlp<'f>(&self, f: &'f Func<'f>, layer: usize, x: Value<'f>) -> Value<'f> {
        let weight = |name: &str| self.weight(f, &format!("layers.{layer}.{name}"));
        let size = self.config.intermediate;

        let normed = self.norm(f, &format!("layers.{layer}.mlp_norm"), x);
        let both = normed.linear(&weight("gate_up"), Linear::column(HIDDEN, INTERMEDIATE).result(DType::F32));
        let (gate, up) = (both.slice(INTERMEDIATE, 0..size), both.slice(INTERMEDIATE, size..2 * size));
        let inner = (gate.silu() * up).convert(self.dtype);
        inner.linear(&weight("down"), Linear::row(INTERMEDIATE, HIDDEN).result(DType::F32))
    }

    /// The residual: the family scales what is added.
    fn add<'f>(&self, x: Value<'f>, addend: Value<'f>) -> Value<'f> {
        (x.convert(DType::F32) + addend * self.config.residual_multiplier).convert(self.dtype)
    }

    fn norm<'f>(&self, f: &'f Func<'f>, name: &str, x: Value<'f>) -> Value<'f> {
        x.rms_norm(HIDDEN, f.vector(&self.weight(f, name), HIDDEN), self.config.norm_eps)
    }

    /// From rows of the hidden state to logits.
    fn head(&self, rows: u64) -> Result<Fragment, Fault> {
        let builder = Builder::new("granite_model_head");
        builder.export("head", |f| {
            let x = f.input(Operand::Hidden, Shape::new(self.dtype, [(ROWS, rows), (HIDDEN, self.config.hidden)]));
            let weight = self.weight(f, if self.config.tied { "embed" } else { "head" });
            let logits = x.linear(&weight, Linear::new(LinearRole::Head, HIDDEN, VOCAB).result(DType::F32));
            vec![(Operand::Logits, logits / self.config.logits_scaling)]
        });
        Ok(builder.finish()?)
    }
}
