//! Writes out a plugin project that builds, and the plugin API that it is built with.
//!
//! The projects are the examples of this repository under other names, so that what a user starts from is compiled and
//! tested here. The API is the sources of `plugin-api`, so that nothing of Torus has to come from a registry. A build
//! script lists both; they are part of the binary.
//!
//! Deliberately absent: cargo. What is written is built by its owner.
//!
//! Invariants:
//! - Nothing that exists is overwritten.
//! - The same names give the same files.

#![forbid(unsafe_code)]

mod api;
mod name;
mod project;

use std::{
    fs,
    path::{Path, PathBuf},
};

pub use name::{Name, NameError};
pub use project::{Kind, Project, create};

/// A file that the binary carries.
struct File {
    path: &'static str,
    text: &'static str,
}

/// What the build script found.
mod embedded {
    use super::File;

    include!(concat!(env!("OUT_DIR"), "/embedded.rs"));
}

/// Why a project was not written.
#[derive(Debug, thiserror::Error)]
pub enum ScaffoldError {
    #[error(transparent)]
    Name(#[from] NameError),
    #[error("{} is not empty; give another folder with --path", .0.display())]
    NotEmpty(PathBuf),
    #[error("--api {}: there is no plugin/Cargo.toml in it; give a copy of the plugin API that 'torus plugin new' \
             wrote, or the folder plugin-api of a checkout of Torus", .0.display())]
    NoApi(PathBuf),
    #[error("{}: {source}", .path.display())]
    Io { path: PathBuf, source: std::io::Error },
}

fn write(path: &Path, text: &str) -> Result<(), ScaffoldError> {
    let failed = |source| ScaffoldError::Io { path: path.to_owned(), source };
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder).map_err(failed)?;
    }
    fs::write(path, text).map_err(failed)
}
