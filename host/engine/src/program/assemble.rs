//! Puts a step program together: the model's and the attention plugin's fragments, the host's imports, sampling, and
//! `@main` around them.

use torus_abi::{
    DType, TensorType,
    attention::{AttentionAnswer, AttentionQuery, EmitAttention},
    fragment::{Fragment, Operand},
    model::{EmitModel, HostImports, LayerLoops, ModelDescription, ModelPart, Parallel, StateHandle},
    step::{StepInput, StepShape},
};
use torus_hlo::{
    Axis, Builder, Callee, Func, Precision, Scatter, Shape, Value,
    axes::{HIDDEN, ROWS, SLOTS, TOKENS, VOCAB},
};
use torus_plugins::{
    AttentionInterface, CallError, LinkError, OpenModel,
    link::{self, Unit},
};

use super::{Field, Rows, StepLayout, WeightMap, imports, loops, native::Native};
use crate::sampling::{RowParameters, SamplingInputs, Vocabulary, sample, sample_natively};

/// Everything that programs of one engine have in common.
pub(crate) struct Assembler {
    pub model: OpenModel,
    pub description: ModelDescription,
    pub attention: AttentionInterface,
    /// One for each kind of layers, for a step of one token; the shape is replaced.
    pub queries: Vec<AttentionQuery>,
    pub activations: DType,
    pub weights: WeightMap,
    pub max_running: u64,
    /// Over how many devices a program is split; its text is that of one.
    pub parallel: Parallel,
    /// Whether the device can call native kernels of plugins.
    pub runs_kernels: bool,
    /// Whether to call the host's own where it has some.
    pub own_kernels: bool,
    /// Whether layers run in loops; see [`super::loops`].
    pub in_loops: bool,
}

/// A program's text and how its step buffer is laid out.
pub(crate) struct Program {
    pub text: String,
    pub layout: StepLayout,
}

/// A program cannot be put together: a plugin's doing.
#[derive(Debug, thiserror::Error)]
pub enum AssembleError {
    #[error(transparent)]
    Call(#[from] CallError),
    #[error(transparent)]
    Link(#[from] LinkError),
    #[error("native kernel '{0}' runs on CPUs only; choose another attention backend or device")]
    KernelOffCpu(String),
    #[error(
        "attention plugin '{plugin}' does not keep the KV of all layers in one pool: {reason}; lower \
         --max-total-tokens or leave out --compile-mode fast"
    )]
    Pool { plugin: String, reason: String },
    #[error(
        "plugin '{0}' does not run layers in loops, as --compile-mode fast has it; leave that out, or build the \
         plugin anew with layers by `Func::layers`"
    )]
    NoLoops(String),
    #[error("the step program cannot be built: {0}")]
    Build(String),
}

/// Types of the arguments of `@main`, in order, and of its results.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Arguments {
    /// Of the weights; see [`WeightMap`].
    pub weights: Vec<TensorType>,
    /// Parts of the pools, layer by layer; where layers run in loops, kind by kind.
    pub pools: Vec<TensorType>,
    /// Those of them that hold scales of caches.
    pub scales: Vec<ScalePart>,
    pub rows: RowArrays,
}

/// A part of a pool that holds scales of caches, of keys and of values for each of some layers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ScalePart {
    /// Its place in [`Arguments::pools`].
    pub part: usize,
    pub layers: Vec<usize>,
}

/// The arrays that stay on the device from step to step and have a row or entry for each slot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct RowArrays {
    /// `i32 [slots]`
    pub last_tokens: TensorType,
    /// `i32 [page_table]`
    pub page_table: TensorType,
    /// `i32 [slots, vocab]`, of this device's part of the vocabulary
    pub token_counts: TensorType,
    /// `f32 [slots, vocab]`, of this device's part of the vocabulary
    pub bias: TensorType,
    /// `u32 [slots, words]`
    pub allowed: TensorType,
}

impl Arguments {
    /// The large arrays that a program makes or updates: those of many words for each slot, then the pools.
    pub fn large(&self) -> impl Iterator<Item = &TensorType> {
        [&self.rows.token_counts, &self.rows.bias].into_iter().chain(&self.pools)
    }
}

impl Assembler {
    /// The pool of a layer and the context, per kind, for a shape.
    fn answers(&self, shape: StepShape) -> Result<Vec<(AttentionQuery, AttentionAnswer)>, AssembleError> {
        let ask = |(kind, query): (usize, &AttentionQuery)| {
            let shape = if self.in_loops { self.pool_of_all_layers(kind, shape) } else { shape };
            let query = AttentionQuery { shape, ..query.clone() };
            let answer = self.attention.query(&query)?;
            if answer.score == 0 && self.in_loops {
                return Err(AssembleError::Pool { plugin: self.attention.plugin().to_owned(), reason: answer.reason });
            }
            Ok((query, answer))
        };
        self.queries.iter().enumerate().map(ask).collect()
    }

    /// The arguments of every program but the step buffer. They are the same for all buckets.
    pub fn arguments(&self, shape: StepShape) -> Result<Arguments, AssembleError> {
        let answers = self.answers(shape)?;
        let (mut pools, mut scales) = (Vec::new(), Vec::new());
        for (layer, kind) in self.pool_owners() {
            let answer = &answers[kind].1;
            let layers = if self.in_loops { self.layers_of(kind) } else { vec![layer] };
            scales.extend(answer.scales.map(|part| ScalePart { part: pools.len() + part, layers }));
            pools.extend(self.pool_types(kind, answer));
        }
        let slots = self.max_running + 1;
        let vocab = self.description.vocab;
        let part = self.parallel.vocab(vocab);
        let ty = |dtype, dims: &[u64]| TensorType::new(dtype, dims);
        Ok(Arguments {
            weights: self.weights.arguments().to_vec(),
            pools,
            scales,
            rows: RowArrays {
                last_tokens: ty(DType::I32, &[slots]),
                page_table: ty(DType::I32, &[shape.page_table]),
                token_counts: ty(DType::I32, &[slots, part]),
                bias: ty(DType::F32, &[slots, part]),
                allowed: ty(DType::U32, &[slots, vocab.div_ceil(32)]),
            },
        })
    }

    /// Puts the program of a bucket together.
    pub fn program(&self, shape: StepShape, rows: Rows) -> Result<Program, AssembleError> {
        let layout = StepLayout::new(shape, rows);
        let answers = self.answers(shape)?;
        let hidden = self.emit(ModelPart::Hidden { shape, capture: Vec::new() }, &answers)?;
        if self.in_loops {
            self.check_loops(&hidden)?;
        }
        let head = self.emit(ModelPart::Head { rows: layout.rows as u64 }, &answers)?;
        let emit_attention = |(kind, (query, _)): (usize, &(AttentionQuery, AttentionAnswer))| {
            Ok(self.attention.emit(&EmitAttention { kind, query: query.clone() })?.fragment)
        };
        let attention: Vec<Fragment> =
            answers.iter().enumerate().map(emit_attention).collect::<Result<_, AssembleError>>()?;
        let parts = Parts {
            assembler: self,
            layout: &layout,
            arguments: self.arguments(shape)?,
            answers: &answers,
            hidden: self.model.unit(&hidden),
            head: self.model.unit(&head),
            attention: attention.iter().map(|fragment| self.attention.unit(fragment)).collect(),
        };
        let text = parts.link()?;
        Ok(Program { text, layout })
    }

    fn emit(&self, part: ModelPart, answers: &[(AttentionQuery, AttentionAnswer)]) -> Result<Fragment, AssembleError> {
        let state = |(kind, asked): (usize, &(AttentionQuery, AttentionAnswer))| match self.in_loops {
            true => loops::state(self.pool_types(kind, &asked.1), asked),
            false => StateHandle { pool: asked.1.pool.clone(), context: asked.1.context.clone() },
        };
        let loops = || LayerLoops { weights: self.weights.own_parts(), pools: loops::own_pool_parts(answers) };
        let request = EmitModel {
            part,
            dtype: self.activations,
            weights: self.weights.handles().map(|(name, handle)| (name.to_owned(), handle)).collect(),
            state: answers.iter().enumerate().map(state).collect(),
            imports: HostImports { block_norms: true },
            loops: self.in_loops.then(loops),
        };
        Ok(self.model.emit(&request)?.fragment)
    }
}

/// The fragments of one program.
pub(super) struct Parts<'a> {
    pub assembler: &'a Assembler,
    pub layout: &'a StepLayout,
    arguments: Arguments,
    pub answers: &'a [(AttentionQuery, AttentionAnswer)],
    hidden: Unit<'a>,
    head: Unit<'a>,
    /// One for each kind of layers.
    pub attention: Vec<Unit<'a>>,
}

/// Values that exports may ask for, by their meaning.
pub(super) struct Scope<'f> {
    pub known: Vec<(Operand, Value<'f>)>,
}

impl<'f> Scope<'f> {
    pub fn set(&mut self, meaning: Operand, value: Value<'f>) {
        self.known.retain(|(known, _)| *known != meaning);
        self.known.push((meaning, value));
    }

    pub fn get(&self, meaning: &Operand) -> Option<Value<'f>> {
        self.known.iter().find(|(known, _)| known == meaning).map(|(_, value)| *value)
    }

    /// Calls an export with what it asks for, and takes its results in.
    pub fn call(&mut self, func: &'f Func<'f>, unit: Unit<'_>, name: &str) -> Result<(), LinkError> {
        let (export, function) = link::export(unit, name)?;
        let mut operands = Vec::with_capacity(export.arguments.len());
        for (meaning, expected) in export.arguments.iter().zip(&function.arguments) {
            let missing = || LinkError::Malformed {
                plugin: unit.plugin.to_owned(),
                message: format!("export '{name}' asks for {meaning:?}, which there is not"),
            };
            let value = self.get(meaning).ok_or_else(missing)?;
            let found = value.shape().tensor_type();
            if found != *expected {
                return Err(LinkError::Malformed {
                    plugin: unit.plugin.to_owned(),
                    message: format!("export '{name}' takes {meaning:?} as {expected}, which is {found}"),
                });
            }
            operands.push(value);
        }
        // A pool that goes in must come out: the old one is not to be taken for its successor.
        self.known.retain(|(known, _)| !(matches!(known, Operand::Pool { .. }) && export.arguments.contains(known)));
        let callee = Callee::external(&function.symbol, &function.arguments, &function.results);
        let results = func.call(&callee, &operands);
        for (meaning, value) in export.results.iter().zip(results) {
            self.set(meaning.clone(), value);
        }
        Ok(())
    }

    pub fn require(&self, meaning: Operand, from: Unit<'_>, export: &str) -> Result<Value<'f>, LinkError> {
        self.get(&meaning).ok_or_else(|| LinkError::Malformed {
            plugin: from.plugin.to_owned(),
            message: format!("export '{export}' does not give {meaning:?}"),
        })
    }
}

/// What a function gives, or nothing and the first reason kept.
fn kept<T>(results: Result<Vec<T>, LinkError>, failure: &mut Option<LinkError>) -> Vec<T> {
    results.unwrap_or_else(|error| {
        failure.get_or_insert(error);
        Vec::new()
    })
}

impl Parts<'_> {
    /// The whole module's text.
    fn link(&self) -> Result<String, AssembleError> {
        let builder = Builder::new("host");
        let mut failure = None;
        builder.main(|func| kept(self.main(func), &mut failure));
        let mut serving = Vec::new();
        for (kind, unit) in self.attention.iter().enumerate() {
            serving.push(match self.assembler.in_loops {
                true => {
                    let name = format!("attention_{kind}");
                    builder.function(&name, |f| kept(self.attention_in_pool(f, kind), &mut failure)).symbol
                }
                false => link::export(*unit, "attention")?.1.symbol.clone(),
            });
        }
        if let Some(error) = failure {
            return Err(error.into());
        }
        let main = builder.finish().map_err(|error| AssembleError::Build(error.to_string()))?;
        let mut units = vec![Unit { plugin: "host", fragment: &main, kernels: None }, self.hidden, self.head];
        units.extend(&self.attention);
        let native = Native { kinds: self.answers, pages_in_loops: self.pages_in_loops() };
        // A TPU and a GPU round f32 unless told otherwise, and whoever has weights in f32 asked for them. A CPU never does.
        let exact = if self.assembler.runs_kernels { Precision::Default } else { Precision::Highest };
        let functions = link::link(&units, &["main"], &mut |import| {
            imports::implement(import, &native, self.assembler.parallel, exact, &|kind| {
                serving.get(kind).cloned().unwrap_or_default()
            })
        })?;
        let kernel = functions.iter().flat_map(|function| &function.kernels).next();
        if let (Some(kernel), false) = (kernel, self.assembler.runs_kernels) {
            return Err(AssembleError::KernelOffCpu(kernel.clone()));
        }
        Ok(torus_hlo::module_text("step", self.assembler.parallel.tensor, &functions))
    }

    fn main<'f>(&self, func: &'f Func<'f>) -> Result<Vec<Value<'f>>, LinkError> {
        let mut scope = Scope { known: Vec::new() };
        let weights = self.assembler.weights.declare(func);
        let pools = self.declare_pools(func, &mut scope);
        let arrays = self.declare_rows(func, pools.len());
        let packed = Packed {
            layout: self.layout,
            words: func.argument(Shape::new(DType::I32, [(WORDS, self.layout.len() as u64)])),
        };
        let num_tokens = packed.scalar(Field::NumTokens);
        scope.known.extend(self.assembler.weights.values(func, &weights, num_tokens));
        let page_table = arrays.page_table.scatter(
            &[(ENTRIES, packed.get(Field::DeltaIndex, DELTAS))],
            packed.get(Field::DeltaPage, DELTAS),
            Scatter::set(),
        );
        let source = packed.get(Field::TokenSrc, TOKENS);
        let sampled_before = arrays.last_tokens.take(SLOTS, -source - 1);
        scope.set(Operand::Tokens, source.ge(0).select(source, sampled_before));
        self.declare_step(&packed, page_table, &mut scope);
        match self.assembler.in_loops {
            true => self.pass_inputs(&mut scope),
            false => (0..self.attention.len()).try_for_each(|kind| self.call_context(func, &mut scope, kind))?,
        }
        scope.call(func, self.hidden, "hidden")?;
        let hidden = scope.require(Operand::Hidden, self.hidden, "hidden")?.named(&[TOKENS, HIDDEN]);
        scope.set(Operand::Hidden, hidden.take(TOKENS, packed.get(Field::LogitRows, ROWS)));
        let num_rows = packed.scalar(Field::NumRows);
        self.assembler.weights.rows_parts().for_each(|part| scope.set(part, num_rows));
        scope.call(func, self.head, "head")?;
        let logits = scope.require(Operand::Logits, self.head, "head")?.named(&[ROWS, VOCAB]);
        let slots = packed.get(Field::Slots, ROWS);
        let assembler = self.assembler;
        let vocabulary =
            Vocabulary::new(assembler.description.vocab, assembler.parallel, assembler.weights.shard(&weights));
        let inputs = SamplingInputs {
            vocabulary,
            logits,
            slots,
            bias_slots: packed.get(Field::BiasSlots, ROWS),
            token_counts: arrays.token_counts,
            bias: arrays.bias,
            allowed: arrays.allowed,
            rows: packed.row_parameters(),
            flags: packed.scalar(Field::Flags),
        };
        let sampled = if assembler.own_kernels { sample_natively(&inputs, num_rows) } else { sample(&inputs) };
        let mut results = Vec::new();
        for meaning in &pools {
            results.push(scope.require(meaning.clone(), self.hidden, "hidden")?);
        }
        let ones = sampled.tokens.full_like(1);
        results.push(arrays.last_tokens.scatter(&[(SLOTS, slots)], sampled.tokens, Scatter::set()));
        results.push(page_table);
        let places = [(SLOTS, slots), (VOCAB, vocabulary.place(sampled.tokens))];
        results.push(arrays.token_counts.scatter(&places, ones, Scatter::add()));
        results.push(sampled.result);
        Ok(results)
    }

    /// Pools are donated: result number `i` is the pool part number `i`.
    fn declare_pools<'f>(&self, func: &'f Func<'f>, scope: &mut Scope<'f>) -> Vec<Operand> {
        let mut meanings = Vec::new();
        for (layer, kind) in self.assembler.pool_owners() {
            let types = self.assembler.pool_types(kind, &self.answers[kind].1);
            for (part, tensor) in types.iter().enumerate() {
                let value = func.donated_argument(Shape::opaque(tensor), meanings.len());
                scope.set(Operand::Pool { layer, part }, value);
                meanings.push(Operand::Pool { layer, part });
            }
        }
        if self.assembler.in_loops {
            self.number_layers(func, scope);
        }
        meanings
    }

    fn declare_rows<'f>(&self, func: &'f Func<'f>, pools: usize) -> ArrayValues<'f> {
        let rows = &self.arguments.rows;
        let named = |tensor: &TensorType, axes: &[Axis]| {
            let axes: Vec<_> = axes.iter().copied().zip(tensor.dims.iter().copied()).collect();
            Shape::new(tensor.dtype, axes)
        };
        ArrayValues {
            last_tokens: func.donated_argument(named(&rows.last_tokens, &[SLOTS]), pools),
            page_table: func.donated_argument(named(&rows.page_table, &[ENTRIES]), pools + 1),
            token_counts: func.donated_argument(named(&rows.token_counts, &[SLOTS, VOCAB]), pools + 2),
            bias: func.argument(named(&rows.bias, &[SLOTS, VOCAB])),
            allowed: func.argument(named(&rows.allowed, &[SLOTS, WORDS])),
        }
    }

    fn declare_step<'f>(&self, packed: &Packed<'f, '_>, page_table: Value<'f>, scope: &mut Scope<'f>) {
        let mut set = |input, value| scope.set(Operand::Step(input), value);
        set(StepInput::TokenSrc, packed.get(Field::TokenSrc, TOKENS));
        set(StepInput::Positions, packed.get(Field::Positions, TOKENS));
        set(StepInput::TokenSeq, packed.get(Field::TokenSeq, TOKENS));
        set(StepInput::KvSlot, packed.get(Field::KvSlot, TOKENS));
        set(StepInput::CuQLens, packed.get(Field::CuQLens, Axis("bounds")));
        set(StepInput::KvLens, packed.get(Field::KvLens, Axis("seqs")));
        set(StepInput::PageBegin, packed.get(Field::PageBegin, Axis("seqs")));
        set(StepInput::NumSeqs, packed.scalar(Field::NumSeqs));
        set(StepInput::PageTable, page_table);
        scope.set(Operand::Positions, packed.get(Field::Positions, TOKENS));
    }

    /// Makes the context of a kind of layers; its types are those that the backend has promised to the model.
    pub fn call_context<'f>(&self, func: &'f Func<'f>, scope: &mut Scope<'f>, kind: usize) -> Result<(), LinkError> {
        let (unit, (_, answer)) = (self.attention[kind], &self.answers[kind]);
        scope.call(func, unit, "context")?;
        for (part, promised) in answer.context.iter().enumerate() {
            let found = scope.require(Operand::Context { kind, part }, unit, "context")?.shape().tensor_type();
            if found != *promised {
                return Err(LinkError::Malformed {
                    plugin: unit.plugin.to_owned(),
                    message: format!("part {part} of its context is {found}, and it promised {promised}"),
                });
            }
        }
        Ok(())
    }
}

const WORDS: Axis = Axis("words");
const ENTRIES: Axis = Axis("entries");
const DELTAS: Axis = Axis("deltas");

struct ArrayValues<'f> {
    last_tokens: Value<'f>,
    page_table: Value<'f>,
    token_counts: Value<'f>,
    bias: Value<'f>,
    allowed: Value<'f>,
}

/// The step buffer inside of the program.
struct Packed<'f, 'a> {
    layout: &'a StepLayout,
    words: Value<'f>,
}

impl<'f> Packed<'f, '_> {
    fn get(&self, field: Field, axis: Axis) -> Value<'f> {
        let range = self.layout.range(field);
        self.words.slice(WORDS, range.start as u64..range.end as u64).rename(WORDS, axis)
    }

    fn scalar(&self, field: Field) -> Value<'f> {
        self.get(field, WORDS).squeeze(WORDS)
    }

    fn row_parameters(&self) -> RowParameters<'f> {
        let float = |field| self.get(field, ROWS).bitcast(DType::F32);
        let unsigned = |field| self.get(field, ROWS).bitcast(DType::U32);
        RowParameters {
            temperature: float(Field::Temperature),
            top_k: self.get(Field::TopK, ROWS),
            top_p: float(Field::TopP),
            min_p: float(Field::MinP),
            repetition_penalty: float(Field::RepetitionPenalty),
            frequency_penalty: float(Field::FrequencyPenalty),
            presence_penalty: float(Field::PresencePenalty),
            seed_low: unsigned(Field::SeedLow),
            seed_high: unsigned(Field::SeedHigh),
            position: unsigned(Field::SamplePosition),
            target: self.get(Field::Target, ROWS),
        }
    }
}
