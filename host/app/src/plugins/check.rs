//! `torus plugins check`: everything a server would find out about a plugin, before a server needs it.

mod attention;
mod batch;
mod model;
mod reference;

use std::process::ExitCode;

use serde::Serialize;
use torus_plugins::{LibraryCache, Plugin, Registry};

use crate::{args::PluginsCheckArgs, cache_dir::CacheDir};

/// What was looked at, and what came of it.
#[derive(Debug, Default, Serialize)]
pub struct Findings(Vec<Finding>);

#[derive(Debug, Serialize)]
struct Finding {
    check: String,
    passed: bool,
    detail: String,
}

impl Findings {
    fn passed(&mut self, check: &str, detail: impl ToString) {
        self.0.push(Finding { check: check.to_owned(), passed: true, detail: detail.to_string() });
    }

    fn failed(&mut self, check: &str, detail: impl ToString) {
        self.0.push(Finding { check: check.to_owned(), passed: false, detail: detail.to_string() });
    }

    fn all_passed(&self) -> bool {
        self.0.iter().all(|finding| finding.passed)
    }

    fn print(&self) {
        for Finding { check, passed, detail } in &self.0 {
            println!("{} {check}: {detail}", if *passed { "ok  " } else { "FAIL" });
        }
    }
}

pub fn run(args: &PluginsCheckArgs) -> anyhow::Result<ExitCode> {
    let cache = CacheDir::new(args.cache_dir.as_deref())?;
    let mut findings = Findings::default();
    match Registry::default().load(&args.file, &LibraryCache::new(cache.libraries())) {
        Ok(plugin) => {
            findings.passed("load", summary(&plugin));
            if let Some(model) = plugin.model() {
                model::check(&plugin, model, &mut findings);
            }
            if let Some(backend) = plugin.attention() {
                attention::check(&plugin, backend, &cache, args.pjrt_plugin.as_deref(), &mut findings);
            }
        }
        Err(error) => findings.failed("load", error),
    }
    if args.json {
        println!("{}", serde_json::to_string_pretty(&findings)?);
    } else {
        findings.print();
    }
    Ok(if findings.all_passed() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
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
