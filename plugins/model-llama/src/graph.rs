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
    axes::{HIDDEN, INTERMEDIATE, ROWS, TOKENS, VOCAB},
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
    o: Weight<'f>,
    o_bias: Option<Weight<'f>>,
    mlp_norm: Weight<'f>,
    gate_up: Weight<'f>,
    gate_up_bias: Option<Weight<'f>>,
    down: Weight<'f>,
    down_bias: Option<Weight<'f>>,
}

impl Graph<'_> {
    fn layer<'f>(&self, inputs: &LayerInputs<'_, 'f>) -> Layer<'f> {
        let weight = |name: &str| inputs.weight(name);
        let bias = |has: bool, name: &str| has.then(|| weight(name));
        let (attention_bias, mlp_bias) = (self.config.attention_bias, self.config.mlp_bias);
        Layer {
            attention_norm: weight("attention_norm"),
            qkv: weight("qkv"),
            qkv_bias: bias(attention_bias, "qkv_bias"),
            o: weight("o"),
            o_bias: bias(attention_bias, "o_bias"),
            mlp_norm: weight("mlp_norm"),
            gate_up: weight("gate_up"),
            gate_up_bias: bias(mlp_bias, "gate_up_bias"),
            down: weight("down"),
            down_bias: bias(mlp_bias, "down_bias"),
        }
    }

    fn hidden(&self, shape: &StepShape, capture: &[usize]) -> Result<Fragment, Fault> {
        // The parts of one program are linked together, so their symbols must differ.
        let builder = Builder::new("llama_hidden");
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
                head_norms: None,
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
            let x = match (g.pass(&layer.gate_up_bias), g.pass(&layer.down_bias)) {
                (Some(gate_up), Some(down)) => biased_mlp(g, x, &mlp, &gate_up, &down),
                _ => x.gated_mlp(&mlp, self.request.imports),
            };
            [vec![x], pool].concat()
        });
        let pool = results.split_off(1);
        (results[0], pool)
    }

    fn head(&self, rows: u64) -> Result<Fragment, Fault> {
        let builder = Builder::new("llama_head");
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

/// The gated MLP with biases, which the import does not have.
fn biased_mlp<'g>(
    g: &'g Func<'g>,
    x: Value<'g>,
    mlp: &GatedMlp<'g>,
    gate_up_bias: &Weight<'g>,
    down_bias: &Weight<'g>,
) -> Value<'g> {
    let normed = x.rms_norm(HIDDEN, g.vector(&mlp.norm, HIDDEN), mlp.norm_eps);
    let both = normed.linear(&mlp.gate_up, Linear::column(HIDDEN, INTERMEDIATE).bias(gate_up_bias));
    let width = both.size(INTERMEDIATE) / 2;
    let gate = both.slice(INTERMEDIATE, 0..width).convert(DType::F32);
    let up = both.slice(INTERMEDIATE, width..2 * width).convert(DType::F32);
    let inner = (gate.activation(mlp.activation) * up).convert(x.dtype());
    inner.linear(&mlp.down, Linear::row(INTERMEDIATE, HIDDEN).bias(down_bias).residual(x))
}
