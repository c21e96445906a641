//! `torus check-env`: what this machine offers, and what to do where something is missing.

use std::{
    env,
    path::{Path, PathBuf},
    process::ExitCode,
};

use serde::Serialize;
use torus_plugins::{LibraryCache, Registry, SearchPath};

use crate::{
    args::{CheckEnvArgs, Device},
    cache_dir::CacheDir,
    limits::Limits,
    tpu,
};

/// One thing that was looked at.
#[derive(Debug, Serialize)]
struct Fact {
    name: String,
    value: String,
    status: Status,
    /// What to do about it.
    #[serde(skip_serializing_if = "Option::is_none")]
    remedy: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum Status {
    Good,
    /// Serving works, though not everything does, or not well.
    Poor,
    /// Serving on a CPU cannot work.
    Bad,
}

impl Fact {
    fn good(name: &str, value: impl ToString) -> Self {
        Self { name: name.to_owned(), value: value.to_string(), status: Status::Good, remedy: None }
    }

    fn poor(name: &str, value: impl ToString, remedy: impl ToString) -> Self {
        Self { status: Status::Poor, remedy: Some(remedy.to_string()), ..Self::good(name, value) }
    }

    fn bad(name: &str, value: impl ToString, remedy: impl ToString) -> Self {
        Self { status: Status::Bad, remedy: Some(remedy.to_string()), ..Self::good(name, value) }
    }

    fn print(&self) {
        let mark = match self.status {
            Status::Good => "ok  ",
            Status::Poor => "note",
            Status::Bad => "FAIL",
        };
        println!("{mark} {}: {}", self.name, self.value);
        for line in self.remedy.iter().flat_map(|remedy| remedy.lines()) {
            println!("       {line}");
        }
    }
}

/// Prints the facts. The exit code says whether serving on a CPU can work.
pub fn run(args: &CheckEnvArgs, limits: &Limits) -> anyhow::Result<ExitCode> {
    let mut facts = machine(limits);
    match CacheDir::new(args.cache_dir.as_deref()) {
        Ok(cache) => {
            facts.push(cache_folder(&cache));
            facts.push(cpu_plugin(&cache, args.pjrt_plugin.as_deref()));
            facts.extend(accelerator(&cache, Device::Tpu, "TPU", "libtpu"));
            facts.extend(accelerator(&cache, Device::Cuda, "GPU", "CUDA plugin"));
            facts.extend(plugins(&cache));
        }
        Err(error) => facts.push(Fact::bad("cache folder", "not known", error)),
    }
    facts.extend(hub());
    if args.json {
        println!("{}", serde_json::to_string_pretty(&facts)?);
    } else {
        facts.iter().for_each(Fact::print);
    }
    let fails = facts.iter().any(|fact| fact.status == Status::Bad);
    Ok(if fails { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

fn machine(limits: &Limits) -> Vec<Fact> {
    vec![
        Fact::good("torus", env!("CARGO_PKG_VERSION")),
        Fact::good("machine", format_args!("{}-{}", env::consts::ARCH, env::consts::OS)),
        cpu_features(),
        cores(limits),
        memory(limits),
        open_files(),
    ]
}

#[cfg(target_arch = "x86_64")]
fn cpu_features() -> Fact {
    let features = [
        ("avx2", is_x86_feature_detected!("avx2")),
        ("fma", is_x86_feature_detected!("fma")),
        ("f16c", is_x86_feature_detected!("f16c")),
        ("avx512f", is_x86_feature_detected!("avx512f")),
        ("avx512bw", is_x86_feature_detected!("avx512bw")),
        ("avx512vnni", is_x86_feature_detected!("avx512vnni")),
        ("avx512bf16", is_x86_feature_detected!("avx512bf16")),
    ];
    let of = |wanted: bool| {
        let names: Vec<_> = features.iter().filter(|(_, there)| *there == wanted).map(|(name, _)| *name).collect();
        names.join(" ")
    };
    if features.iter().all(|(_, there)| *there) {
        return Fact::good("CPU features", of(true));
    }
    Fact::poor("CPU features", of(true), format_args!("{} not there; computing takes longer without", of(false)))
}

#[cfg(not(target_arch = "x86_64"))]
fn cpu_features() -> Fact {
    Fact::good("CPU features", "not looked at on this machine")
}

fn cores(limits: &Limits) -> Fact {
    let quota = limits.cpu_quota.map_or("no quota".to_owned(), |cores| format!("a quota of {cores:.2}"));
    let value = format!("{} to use (affinity {}, cgroup {quota})", limits.cpus(), limits.affinity);
    match limits.cpu_quota {
        Some(quota) if quota.fract() != 0.0 => {
            Fact::poor("cores", value, "threads share a part of a core; a whole number of cores serves steadier")
        }
        _ => Fact::good("cores", value),
    }
}

fn memory(limits: &Limits) -> Fact {
    const LITTLE: u64 = 1 << 30;
    let size = |bytes: u64| format!("{:.1} GiB", bytes as f64 / f64::from(1 << 30));
    let of = |bytes: Option<u64>| bytes.map_or("no limit".to_owned(), size);
    let Some(left) = limits.memory_bytes() else {
        return Fact::poor("memory", "unknown", "give --max-total-tokens, so that the size of the KV cache is known");
    };
    let value = format!(
        "{} to use (machine {}, cgroup {})",
        size(left),
        of(limits.machine_available_bytes),
        of(limits.cgroup_available_bytes)
    );
    if left < LITTLE {
        return Fact::poor(
            "memory",
            value,
            "enough for the smallest models only; end other processes or raise the limit",
        );
    }
    Fact::good("memory", value)
}

fn open_files() -> Fact {
    const FEW: u64 = 4096;
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
    match limit {
        Some(limit) if limit < FEW => {
            Fact::poor("open files", limit, "each client takes one; raise the limit with 'ulimit -n 65536'")
        }
        Some(limit) => Fact::good("open files", limit),
        None => Fact::good("open files", "no limit"),
    }
}

fn cache_folder(cache: &CacheDir) -> Fact {
    let folder = cache.path();
    let writable = |path: &Path| rustix::fs::access(path, rustix::fs::Access::WRITE_OK).is_ok();
    // It is made when it is first needed, so the first folder above it that exists counts.
    let there = folder.ancestors().find(|path| path.exists());
    let models = || std::fs::read_dir(folder.join("models")).into_iter().flatten().count();
    match there {
        Some(path) if writable(path) => {
            Fact::good("cache folder", format_args!("{} ({} models)", folder.display(), models()))
        }
        _ => Fact::bad(
            "cache folder",
            format_args!("{} cannot be written", folder.display()),
            "give another with --cache-dir, or set TORUS_CACHE",
        ),
    }
}

fn cpu_plugin(cache: &CacheDir, given: Option<&Path>) -> Fact {
    const NAME: &str = "PJRT plugin for CPU";
    let path = match cache.pjrt_plugin(Device::Cpu, given) {
        Ok(path) => path,
        Err(error) => return Fact::bad(NAME, "not found", error),
    };
    match torus_pjrt::Plugin::load(&path) {
        Ok(plugin) => {
            let (major, minor) = plugin.api_version();
            Fact::good(NAME, format_args!("{} (PJRT {major}.{minor})", path.display()))
        }
        Err(error) => Fact::bad(NAME, error, "fetch it again, or give another with --pjrt-plugin"),
    }
}

/// The library that drives such devices, and which of them answer through it; a child process asks.
fn accelerator(cache: &CacheDir, device: Device, what: &str, library: &str) -> Vec<Fact> {
    let path = match cache.pjrt_plugin(device, None) {
        Ok(path) => path,
        Err(error) => return vec![Fact::poor(library, format_args!("not found: no serving on a {what}"), error)],
    };
    let answer = match tpu::probe(device, &path) {
        Ok(found) => {
            let kind = found.kinds.first().map_or("no device", String::as_str);
            let memory = found.memory_bytes.map_or("unknown".to_owned(), |bytes| format!("{} GiB", bytes >> 30));
            Fact::good(what, format_args!("{} of {kind}, memory of each {memory}", found.kinds.len()))
        }
        Err(error) => {
            let reason = error.root_cause().to_string();
            Fact::poor(what, format_args!("none answers: {reason}"), "free it if another process uses it")
        }
    };
    vec![Fact::good(library, path.display()), answer]
}

fn plugins(cache: &CacheDir) -> Vec<Fact> {
    let path = SearchPath::of_process(Vec::new());
    let mut facts: Vec<_> = path.folders.iter().map(|folder| plugin_folder(folder)).collect();
    let loaded = Registry::linked().and_then(|mut registry| {
        registry.load_all(&path, &LibraryCache::new(cache.libraries()))?;
        Ok(registry)
    });
    facts.push(match loaded {
        Ok(registry) => {
            let names: Vec<_> = registry.plugins().iter().map(|plugin| plugin.name()).collect();
            let offers = |found: bool, kind| (!found).then_some(kind);
            let model = offers(registry.plugins().iter().any(|plugin| plugin.model().is_some()), "model");
            let attention = offers(registry.plugins().iter().any(|plugin| plugin.attention().is_some()), "attention");
            match model.or(attention) {
                None => Fact::good("plugins", names.join(", ")),
                Some(kind) => Fact::bad(
                    "plugins",
                    names.join(", "),
                    format_args!("there is no {kind} plugin: put one into a folder of TORUS_PLUGIN_PATH"),
                ),
            }
        }
        Err(error) => Fact::bad("plugins", error, "see 'torus plugins check FILE'; remove it if it is of no use"),
    });
    facts
}

fn plugin_folder(folder: &Path) -> Fact {
    let count = std::fs::read_dir(folder).map(|entries| {
        let files = entries.flatten().map(|entry| entry.path());
        files.filter(|file| file.extension().is_some_and(|extension| extension == "so")).count()
    });
    match count {
        Ok(count) => Fact::good("plugin folder", format_args!("{} ({count} files)", folder.display())),
        Err(_) => Fact::good("plugin folder", format_args!("{} (not there)", folder.display())),
    }
}

/// How models from the hub are fetched.
fn hub() -> Vec<Fact> {
    let set = |name: &str| env::var(name).ok().filter(|value| !value.is_empty());
    let home = set("HF_HOME").map(PathBuf::from);
    let home = home.or_else(|| set("HOME").map(|home| Path::new(&home).join(".cache/huggingface")));
    let folder = home.map_or("unknown: set HF_HOME".to_owned(), |home| home.display().to_string());
    let mut facts = vec![
        Fact::good("models from the hub", folder),
        Fact::good("HF_TOKEN", if set("HF_TOKEN").is_some() { "set" } else { "not set: public models only" }),
    ];
    if let Some(endpoint) = set("HF_ENDPOINT") {
        facts.push(Fact::good("HF_ENDPOINT", endpoint));
    }
    if let Some(offline) = set("HF_HUB_OFFLINE") {
        facts.push(Fact::poor("HF_HUB_OFFLINE", offline, "nothing is fetched; only models that are there are served"));
    }
    facts
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits() -> Limits {
        Limits {
            affinity: 4,
            cpu_quota: Some(2.0),
            machine_available_bytes: Some(8 << 30),
            cgroup_available_bytes: Some(2 << 30),
        }
    }

    #[test]
    fn the_limits_in_force_are_told() {
        let (cores, memory) = (cores(&limits()), memory(&limits()));
        assert_eq!(cores.value, "2 to use (affinity 4, cgroup a quota of 2.00)");
        assert_eq!(memory.value, "2.0 GiB to use (machine 8.0 GiB, cgroup 2.0 GiB)");
        assert_eq!((cores.status, memory.status), (Status::Good, Status::Good));
    }

    #[test]
    fn little_of_something_comes_with_a_remedy() {
        let little = Limits { cpu_quota: Some(1.5), cgroup_available_bytes: Some(1 << 20), ..limits() };
        for fact in [cores(&little), memory(&little)] {
            assert_eq!(fact.status, Status::Poor, "{fact:?}");
            assert!(fact.remedy.is_some(), "{fact:?}");
        }
    }

    #[test]
    fn without_a_pjrt_plugin_serving_on_a_cpu_cannot_work() {
        let folder = tempfile::tempdir().unwrap();
        let cache = CacheDir::new(Some(folder.path())).unwrap();
        let fact = cpu_plugin(&cache, None);
        assert_eq!(fact.status, Status::Bad);
        assert!(fact.remedy.unwrap().contains("pip download"));
        assert_eq!(cache_folder(&cache).status, Status::Good);
        let text = folder.path().join("text.so");
        std::fs::write(&text, "no library").unwrap();
        assert_eq!(cpu_plugin(&cache, Some(&text)).status, Status::Bad);
    }
}
