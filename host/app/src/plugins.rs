//! `torus plugins`, and the registry that a server starts with.

mod check;
mod new;

use std::process::ExitCode;

use serde_json::json;
use torus_plugins::{LibraryCache, Origin, Plugin, Registry, RegistryError, SearchPath};

use crate::{
    args::{PluginArgs, PluginsCommand, PluginsLsArgs},
    cache_dir::CacheDir,
};

/// The plugins that a server with these options has.
pub fn registry(args: &PluginArgs, cache: &CacheDir) -> Result<Registry, RegistryError> {
    let mut registry = if args.no_linked_plugins { Registry::default() } else { Registry::linked()? };
    let path = SearchPath::of_process(args.files.clone());
    registry.load_all(&path, &LibraryCache::new(cache.libraries()))?;
    Ok(registry)
}

/// From where a server with these options loads plugins while it runs: the folders it has looked into at its start, and
/// those it was told to leave for later.
pub fn folders_at_run_time(args: &PluginArgs) -> SearchPath {
    let mut path = SearchPath::of_process(Vec::new());
    path.folders.extend(args.folders.iter().cloned());
    path
}

pub fn run(command: &PluginsCommand) -> anyhow::Result<ExitCode> {
    match command {
        PluginsCommand::Ls(args) => list(args).map(|()| ExitCode::SUCCESS),
        PluginsCommand::Check(args) => check::run(args),
        PluginsCommand::New(args) => new::run(args).map(|()| ExitCode::SUCCESS),
    }
}

fn list(args: &PluginsLsArgs) -> anyhow::Result<()> {
    let registry = registry(&args.plugins, &CacheDir::new(args.cache_dir.as_deref())?)?;
    if args.json {
        let plugins: Vec<_> = registry.plugins().iter().map(|plugin| describe(plugin)).collect();
        println!("{}", serde_json::to_string_pretty(&plugins)?);
        return Ok(());
    }
    for plugin in registry.plugins() {
        println!("{}", line(plugin));
    }
    if registry.plugins().is_empty() {
        eprintln!("no plugins: leave out --no-linked-plugins, or give --plugin FILE");
    }
    Ok(())
}

fn kinds(plugin: &Plugin) -> Vec<&'static str> {
    plugin.manifest.kinds.iter().map(|kind| kind.name()).collect()
}

fn line(plugin: &Plugin) -> String {
    let manifest = &plugin.manifest;
    let origin = match &plugin.origin {
        Origin::Linked => "linked in".to_owned(),
        Origin::File { path, .. } => path.display().to_string(),
    };
    let mut line = format!("{} {} ({}; {origin})", manifest.name, manifest.version, kinds(plugin).join(", "));
    if !manifest.description.is_empty() {
        line.push_str(&format!("\n    {}", manifest.description));
    }
    if !manifest.architectures.is_empty() {
        line.push_str(&format!("\n    serves {}", manifest.architectures.join(", ")));
    }
    if !manifest.gguf_architectures.is_empty() {
        line.push_str(&format!("\n    reads GGUF files of {}", manifest.gguf_architectures.join(", ")));
    }
    line
}

fn describe(plugin: &Plugin) -> serde_json::Value {
    let (path, sha256) = match &plugin.origin {
        Origin::Linked => (None, None),
        Origin::File { path, sha256 } => (Some(path.display().to_string()), Some(sha256)),
    };
    json!({"manifest": plugin.manifest, "linked": path.is_none(), "path": path, "sha256": sha256})
}
