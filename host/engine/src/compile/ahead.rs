//! Compiling all programs of an engine for a device that need not be there.

use std::time::Instant;

use torus_pjrt::{CompileOptions, MemoryStats, Topology, Traffic};

use super::{CacheKey, CompileError, Compiler, Kept};
use crate::{
    blueprint::{Blueprint, StepKind},
    config::EngineConfig,
    device::compile_options,
    load::StartError,
};

/// Compiles an engine's programs, and keeps them where an engine on such a device will look for them.
///
/// It looks under the same key if it has the same compiler (the file of the device plugin), the same flags in the
/// environment, and programs of the same text: the same options, and a pool of the same size. The size follows from the
/// memory that the device turns out to have, unless the number of tokens is given.
pub struct AheadCompiler<'a> {
    blueprint: &'a Blueprint,
    topology: &'a Topology,
    options: CompileOptions,
    kept: Kept,
    /// Compile also what is in the cache.
    pub again: bool,
}

/// A program to compile.
#[derive(Clone, Debug)]
pub struct AheadProgram {
    /// What it does, in words.
    pub name: String,
    /// The step that it computes; `None` = it sets state between steps.
    pub step: Option<StepKind>,
    /// Of a program beside the steps; the texts of steps are long, and made when they are needed.
    text: Option<String>,
}

/// What became of a program.
#[derive(Clone, Debug)]
pub struct CompiledAhead {
    pub program: AheadProgram,
    /// `None` = it was in the cache already, and only a device that is there can read it.
    pub compiled: Option<Compiled>,
    /// Size of what the cache holds; 0 = nothing.
    pub stored_bytes: u64,
}

/// What is known of a program that was just compiled.
#[derive(Clone, Debug)]
pub struct Compiled {
    pub seconds: f64,
    pub memory: MemoryStats,
    /// The compiler's estimate of arithmetic; a kernel counts as it says.
    pub flops: Option<f64>,
    /// The compiler's estimate of bytes read and written, in whatever memory; a kernel counts as it says.
    pub bytes_accessed: Option<f64>,
    /// What moves through HBM, kernels left out; `None` = the compiler does not show its program.
    pub traffic: Option<Traffic>,
}

impl<'a> AheadCompiler<'a> {
    /// # Errors
    /// If the device plugin's file cannot be read.
    pub fn new(config: &EngineConfig, blueprint: &'a Blueprint, topology: &'a Topology) -> Result<Self, StartError> {
        let devices = topology.devices();
        let kind = devices.first().map(|device| device.kind.as_str()).unwrap_or_default();
        let kept = Kept::new(config.cache_dir.as_deref(), CacheKey::of_device(config, kind)?);
        let count = config.device.parallel().tensor as usize;
        let ids = devices.iter().take(count).map(|device| i64::from(device.id)).collect();
        let options = compile_options(config.device.platform(), ids);
        Ok(Self { blueprint, topology, options, kept, again: false })
    }

    /// The programs that an engine runs, the largest steps first: they take longest.
    ///
    /// # Errors
    /// If the plugins' fragments do not fit together.
    pub fn programs(&self) -> Result<Vec<AheadProgram>, StartError> {
        let name = |step| self.blueprint.name(step);
        let steps = self.blueprint.steps().into_iter().rev();
        let steps = steps.map(|step| AheadProgram { name: name(step), step: Some(step), text: None });
        let loader = |(name, text): (&str, _)| AheadProgram { name: name.to_owned(), step: None, text: Some(text) };
        Ok(steps.chain(self.blueprint.loaders()?.into_iter().map(loader)).collect())
    }

    /// Compiles programs on so many threads, and gives them in order. `done` is told how many are.
    ///
    /// # Errors
    /// Of the compiler, with the program's name.
    pub fn compile_all(
        &self,
        programs: &[AheadProgram],
        threads: usize,
        done: impl Fn(usize) + Sync,
    ) -> Result<Vec<CompiledAhead>, StartError> {
        Compiler::all(programs, threads, |program| self.compile(program), done)
    }

    fn compile(&self, program: &AheadProgram) -> Result<CompiledAhead, StartError> {
        let text = match (&program.text, program.step) {
            (Some(text), _) => text.clone(),
            (None, Some(step)) => self.blueprint.text(step)?,
            (None, None) => String::new(),
        };
        let key = self.kept.key(&self.options, &text);
        let stored = || self.kept.cache.as_ref().and_then(|cache| cache.stored_bytes(&key));
        if let Some(stored_bytes) = stored().filter(|_| !self.again) {
            return Ok(CompiledAhead { program: program.clone(), compiled: None, stored_bytes });
        }
        let started = Instant::now();
        let compiled = self.topology.compile(&text, &self.options);
        let executable = compiled.map_err(|source| CompileError { name: program.name.clone(), source })?;
        let seconds = started.elapsed().as_secs_f64();
        self.kept.store(&program.name, &key, || executable.serialize());
        let costs = executable.cost_analysis().unwrap_or_default();
        // Below 0 where the compiler cannot tell.
        let cost = |name: &str| costs.get(name).and_then(|value| value.as_float()).filter(|cost| *cost >= 0.0);
        let compiled = Compiled {
            seconds,
            memory: executable.memory_stats()?,
            flops: cost("flops"),
            bytes_accessed: cost("bytes accessed"),
            traffic: executable.traffic().inspect_err(|error| tracing::debug!(%error, "no optimized program")).ok(),
        };
        Ok(CompiledAhead { program: program.clone(), compiled: Some(compiled), stored_bytes: stored().unwrap_or(0) })
    }
}
