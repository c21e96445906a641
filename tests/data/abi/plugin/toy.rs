//! A model of one layer and an attention backend that answers with the query. What they do wrong is chosen by the
//! config (`"panic"`) and the window (0). What it logs on opening is the layout's, which may use its host for it.
//!
//! Answers are written as JSON: the plugin API's structs may gain fields, and this must build with every revision.

use serde_json::{Value, from_value, json};
use torus_abi::{
    DType, TensorType,
    attention::{AttentionAnswer, AttentionQuery, EmitAttention},
    author::{Attention, Model},
    fault::Fault,
    fragment::Package,
    log::{Level, log},
    model::{EmitModel, GgufAnswer, GgufQuery, ModelDescription, ModelOptions, ModelPart},
};

/// Every symbol starts with the library's own name, so that fragments of two layouts can be linked together.
const PREFIX: &str = env!("CARGO_CRATE_NAME");
const VOCAB: u64 = 8;
const EMBED: &str = "embed";
const TENSOR: &str = "model.embed_tokens.weight";

pub struct Toy {
    hidden: u64,
}

impl Model for Toy {
    const ARCHITECTURES: &'static [&'static str] = &["ToyForCausalLM"];
    const GGUF_ARCHITECTURES: &'static [&'static str] = &["toy"];

    fn from_gguf(query: &GgufQuery) -> Result<GgufAnswer, Fault> {
        let hidden = query.metadata.get("toy.embedding_length").and_then(|value| value.as_u64());
        let hidden = hidden.ok_or_else(|| Fault::invalid("toy.embedding_length is missing"))?;
        let tensors = json!({ TENSOR: { "name": "token_embd.weight" } });
        from_value(json!({ "config": { "hidden_size": hidden }, "tensors": tensors })).map_err(malformed)
    }

    fn open(options: &ModelOptions) -> Result<Self, Fault> {
        log(Level::Info, &crate::opening());
        assert!(options.config.get("panic").is_none(), "the config says so");
        let hidden = options.config.get("hidden_size").and_then(|value| value.as_u64());
        Ok(Self { hidden: hidden.ok_or_else(|| Fault::unsupported("hidden_size is missing"))? })
    }

    fn describe(&self) -> ModelDescription {
        let shape = [VOCAB, self.hidden];
        let source = json!({ "tensor": TENSOR, "shape": shape });
        let kind = json!({ "state": "paged", "q_heads": 1, "kv_heads": 1, "head_dim": self.hidden, "scale": 1.0 });
        let description = json!({
            "architecture": Self::ARCHITECTURES[0], "hidden": self.hidden, "vocab": VOCAB, "context_length": 64,
            "dtype": "f32", "kinds": [kind], "layers": [0],
            "weights": [{ "name": EMBED, "shape": shape, "role": "embed_and_head", "sources": [source] }],
        });
        from_value(description).unwrap_or_else(|error| panic!("{error}"))
    }

    fn emit(&self, request: &EmitModel) -> Result<Package, Fault> {
        match request.part {
            ModelPart::Hidden { shape, .. } => self.emit_hidden(request, shape.tokens),
            ModelPart::Head { rows, .. } => self.emit_head(request, rows),
        }
    }
}

impl Toy {
    fn weight(&self, request: &EmitModel) -> Result<(Value, Vec<TensorType>), Fault> {
        let handle = request.weights.get(EMBED).ok_or_else(|| Fault::invalid("the weight 'embed' is missing"))?;
        let operand = json!({
            "shape": [VOCAB, self.hidden], "storage": handle.storage, "parts": handle.parts.len(),
        });
        Ok((operand, handle.parts.clone()))
    }

    /// Embeds, attends, and that is all.
    fn emit_hidden(&self, request: &EmitModel, tokens: u64) -> Result<Package, Fault> {
        let (weight, weights) = self.weight(request)?;
        let state = request.state.first().ok_or_else(|| Fault::invalid("the state of the layer is missing"))?;
        let (pool, context, dtype) = (&state.pool, &state.context, request.dtype);
        let ids = TensorType::new(DType::I32, [tokens]);
        let rows = TensorType::new(dtype, [tokens, self.hidden]);
        let heads = TensorType::new(dtype, [tokens, 1, self.hidden]);

        let embed = Import {
            symbol: symbol("embed"),
            operation: json!({ "op": "embed", "weight": weight, "result": dtype }),
            arguments: [vec![ids.clone()], weights.clone()].concat(),
            results: vec![rows.clone()],
        };
        let (pool_parts, context_parts) = (pool.len(), context.len());
        let attention = Import {
            symbol: symbol("attend"),
            operation: json!({
                "op": "attention", "kind": 0, "pool_parts": pool_parts, "context_parts": context_parts,
            }),
            arguments: [vec![heads.clone(); 3], pool.clone(), context.clone()].concat(),
            results: [vec![heads.clone()], pool.clone()].concat(),
        };

        let mut body = Body::new([vec![ids], weights.clone(), pool.clone(), context.clone()].concat());
        let embedded = body.call(&embed, 0..1 + weights.len());
        let query = body.reshape(embedded[0], heads);
        let state_at = 1 + weights.len();
        let state_values = state_at..state_at + pool_parts + context_parts;
        let attended = body.call(&attention, [query; 3].into_iter().chain(state_values));
        let result = body.reshape(attended[0], rows);
        let results = [vec![result], attended[1..].to_vec()].concat();

        let pools = (0..pool_parts).map(|part| json!({ "pool": { "layer": 0, "part": part } }));
        let contexts = (0..context_parts).map(|part| json!({ "context": { "kind": 0, "part": part } }));
        let arguments = list("tokens", weight_parts(&weights).chain(pools.clone()).chain(contexts));
        let export = json!({
            "symbol": symbol("hidden"), "arguments": arguments,
            "results": list("hidden", pools),
        });
        let functions = [body.finish(&symbol("hidden"), &results)];
        package(&functions, &[embed.message(), attention.message()], json!({ "hidden": export }))
    }

    fn emit_head(&self, request: &EmitModel, rows: u64) -> Result<Package, Fault> {
        let (weight, weights) = self.weight(request)?;
        let linear = Import {
            symbol: symbol("project"),
            operation: json!({
                "op": "linear", "weight": weight, "role": "head", "bias": null, "residual": false, "result": "f32",
            }),
            arguments: [vec![TensorType::new(request.dtype, [rows, self.hidden])], weights.clone()].concat(),
            results: vec![TensorType::new(DType::F32, [rows, VOCAB])],
        };
        let mut body = Body::new(linear.arguments.clone());
        let logits = body.call(&linear, 0..linear.arguments.len());
        let export = json!({
            "symbol": symbol("head"), "results": ["logits"],
            "arguments": list("hidden", weight_parts(&weights)),
        });
        let functions = [body.finish(&symbol("head"), &logits)];
        package(&functions, &[linear.message()], json!({ "head": export }))
    }
}

impl Attention for Toy {
    fn query(query: &AttentionQuery) -> Result<AttentionAnswer, Fault> {
        let (spec, shape) = (&query.spec, &query.shape);
        if spec.soft_cap.is_some() {
            return from_value(json!({ "score": 0, "reason": "soft caps are not for toys" })).map_err(malformed);
        }
        if spec.q_heads == 0 {
            return Err(Fault::invalid("q_heads is 0"));
        }
        assert_ne!(spec.window, Some(0), "nothing to see");
        let pool = TensorType::new(query.kv_dtype, [shape.pages * shape.page_size, spec.kv_heads, spec.head_dim]);
        let answer = json!({
            "score": 1, "reason": "a toy", "pool": [pool],
            "page_bytes": shape.page_size * spec.kv_heads * spec.head_dim * query.kv_dtype.bytes() as u64,
            "inputs": ["positions"], "context": [TensorType::new(DType::I32, [shape.tokens])],
        });
        from_value(answer).map_err(malformed)
    }

    fn emit(request: &EmitAttention) -> Result<Package, Fault> {
        let (kind, query) = (request.kind, &request.query);
        let answer = Self::query(query)?;
        let heads = |heads| TensorType::new(query.dtype, [query.shape.tokens, heads, query.spec.head_dim]);
        let (q, kv) = (heads(query.spec.q_heads), heads(query.spec.kv_heads));
        let arguments = [vec![q, kv.clone(), kv], answer.pool, answer.context.clone()].concat();
        let (context, attention) = (symbol(&format!("context_{kind}")), symbol(&format!("attention_{kind}")));
        let functions =
            [Body::new(answer.context).finish(&context, &[0]), Body::new(arguments).finish(&attention, &[0, 3])];
        let part = json!({ "context": { "kind": kind, "part": 0 } });
        let pool = json!({ "pool": { "layer": 0, "part": 0 } });
        let exports = json!({
            "context": { "symbol": context, "arguments": [{ "step": "positions" }], "results": [part] },
            "attention": {
                "symbol": attention, "arguments": ["query", "key", "value", pool, part], "results": ["attended", pool],
            },
        });
        package(&functions, &[], exports)
    }
}

fn malformed(error: serde_json::Error) -> Fault {
    Fault::internal(error.to_string())
}

fn symbol(name: &str) -> String {
    format!("{PREFIX}.{name}")
}

fn weight_parts(weights: &[TensorType]) -> impl Iterator<Item = Value> {
    (0..weights.len()).map(|part| json!({ "weight": { "name": EMBED, "part": part } }))
}

fn list(first: &str, others: impl Iterator<Item = Value>) -> Value {
    std::iter::once(json!(first)).chain(others).collect()
}

fn package(functions: &[Value], imports: &[Value], exports: Value) -> Result<Package, Fault> {
    let fragment = json!({ "functions": functions, "imports": imports, "exports": exports });
    from_value(json!({ "fragment": fragment })).map_err(malformed)
}

/// An operation that the host supplies.
struct Import {
    symbol: String,
    operation: Value,
    arguments: Vec<TensorType>,
    results: Vec<TensorType>,
}

impl Import {
    fn message(&self) -> Value {
        let Self { symbol, operation, arguments, results } = self;
        json!({ "symbol": symbol, "operation": operation, "arguments": arguments, "results": results })
    }
}

/// A function in the making. A value is an index into `values`, which hold each its spelling and type.
struct Body {
    arguments: usize,
    values: Vec<(String, TensorType)>,
    calls: Vec<String>,
    text: String,
}

impl Body {
    fn new(arguments: Vec<TensorType>) -> Self {
        let values: Vec<_> = arguments.into_iter().enumerate().map(|(i, ty)| (format!("%arg{i}"), ty)).collect();
        Self { arguments: values.len(), values, calls: vec![], text: String::new() }
    }

    fn names(&self, values: &[usize]) -> String {
        values.iter().map(|value| self.values[*value].0.as_str()).collect::<Vec<_>>().join(", ")
    }

    fn types(&self, values: &[usize]) -> String {
        values.iter().map(|value| self.values[*value].1.mlir()).collect::<Vec<_>>().join(", ")
    }

    fn call(&mut self, import: &Import, arguments: impl IntoIterator<Item = usize>) -> Vec<usize> {
        let arguments: Vec<_> = arguments.into_iter().collect();
        let (base, first) = (format!("%v{}", self.values.len()), self.values.len());
        for (i, ty) in import.results.iter().enumerate() {
            self.values.push((format!("{base}#{i}"), ty.clone()));
        }
        let results: Vec<_> = (first..self.values.len()).collect();
        let line = format!(
            "  {base}:{} = \"func.call\"({}) {{callee = @{}}} : ({}) -> ({})\n",
            results.len(),
            self.names(&arguments),
            import.symbol,
            self.types(&arguments),
            self.types(&results),
        );
        self.text.push_str(&line);
        self.calls.push(import.symbol.clone());
        results
    }

    fn reshape(&mut self, value: usize, ty: TensorType) -> usize {
        let name = format!("%v{}", self.values.len());
        let (from, to) = (&self.values[value], ty.mlir());
        let line = format!("  {name} = \"stablehlo.reshape\"({}) : ({}) -> {to}\n", from.0, from.1.mlir());
        self.text.push_str(&line);
        self.values.push((name, ty));
        self.values.len() - 1
    }

    fn finish(self, symbol: &str, results: &[usize]) -> Value {
        let arguments: Vec<_> = (0..self.arguments).collect();
        let typed = arguments.iter().map(|i| format!("{}: {}", self.values[*i].0, self.values[*i].1.mlir()));
        let (takes, gives) = (self.types(&arguments), self.types(results));
        let text = format!(
            "\"func.func\"() ({{\n^bb0({}):\n{}  \"func.return\"({}) : ({gives}) -> ()\n}}) {{function_type = ({takes}) \
             -> ({gives}), sym_name = \"{symbol}\", sym_visibility = \"private\"}} : () -> ()\n",
            typed.collect::<Vec<_>>().join(", "),
            self.text,
            self.names(results),
        );
        let of = |values: &[usize]| values.iter().map(|value| self.values[*value].1.clone()).collect::<Vec<_>>();
        json!({
            "symbol": symbol, "arguments": of(&arguments), "results": of(results), "calls": self.calls, "text": text,
        })
    }
}
