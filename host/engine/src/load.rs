//! From a configuration to an engine that can run: client, plugins, weights, memory, programs.

use std::{io, path::PathBuf, sync::Arc, time::Instant};

use torus_abi::{TensorType, step::StepShape};
use torus_pjrt::{Buffer, LoadedExecutable, PjrtError};
use torus_plugins::{CallError, RegistryError};
use torus_weights::{Checkpoint, LoadPlan, Progress, WeightsError};

use crate::{
    api::{ModelInfo, Readiness},
    blueprint::{Blueprint, OpenedModel, StepKind},
    budget::{Reservation, Shortage},
    compile::{CacheKey, CompileError, Compiler},
    config::{EngineConfig, Platform},
    device::{DeviceState, Loaders, StepDevice, Target},
    handle::{Shared, lock},
    kernels::{register_host_kernels, register_kernels},
    kv_scales,
    program::{Arguments, AssembleError, Rows, StepBytes, StepLayout, WeightMap},
    sink::{self, DeviceSink},
    weight_cache::{self, Keeping},
};

/// Why an engine could not be started.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error(transparent)]
    Device(#[from] PjrtError),
    #[error("the device plugin {path} cannot be read: {source}", path = .path.display())]
    Unreadable { path: PathBuf, source: io::Error },
    #[error(transparent)]
    Registry(#[from] RegistryError),
    #[error(transparent)]
    Plugin(#[from] CallError),
    #[error(transparent)]
    Weights(#[from] WeightsError),
    #[error(transparent)]
    Assemble(#[from] AssembleError),
    #[error(transparent)]
    Compile(#[from] CompileError),
    #[error("{field}: {message}")]
    Config { field: &'static str, message: String },
    #[error(
        "the model does not fit beside what is loaded: {0}; unload another, lower --max-total-tokens or --mem-fraction-static, \
         or replace one with swap mode 'drain'"
    )]
    Memory(#[from] Shortage),
    /// Its last handle was dropped meanwhile.
    #[error("loading was cancelled")]
    Cancelled,
}

pub(crate) fn invalid(field: &'static str, message: impl Into<String>) -> StartError {
    StartError::Config { field, message: message.into() }
}

/// One compiled bucket.
pub(crate) struct Bucket {
    pub layout: StepLayout,
    /// `None` on the null device.
    pub executable: Option<Arc<LoadedExecutable>>,
}

impl Bucket {
    /// Tokens it computes, padding included.
    pub fn tokens(&self) -> usize {
        self.layout.shape.tokens as usize
    }
}

/// Everything the step loop runs on.
pub(crate) struct Loaded {
    pub state: StepDevice,
    /// By ascending number of tokens.
    pub buckets: Vec<Bucket>,
    /// The program that gives logprobs of prompt tokens.
    pub prompt_logprobs: Bucket,
    pub shape: StepShape,
    pub max_running: usize,
    pub token_budget: usize,
    pub context_length: usize,
    pub vocab: usize,
    pub end_tokens: Vec<u32>,
    /// Table entries of one slot.
    pub pages_per_slot: usize,
    /// For each slot the pages of its sequence, as the device's table has them or will with the next step.
    pub pages: Vec<Vec<u32>>,
    /// Entries of the table that the next step buffer brings.
    pub pending_pages: Vec<(u32, i32)>,
    /// The step buffer, whose memory every step uses again.
    pub buffer: StepBytes,
    /// Writes the packed weights to disk.
    #[expect(dead_code, reason = "held until the engine ends")]
    pub keeping: Option<Keeping>,
    /// Given back after everything above is gone: fields are dropped in order.
    #[expect(dead_code, reason = "held until the engine ends")]
    pub reservation: Option<Reservation>,
}

impl Loaded {
    /// The program of a step: of a bucket, or the one for logprobs of prompt tokens.
    pub fn program(&self, rows: Rows, bucket: usize) -> &Bucket {
        match rows {
            Rows::All => &self.prompt_logprobs,
            Rows::Sampled => &self.buckets[bucket],
        }
    }
}

/// Loads everything, telling `shared` how far it is.
pub(crate) fn load(config: &EngineConfig, shared: &Shared) -> Result<Loaded, StartError> {
    let target = config.device.open()?;
    target.memory_bytes().into_iter().for_each(|bytes| config.memory.budget.learn(bytes));
    let checkpoint = Checkpoint::open(&config.model)?;
    let opened = OpenedModel::of_checkpoint(config, &checkpoint)?;
    let shards = opened.load_plans(config, &checkpoint)?;
    let weights = shards.first().map_or(&[][..], LoadPlan::weights);
    let blueprint = Blueprint::new(config, opened, weights, &target.description())?;
    let presets = kv_scales::presets(&blueprint, &checkpoint)?;
    let bytes = blueprint.bytes() * config.device.shards_per_memory();
    let at_once = (config.memory.released_bytes == 0).then(|| config.memory.budget.reserve(bytes)).transpose()?;
    if config.device.platform() == Platform::Cpu {
        config.device.cpu_threads().into_iter().for_each(torus_plugins::limit_kernel_threads);
        register_host_kernels(&target.plugin)?;
        for plugin in [&blueprint.plugin, &blueprint.attention] {
            register_kernels(&target.plugin, plugin)?;
        }
    }
    let key = CacheKey::of_device(config, target.kind())?;
    let options = target.compile_options(config.device.platform());
    let compiler = Compiler::new(target.client.clone(), shared, config.cache_dir.as_deref(), key, options);
    let programs = compile(config, &compiler, &blueprint, shared)?;
    let reservation = at_once.map_or_else(|| wait_for_memory(config, bytes, shared), Ok)?;
    let Blueprint { plugin, attention, plan, assembler, .. } = blueprint;
    let (weights, keeping) = load_weights(config, &shards, &assembler.weights, &target, shared)?;
    let arguments = assembler.arguments(plan.shape(1, 1))?;
    let state = DeviceState::new(target.clone(), arguments, weights, presets, programs.loaders)?;
    let end_tokens = config.end_token_ids.clone();
    *lock(&shared.info) = Some(Arc::new(ModelInfo {
        architecture: assembler.description.architecture.clone(),
        vocab_size: assembler.description.vocab as usize,
        context_length: plan.context_length,
        max_total_tokens: plan.kv_tokens(),
        max_running_requests: plan.max_running,
        page_size: plan.page_size as usize,
        dtype: assembler.activations.to_string(),
        weight_bytes: assembler.weights.bytes_per_step(),
        attention_backend: attention.name().to_owned(),
        model_plugin: format!("{} {}", plugin.name(), plugin.manifest.version),
        reserved_bytes: reservation.bytes(),
        device: target.kind().to_owned(),
        end_token_ids: end_tokens.clone(),
    }));
    Ok(Loaded {
        state: StepDevice::Pjrt(Box::new(state)),
        buckets: programs.buckets,
        prompt_logprobs: programs.prompt_logprobs,
        shape: plan.shape(1, 1),
        max_running: plan.max_running,
        token_budget: plan.token_budget,
        context_length: plan.context_length,
        vocab: assembler.description.vocab as usize,
        end_tokens,
        pages_per_slot: plan.pages_per_slot,
        pages: vec![Vec::new(); plan.max_running],
        pending_pages: Vec::new(),
        buffer: StepBytes::default(),
        keeping,
        reservation: Some(reservation),
    })
}

/// Waits until the engine that this one replaces has released its memory.
fn wait_for_memory(config: &EngineConfig, bytes: u64, shared: &Shared) -> Result<Reservation, StartError> {
    shared.set_readiness(Readiness::WaitingForMemory { bytes });
    let reservation = config.memory.budget.wait_for(bytes, || shared.is_shutting_down());
    reservation.ok_or(StartError::Cancelled)
}

/// Passes progress on to the terminal and to `/health`.
struct LoadProgress<'a> {
    console: Option<torus_weights::ConsoleProgress>,
    shared: &'a Shared,
}

impl Progress for LoadProgress<'_> {
    fn begin(&self, what: &str, total_bytes: u64) {
        self.shared.set_readiness(Readiness::Loading { done: 0, total: total_bytes });
        if let Some(console) = &self.console {
            console.begin(what, total_bytes);
        }
    }

    fn advance(&self, bytes: u64) {
        if let Readiness::Loading { done, .. } = &mut *lock(&self.shared.readiness) {
            *done += bytes;
        }
        if let Some(console) = &self.console {
            console.advance(bytes);
        }
    }

    fn finish(&self) {
        if let Some(console) = &self.console {
            console.finish();
        }
    }
}

/// Progress over the shards of a model, whose beginnings and ends are not shown.
struct ShardProgress<'a>(&'a LoadProgress<'a>);

impl Progress for ShardProgress<'_> {
    fn begin(&self, _: &str, _: u64) {}

    fn advance(&self, bytes: u64) {
        self.0.advance(bytes);
    }

    fn finish(&self) {}
}

/// Puts each shard onto its device; one after the other, so that host memory holds no more than for a whole model. Packed
/// weights come from the cache, or are then written to the cache beside everything else.
fn load_weights(
    config: &EngineConfig,
    shards: &[LoadPlan<'_>],
    map: &WeightMap,
    target: &Target,
    shared: &Shared,
) -> Result<(Vec<Vec<Buffer>>, Option<Keeping>), StartError> {
    let mut entry = match shards {
        [whole] => map.arena().and_then(|_| weight_cache::entry(config.weight_cache.as_ref(), whole)),
        _ => None,
    };
    let (started, bytes) = (Instant::now(), shards.iter().map(LoadPlan::bytes).sum());
    if let Some(found) = entry.as_ref().and_then(|entry| entry.open()) {
        tracing::info!(bytes, "packed weights are mapped from the cache");
        return Ok((vec![sink::arguments(target, map, found.matrices, &found.vectors)?], None));
    }
    let console = config.progress.then(torus_weights::ConsoleProgress::new);
    let progress = LoadProgress { console, shared };
    progress.begin("loading weights", bytes);
    let mut load = |(device, plan): (usize, &LoadPlan<'_>)| {
        let mut sink = DeviceSink::new(target, device, shared, map)?;
        plan.run(&mut sink, &ShardProgress(&progress))?;
        sink.finish(entry.take())
    };
    let loaded = shards.iter().enumerate().map(&mut load).collect::<Result<Vec<_>, StartError>>();
    progress.finish();
    let (weights, keeping): (Vec<_>, Vec<_>) = loaded?.into_iter().unzip();
    let (count, seconds) = (shards.first().map_or(0, |plan| plan.weights().len()), started.elapsed().as_secs_f32());
    tracing::info!(weights = count, bytes, devices = shards.len(), seconds, "weights loaded");
    Ok((weights, keeping.into_iter().flatten().next()))
}

struct Programs {
    loaders: Loaders,
    buckets: Vec<Bucket>,
    prompt_logprobs: Bucket,
}

fn compile(
    config: &EngineConfig,
    compiler: &Compiler<'_>,
    blueprint: &Blueprint,
    shared: &Shared,
) -> Result<Programs, StartError> {
    let wanted = blueprint.steps();
    let total = wanted.len();
    shared.set_readiness(Readiness::Compiling { done: 0, total });
    let bar = config.progress.then(|| progress_bar(total));
    let arguments = blueprint.arguments()?;
    // The largest take longest: they go first, so that the last ones to finish are short.
    let order: Vec<_> = wanted.iter().rev().copied().collect();
    let make = |step: &StepKind| -> Result<Bucket, StartError> {
        if shared.is_shutting_down() {
            return Err(StartError::Cancelled);
        }
        let program = blueprint.program(*step)?;
        let name = blueprint.name(*step);
        let executable = compiler.compile(&name, &program.text)?;
        check_in_place(&name, &executable, &arguments)?;
        Ok(Bucket { layout: program.layout, executable: Some(Arc::new(executable)) })
    };
    let done = |done| {
        shared.set_readiness(Readiness::Compiling { done, total });
        if let Some(bar) = &bar {
            bar.set_position(done as u64);
        }
    };
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let mut buckets = Compiler::all(&order, threads, make, done)?;
    buckets.reverse();
    if let Some(bar) = bar {
        bar.finish_and_clear();
    }
    let prompt_logprobs = buckets.pop().ok_or_else(|| invalid("chunked_prefill_size", "there are no buckets"))?;
    let [initial_state, load_counts, load_bias, load_pages] = blueprint.loaders()?;
    let load = |(name, text): (&str, String)| compiler.compile(name, &text);
    let loaders = Loaders {
        initial_state: load(initial_state)?,
        load_counts: load(load_counts)?,
        load_bias: load(load_bias)?,
        load_pages: load(load_pages)?,
    };
    Ok(Programs { loaders, buckets, prompt_logprobs })
}

/// Fails if a program would copy pages, or a whole weight, in each step: it updates the donated pools where they are, and its
/// temporaries are smaller than they.
fn check_in_place(name: &str, program: &LoadedExecutable, arguments: &Arguments) -> Result<(), StartError> {
    // Not every device plugin tells.
    let Ok(stats) = program.memory_stats() else { return Ok(()) };
    let bytes = |tensors: &[TensorType]| tensors.iter().filter_map(TensorType::bytes).sum::<u64>();
    let pools = bytes(&arguments.pools);
    let aliased = u64::try_from(stats.alias_bytes).unwrap_or(0);
    tracing::debug!(name, aliased, temporaries = stats.temp_bytes, "memory of a step");
    if aliased >= pools {
        return Ok(());
    }
    let message = format!("{name} copies KV pages: it updates {aliased} of {pools} bytes in place");
    Err(invalid("attention_backend", message))
}

fn progress_bar(total: usize) -> indicatif::ProgressBar {
    let style = indicatif::ProgressStyle::with_template("compiling {bar:40} {pos}/{len} programs, {elapsed}");
    let bar = indicatif::ProgressBar::new(total as u64);
    // The template is a constant; a default style would do as well.
    if let Ok(style) = style { bar.with_style(style) } else { bar }
}
