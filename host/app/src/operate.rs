//! Makes models and loads plugins, when the server starts and when an administrator asks.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::SystemTime,
};

use clap::ValueEnum;
use torus_http::{LoadPlugin, ModelRequest, OperateError, Operator, PluginInfo, Recipe, ServedModel};
use torus_plugins::{LibraryCache, Origin, Plugin, Registry};

use crate::{
    args::{ChunkSize, Dtype, EngineArgs, fraction},
    engine::{Machine, MemoryClaim},
    model::{self, Model},
    plugins,
};

/// The plugins of a server and what it makes models from.
pub struct Workshop {
    /// As the server was started; requests change a copy.
    args: EngineArgs,
    preferred_sampling_params: Option<String>,
    machine: Arc<Machine>,
    plugins: Mutex<Registry>,
}

impl Workshop {
    pub fn new(args: EngineArgs, preferred_sampling_params: Option<String>, machine: Machine) -> anyhow::Result<Self> {
        let plugins = plugins::registry(&args.plugins, machine.cache())?;
        Ok(Self { args, preferred_sampling_params, machine: Arc::new(machine), plugins: Mutex::new(plugins) })
    }

    fn registry(&self) -> Registry {
        self.plugins.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Opens a model, to be made with the plugins of this moment.
    pub fn open(&self, request: &ModelRequest) -> Result<ModelRecipe, OperateError> {
        let mut args = self.args.clone();
        apply(&mut args, request)?;
        let path = request.model_path.clone().unwrap_or_default();
        let opened = Model::open(&path, &args.model);
        let mut model = opened.map_err(|error| OperateError::invalid("model_path", format!("{error:#}")))?;
        if let Some(json) = &self.preferred_sampling_params {
            model::prefer(&mut model.defaults, json).map_err(|error| OperateError::other(format!("{error:#}")))?;
        }
        let share = request.mem;
        Ok(ModelRecipe { path, args, share, model, machine: self.machine.clone(), plugins: self.registry() })
    }
}

impl Operator for Workshop {
    fn plugins(&self) -> Vec<PluginInfo> {
        self.registry().plugins().iter().map(|plugin| describe(plugin)).collect()
    }

    fn load_plugin(&self, request: &LoadPlugin) -> Result<PluginInfo, OperateError> {
        let refused = |error: &dyn std::fmt::Display| OperateError::invalid("file", error.to_string());
        let file = plugins::search_path(&self.args.plugins).find(&request.file).map_err(|error| refused(&error))?;
        let libraries = LibraryCache::new(self.machine.cache().libraries());
        // On a copy: loading runs code of the plugin, and nothing may wait for that.
        let mut registry = self.registry();
        let update = registry.update(&file, request.sha256.as_deref(), &libraries).map_err(|error| refused(&error))?;
        *self.plugins.lock().unwrap_or_else(PoisonError::into_inner) = registry;
        let replaced = update.replaced.map(|replaced| replaced.manifest.version.clone());
        Ok(PluginInfo { replaced, ..describe(&update.plugin) })
    }

    fn recipe(&self, request: &ModelRequest) -> Result<Arc<dyn Recipe>, OperateError> {
        Ok(Arc::new(self.open(request)?))
    }
}

fn describe(plugin: &Plugin) -> PluginInfo {
    let manifest = &plugin.manifest;
    let (path, sha256) = match &plugin.origin {
        Origin::Linked => (None, None),
        Origin::File { path, sha256 } => (Some(path.display().to_string()), Some(sha256.clone())),
    };
    PluginInfo {
        name: manifest.name.clone(),
        version: manifest.version.clone(),
        description: manifest.description.clone(),
        kinds: manifest.kinds.iter().map(|kind| kind.name().to_owned()).collect(),
        architectures: manifest.architectures.clone(),
        path,
        sha256,
        replaced: None,
    }
}

/// Puts what a request says over the options of the command line.
fn apply(args: &mut EngineArgs, request: &ModelRequest) -> Result<(), OperateError> {
    if let Some(name) = &request.dtype {
        let supported = Dtype::from_str(name, true).ok().filter(|dtype| *dtype != Dtype::Float16);
        let unknown = || OperateError::invalid("dtype", format!("dtype '{name}' is not auto, float32 or bfloat16"));
        args.model.dtype = supported.ok_or_else(unknown)?;
    }
    if let Some(share) = request.mem {
        fraction(&share.to_string()).map_err(|error| OperateError::invalid("mem", format!("mem {error}")))?;
    }
    let sizes = [
        ("context_length", request.context_length),
        ("max_total_tokens", request.max_total_tokens),
        ("max_running_requests", request.max_running_requests),
        ("chunked_prefill_size", request.chunked_prefill_size),
        ("page_size", request.page_size),
    ];
    if let Some((field, _)) = sizes.iter().find(|(_, size)| *size == Some(0)) {
        return Err(OperateError::invalid(field, format!("{field} must be above 0")));
    }
    let (model, schedule) = (&mut args.model, &mut args.schedule);
    // Those of the command line belong to its own checkpoint, whose request names them.
    model.tokenizer_path = request.tokenizer_path.as_ref().map(Into::into);
    model.chat_template.clone_from(&request.chat_template);
    model.context_length = request.context_length;
    schedule.max_total_tokens = request.max_total_tokens.or(schedule.max_total_tokens);
    schedule.max_running_requests = request.max_running_requests.or(schedule.max_running_requests);
    schedule.page_size = request.page_size.or(schedule.page_size);
    if let Some(tokens) = request.chunked_prefill_size {
        schedule.chunked_prefill_size = Some(ChunkSize::Tokens(tokens));
    }
    if let Some(name) = &request.attention_backend {
        args.plugins.attention_backend.clone_from(name);
    }
    Ok(())
}

/// An opened model and everything it is made with.
pub struct ModelRecipe {
    path: String,
    args: EngineArgs,
    share: Option<f64>,
    model: Model,
    machine: Arc<Machine>,
    plugins: Registry,
}

impl ModelRecipe {
    pub fn model(&self) -> &Model {
        &self.model
    }
}

impl Recipe for ModelRecipe {
    fn start(&self, names: Vec<String>, released_bytes: u64) -> Result<ServedModel, OperateError> {
        let (args, model) = (&self.args, self.model.clone());
        let claim = MemoryClaim { share: self.share, released_bytes };
        let name = names.first().cloned().unwrap_or_default();
        let engine = self.machine.start(args, self.plugins.clone(), claim, name, &model);
        let engine = engine.map_err(|error| OperateError::other(format!("{error:#}")))?;
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        let tokenizer_path = args.model.tokenizer_path.as_ref().map(|path| path.display().to_string());
        Ok(ServedModel {
            names,
            engine,
            tokenizer: model.tokenizer,
            chat_template: model.chat_template,
            defaults: model.defaults,
            model_path: self.path.clone(),
            tokenizer_path: tokenizer_path.unwrap_or_else(|| self.path.clone()),
            created_s: now.map_or(0, |now| now.as_secs()),
            origin: None,
        })
    }
}
