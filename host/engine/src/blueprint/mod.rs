//! What an engine is, decided without a device and without weights: the plugins that serve the model, the shapes of its
//! weights, how much KV fits, which steps there are, and how their programs are put together.
//!
//! Loading begins with it, and so does whoever only wants to know: compiling for a device that is not there, or planning.
//! [`OpenedModel`] needs no more than a `config.json`; [`Blueprint`] in addition the shapes of the weights and the name of
//! a device. How much memory there is, [`MemoryConfig::budget`](crate::config::MemoryConfig::budget) says.
//!
//! Not here: clients, buffers, compilers, files of weights.

mod open;

use std::sync::Arc;

use serde_json::Value;
use torus_abi::{
    DType,
    attention::{AttentionQuery, Target},
    model::{ModelDescription, StateKind},
    step::StepShape,
};
use torus_plugins::Plugin;
use torus_weights::PlannedWeight;

pub(crate) use open::OpenedModel;

use crate::{
    config::{EngineConfig, KvCacheDtype, Platform},
    load::{StartError, invalid},
    memory,
    program::{Arguments, AssembleError, Assembler, Program, Rows, WeightMap},
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
        let page_bytes: u64 = description.layers.iter().map(|kind| answers[*kind].page_bytes).sum();
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
        let assembler = Assembler {
            model,
            attention: interface.clone(),
            queries: queries.iter().map(|query| AttentionQuery { shape: plan.shape(1, 1), ..query.clone() }).collect(),
            activations,
            weights: WeightMap::new(weights, &description.weights, parallel),
            max_running: plan.max_running as u64,
            runs_kernels,
            parallel,
            own_kernels: open::runs_own_kernels(config),
            description,
        };
        Ok(Self { plugin, attention, plan, assembler, page_bytes, weight_bytes })
    }

    /// Tokens whose KV the pool holds.
    pub fn kv_tokens(&self) -> usize {
        self.plan.kv_tokens()
    }

    /// What the weights take on the device.
    pub fn weight_bytes(&self) -> u64 {
        self.weight_bytes
    }

    /// What weights and KV take on the device.
    pub fn bytes(&self) -> u64 {
        self.weight_bytes + self.plan.pages * self.page_bytes
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

    /// A step in words, for messages.
    pub fn name(&self, step: StepKind) -> String {
        let (model, attention) = (self.plugin.name(), self.attention.name());
        format!("a step of {} tokens with plugins '{model}' and '{attention}'", step.tokens)
    }
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
        KvCacheDtype::Int8 => DType::I8,
    };
    let query = |kind: &StateKind| {
        let StateKind::Paged(spec) = kind;
        AttentionQuery { spec: spec.clone(), dtype, kv_dtype, shape, target: target.clone() }
    };
    description.kinds.iter().map(query).collect()
}
