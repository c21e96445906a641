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
    let weights = ModelWeights::sharded(request, weights::weights(config), 1, config.parallel)?;
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

/// The weights of one layer.
struct Layer<'f> {
    attention_norm: Weight<'f>,
    qkv: Weight<'f>,
    qkv_bias: Option<Weight<'f>>,
    q_norm: Option<Weight<'f>>,
    k_norm: Option<Weight<'f>>,
    o: Weight<'f>,
    o_bias: Option<Weight<'f>>,
    mlp_norm: Weight<'f>,
    gate_up: Weight<'f>,
    down: Weight<'f>,
}

impl Graph<'_> {
    fn layer<'f>(&self, inputs: &LayerInputs<'_, 'f>) -> Layer<'f> {
        let weight = |name: &str| inputs.weight(name);
        let weight_if = |has: bool, name: &str| has.then(|| weight(name));
        let qk_norm = self.config.qk_norm();
        Layer {
            attention_norm: weight("attention_norm"),
            qkv: weight("qkv"),
            qkv_bias: weight_if(self.config.qkv_bias, "qkv_bias"),
            q_norm: weight_if(qk_norm, "q_norm"),
            k_norm: weight_if(qk_norm, "k_norm"),
            o: weight("o"),
            o_bias: weight_if(self.config.o_bias, "o_bias"),
            mlp_norm: weight("mlp_norm"),
            gate_up: weight("gate_up"),
            down: weight("down"),
        }
    }

    fn hidden(&self, shape: &StepShape, capture: &[usize]) -> Result<Fragment, Fault> {
        // The parts of one program are linked together, so their symbols must differ.
        let builder = Builder::new("qwen_hidden");
        builder.export("hidden", |f| {
            let tokens = f.input(Operand::Tokens, Shape::new(DType::I32, [(TOKENS, shape.tokens)]));
            let positions = f.input(Operand::Positions, Shape::new(DType::I32, [(TOKENS, shape.tokens)]));
            let context = f.context(0, &self.request.state[0]);
            let x = f.embed(tokens, &self.weights.declare(f, "embed"), HIDDEN, self.request.dtype);
            let (cos, sin) = f.rotary_tables(positions, &self.config.rope);
            let kinds = vec![0; self.config.layers];
            let layers = Layers { request: self.request, weights: &self.weights, kinds: &kinds, capture };
            let (x, mut results) =
                f.layers(&layers, x, |inputs, x| self.apply_layer(f, inputs, x, &context, [cos, sin]));
            let norm = f.vector(&self.weights.declare(f, "norm"), HIDDEN);
            results.push((Operand::Hidden, x.rms_norm(HIDDEN, norm, self.config.norm_eps)));
            results
        });
        Ok(builder.finish()?)
    }

    /// Calls the function of the layer's types: layers of equal types share one.
    fn apply_layer<'f>(
        &self,
        f: &'f Func<'f>,
        inputs: &LayerInputs<'_, 'f>,
        x: Value<'f>,
        context: &Vec<Value<'f>>,
        rotary: [Value<'f>; 2],
    ) -> (Value<'f>, Vec<Value<'f>>) {
        let (layer, pool) = (self.layer(inputs), inputs.pool());
        let mut results = f.outline("layer", |g| {
            let x = g.pass(&x);
            let [cos, sin] = rotary.map(|table| g.pass(&table));
            let block = AttentionBlock {
                norm: g.pass(&layer.attention_norm),
                qkv: g.pass(&layer.qkv),
                qkv_bias: g.pass(&layer.qkv_bias),
                o: g.pass(&layer.o),
                cos,
                sin,
                pool: g.pass(&pool),
                context: g.pass(context),
                kind: 0,
                heads: self.config.shard_heads,
                norm_eps: self.config.norm_eps,
                head_norms: g.pass(&layer.q_norm).zip(g.pass(&layer.k_norm)).map(<[_; 2]>::from),
                o_bias: g.pass(&layer.o_bias),
                post_norm: None,
            };
            let (x, pool) = g.attention_block(x, &block, self.request.imports);
            let mlp = GatedMlp {
                norm: g.pass(&layer.mlp_norm),
                gate_up: g.pass(&layer.gate_up),
                down: g.pass(&layer.down),
                activation: self.config.activation,
                norm_eps: self.config.norm_eps,
                post_norm: None,
            };
            let x = x.gated_mlp(&mlp, self.request.imports);
            [vec![x], pool].concat()
        });
        let pool = results.split_off(1);
        (results[0], pool)
    }

    fn head(&self, rows: u64) -> Result<Fragment, Fault> {
        let builder = Builder::new("qwen_head");
        builder.export("head", |f| {
            let shape = Shape::new(self.request.dtype, [(ROWS, rows), (HIDDEN, self.config.hidden)]);
            let x = f.input(Operand::Hidden, shape);
            let weight = self.weights.declare(f, if self.config.tied { "embed" } else { "head" });
            let logits = x.linear(&weight, Linear::new(LinearRole::Head, HIDDEN, VOCAB).result(DType::F32));
            vec![(Operand::Logits, logits)]
        });
        Ok(builder.finish()?)
    }
}
