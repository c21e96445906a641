//! A model of one layer and an attention backend that answers with the query. What they do wrong is chosen by the
//! config (`"panic"`) and the window (0). What it logs on opening is the layout's, which may use its host for it.

use std::collections::BTreeMap;

use torus_abi::{
    DType, TensorType,
    attention::{AttentionAnswer, AttentionQuery, EmitAttention},
    author::{Attention, Model},
    fault::Fault,
    fragment::{Export, Fragment, Function, Import, LinearRole, Operand, Operation, Package, WeightOperand},
    log::{Level, log},
    model::{
        AttentionSpec, EmitModel, GgufAnswer, GgufQuery, GgufTensor, ModelDescription, ModelOptions, ModelPart,
        StateKind, WeightRole, WeightSource, WeightSpec,
    },
    step::StepInput,
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
        let embed = GgufTensor { name: "token_embd.weight".into(), transforms: vec![] };
        let config = [("hidden_size", hidden)].into_iter().collect();
        Ok(GgufAnswer { config, tensors: [(TENSOR.to_owned(), embed)].into(), ignored_tensors: vec![] })
    }

    fn open(options: &ModelOptions) -> Result<Self, Fault> {
        log(Level::Info, &crate::opening());
        assert!(options.config.get("panic").is_none(), "the config says so");
        let hidden = options.config.get("hidden_size").and_then(|value| value.as_u64());
        Ok(Self { hidden: hidden.ok_or_else(|| Fault::unsupported("hidden_size is missing"))? })
    }

    fn describe(&self) -> ModelDescription {
        let spec =
            AttentionSpec { q_heads: 1, kv_heads: 1, head_dim: self.hidden, scale: 1.0, window: None, soft_cap: None };
        let shape = vec![VOCAB, self.hidden];
        let source = WeightSource { tensor: TENSOR.into(), shape: shape.clone(), transforms: vec![] };
        ModelDescription {
            architecture: Self::ARCHITECTURES[0].into(),
            hidden: self.hidden,
            vocab: VOCAB,
            context_length: 64,
            dtype: DType::F32,
            kinds: vec![StateKind::Paged(spec)],
            layers: vec![0],
            weights: vec![WeightSpec {
                name: EMBED.into(),
                shape,
                role: WeightRole::EmbedAndHead,
                sources: vec![source],
            }],
            ignored_tensors: vec![],
        }
    }

    fn emit(&self, request: &EmitModel) -> Result<Package, Fault> {
        match request.part {
            ModelPart::Hidden { shape, .. } => self.emit_hidden(request, shape.tokens),
            ModelPart::Head { rows } => self.emit_head(request, rows),
        }
    }
}

impl Toy {
    fn weight(&self, request: &EmitModel) -> Result<(WeightOperand, Vec<TensorType>), Fault> {
        let handle = request.weights.get(EMBED).ok_or_else(|| Fault::invalid("the weight 'embed' is missing"))?;
        let (storage, parts) = (handle.storage.clone(), handle.parts.len());
        Ok((WeightOperand { shape: vec![VOCAB, self.hidden], storage, parts }, handle.parts.clone()))
    }

    /// Embeds, attends, and that is all.
    fn emit_hidden(&self, request: &EmitModel, tokens: u64) -> Result<Package, Fault> {
        let (weight, weights) = self.weight(request)?;
        let state = request.state.first().ok_or_else(|| Fault::invalid("the state of the layer is missing"))?;
        let (pool, context) = (&state.pool, &state.context);
        let ids = TensorType::new(DType::I32, [tokens]);
        let rows = TensorType::new(request.dtype, [tokens, self.hidden]);
        let heads = TensorType::new(request.dtype, [tokens, 1, self.hidden]);

        let embed = Import {
            symbol: symbol("embed"),
            operation: Operation::Embed { weight, result: request.dtype },
            arguments: [vec![ids.clone()], weights.clone()].concat(),
            results: vec![rows.clone()],
            default: None,
        };
        let attention = Import {
            symbol: symbol("attend"),
            operation: Operation::Attention { kind: 0, pool_parts: pool.len(), context_parts: context.len() },
            arguments: [vec![heads.clone(); 3], pool.clone(), context.clone()].concat(),
            results: [vec![heads.clone()], pool.clone()].concat(),
            default: None,
        };

        let mut body = Body::new([vec![ids], weights.clone(), pool.clone(), context.clone()].concat());
        let embedded = body.call(&embed, 0..1 + weights.len());
        let query = body.reshape(embedded[0], heads);
        let state_at = 1 + weights.len();
        let state_values = state_at..state_at + pool.len() + context.len();
        let attended = body.call(&attention, [query; 3].into_iter().chain(state_values));
        let result = body.reshape(attended[0], rows);
        let results = [vec![result], attended[1..].to_vec()].concat();
        let function = body.finish(&symbol("hidden"), &results);

        let pool_parts = || (0..pool.len()).map(|part| Operand::Pool { layer: 0, part });
        let weight_parts = (0..weights.len()).map(|part| Operand::Weight { name: EMBED.into(), part });
        let context_parts = (0..context.len()).map(|part| Operand::Context { kind: 0, part });
        let export = Export {
            symbol: function.symbol.clone(),
            arguments: [Operand::Tokens]
                .into_iter()
                .chain(weight_parts)
                .chain(pool_parts())
                .chain(context_parts)
                .collect(),
            results: [Operand::Hidden].into_iter().chain(pool_parts()).collect(),
        };
        Ok(package(vec![function], vec![embed, attention], [("hidden".to_owned(), export)].into()))
    }

    fn emit_head(&self, request: &EmitModel, rows: u64) -> Result<Package, Fault> {
        let (weight, weights) = self.weight(request)?;
        let operation =
            Operation::Linear { weight, role: LinearRole::Head, bias: None, residual: false, result: DType::F32 };
        let linear = Import {
            symbol: symbol("project"),
            operation,
            arguments: [vec![TensorType::new(request.dtype, [rows, self.hidden])], weights.clone()].concat(),
            results: vec![TensorType::new(DType::F32, [rows, VOCAB])],
            default: None,
        };
        let mut body = Body::new(linear.arguments.clone());
        let logits = body.call(&linear, 0..linear.arguments.len());
        let function = body.finish(&symbol("head"), &logits);
        let weight_parts = (0..weights.len()).map(|part| Operand::Weight { name: EMBED.into(), part });
        let export = Export {
            symbol: function.symbol.clone(),
            arguments: [Operand::Hidden].into_iter().chain(weight_parts).collect(),
            results: vec![Operand::Logits],
        };
        Ok(package(vec![function], vec![linear], [("head".to_owned(), export)].into()))
    }
}

impl Attention for Toy {
    fn query(query: &AttentionQuery) -> Result<AttentionAnswer, Fault> {
        let (spec, shape) = (&query.spec, &query.shape);
        if spec.soft_cap.is_some() {
            return Ok(AttentionAnswer::refuse("soft caps are not for toys"));
        }
        if spec.q_heads == 0 {
            return Err(Fault::invalid("q_heads is 0"));
        }
        assert_ne!(spec.window, Some(0), "nothing to see");
        let slots = shape.pages * shape.page_size;
        Ok(AttentionAnswer {
            score: 1,
            reason: "a toy".into(),
            pool: vec![TensorType::new(query.kv_dtype, [slots, spec.kv_heads, spec.head_dim])],
            page_bytes: shape.page_size * spec.kv_heads * spec.head_dim * query.kv_dtype.bytes() as u64,
            inputs: vec![StepInput::Positions],
            context: vec![StepInput::Positions.tensor_type(shape)],
        })
    }

    fn emit(request: &EmitAttention) -> Result<Package, Fault> {
        let (kind, query) = (request.kind, &request.query);
        let answer = Self::query(query)?;
        let context = Body::new(answer.context.clone()).finish(&symbol(&format!("context_{kind}")), &[0]);
        let context_export = Export {
            symbol: context.symbol.clone(),
            arguments: vec![Operand::Step(StepInput::Positions)],
            results: vec![Operand::Context { kind, part: 0 }],
        };

        let tokens = query.shape.tokens;
        let heads = |heads| TensorType::new(query.dtype, [tokens, heads, query.spec.head_dim]);
        let (q, kv) = (heads(query.spec.q_heads), heads(query.spec.kv_heads));
        let arguments = [vec![q, kv.clone(), kv], answer.pool, answer.context].concat();
        let attention = Body::new(arguments).finish(&symbol(&format!("attention_{kind}")), &[0, 3]);
        let pool = Operand::Pool { layer: 0, part: 0 };
        let attention_export = Export {
            symbol: attention.symbol.clone(),
            arguments: vec![
                Operand::Query,
                Operand::Key,
                Operand::Value,
                pool.clone(),
                Operand::Context { kind, part: 0 },
            ],
            results: vec![Operand::Attended, pool],
        };
        let exports = [("context".to_owned(), context_export), ("attention".to_owned(), attention_export)];
        Ok(package(vec![context, attention], vec![], exports.into()))
    }
}

fn symbol(name: &str) -> String {
    format!("{PREFIX}.{name}")
}

fn package(functions: Vec<Function>, imports: Vec<Import>, exports: BTreeMap<String, Export>) -> Package {
    Package { fragment: Fragment { functions, imports, exports } }
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

    fn finish(self, symbol: &str, results: &[usize]) -> Function {
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
        let of = |values: &[usize]| values.iter().map(|value| self.values[*value].1.clone()).collect();
        Function { symbol: symbol.to_owned(), arguments: of(&arguments), results: of(results), calls: self.calls, text }
    }
}
