//! Files that are no plugins of this host: a distinct error each, which names the file and what to do about it.

use std::{fs, path::Path};

use torus_plugins::{LibraryCache, LoadError, Registry, RegistryError};

use super::{copy, data};

/// Loads a file, which fails, and checks that the message names it and the remedy.
fn refused(file: &Path, remedy: &str) -> LoadError {
    let cache = tempfile::tempdir().unwrap();
    let mut registry = Registry::default();
    let error = registry.load(file, &LibraryCache::new(cache.path())).unwrap_err();
    assert!(registry.plugins().is_empty());
    let RegistryError::Load(error) = error else { panic!("{error}") };
    let message = error.to_string();
    assert!(message.starts_with(&file.canonicalize().unwrap().display().to_string()), "{message}");
    assert!(message.contains(remedy), "{message}");
    error
}

fn stored(name: &str, remedy: &str) -> LoadError {
    let (_folder, file) = copy(&data().join(name));
    refused(&file, remedy)
}

#[test]
fn a_library_whose_panics_abort() {
    let error = stored("panic_abort.so", "build it with panic = \"unwind\"");
    assert!(matches!(error, LoadError::PanicStrategy { name, .. } if name == "panic_abort"));
}

#[test]
fn a_library_for_another_architecture() {
    let error = stored("aarch64.so", "build it for x86_64");
    assert!(matches!(error, LoadError::WrongArchitecture { found, .. } if found == "aarch64"));
}

/// Its constructor would end the process: what is no plugin is not even mapped.
#[test]
fn a_library_without_a_root() {
    let error = stored("no_root.so", "torus_abi::export_plugin!");
    assert!(matches!(error, LoadError::NoRoot { .. }));
}

#[test]
fn a_library_with_a_root_of_another_type_or_none_under_its_name() {
    for name in ["wrong_root.so", "garbage_root.so", "short_root.so", "root_function.so"] {
        let error = stored(name, "rebuild it with a current plugin API");
        assert!(matches!(error, LoadError::RootMismatch { .. }), "{error}");
    }
}

/// Wherever it ends: in its header, its code, before its section table, a byte short.
#[test]
fn a_truncated_library() {
    let (_folder, file) = copy(&data().join("released_0_1_a.so"));
    let whole = fs::read(&file).unwrap();
    for length in [64, 4096, whole.len() / 2, whole.len() - 2000, whole.len() - 1] {
        fs::write(&file, &whole[..length]).unwrap();
        let error = refused(&file, "copy it again");
        assert!(matches!(error, LoadError::Truncated { .. }), "{length}: {error}");
    }
}

#[test]
fn a_text_file() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("plugin.so");
    for text in ["", "fn main() {}\n", "\x7fELF"] {
        fs::write(&file, text).unwrap();
        let error = refused(&file, "crate of type 'cdylib'");
        assert!(matches!(error, LoadError::NotALibrary { .. }), "{error}");
    }
}

#[test]
fn two_plugins_of_one_name() {
    let (folder, first) = copy(&data().join("released_0_1_a.so"));
    let second = folder.path().join("other.so");
    let mut content = fs::read(&first).unwrap();
    // Behind the end of what is mapped: another file, the same code.
    content.push(0);
    fs::write(&second, content).unwrap();
    let cache = LibraryCache::new(folder.path().join("cache"));
    let mut registry = Registry::default();
    registry.load(&first, &cache).unwrap();
    let error = registry.load(&second, &cache).unwrap_err();
    assert!(matches!(&error, RegistryError::DuplicateName { name, .. } if name == "released_0_1_a"), "{error}");
    let message = error.to_string();
    for part in ["released_0_1_a.so", "other.so", "remove one"] {
        assert!(message.contains(part), "{message}");
    }
    assert_eq!(registry.plugins().len(), 1);
}
