//! Opens a plugin library: checks the file, copies it under its hash, loads the copy, checks the root.

use std::{
    fs,
    path::{Path, PathBuf},
};

use abi_stable::library::{LibraryError, RootModule, lib_header_from_path};
use sha2::{Digest, Sha256};
use torus_abi::{export::PluginEntry, root::PluginRootRef};

use crate::{LoadError, elf, search::refuse_writable_by_others};

/// The folder that holds a copy of each plugin ever loaded, named by content. A library is loaded from there only:
/// the file a user may overwrite is never mapped, and a new version is a new path, so the system's loader, which goes
/// by path, does not answer with the old one.
#[derive(Clone, Debug)]
pub struct LibraryCache {
    folder: PathBuf,
}

/// A library that was loaded and whose root fits.
pub(crate) struct Library {
    pub entry: PluginEntry,
    pub path: PathBuf,
    pub sha256: String,
}

impl LibraryCache {
    pub fn new(folder: impl Into<PathBuf>) -> Self {
        Self { folder: folder.into() }
    }

    /// `pinned`: the SHA-256 that the file must have, in hexadecimal; nothing of another file is run.
    pub(crate) fn open(&self, path: &Path, pinned: Option<&str>) -> Result<Library, LoadError> {
        let unreadable = |source| LoadError::Unreadable { path: path.to_owned(), source };
        let path = path.canonicalize().map_err(unreadable)?;
        refuse_writable_by_others(&path, "file", &path.metadata().map_err(unreadable)?)?;
        let content = fs::read(&path).map_err(unreadable)?;
        let sha256 = hex(&Sha256::digest(&content));
        if let Some(pinned) = pinned.filter(|pinned| !pinned.eq_ignore_ascii_case(&sha256)) {
            return Err(LoadError::OtherHash { path, found: sha256, pinned: pinned.to_owned() });
        }
        elf::check(&path, &content)?;
        let copy = self.store(&sha256, &content)?;
        let root = load_root(&path, &copy)?;
        let entry = PluginEntry { describe: root.describe(), interface: root.interface() };
        Ok(Library { entry, path, sha256 })
    }

    /// Puts the content under its hash, unless it is there already.
    fn store(&self, sha256: &str, content: &[u8]) -> Result<PathBuf, LoadError> {
        let stored = self.folder.join(format!("{sha256}.so"));
        let failed = |source| LoadError::Cache { path: self.folder.clone(), source };
        fs::create_dir_all(&self.folder).map_err(failed)?;
        refuse_writable_by_others(&self.folder, "folder", &fs::metadata(&self.folder).map_err(failed)?)?;
        if fs::read(&stored).is_ok_and(|present| present == content) {
            return Ok(stored);
        }
        // Renamed into place, so that another process never maps half a file.
        let partial = self.folder.join(format!("{sha256}.{}.partial", std::process::id()));
        fs::write(&partial, content).and_then(|()| fs::rename(&partial, &stored)).map_err(failed)?;
        Ok(stored)
    }
}

/// Loads the copy and checks its root. The library is never unloaded: `abi_stable` leaks it on purpose.
fn load_root(path: &Path, copy: &Path) -> Result<PluginRootRef, LoadError> {
    // Not `RootModule::load_from_file`: it answers with the first library ever loaded, whatever the path.
    let loaded = lib_header_from_path(copy).and_then(|header| header.init_root_module::<PluginRootRef>());
    loaded.map_err(|error| match error {
        LibraryError::OpenError { err, .. } => LoadError::Refused { path: path.to_owned(), message: err.to_string() },
        LibraryError::GetSymbolError { .. } => LoadError::NoRoot { path: path.to_owned() },
        other => LoadError::RootMismatch { path: path.to_owned(), message: summary(&other) },
    })
}

/// `abi_stable` describes a mismatch with tens of thousands of characters; the reason is at the end.
fn summary(error: &LibraryError) -> String {
    const LONGEST: usize = 240;
    let text = error.to_string();
    let line = text.lines().map(str::trim).rev().find(|line| !line.is_empty()).unwrap_or_default();
    let expected = <PluginRootRef as RootModule>::VERSION_STRINGS.version;
    format!("root {expected}: {}", line.chars().take(LONGEST).collect::<String>())
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_of_another_hash_than_the_pinned_one_is_not_run() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("plugin.so");
        fs::write(&file, "a library").unwrap();
        let cache = LibraryCache::new(folder.path().join("cache"));
        let refused = |pinned: &str| cache.open(&file, Some(pinned)).err().unwrap();
        let error = refused("00ff");
        let LoadError::OtherHash { found, .. } = &error else { panic!("{error}") };
        assert!(error.to_string().contains("00ff"), "{error}");
        assert!(matches!(refused(&found.to_uppercase()), LoadError::NotALibrary { .. }));
    }

    #[test]
    fn a_missing_file_is_named() {
        let error = LibraryCache::new("unused").open(Path::new("/nonexistent/plugin.so"), None).err().unwrap();
        assert!(error.to_string().contains("/nonexistent/plugin.so"), "{error}");
    }

    #[test]
    fn a_library_that_is_no_plugin_has_no_root() {
        let folder = tempfile::tempdir().unwrap();
        let maps = fs::read_to_string("/proc/self/maps").unwrap();
        let libc = maps
            .lines()
            .find_map(|line| line.split_whitespace().last().filter(|path| path.contains("libgcc_s")))
            .unwrap();
        let error = LibraryCache::new(folder.path()).open(Path::new(libc), None).err().unwrap();
        assert!(matches!(error, LoadError::NoRoot { .. }), "{error}");
    }
}
