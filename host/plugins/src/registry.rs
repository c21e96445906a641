//! The plugins of a server, by name and by what they serve.

use std::{path::Path, sync::Arc};

use torus_abi::{
    DType,
    attention::{AttentionAnswer, AttentionQuery},
    export::linked_plugins,
    fault::{Fault, FaultCode},
};

use crate::{CallError, LibraryCache, LoadError, Origin, Plugin, SearchPath, candidates};

/// All plugins that loaded. A name occurs once.
#[derive(Clone, Debug, Default)]
pub struct Registry {
    plugins: Vec<Arc<Plugin>>,
}

/// A plugin that was asked for and is not there, or clashes with another.
#[derive(Debug, thiserror::Error)]
pub enum RegistryError {
    #[error(transparent)]
    Load(#[from] LoadError),
    #[error(transparent)]
    Call(#[from] CallError),
    #[error(
        "two plugins are named '{name}': {first} and {second}; remove one, or give --no-linked-plugins to use only files"
    )]
    DuplicateName { name: String, first: String, second: String },
    #[error("no plugin serves the architecture '{architecture}'; loaded model plugins serve: {known}")]
    UnknownArchitecture { architecture: String, known: String },
    #[error("no plugin reads GGUF files of architecture '{architecture}'; loaded model plugins read: {known}")]
    UnknownGgufArchitecture { architecture: String, known: String },
    #[error("there is no attention backend '{name}'; loaded: {known}")]
    UnknownAttention { name: String, known: String },
    #[error("attention backend '{name}' cannot serve this model: {reason}")]
    AttentionRefused { name: String, reason: String },
    #[error("no attention backend can serve this model: {reasons}")]
    NoAttention { reasons: String },
}

/// What came of [`Registry::update`].
#[derive(Clone, Debug)]
pub struct Update {
    pub plugin: Arc<Plugin>,
    /// The plugin of the same name that it took the place of.
    pub replaced: Option<Arc<Plugin>>,
}

fn announce(plugin: &Plugin, file: &Path) {
    let kinds: Vec<_> = plugin.manifest.kinds.iter().map(|kind| kind.name()).collect();
    tracing::info!(
        name = plugin.name(),
        version = plugin.manifest.version,
        kinds = kinds.join(","),
        file = %file.display(),
        "plugin loaded"
    );
}

fn describe_origin(plugin: &Plugin) -> String {
    match &plugin.origin {
        Origin::Linked => "linked into the server".into(),
        Origin::File { path, .. } => path.display().to_string(),
    }
}

impl Registry {
    /// The plugins linked into the binary.
    pub fn linked() -> Result<Self, RegistryError> {
        let mut registry = Self::default();
        for entry in linked_plugins() {
            registry.add(Plugin::new(*entry, Origin::Linked)?)?;
        }
        registry.plugins.sort_by(|a, b| a.name().cmp(b.name()));
        Ok(registry)
    }

    /// Loads every file of a search path. Each is logged, with what it offers.
    pub fn load_all(&mut self, path: &SearchPath, cache: &LibraryCache) -> Result<(), RegistryError> {
        for file in candidates(path)? {
            self.load(&file, cache)?;
        }
        Ok(())
    }

    /// Loads one file. Nothing changes if it fails. The same file twice is one plugin.
    pub fn load(&mut self, file: &Path, cache: &LibraryCache) -> Result<Arc<Plugin>, RegistryError> {
        let plugin = Plugin::from_library(cache.open(file, None)?)?;
        let same = |known: &&Arc<Plugin>| known.name() == plugin.name() && known.identity() == plugin.identity();
        if let Some(known) = self.plugins.iter().find(same) {
            return Ok(known.clone());
        }
        let plugin = self.add(plugin)?;
        announce(&plugin, file);
        Ok(plugin)
    }

    /// Loads one file into a running server. It takes the place of a plugin of its name, whatever that one's version,
    /// and comes before all others, so that it also serves what another served so far. Who holds the replaced plugin
    /// keeps it. Nothing changes if the file fails; the same file twice is one plugin.
    ///
    /// `pinned`: the SHA-256 that the file must have, in hexadecimal.
    pub fn update(&mut self, file: &Path, pinned: Option<&str>, cache: &LibraryCache) -> Result<Update, RegistryError> {
        let plugin = Arc::new(Plugin::from_library(cache.open(file, pinned)?)?);
        let known = self.plugins.iter().position(|known| known.name() == plugin.name());
        let replaced = known.map(|index| self.plugins.remove(index));
        // The one that is known already stays, so that all engines share it.
        let plugin = replaced.clone().filter(|known| known.identity() == plugin.identity()).unwrap_or(plugin);
        self.plugins.insert(0, plugin.clone());
        let replaced = replaced.filter(|replaced| !Arc::ptr_eq(replaced, &plugin));
        announce(&plugin, file);
        Ok(Update { plugin, replaced })
    }

    fn add(&mut self, plugin: Plugin) -> Result<Arc<Plugin>, RegistryError> {
        if let Some(known) = self.plugins.iter().find(|known| known.name() == plugin.name()) {
            return Err(RegistryError::DuplicateName {
                name: plugin.name().to_owned(),
                first: describe_origin(known),
                second: describe_origin(&plugin),
            });
        }
        let plugin = Arc::new(plugin);
        self.plugins.push(plugin.clone());
        Ok(plugin)
    }

    pub fn plugins(&self) -> &[Arc<Plugin>] {
        &self.plugins
    }

    /// The model plugin for an architecture of a `config.json`.
    pub fn model(&self, architecture: &str) -> Result<&Arc<Plugin>, RegistryError> {
        let serves = |plugin: &&Arc<Plugin>| plugin.manifest.architectures.iter().any(|name| name == architecture);
        let found = self.plugins.iter().find(|plugin| plugin.model().is_some() && serves(plugin));
        found.ok_or_else(|| RegistryError::UnknownArchitecture {
            architecture: architecture.to_owned(),
            known: self.list(|plugin| &plugin.manifest.architectures),
        })
    }

    /// The model plugin for the `general.architecture` of a GGUF file.
    pub fn gguf_model(&self, architecture: &str) -> Result<&Arc<Plugin>, RegistryError> {
        let reads = |plugin: &&Arc<Plugin>| plugin.manifest.gguf_architectures.iter().any(|name| name == architecture);
        let found = self.plugins.iter().find(|plugin| plugin.model().is_some() && reads(plugin));
        found.ok_or_else(|| RegistryError::UnknownGgufArchitecture {
            architecture: architecture.to_owned(),
            known: self.list(|plugin| &plugin.manifest.gguf_architectures),
        })
    }

    fn list(&self, of: impl Fn(&Plugin) -> &Vec<String>) -> String {
        let names: Vec<_> = self.plugins.iter().flat_map(|plugin| of(plugin)).cloned().collect();
        if names.is_empty() { "none".into() } else { names.join(", ") }
    }

    /// The attention plugin that serves all `queries`: the one named, or the one that scores highest on the query it
    /// serves worst. Returns its answers, one for each query.
    pub fn attention(
        &self,
        name: Option<&str>,
        queries: &[AttentionQuery],
    ) -> Result<(Arc<Plugin>, Vec<AttentionAnswer>), RegistryError> {
        let offered: Vec<_> = self.plugins.iter().filter(|plugin| plugin.attention().is_some()).collect();
        if let Some(name) = name {
            let plugin = offered.iter().find(|plugin| plugin.name() == name).ok_or_else(|| {
                let known: Vec<_> = offered.iter().map(|plugin| plugin.name()).collect();
                RegistryError::UnknownAttention { name: name.to_owned(), known: known.join(", ") }
            })?;
            let answers = ask(plugin, queries)?
                .map_err(|reason| RegistryError::AttentionRefused { name: name.to_owned(), reason })?;
            return Ok(((*plugin).clone(), answers));
        }
        let mut best: Option<(u32, &Arc<Plugin>, Vec<AttentionAnswer>)> = None;
        let mut reasons = Vec::new();
        for plugin in offered {
            match ask(plugin, queries)? {
                Ok(answers) => {
                    let score = answers.iter().map(|answer| answer.score).min().unwrap_or(0);
                    tracing::info!(backend = plugin.name(), score, "attention backend offered");
                    if best.as_ref().is_none_or(|(highest, ..)| score > *highest) {
                        best = Some((score, plugin, answers));
                    }
                }
                Err(reason) => {
                    // Elsewhere than on a CPU the slower one is no choice that anybody would make unawares.
                    if queries.iter().all(|query| query.target.platform == "cpu") {
                        tracing::info!(backend = plugin.name(), reason, "attention backend refuses");
                    } else {
                        tracing::warn!(backend = plugin.name(), reason, "attention backend refuses");
                    }
                    reasons.push(format!("{}: {reason}", plugin.name()));
                }
            }
        }
        let reasons = || if reasons.is_empty() { "none is loaded".into() } else { reasons.join("; ") };
        let (_, plugin, answers) = best.ok_or_else(|| RegistryError::NoAttention { reasons: reasons() })?;
        Ok((plugin.clone(), answers))
    }
}

/// The answers of a plugin, or why it serves one of the queries not at all.
fn ask(plugin: &Plugin, queries: &[AttentionQuery]) -> Result<Result<Vec<AttentionAnswer>, String>, CallError> {
    let Some(attention) = plugin.attention() else { return Ok(Err("it is no attention backend".into())) };
    let mut answers = Vec::with_capacity(queries.len());
    for query in queries {
        let answer = match attention.query(query) {
            Err(error) if misses_cache(query, &error) => return Ok(Err(too_old(query.kv_dtype))),
            answer => answer?,
        };
        if answer.score == 0 {
            return Ok(Err(answer.reason));
        }
        answers.push(answer);
    }
    Ok(Ok(answers))
}

/// Whether a plugin failed at a query because it was built before there were caches of this dtype: it cannot read the message.
fn misses_cache(query: &AttentionQuery, error: &CallError) -> bool {
    query.kv_dtype == DType::F8E4M3
        && matches!(error, CallError::Fault { fault: Fault { code: FaultCode::Invalid, message }, .. }
            if message.contains(query.kv_dtype.name()))
}

fn too_old(kv_dtype: DType) -> String {
    format!("it was built before there were caches of {kv_dtype}: build it anew, or choose another --kv-cache-dtype")
}
