//! Finds the plugin that serves a model, opens the model, and decides how its weights are stored.

use std::sync::Arc;

use serde_json::Value;
use torus_abi::{
    DType,
    model::{GgufAnswer, ModelDescription, ModelOptions, Parallel, WeightRole, WeightSpec},
    shard::Shard,
};
use torus_cpu::packed::Format;
use torus_plugins::{ModelInterface, OpenModel, Plugin};
use torus_weights::{Checkpoint, LoadPlan, PlannedWeight, StorageDType, Target as WeightTarget};

use crate::{
    config::{DtypeChoice, EngineConfig, Platform},
    load::{StartError, invalid},
};

/// A model that its plugin has opened and described.
pub(crate) struct OpenedModel {
    pub plugin: Arc<Plugin>,
    /// How the plugin reads the file, if it is a GGUF file.
    pub gguf: Option<GgufAnswer>,
    pub model: OpenModel,
    pub description: ModelDescription,
    /// The dtype of activations.
    pub activations: DType,
}

impl OpenedModel {
    pub fn of_checkpoint(config: &EngineConfig, checkpoint: &Checkpoint) -> Result<Self, StartError> {
        let opened = match checkpoint.gguf_query() {
            Some(query) => {
                let architecture = query.metadata.get("general.architecture").and_then(|name| name.as_str());
                let plugin = config.plugins.gguf_model(architecture.unwrap_or("(none)"))?.clone();
                let answer = interface(&plugin)?.from_gguf(&query)?;
                let hf_config = answer.config.clone();
                Self::open(config, plugin, Some(answer), hf_config)?
            }
            None => Self::of_config(config, checkpoint.config().cloned().unwrap_or_default())?,
        };
        tracing::info!(plugin = opened.plugin.name(), model = %checkpoint.path().display(), "model opened");
        Ok(opened)
    }

    /// From the `config.json` of a checkpoint, which need not be here.
    pub fn of_config(config: &EngineConfig, hf_config: Value) -> Result<Self, StartError> {
        let architecture = hf_config["architectures"][0].as_str().unwrap_or("(none)");
        let plugin = config.plugins.model(architecture)?.clone();
        Self::open(config, plugin, None, hf_config)
    }

    fn open(
        config: &EngineConfig,
        plugin: Arc<Plugin>,
        gguf: Option<GgufAnswer>,
        hf_config: Value,
    ) -> Result<Self, StartError> {
        let parallel = config.device.parallel();
        let options = ModelOptions { config: hf_config, parallel };
        let model = interface(&plugin)?.open(&options)?;
        let description = model.describe()?;
        check_description(plugin.name(), &description, parallel)?;
        let activations = activations(config.dtype, description.dtype);
        Ok(Self { plugin, gguf, model, description, activations })
    }

    /// What each weight becomes on each of the devices, held against the checkpoint.
    pub fn load_plans<'a>(
        &self,
        config: &EngineConfig,
        checkpoint: &'a Checkpoint,
    ) -> Result<Vec<LoadPlan<'a>>, StartError> {
        let storage = |spec: &WeightSpec| self.storage(config, spec);
        let plan = |shard| LoadPlan::for_shard(checkpoint, &self.description, self.gguf.as_ref(), storage, shard);
        Ok(Shard::all(config.device.parallel()).map(plan).collect::<Result<_, _>>()?)
    }

    /// What each weight would become if it came from a checkpoint of floating-point numbers.
    ///
    /// # Errors
    /// If weights are packed for the device: how, only their values' types say.
    pub fn weight_shapes(&self, config: &EngineConfig) -> Result<Vec<PlannedWeight>, StartError> {
        let shape = |spec: &WeightSpec| match self.storage(config, spec) {
            WeightTarget::Dense(dtype) => Ok(PlannedWeight::of_shape(spec, dtype, self.description.parallel)?),
            WeightTarget::Packed { .. } => {
                Err(invalid("model", "the kernels of a CPU need to know the checkpoint; a config.json is not enough"))
            }
        };
        self.description.weights.iter().map(shape).collect()
    }

    fn storage(&self, config: &EngineConfig, spec: &WeightSpec) -> WeightTarget {
        let on_cpu = config.device.platform() == Platform::Cpu;
        if spec.role == WeightRole::Vector {
            return WeightTarget::Dense(StorageDType::F32);
        }
        if runs_own_kernels(config) {
            return WeightTarget::Packed {
                floats: match self.activations {
                    _ if config.quantize_int8 => Format::Q8,
                    DType::Bf16 => Format::Bf16,
                    _ => Format::F32,
                },
                // Whoever asks for float32 wants the weights that the blocks stand for, multiplied as such.
                keep_quantized: self.activations != DType::F32,
            };
        }
        // XLA multiplies single rows of bf16 far slower on a CPU than of f32 (6.6 against 40 GB/s), so that without the
        // kernels matrices are f32 there: twice the memory, and several times the speed.
        WeightTarget::Dense(match self.activations {
            DType::Bf16 if !on_cpu => StorageDType::Bf16,
            _ => StorageDType::F32,
        })
    }
}

/// Whether the host's native kernels compute: on a CPU, for a model that is whole.
pub(crate) fn runs_own_kernels(config: &EngineConfig) -> bool {
    config.device.platform() == Platform::Cpu && config.cpu_kernels && config.device.parallel().tensor == 1
}

fn interface(plugin: &Plugin) -> Result<&ModelInterface, StartError> {
    plugin.model().ok_or_else(|| invalid("model", "the plugin offers no model"))
}

/// What the host indexes by must be there.
fn check_description(plugin: &str, description: &ModelDescription, parallel: Parallel) -> Result<(), StartError> {
    if description.parallel != parallel {
        let message = format!("plugin '{plugin}' does not split models over devices; leave it out or give 1");
        return Err(invalid("--tp-size", message));
    }
    let kinds = description.kinds.len();
    match description.layers.iter().position(|kind| *kind >= kinds) {
        None if description.vocab > 0 && description.context_length > 0 => Ok(()),
        None => Err(invalid("model", format!("plugin '{plugin}' describes a model without vocabulary or context"))),
        Some(layer) => {
            let kind = description.layers[layer];
            Err(invalid("model", format!("plugin '{plugin}': layer {layer} is of kind {kind}, and there are {kinds}")))
        }
    }
}

/// The dtype of activations. f16 checkpoints run in bf16, which every device has.
fn activations(choice: DtypeChoice, checkpoint: DType) -> DType {
    match (choice, checkpoint) {
        (DtypeChoice::Float32, _) | (DtypeChoice::Auto, DType::F32 | DType::F64) => DType::F32,
        (DtypeChoice::Bfloat16, _) | (DtypeChoice::Auto, _) => DType::Bf16,
    }
}
