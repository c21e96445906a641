//! `torus plugins check`: everything a server would find out about a plugin, before a server needs it.
//!
//! The cases and what they are compared with are the test kit's (`torus_testkit`); here they get a loaded plugin and a
//! device.

mod adapters;
mod cpu;
mod model;
mod tpu;

use std::{path::Path, process::ExitCode, sync::Arc};

use anyhow::Context;
use torus_abi::attention::Target;
use torus_plugins::{LibraryCache, Plugin, Registry};
use torus_testkit::{Outcome, Report, attention, speculative};

use self::adapters::{Attention, open_model, open_speculator};
use crate::{
    args::{CheckTarget, PluginsCheckArgs},
    cache_dir::CacheDir,
};

pub fn run(args: &PluginsCheckArgs) -> anyhow::Result<ExitCode> {
    let cache = CacheDir::new(args.cache_dir.as_deref())?;
    let config = args.config.as_deref().map(read_config).transpose()?;
    let mut report = Report::default();
    match Registry::default().load(&args.file, &LibraryCache::new(cache.libraries())) {
        Ok(plugin) => {
            report.passed("load", summary(&plugin));
            if config.is_some() && plugin.model().is_none() {
                report.failed("--config", "the plugin offers no model that it could be the config of; leave it out");
            }
            let checked = match args.target {
                CheckTarget::Cpu => on_cpu(&plugin, config.as_ref(), &cache, args.pjrt_plugin.as_deref()),
                target => tpu::check(&plugin, config.as_ref(), &cache, args.pjrt_plugin.as_deref(), target),
            };
            match checked {
                Ok(checked) => report.extend(checked),
                Err(error) => report.failed("a device to check it for", format_args!("{error:#}")),
            }
        }
        Err(error) => report.failed("load", error),
    }
    if args.json {
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        print!("{report}");
        println!("{}", counts(&report));
    }
    Ok(if report.conforms() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn read_config(path: &Path) -> anyhow::Result<serde_json::Value> {
    let read = || -> anyhow::Result<_> { Ok(serde_json::from_slice(&std::fs::read(path)?)?) };
    read().with_context(|| format!("--config {}", path.display()))
}

fn on_cpu(
    plugin: &Arc<Plugin>,
    config: Option<&serde_json::Value>,
    cache: &CacheDir,
    pjrt_plugin: Option<&Path>,
) -> anyhow::Result<Report> {
    let mut report = Report::default();
    let target = Target { platform: "cpu".to_owned(), device_kind: "cpu".to_owned() };
    if let Some(interface) = plugin.model() {
        model::check(plugin, interface, &mut report);
        let run = |config: &serde_json::Value| -> anyhow::Result<Report> {
            let mut report = torus_testkit::model::check_opened(&|| open_model(interface, config));
            let native = stock_attention()?;
            let (Some(backend), Ok(model)) = (native.attention(), open_model(interface, config)) else {
                return Ok(report);
            };
            let device = cpu::Cpu::new(cache, pjrt_plugin, &[plugin, &native])?;
            report.extend(torus_testkit::model::run(&*model, &Attention(backend), &device, &target));
            Ok(report)
        };
        match config.map(run).transpose()? {
            Some(checked) => report.extend(checked),
            None => no_config(&mut report),
        }
    }
    if let Some(backend) = plugin.attention() {
        let device = cpu::Cpu::new(cache, pjrt_plugin, &[plugin])?;
        report.extend(attention::run(&Attention(backend), &device, &target));
    }
    if let Some(interface) = plugin.speculative() {
        let open = |options: &_| open_speculator(interface, options);
        report.extend(speculative::check_proposer(&open, &speculative::Options::default()));
    }
    Ok(report)
}

fn no_config(report: &mut Report) {
    let reason = "give the config.json of a small checkpoint with --config FILE";
    report.add("weights, fragments and numbers", Outcome::Skipped, reason);
}

/// The stock backend, with which models are run.
fn stock_attention() -> anyhow::Result<Arc<Plugin>> {
    let registry = Registry::linked()?;
    let found = registry.plugins().iter().find(|plugin| plugin.name() == "native").cloned();
    found.context("the stock attention backend is not linked into this binary")
}

fn counts(report: &Report) -> String {
    let of = |outcome| report.findings.iter().filter(|finding| finding.outcome == outcome).count();
    let (passed, failed) = (of(Outcome::Passed), of(Outcome::Failed));
    format!("{passed} ok, {failed} failed, {} not served, {} skipped", of(Outcome::Declined), of(Outcome::Skipped))
}

fn summary(plugin: &Plugin) -> String {
    let manifest = &plugin.manifest;
    let (major, minor) = manifest.abi;
    let kinds = super::kinds(plugin).join(", ");
    let Some(kinds) = Some(kinds).filter(|kinds| !kinds.is_empty()) else {
        return format!("{} {} (plugin API {major}.{minor}) offers nothing", manifest.name, manifest.version);
    };
    format!("{} {} (plugin API {major}.{minor}, {}) offers: {kinds}", manifest.name, manifest.version, manifest.target)
}

#[cfg(test)]
mod tests;
