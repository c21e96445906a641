//! Models and TPUs that need not be here: what `torus compile` and `torus plan` begin with.

use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};
use serde_json::Value;
use torus_abi::attention::Target;
use torus_engine::{Blueprint, EngineConfig, StartError, roofline};
use torus_pjrt::Topology;
use torus_weights::{Checkpoint, ConsoleProgress, ModelPath, ResolvedModel};

use crate::{
    args::{Device, EngineArgs},
    cache_dir::CacheDir,
    engine::{Machine, MemoryClaim},
    model::{default_name, hub_options},
    plugins,
};

/// What is known of a model without its weights.
pub struct ModelFile {
    pub name: String,
    content: Content,
}

enum Content {
    /// A `config.json`, and the folder it lies in; that again, if its weights are there, too.
    Config { content: Value, folder: PathBuf, weights: Option<PathBuf> },
    /// A GGUF file, which has none.
    Gguf(Checkpoint),
}

impl ModelFile {
    /// `path` is what a server is given, or the `config.json` itself. Of a model on the hub only that file is fetched.
    pub fn open(args: &EngineArgs) -> anyhow::Result<Self> {
        let path = args.model.only().map_err(anyhow::Error::msg)?;
        let given = Path::new(&path);
        let is_config = given.is_file() && given.extension().is_some_and(|extension| extension == "json");
        let files = if is_config {
            ResolvedModel::Folder(given.parent().unwrap_or(Path::new(".")).to_owned())
        } else {
            let mut options = hub_options(&args.model);
            options.config_only = true;
            ModelPath::resolve(&path, &options, &ConsoleProgress::new())
                .with_context(|| format!("--model-path {path}"))?
        };
        let stem = given.file_stem().filter(|stem| is_config && *stem != "config");
        let name = stem.map_or_else(|| default_name(&path, &files), |stem| stem.to_string_lossy().into_owned());
        let content = match files {
            ResolvedModel::Gguf(file) => Content::Gguf(Checkpoint::open_gguf(&file)?),
            ResolvedModel::Folder(folder) => {
                let file = if is_config { given.to_owned() } else { folder.join("config.json") };
                let read = || -> anyhow::Result<_> { Ok(serde_json::from_slice(&std::fs::read(&file)?)?) };
                let content = read().with_context(|| format!("--model-path: {}", file.display()))?;
                let weights = (!is_config && has_weights(&folder)?).then(|| folder.clone());
                Content::Config { content, folder, weights }
            }
        };
        Ok(Self { name, content })
    }

    fn files(&self) -> ResolvedModel {
        match &self.content {
            Content::Config { folder, .. } => ResolvedModel::Folder(folder.clone()),
            Content::Gguf(checkpoint) => ResolvedModel::Gguf(checkpoint.path().to_owned()),
        }
    }

    /// What an engine with these options would be on a device of this kind.
    pub fn blueprint(&self, config: &EngineConfig, device: &Target) -> Result<Blueprint, StartError> {
        match &self.content {
            Content::Config { content, .. } => Blueprint::of_config(config, content.clone(), device),
            Content::Gguf(checkpoint) => Blueprint::of_checkpoint(config, checkpoint, device),
        }
    }

    /// Refuses a checkpoint that a server would refuse for the scales of its cache, if the weights are here.
    pub fn check_kv_scales(&self, blueprint: &Blueprint) -> Result<(), StartError> {
        match &self.content {
            Content::Gguf(checkpoint) => torus_engine::check_kv_scales(blueprint, checkpoint),
            Content::Config { weights: Some(folder), .. } => {
                torus_engine::check_kv_scales(blueprint, &Checkpoint::open_folder(folder)?)
            }
            Content::Config { .. } => Ok(()),
        }
    }
}

fn has_weights(folder: &Path) -> anyhow::Result<bool> {
    for entry in std::fs::read_dir(folder).with_context(|| format!("--model-path {}", folder.display()))? {
        if entry?.path().extension().is_some_and(|extension| extension == "safetensors") {
            return Ok(true);
        }
    }
    Ok(false)
}

/// A TPU by what programs are made for.
pub struct AbsentTpu {
    pub device: Target,
    /// Of one device, for programs and their data.
    pub memory_bytes: u64,
    cache: CacheDir,
    /// The compiler's library.
    libtpu: Option<PathBuf>,
}

impl AbsentTpu {
    /// As data sheets say.
    pub fn by_sheet(args: &EngineArgs, topology: &roofline::Topology) -> anyhow::Result<Self> {
        Ok(Self {
            device: Target { platform: "tpu".to_owned(), device_kind: topology.chip.device_kind.to_owned() },
            memory_bytes: topology.memory_bytes(),
            cache: CacheDir::new(args.device.cache_dir.as_deref())?,
            libtpu: None,
        })
    }

    /// As the compiler says, which is loaded for it.
    pub fn by_compiler(args: &EngineArgs, topology: &roofline::Topology) -> anyhow::Result<(Self, Topology)> {
        let cache = CacheDir::new(args.device.cache_dir.as_deref())?;
        let libtpu = cache.pjrt_plugin(Device::Tpu, args.device.pjrt_plugin.as_deref())?;
        let described = torus_pjrt::Plugin::load(&libtpu)?
            .topology(&topology.to_string(), &[])
            .with_context(|| format!("--topology {topology}: {} does not know it", libtpu.display()))?;
        let device = described.devices().first().context("a topology without devices")?;
        ensure!(
            device.kind == topology.chip.device_kind,
            "--topology {topology}: its devices are '{}', where '{}' were expected",
            device.kind,
            topology.chip.device_kind
        );
        let limit = device.attributes.get("device_memory_bytes_limit").and_then(|limit| limit.as_int());
        let memory_bytes = limit.and_then(|limit| u64::try_from(limit).ok()).unwrap_or(topology.memory_bytes());
        let device = Target { platform: described.platform_name().to_owned(), device_kind: device.kind.clone() };
        Ok((Self { device, memory_bytes, cache, libtpu: Some(libtpu) }, described))
    }

    /// The configuration of an engine on one such device.
    pub fn config(&self, args: &EngineArgs, model: &ModelFile) -> anyhow::Result<EngineConfig> {
        let plugins = plugins::registry(&args.plugins, &self.cache)?;
        let machine = Machine::of_absent_tpu(args, self.cache.clone(), self.libtpu.clone(), self.memory_bytes);
        machine.config(args, plugins, MemoryClaim::default(), model.name.clone(), model.files())
    }
}
