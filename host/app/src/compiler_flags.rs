//! Flags for the compiler of the device, which it reads from the environment when it is first used.

use std::{fs, path::Path};

use crate::{
    args::{Device, DeviceArgs},
    cache_dir::CacheDir,
};

/// The variable to set, and its value: this program's own flags, those that are there already, and those of
/// `--xla-flags`; a later one counts. `None` = nothing is to be changed.
pub fn to_set(args: &DeviceArgs, env: &dyn Fn(&str) -> Option<String>) -> Option<(&'static str, String)> {
    let variable = if args.device == Device::Tpu { "LIBTPU_INIT_ARGS" } else { "XLA_FLAGS" };
    let own = if args.device == Device::Cuda { of_cuda(args.cache_dir.as_deref()) } else { Vec::new() };
    if own.is_empty() && args.xla_flags.is_none() {
        return None;
    }
    let there = env(variable).unwrap_or_default();
    let flags = own.iter().map(String::as_str).chain([there.trim()]).chain(args.xla_flags.as_deref());
    let flags: Vec<_> = flags.filter(|flags| !flags.is_empty()).collect();
    Some((variable, flags.join(" ")))
}

/// Loops become part of a step's CUDA graph: the host would else wait for the GPU before each round of attention. What the
/// compiler has found out by trying kernels is kept for programs of other sizes; without it a program compiles several
/// times as long.
fn of_cuda(cache: Option<&Path>) -> Vec<String> {
    let mut flags = vec!["--xla_gpu_enable_command_buffer=+WHILE,+CONDITIONAL".to_owned()];
    let folder = CacheDir::new(cache).ok().map(|cache| cache.autotuning());
    // The flags are split at spaces, and the folder must be there.
    let usable = folder.filter(|folder| fs::create_dir_all(folder).is_ok());
    let name = usable.as_deref().and_then(Path::to_str).filter(|name| !name.contains(char::is_whitespace));
    flags.extend(name.map(|name| format!("--xla_gpu_per_fusion_autotune_cache_dir={name}")));
    flags
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::args::{Cli, Command};

    fn flags(options: &[&str], there: Option<&str>) -> Option<(&'static str, String)> {
        let line = ["torus", "serve", "--model-path", "m"].iter().chain(options);
        let Command::Serve(args) = Cli::try_parse_from(line).unwrap().command else { panic!("not serve") };
        to_set(&args.engine.device, &|_| there.map(str::to_owned))
    }

    #[test]
    fn flags_follow_those_that_are_there() {
        assert_eq!(flags(&[], Some("--a=1")), None);
        assert_eq!(flags(&["--xla-flags", "--b=2"], None), Some(("XLA_FLAGS", "--b=2".to_owned())));
        let both = flags(&["--xla-flags", "--b=2", "--device", "tpu"], Some(" --a=1 "));
        assert_eq!(both, Some(("LIBTPU_INIT_ARGS", "--a=1 --b=2".to_owned())));
    }

    #[test]
    fn a_gpu_has_flags_of_its_own_which_others_may_take_back() {
        let folder = tempfile::tempdir().unwrap();
        let of = |cache: &Path| {
            let options = ["--device", "cuda", "--xla-flags", "--b=2", "--cache-dir", cache.to_str().unwrap()];
            flags(&options, Some("--a=1")).unwrap()
        };
        let graphs = "--xla_gpu_enable_command_buffer=+WHILE,+CONDITIONAL";
        let kept = folder.path().join("autotuning");
        let expected = format!("{graphs} --xla_gpu_per_fusion_autotune_cache_dir={} --a=1 --b=2", kept.display());
        assert_eq!(of(folder.path()), ("XLA_FLAGS", expected));
        assert!(kept.is_dir());
        assert_eq!(of(&folder.path().join("with space")).1, format!("{graphs} --a=1 --b=2"));
        assert_eq!(of(Path::new("/proc/nowhere")).1, format!("{graphs} --a=1 --b=2"));
    }
}
