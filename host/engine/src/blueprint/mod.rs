//! What an engine is, decided without a device and without weights: the plugins that serve the model, the shapes of its
//! weights, how much KV fits, which steps there are, and how their programs are put together.
//!
//! Loading begins with it, and so does whoever only wants to know: compiling for a device that is not there, or planning.
//! [`OpenedModel`] needs no more than a `config.json`; [`Blueprint`] in addition the shapes of the weights and the name of
//! a device. How much memory there is, [`MemoryConfig::budget`](crate::config::MemoryConfig::budget) says.
//!
//! Not here: clients, buffers, compilers, files of weights.

mod costs;
mod open;

use std::sync::Arc;

use serde_json::Value;
use torus_abi::{
    DType, TensorType,
    attention::{AttentionAnswer, AttentionQuery, Target, scales_type},
    model::{ModelDescription, StateKind},
    step::StepShape,
};
use torus_plugins::Plugin;
use torus_weights::{Checkpoint, PlannedWeight};

pub(crate) use open::OpenedModel;

use crate::{
    config::{CompileMode, EngineConfig, KvCacheDtype, Platform},
    load::{StartError, invalid},
    memory,
    program::{Arguments, AssembleError, Assembler, Program, Rows, WeightMap, initial_state, load_pages, load_row},
    roofline::{Padded, Shard},
};

/// One of the programs that an engine runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StepKind {
    /// Tokens it computes, padding included.
    pub tokens: usize,
    pub rows: Rows,
}

/// What an engine is made of; see the module.
pub struct Blueprint {
    /// Serves the model.
    pub(crate) plugin: Arc<Plugin>,
    pub(crate) attention: Arc<Plugin>,
    pub(crate) plan: memory::Plan,
    pub(crate) assembler: Assembler,
    /// Of one page of KV, over all layers.
    page_bytes: u64,
    weight_bytes: u64,
    shard: Shard,
}

impl Blueprint {
    /// From the `config.json` of a model whose weights need not be here.
    ///
    /// # Errors
    /// If no plugin serves the model, if it does not fit into the memory, or if weights are packed for the device (a CPU with
    /// native kernels): how, only a checkpoint says.
    pub fn of_config(config: &EngineConfig, hf_config: Value, device: &Target) -> Result<Self, StartError> {
        let opened = OpenedModel::of_config(config, hf_config)?;
        let weights = opened.weight_shapes(config)?;
        Self::new(config, opened, &weights, device)
    }

    /// From a checkpoint, of which no weight is read: a GGUF file has no `config.json`.
    ///
    /// # Errors
    /// If no plugin serves the model, if it does not fit into the memory, or if the checkpoint lacks a tensor.
    pub fn of_checkpoint(config: &EngineConfig, checkpoint: &Checkpoint, device: &Target) -> Result<Self, StartError> {
        let opened = OpenedModel::of_checkpoint(config, checkpoint)?;
        let shards = opened.load_plans(config, checkpoint)?;
        // All devices hold weights of the same shapes.
        let weights = shards.first().map_or(&[][..], |shard| shard.weights());
        Self::new(config, opened, weights, device)
    }

    /// `weights` are those of the model's description, in its order.
    pub(crate) fn new(
        config: &EngineConfig,
        opened: OpenedModel,
        weights: &[PlannedWeight],
        device: &Target,
    ) -> Result<Self, StartError> {
        let OpenedModel { plugin, model, description, activations, .. } = opened;
        let weight_bytes = weights.iter().map(|weight| weight.bytes() as u64).sum();
        let plan = memory::plan(config, &description)?;
        let queries = attention_queries(config, &description, activations, plan.shape(1, 1), device);
        let (attention, answers) = config.plugins.attention(config.attention_backend.as_deref(), &queries)?;
        check_scales(attention.name(), &answers)?;
        let page_bytes: u64 = description.layers.iter().map(|kind| answers[*kind].page_bytes).sum();
        let shard = costs::shard(&description, weights, &answers, plan.page_size, activations);
        let plan = plan.with_pages(config, page_bytes, weight_bytes)?;
        tracing::info!(
            attention = attention.name(),
            %activations,
            kv_tokens = plan.kv_tokens(),
            kv_bytes = plan.pages * page_bytes,
            max_running = plan.max_running,
            "memory is planned"
        );
        let interface = attention.attention().ok_or_else(|| invalid("attention_backend", "it offers no attention"))?;
        let runs_kernels = config.device.platform() == Platform::Cpu;
        let parallel = description.parallel;
        if runs_kernels && config.cpu_kernels && parallel.tensor > 1 {
            tracing::info!(
                "the CPU's native kernels serve whole models only: XLA's code computes the shards of this one"
            );
        }
        let in_loops = config.compile_mode == CompileMode::Fast;
        let assembler = Assembler {
            model,
            attention: interface.clone(),
            queries: queries.iter().map(|query| AttentionQuery { shape: plan.shape(1, 1), ..query.clone() }).collect(),
            activations,
            weights: WeightMap::new(weights, &description.weights, parallel, in_loops),
            max_running: plan.max_running as u64,
            runs_kernels,
            in_loops,
            parallel,
            own_kernels: open::runs_own_kernels(config),
            description,
        };
        Ok(Self { plugin, attention, plan, assembler, page_bytes, weight_bytes, shard })
    }

    /// Names of the plugins that serve the model and its attention.
    pub fn plugins(&self) -> [&str; 2] {
        [self.plugin.name(), self.attention.name()]
    }

    pub fn description(&self) -> &ModelDescription {
        &self.assembler.description
    }

    /// What caches hold; `None` = no layer has one.
    pub(crate) fn kv_dtype(&self) -> Option<DType> {
        self.assembler.queries.first().map(|query| query.kv_dtype)
    }

    /// Requests that run at once.
    pub fn max_running(&self) -> usize {
        self.plan.max_running
    }

    /// Longest prompt plus output.
    pub fn context_length(&self) -> usize {
        self.plan.context_length
    }

    /// Tokens whose KV the pool holds.
    pub fn kv_tokens(&self) -> usize {
        self.plan.kv_tokens()
    }

    /// What the weights take on the device.
    pub fn weight_bytes(&self) -> u64 {
        self.weight_bytes
    }

    /// Bytes of the KV pools of all layers.
    pub fn pool_bytes(&self) -> u64 {
        self.plan.pages * self.page_bytes
    }

    /// What weights and KV take on the device.
    pub fn bytes(&self) -> u64 {
        self.weight_bytes + self.pool_bytes()
    }

    /// Bytes of all that a step updates in place: the pools, and the rows of each slot that a step changes.
    ///
    /// # Errors
    /// If the attention plugin answers no longer.
    pub fn donated_bytes(&self) -> Result<u64, AssembleError> {
        let arguments = self.arguments()?;
        let rows = &arguments.rows;
        let donated = arguments.pools.iter().chain([&rows.last_tokens, &rows.page_table, &rows.token_counts]);
        Ok(donated.filter_map(TensorType::bytes).sum())
    }

    /// What costs of steps are made of.
    pub fn shard(&self) -> &Shard {
        &self.shard
    }

    /// What the program computes that serves a step of so many tokens: the smallest that they fit into.
    pub fn padded(&self, tokens: usize) -> Option<Padded> {
        let tokens = self.plan.buckets().into_iter().find(|bucket| *bucket >= tokens)?;
        Some(Padded { tokens: tokens as u64, rows: self.plan.shape(tokens, self.plan.max_running).seqs })
    }

    /// All step programs: the buckets by ascending number of tokens, then the one that gives logprobs of prompt tokens.
    pub fn steps(&self) -> Vec<StepKind> {
        let buckets = self.plan.buckets().into_iter().map(|tokens| StepKind { tokens, rows: Rows::Sampled });
        let prompt_logprobs = StepKind { tokens: self.plan.prompt_logprob_tokens(), rows: Rows::All };
        buckets.chain([prompt_logprobs]).collect()
    }

    /// The StableHLO text of a step's program.
    ///
    /// # Errors
    /// If the plugins' fragments do not fit together.
    pub fn text(&self, step: StepKind) -> Result<String, AssembleError> {
        Ok(self.program(step)?.text)
    }

    /// The arguments of every step but its buffer.
    pub(crate) fn arguments(&self) -> Result<Arguments, AssembleError> {
        self.assembler.arguments(self.plan.shape(1, 1))
    }

    pub(crate) fn program(&self, step: StepKind) -> Result<Program, AssembleError> {
        self.assembler.program(self.plan.shape(step.tokens, self.plan.max_running), step.rows)
    }

    /// The programs beside the steps, with what each of them sets: everything, the token counts and the biases of a slot,
    /// entries of the page table.
    pub(crate) fn loaders(&self) -> Result<[(&'static str, String); 4], AssembleError> {
        let (arguments, parallel) = (self.arguments()?, self.assembler.parallel);
        Ok([
            ("the initial state", initial_state(&arguments, !self.assembler.runs_kernels, parallel)?),
            ("the token counts of a slot", load_row(&arguments.rows.token_counts, parallel)?),
            ("the biases of a slot", load_row(&arguments.rows.bias, parallel)?),
            ("the page table", load_pages(&arguments.rows.page_table, parallel)?),
        ])
    }

    /// A step in words, for messages.
    pub fn name(&self, step: StepKind) -> String {
        let (model, attention) = (self.plugin.name(), self.attention.name());
        format!("a step of {} tokens with plugins '{model}' and '{attention}'", step.tokens)
    }
}

/// The host writes where a plugin says.
fn check_scales(plugin: &str, answers: &[AttentionAnswer]) -> Result<(), StartError> {
    let is_wrong =
        |answer: &&AttentionAnswer| answer.scales.is_some_and(|part| answer.pool.get(part) != Some(&scales_type()));
    answers.iter().find(is_wrong).map_or(Ok(()), |answer| {
        let (part, pool, scales) = (answer.scales.unwrap_or_default(), &answer.pool, scales_type());
        let message =
            format!("plugin '{plugin}': part {part} of its pool {pool:?} is to hold scales, which are {scales}");
        Err(invalid("attention_backend", message))
    })
}

/// What to ask an attention plugin: one query for each kind of layers.
fn attention_queries(
    config: &EngineConfig,
    description: &ModelDescription,
    dtype: DType,
    shape: StepShape,
    target: &Target,
) -> Vec<AttentionQuery> {
    let kv_dtype = match config.kv_cache_dtype {
        KvCacheDtype::Auto => dtype,
        KvCacheDtype::Float32 => DType::F32,
        KvCacheDtype::Bfloat16 => DType::Bf16,
        KvCacheDtype::Fp8E4m3 => DType::F8E4M3,
        KvCacheDtype::Int8 => DType::I8,
    };
    let query = |kind: &StateKind| {
        let StateKind::Paged(spec) = kind;
        AttentionQuery { spec: spec.clone(), dtype, kv_dtype, shape, target: target.clone(), sets_scales: true }
    };
    description.kinds.iter().map(query).collect()
}
