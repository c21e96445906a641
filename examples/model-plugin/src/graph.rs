//! The forward pass.

use torus_plugin::{
    DType, EmitModel, Fault, Fragment, LinearRole, ModelPart, Operand, StepShape,
    hlo::{
        Builder, Func, Heads, Linear, Shape, Value, Weight,
        axes::{HEAD_DIM, HIDDEN, INTERMEDIATE, Q_HEADS, QKV, ROWS, TOKENS, VOCAB},
    },
};

use crate::{config::Config, weights};

pub fn emit(config: &Config, request: &EmitModel) -> Result<Fragment, Fault> {
    let (specs, handles) = (weights::weights(config), &request.weights);
    if let Some(spec) = specs.iter().find(|spec| !handles.contains_key(&spec.name)) {
        return Err(Fault::invalid(format!("the request has no handle for the weight '{}'", spec.name)));
    }
    let shapes = specs.into_iter().map(|spec| (spec.name, spec.shape)).collect();
    let graph = Graph { config, request, shapes };
    match &request.part {
        ModelPart::Hidden { shape, capture } => graph.hidden(shape, capture),
        ModelPart::Head { rows } => graph.head(*rows),
    }
}

struct Graph<'a> {
    config: &'a Config,
    request: &'a EmitModel,
    shapes: std::collections::BTreeMap<String, Vec<u64>>,
}

impl Graph<'_> {
    fn weight<'f>(&self, f: &'f Func<'f>, name: &str) -> Weight<'f> {
        f.weight(name, &self.request.weights[name], &self.shapes[name])
    }

    fn hidden(&self, shape: &StepShape, capture: &[usize]) -> Result<Fragment, Fault> {
        // The parts of one program are linked together, so their symbols must differ.
        let builder = Builder::new("granite_model_hidden");
        builder.export("hidden", |f| {
            let input = |operand| f.input(operand, Shape::new(DType::I32, [(TOKENS, shape.tokens)]));
            let (tokens, positions) = (input(Operand::Tokens), input(Operand::Positions));
            let context = f.context(0, &self.request.state[0]);
            let embedded = f.embed(tokens, &self.weight(f, "embed"), HIDDEN, self.request.dtype);
            let mut x = embedded * self.config.embedding_multiplier;
            let rotary = f.rotary_tables(positions, &self.config.rope).into();
            let mut results = Vec::new();
            for index in 0..self.config.num_hidden_layers {
                let mut pool = f.pool(index, &self.request.state[0]);
                x = self.attention(f, index, x, &mut pool, &context, rotary);
                x = self.mlp(f, index, x);
                results.extend(pool.into_iter().enumerate().map(|(part, v)| (Operand::Pool { layer: index, part }, v)));
                if capture.contains(&index) {
                    results.push((Operand::Captured { layer: index }, x));
                }
            }
            results.push((Operand::Hidden, self.norm(f, x, "norm")));
            results
        });
        Ok(builder.finish()?)
    }

    /// `x + multiplier * o(attention(rotary(qkv(norm(x)))))`; replaces the layer's pool by what it is afterwards.
    fn attention<'f>(
        &self,
        f: &'f Func<'f>,
        index: usize,
        x: Value<'f>,
        pool: &mut Vec<Value<'f>>,
        context: &[Value<'f>],
        [cos, sin]: [Value<'f>; 2],
    ) -> Value<'f> {
        let config = self.config;
        let heads =
            Heads { q_heads: config.num_attention_heads, kv_heads: config.kv_heads, head_dim: config.head_dim };
        let weight = |name: &str| self.weight(f, &format!("layers.{index}.{name}"));
        let normed = self.norm(f, x, &format!("layers.{index}.attention_norm"));
        let [q, k, v] = heads.split(normed.linear(&weight("qkv"), Linear::column(HIDDEN, QKV)));
        let qkv = [q.rotary(cos, sin), k.rotary(cos, sin), v];
        let (attended, written) = f.attention(0, qkv, pool, context);
        *pool = written;
        let joined = attended.merge(&[Q_HEADS, HEAD_DIM], QKV);
        x + joined.linear(&weight("o"), Linear::row(QKV, HIDDEN)) * config.residual_multiplier
    }

    /// `x + multiplier * down(silu(gate(norm(x))) * up(norm(x)))`
    fn mlp<'f>(&self, f: &'f Func<'f>, index: usize, x: Value<'f>) -> Value<'f> {
        let weight = |name: &str| self.weight(f, &format!("layers.{index}.{name}"));
        let normed = self.norm(f, x, &format!("layers.{index}.mlp_norm"));
        let both = normed.linear(&weight("gate_up"), Linear::column(HIDDEN, INTERMEDIATE));
        let width = self.config.intermediate_size;
        let gate = both.slice(INTERMEDIATE, 0..width).convert(DType::F32);
        let up = both.slice(INTERMEDIATE, width..2 * width).convert(DType::F32);
        let inner = (gate.silu() * up).convert(x.dtype());
        x + inner.linear(&weight("down"), Linear::row(INTERMEDIATE, HIDDEN)) * self.config.residual_multiplier
    }

    fn norm<'f>(&self, f: &'f Func<'f>, x: Value<'f>, name: &str) -> Value<'f> {
        x.rms_norm(HIDDEN, f.vector(&self.weight(f, name), HIDDEN), self.config.norm_eps)
    }

    fn head(&self, rows: u64) -> Result<Fragment, Fault> {
        let builder = Builder::new("granite_model_head");
        builder.export("head", |f| {
            let shape = Shape::new(self.request.dtype, [(ROWS, rows), (HIDDEN, self.config.hidden_size)]);
            let x = f.input(Operand::Hidden, shape);
            let weight = self.weight(f, if self.config.tied { "embed" } else { "head" });
            let logits = x.linear(&weight, Linear::new(LinearRole::Head, HIDDEN, VOCAB).result(DType::F32));
            vec![(Operand::Logits, logits / self.config.logits_scaling)]
        });
        Ok(builder.finish()?)
    }
}
