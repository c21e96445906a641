//! Opens a plugin library: checks the file, copies it under its hash, loads the copy, checks the root.

use std::{
    fs,
    path::{Path, PathBuf},
};

use abi_stable::library::{LibraryError, RootModule, lib_header_from_path};
use sha2::{Digest, Sha256};
use torus_abi::{export::PluginEntry, root::PluginRootRef};

use crate::{LoadError, search::refuse_writable_by_others};

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
        check_elf(&path, &content)?;
        let sha256 = hex(&Sha256::digest(&content));
        if let Some(pinned) = pinned.filter(|pinned| !pinned.eq_ignore_ascii_case(&sha256)) {
            return Err(LoadError::OtherHash { path, found: sha256, pinned: pinned.to_owned() });
        }
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

/// ELF machine numbers of the targets Torus runs on, with the names Rust uses for them.
const MACHINES: [(u16, &str); 4] = [(62, "x86_64"), (183, "aarch64"), (243, "riscv64"), (3, "x86")];

/// Reads as much of the ELF header as tells a shared library for this machine from anything else. The system's loader
/// would refuse these files too, but with a message that names no remedy.
fn check_elf(path: &Path, content: &[u8]) -> Result<(), LoadError> {
    let not = |reason| LoadError::NotALibrary { path: path.to_owned(), reason };
    let half = |at: usize| content.get(at..at + 2).map(|bytes| u16::from_le_bytes([bytes[0], bytes[1]]));
    let word = |at: usize| {
        let bytes = content.get(at..at + 8)?;
        Some(u64::from_le_bytes(bytes.try_into().ok()?))
    };
    if content.get(..4) != Some(b"\x7fELF") {
        return Err(not("it does not start with an ELF header"));
    }
    if content.get(4..6) != Some(&[2, 1]) {
        return Err(not("it is not a 64-bit little-endian ELF file"));
    }
    let (Some(kind), Some(machine)) = (half(16), half(18)) else { return Err(not("its header is cut off")) };
    const SHARED_OBJECT: u16 = 3;
    if kind != SHARED_OBJECT {
        return Err(not("it is an ELF file of another type than a shared object"));
    }
    let found = MACHINES.iter().find(|(number, _)| *number == machine).map(|(_, name)| (*name).to_owned());
    let found = found.unwrap_or_else(|| format!("machine {machine}"));
    if found != std::env::consts::ARCH {
        return Err(LoadError::WrongArchitecture { path: path.to_owned(), found, expected: std::env::consts::ARCH });
    }
    // The section headers stand at the end of the file, so a file that was cut off lacks them.
    let sections_end = (|| word(40)?.checked_add(u64::from(half(58)?) * u64::from(half(60)?)))();
    if sections_end.is_none_or(|end| end > content.len() as u64) {
        return Err(not("it is cut off before its end"));
    }
    Ok(())
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(content: &[u8]) -> LoadError {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("plugin.so");
        fs::write(&file, content).unwrap();
        LibraryCache::new(folder.path().join("cache")).open(&file, None).err().unwrap()
    }

    /// A header that claims to be a shared object for `machine`, with no sections.
    fn header(kind: u16, machine: u16) -> Vec<u8> {
        let mut elf = vec![0; 64];
        elf[..6].copy_from_slice(b"\x7fELF\x02\x01");
        elf[16..18].copy_from_slice(&kind.to_le_bytes());
        elf[18..20].copy_from_slice(&machine.to_le_bytes());
        elf
    }

    fn this_machine() -> u16 {
        MACHINES.iter().find(|(_, name)| *name == std::env::consts::ARCH).unwrap().0
    }

    #[test]
    fn files_that_are_no_library_for_this_machine_are_told_apart() {
        assert!(matches!(open(b"# a plugin"), LoadError::NotALibrary { reason, .. } if reason.contains("ELF header")));
        assert!(
            matches!(open(&header(2, this_machine())), LoadError::NotALibrary { reason, .. } if reason.contains("type"))
        );
        assert!(matches!(open(&header(3, 22)), LoadError::WrongArchitecture { found, .. } if found == "machine 22"));
        let mut cut = header(3, this_machine());
        cut[40..48].copy_from_slice(&9_000u64.to_le_bytes());
        assert!(matches!(open(&cut), LoadError::NotALibrary { reason, .. } if reason.contains("cut off")));
        assert!(matches!(open(&header(3, this_machine())), LoadError::Refused { .. }));
    }

    #[test]
    fn a_file_of_another_hash_than_the_pinned_one_is_not_run() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("plugin.so");
        fs::write(&file, header(3, this_machine())).unwrap();
        let cache = LibraryCache::new(folder.path().join("cache"));
        let refused = |pinned: &str| cache.open(&file, Some(pinned)).err().unwrap();
        let error = refused("00ff");
        let LoadError::OtherHash { found, .. } = &error else { panic!("{error}") };
        assert!(error.to_string().contains("00ff"), "{error}");
        assert!(matches!(refused(&found.to_uppercase()), LoadError::Refused { .. }));
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
