//! The forward pass.

use torus_abi::{
    DType,
    fault::Fault,
    fragment::{Fragment, LinearRole, Operand},
    model::{EmitModel, ModelPart},
    step::StepShape,
};
use torus_hlo::{
    AttentionBlock, Builder, Func, GatedMlp, LayerInputs, Layers, Linear, ModelWeights, Shape, Value, Weight,
    axes::{HIDDEN, ROWS, TOKENS, VOCAB},
};

use crate::{config::Config, weights};

#[cfg(test)]
mod tests;

pub fn emit(config: &Config, request: &EmitModel) -> Result<Fragment, Fault> {
    let weights = ModelWeights::sharded(request, weights::weights(config), config.kinds.len(), config.parallel)?;
    let graph = Graph { config, request, weights };
    match &request.part {
        ModelPart::Hidden { shape, capture } => graph.hidden(shape, capture),
        ModelPart::Head { rows } => graph.head(*rows),
    }
}

struct Graph<'a> {
    config: &'a Config,
    request: &'a EmitModel,
    weights: ModelWeights<'a>,
}

/// What layers of one kind are given.
struct KindValues<'f> {
    context: Vec<Value<'f>>,
    cos: Value<'f>,
    sin: Value<'f>,
}

/// What one layer's attention is given beside.
struct Attention<'g> {
    kind: usize,
    values: KindValues<'g>,
    pool: Vec<Value<'g>>,
}

/// The weights of one layer.
struct Layer<'f> {
    attention_norm: Weight<'f>,
    qkv: Weight<'f>,
    q_norm: Weight<'f>,
    k_norm: Weight<'f>,
    o: Weight<'f>,
    attention_post_norm: Weight<'f>,
    mlp_norm: Weight<'f>,
    gate_up: Weight<'f>,
    down: Weight<'f>,
    mlp_post_norm: Weight<'f>,
}

impl<'f> Layer<'f> {
    fn pass<'g>(&self, g: &'g Func<'g>) -> Layer<'g> {
        Layer {
            attention_norm: g.pass(&self.attention_norm),
            qkv: g.pass(&self.qkv),
            q_norm: g.pass(&self.q_norm),
            k_norm: g.pass(&self.k_norm),
            o: g.pass(&self.o),
            attention_post_norm: g.pass(&self.attention_post_norm),
            mlp_norm: g.pass(&self.mlp_norm),
            gate_up: g.pass(&self.gate_up),
            down: g.pass(&self.down),
            mlp_post_norm: g.pass(&self.mlp_post_norm),
        }
    }
}

impl Graph<'_> {
    fn layer<'f>(&self, inputs: &LayerInputs<'_, 'f>) -> Layer<'f> {
        let weight = |name: &str| inputs.weight(name);
        Layer {
            attention_norm: weight("attention_norm"),
            qkv: weight("qkv"),
            q_norm: weight("q_norm"),
            k_norm: weight("k_norm"),
            o: weight("o"),
            attention_post_norm: weight("attention_post_norm"),
            mlp_norm: weight("mlp_norm"),
            gate_up: weight("gate_up"),
            down: weight("down"),
            mlp_post_norm: weight("mlp_post_norm"),
        }
    }

    fn hidden(&self, shape: &StepShape, capture: &[usize]) -> Result<Fragment, Fault> {
        // The parts of one program are linked together, so their symbols must differ.
        let builder = Builder::new("gemma_hidden");
        builder.export("hidden", |f| {
            let tokens = f.input(Operand::Tokens, Shape::new(DType::I32, [(TOKENS, shape.tokens)]));
            let positions = f.input(Operand::Positions, Shape::new(DType::I32, [(TOKENS, shape.tokens)]));
            let kind = |(index, kind): (usize, &crate::config::Kind)| {
                let context = f.context(index, &self.request.state[index]);
                let (cos, sin) = f.rotary_tables(positions, &kind.rope);
                KindValues { context, cos, sin }
            };
            let kinds: Vec<_> = self.config.kinds.iter().enumerate().map(kind).collect();
            let x = self.embed(f, tokens);
            let layers = Layers { request: self.request, weights: &self.weights, kinds: &self.config.layers, capture };
            let (x, mut results) =
                f.layers(&layers, x, |inputs, x| self.apply_layer(f, inputs, x, &kinds[inputs.kind]));
            let norm = self.weights.declare(f, "norm");
            results.push((Operand::Hidden, self.norm(f, x, &norm)));
            results
        });
        Ok(builder.finish()?)
    }

    /// The embedding times `sqrt(hidden)`, which the reference rounds to the dtype of activations.
    fn embed<'f>(&self, f: &'f Func<'f>, tokens: Value<'f>) -> Value<'f> {
        let scale = (self.config.hidden as f64).sqrt() as f32;
        f.embed(tokens, &self.weights.declare(f, "embed"), HIDDEN, self.request.dtype) * scale
    }

    fn norm<'f>(&self, f: &'f Func<'f>, x: Value<'f>, weight: &Weight<'f>) -> Value<'f> {
        x.rms_norm(HIDDEN, f.vector(weight, HIDDEN), self.config.norm_eps)
    }

    /// Calls the function of the layer's kind and types: equal layers share one.
    fn apply_layer<'f>(
        &self,
        f: &'f Func<'f>,
        inputs: &LayerInputs<'_, 'f>,
        x: Value<'f>,
        values: &KindValues<'f>,
    ) -> (Value<'f>, Vec<Value<'f>>) {
        let (layer, pool, kind) = (self.layer(inputs), inputs.pool(), inputs.kind);
        let mut results = f.outline("layer", |g| {
            let (x, layer) = (g.pass(&x), layer.pass(g));
            let KindValues { context, cos, sin } = values;
            let values = KindValues { context: g.pass(context), cos: g.pass(cos), sin: g.pass(sin) };
            let attention = Attention { kind, values, pool: g.pass(&pool) };
            let (x, pool) = self.attention(g, x, &layer, attention);
            [vec![self.mlp(x, &layer)], pool].concat()
        });
        let pool = results.split_off(1);
        (results[0], pool)
    }

    fn attention<'g>(
        &self,
        g: &'g Func<'g>,
        x: Value<'g>,
        layer: &Layer<'g>,
        Attention { kind, values, pool }: Attention<'g>,
    ) -> (Value<'g>, Vec<Value<'g>>) {
        let block = AttentionBlock {
            norm: layer.attention_norm.clone(),
            qkv: layer.qkv.clone(),
            qkv_bias: None,
            o: layer.o.clone(),
            cos: values.cos,
            sin: values.sin,
            pool,
            context: values.context,
            kind,
            heads: self.config.shard_heads,
            norm_eps: self.config.norm_eps,
            head_norms: Some([layer.q_norm.clone(), layer.k_norm.clone()]),
            o_bias: None,
            post_norm: Some(layer.attention_post_norm.clone()),
        };
        g.attention_block(x, &block, self.request.imports)
    }

    fn mlp<'g>(&self, x: Value<'g>, layer: &Layer<'g>) -> Value<'g> {
        let mlp = GatedMlp {
            norm: layer.mlp_norm.clone(),
            gate_up: layer.gate_up.clone(),
            down: layer.down.clone(),
            activation: self.config.activation,
            norm_eps: self.config.norm_eps,
            post_norm: Some(layer.mlp_post_norm.clone()),
        };
        x.gated_mlp(&mlp, self.request.imports)
    }

    fn head(&self, rows: u64) -> Result<Fragment, Fault> {
        let builder = Builder::new("gemma_head");
        builder.export("head", |f| {
            let shape = Shape::new(self.request.dtype, [(ROWS, rows), (HIDDEN, self.config.hidden)]);
            let x = f.input(Operand::Hidden, shape);
            let weight = self.weights.declare(f, if self.config.tied { "embed" } else { "head" });
            let logits = x.linear(&weight, Linear::new(LinearRole::Head, HIDDEN, VOCAB).result(DType::F32));
            let capped = match self.config.final_soft_cap {
                Some(cap) => (logits / cap).tanh() * cap,
                None => logits,
            };
            vec![(Operand::Logits, capped)]
        });
        Ok(builder.finish()?)
    }
}
