//! From options to an engine.

use std::{path::PathBuf, sync::Arc};

use anyhow::ensure;
use torus_engine::{
    MemoryBudget,
    api::Engine,
    config::{
        CompileMode, DeviceConfig, DtypeChoice, EngineConfig, KvCacheDtype, MemoryConfig, Platform, ScheduleConfig,
        WeightCacheConfig,
    },
};
use torus_plugins::Registry;
use torus_weights::ResolvedModel;

use crate::{
    args::{self, ChunkSize, Device, Dtype, EngineArgs, Policy, Quantization, ScheduleArgs, Switch},
    cache_dir::CacheDir,
    limits::Limits,
    model::Model,
    tpu,
};

/// What all engines of this process share.
pub struct Machine {
    cache: CacheDir,
    device: torus_engine::Device,
    budget: MemoryBudget,
}

/// What of the machine's memory an engine gets.
#[derive(Clone, Copy, Debug, Default)]
pub struct MemoryClaim {
    /// `None` = what it needs of what is free.
    pub share: Option<f64>,
    /// What another engine is going to release for it.
    pub released_bytes: u64,
}

impl Machine {
    pub fn new(args: &EngineArgs, limits: &Limits) -> anyhow::Result<Self> {
        let tp_size = args.parallel.tp_size;
        let (args, cache) = (&args.device, CacheDir::new(args.device.cache_dir.as_deref())?);
        torus_plugins::pin_kernel_threads(args.pin_threads == Switch::On);
        let pjrt_plugin = cache.pjrt_plugin(args.device, args.pjrt_plugin.as_deref())?;
        if args.device == Device::Tpu {
            let found = tpu::probe(Device::Tpu, &pjrt_plugin)?;
            let count = found.kinds.len();
            ensure!(tp_size as usize <= count, "--tp-size {tp_size}: there are {count} devices; give at most as many");
            tracing::info!(
                kind = found.kinds.first(),
                devices = count,
                memory_bytes = found.memory_bytes,
                "the TPU answers"
            );
        }
        let config = DeviceConfig {
            platform: args.device.platform(),
            pjrt_plugin,
            cpu_threads: Some(args.threads.unwrap_or_else(|| limits.cpus())),
            tensor_parallel: tp_size,
        };
        // Other devices have memory of their own, and say how much.
        let budget = MemoryBudget::new(limits.memory_bytes().filter(|_| args.device == Device::Cpu));
        let device = torus_engine::Device::new(config);
        device.prepare();
        Ok(Self { cache, device, budget })
    }

    /// A TPU of so much memory that need not be there: programs are compiled for it with `compiler`, or not at all.
    pub fn of_absent_tpu(args: &EngineArgs, cache: CacheDir, compiler: Option<PathBuf>, memory_bytes: u64) -> Self {
        let (pjrt_plugin, tensor_parallel) = (compiler.unwrap_or_default(), args.parallel.tp_size);
        let config = DeviceConfig { platform: Platform::Tpu, pjrt_plugin, cpu_threads: None, tensor_parallel };
        let (device, budget) = (torus_engine::Device::new(config), MemoryBudget::new(Some(memory_bytes)));
        Self { cache, device, budget }
    }

    pub fn cache(&self) -> &CacheDir {
        &self.cache
    }

    /// Starts an engine. It returns at once; the engine loads and compiles in threads of its own.
    pub fn start(
        &self,
        args: &EngineArgs,
        plugins: Registry,
        claim: MemoryClaim,
        name: String,
        model: &Model,
    ) -> anyhow::Result<Arc<dyn Engine>> {
        let config = self.config(args, plugins, claim, name, model.files.clone())?;
        let config = EngineConfig { end_token_ids: model.end_token_ids.clone(), ..config };
        Ok(Arc::new(torus_engine::start(config)?))
    }

    /// An engine of these options, which knows of no end tokens.
    pub fn config(
        &self,
        args: &EngineArgs,
        plugins: Registry,
        claim: MemoryClaim,
        name: String,
        model: ResolvedModel,
    ) -> anyhow::Result<EngineConfig> {
        let attention_backend = Some(args.plugins.attention_backend.clone()).filter(|name| name != "auto");
        if let Some(name) = &attention_backend {
            check_attention(name, &plugins)?;
        }
        Ok(EngineConfig {
            name,
            model,
            plugins,
            end_token_ids: Vec::new(),
            device: self.device.clone(),
            dtype: match args.model.dtype {
                // Refused when the command line was checked.
                Dtype::Auto | Dtype::Float16 => DtypeChoice::Auto,
                Dtype::Float32 => DtypeChoice::Float32,
                Dtype::Bfloat16 => DtypeChoice::Bfloat16,
            },
            kv_cache_dtype: match args.model.kv_cache_dtype {
                args::KvCacheDtype::Auto => KvCacheDtype::Auto,
                args::KvCacheDtype::Float32 => KvCacheDtype::Float32,
                args::KvCacheDtype::Bfloat16 => KvCacheDtype::Bfloat16,
                args::KvCacheDtype::Fp8E4m3 => KvCacheDtype::Fp8E4m3,
                args::KvCacheDtype::Int8 => KvCacheDtype::Int8,
            },
            quantize_int8: args.model.quantization == Some(Quantization::Int8),
            cpu_kernels: args.device.cpu_kernels == Switch::On,
            compile_mode: match args.device.compile_mode {
                args::CompileMode::Best => CompileMode::Best,
                args::CompileMode::Fast => CompileMode::Fast,
            },
            attention_backend,
            context_length: args.model.context_length,
            memory: MemoryConfig {
                budget: self.budget.clone(),
                share: claim.share,
                released_bytes: claim.released_bytes,
                page_size: args.schedule.page_size,
                max_total_tokens: args.schedule.max_total_tokens,
                mem_fraction_static: args.schedule.mem_fraction_static,
            },
            schedule: schedule(&args.schedule),
            random_seed: args.schedule.random_seed,
            cache_dir: Some(self.cache.executables()),
            weight_cache: args
                .device
                .weight_cache_from
                .bytes()
                .map(|from_bytes| WeightCacheConfig { folder: self.cache.weights(), from_bytes }),
            watchdog_timeout: args.schedule.watchdog_timeout,
            progress: true,
            fail_on_token: None,
        })
    }
}

fn check_attention(name: &str, plugins: &Registry) -> anyhow::Result<()> {
    let backends = plugins.plugins().iter().filter(|plugin| plugin.attention().is_some());
    let names: Vec<_> = backends.map(|plugin| plugin.name()).collect();
    ensure!(
        names.contains(&name),
        "--attention-backend {name}: not supported yet: no plugin of this name is loaded (there are: {}); give one of \
         these or 'auto', or the file of a plugin with --plugin",
        names.join(", ")
    );
    Ok(())
}

fn schedule(args: &ScheduleArgs) -> ScheduleConfig {
    ScheduleConfig {
        max_running_requests: args.max_running_requests,
        chunked_prefill_size: args.chunked_prefill_size.map(|size| match size {
            ChunkSize::Tokens(tokens) => tokens,
            ChunkSize::Disabled => args.max_prefill_tokens,
        }),
        max_prefill_tokens: args.max_prefill_tokens,
        max_queued_requests: args.max_queued_requests,
        policy: match args.schedule_policy {
            Policy::Fcfs => torus_sched::Policy::Fcfs,
            Policy::Lpm => torus_sched::Policy::Lpm,
            Policy::DfsWeight => torus_sched::Policy::DfsWeight,
            Policy::Random => torus_sched::Policy::Random { seed: args.random_seed },
        },
        prefix_cache: !args.disable_radix_cache,
        overlap: !args.disable_overlap_schedule,
        prefill_slowdown: args.prefill_slowdown,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_attention_backend_that_is_not_loaded_is_refused_by_its_option() {
        let plugins = Registry::linked().unwrap();
        assert!(check_attention("native", &plugins).is_ok() && check_attention("fa", &plugins).is_ok());
        let error = check_attention("mla", &plugins).unwrap_err().to_string();
        assert!(error.starts_with("--attention-backend mla: not supported yet"), "{error}");
        assert!(["fa", "native"].iter().all(|name| error.contains(name)), "{error}");
    }
}
