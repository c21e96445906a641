//! Libraries in installed Python packages. No Python is run: packages lie in folders of known names.

use std::{
    env,
    ffi::OsString,
    fs,
    path::{Path, PathBuf},
};

/// The first of these files (paths below the folder of packages) that an installed Python has: that of the active
/// environment, else the one that the shell finds, else the user's, else the system's.
pub fn installed(members: &[&str]) -> Option<PathBuf> {
    let prefixes = prefixes(&|name| env::var_os(name));
    members.iter().find_map(|member| prefixes.iter().find_map(|prefix| below(prefix, member)))
}

/// Folders in whose `lib` a Python's packages may lie.
fn prefixes(env: &dyn Fn(&str) -> Option<OsString>) -> Vec<PathBuf> {
    let set = |name: &str| env(name).filter(|value| !value.is_empty());
    let environment = set("VIRTUAL_ENV").or_else(|| set("CONDA_PREFIX")).map(PathBuf::from);
    let path = set("PATH").unwrap_or_default();
    let folders = env::split_paths(&path).filter(|folder| folder.join("python3").is_file());
    // Links are not followed: the Python of an environment is a link to the system's.
    let of_shell = folders.filter_map(|folder| folder.parent().map(Path::to_owned));
    let user = set("HOME").map(|home| Path::new(&home).join(".local"));
    environment.into_iter().chain(of_shell).chain(user).chain(["/usr/local".into(), "/usr".into()]).collect()
}

fn below(prefix: &Path, member: &str) -> Option<PathBuf> {
    let entries = fs::read_dir(prefix.join("lib")).ok()?.flatten().map(|entry| entry.path());
    let is_python = |path: &PathBuf| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("python3"));
    let mut folders: Vec<_> = entries.filter(is_python).collect();
    folders.sort();
    let packages =
        folders.iter().rev().flat_map(|folder| ["site-packages", "dist-packages"].map(|name| folder.join(name)));
    packages.map(|packages| packages.join(member)).find(|file| file.is_file())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_python_has_the_package() {
        let folder = tempfile::tempdir().unwrap();
        let find = || below(folder.path(), "libtpu/libtpu.so");
        assert_eq!(find(), None);
        for python in ["python3.11/site-packages", "python3.12/dist-packages"] {
            let package = folder.path().join("lib").join(python).join("libtpu");
            fs::create_dir_all(&package).unwrap();
            fs::write(package.join("libtpu.so"), "").unwrap();
            assert_eq!(find(), Some(package.join("libtpu.so")));
        }
    }

    #[test]
    fn the_active_environment_comes_first_then_the_python_of_the_shell() {
        let folder = tempfile::tempdir().unwrap();
        let bin = folder.path().join("bin");
        fs::create_dir(&bin).unwrap();
        fs::write(bin.join("python3"), "").unwrap();
        let path = env::join_paths([Path::new("/nonexistent/bin"), &bin]).unwrap();
        let of = |set: &[(&str, OsString)]| {
            let found = |name: &str| set.iter().find(|(key, _)| *key == name).map(|(_, value)| value.clone());
            prefixes(&found).iter().map(|prefix| prefix.display().to_string()).collect::<Vec<_>>()
        };
        let shell = folder.path().display().to_string();
        let system = ["/usr/local", "/usr"];
        assert_eq!(of(&[]), system);
        assert_eq!(of(&[("PATH", path.clone())]), [&*shell, system[0], system[1]]);
        let all = [("PATH", path), ("HOME", "/h".into()), ("CONDA_PREFIX", "/c".into()), ("VIRTUAL_ENV", "/v".into())];
        assert_eq!(of(&all), ["/v", &shell, "/h/.local", system[0], system[1]]);
        assert_eq!(of(&all[1..3])[0], "/c");
    }
}
