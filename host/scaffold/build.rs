//! Lists the files that the crate carries: the plugin API and the examples that projects are made from. Writes
//! `embedded.rs`, in which each becomes an `include_str!`.

use std::{
    env, fs, io,
    path::{Path, PathBuf},
};

fn main() -> io::Result<()> {
    let root = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").unwrap_or_default()).join("../..").canonicalize()?;
    let workspace = root.join("Cargo.toml");
    watch(&workspace);
    let mut api = Vec::new();
    for folder in crates(&root.join("plugin-api"))? {
        sources(&folder, &["Cargo.toml", "src"], &mut api)?;
    }
    let mut code = format!("pub const WORKSPACE: &str = include_str!({workspace:?});\n");
    code += &list("API", &root.join("plugin-api"), &api);
    for kind in ["model", "attention", "speculative"] {
        let folder = root.join(format!("examples/{kind}-plugin"));
        let mut files = Vec::new();
        sources(&folder, &["Cargo.lock", "Cargo.toml", "README.md", "src", "testdata"], &mut files)?;
        code += &list(&kind.to_uppercase(), &folder, &files);
    }
    fs::write(PathBuf::from(env::var_os("OUT_DIR").unwrap_or_default()).join("embedded.rs"), code)
}

/// The folders that hold a crate, in order.
fn crates(folder: &Path) -> io::Result<Vec<PathBuf>> {
    watch(folder);
    Ok(entries(folder)?.into_iter().filter(|entry| entry.join("Cargo.toml").is_file()).collect())
}

fn sources(folder: &Path, names: &[&str], files: &mut Vec<PathBuf>) -> io::Result<()> {
    for path in names.iter().map(|name| folder.join(name)).filter(|path| path.exists()) {
        watch(&path);
        add(&path, files)?;
    }
    Ok(())
}

fn add(path: &Path, files: &mut Vec<PathBuf>) -> io::Result<()> {
    if path.is_dir() {
        return entries(path)?.iter().try_for_each(|entry| add(entry, files));
    }
    files.push(path.to_owned());
    Ok(())
}

fn entries(folder: &Path) -> io::Result<Vec<PathBuf>> {
    let mut entries: Vec<_> = fs::read_dir(folder)?.map(|entry| Ok(entry?.path())).collect::<io::Result<_>>()?;
    entries.sort();
    Ok(entries)
}

/// `pub const NAME: &[File]`, with paths relative to `base`.
fn list(name: &str, base: &Path, files: &[PathBuf]) -> String {
    let item = |file: &PathBuf| {
        let path = file.strip_prefix(base).unwrap_or(file);
        format!("    File {{ path: {path:?}, text: include_str!({file:?}) }},\n")
    };
    format!("pub const {name}: &[File] = &[\n{}];\n", files.iter().map(item).collect::<String>())
}

fn watch(path: &Path) {
    println!("cargo:rerun-if-changed={}", path.display());
}
