//! What an operator may write as `--model-path`.

use std::path::{Path, PathBuf};

use crate::{HubOptions, Progress, WeightsError, hub};

/// A model by where it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ModelPath {
    /// An existing folder.
    Folder(PathBuf),
    /// An existing `.gguf` file.
    Gguf(PathBuf),
    /// `org/name`, or `org/name/file.gguf`.
    Hub { repo: String, gguf: Option<String> },
}

/// A model on this machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ResolvedModel {
    Folder(PathBuf),
    Gguf(PathBuf),
}

impl ResolvedModel {
    pub fn path(&self) -> &Path {
        match self {
            Self::Folder(path) | Self::Gguf(path) => path,
        }
    }
}

impl ModelPath {
    /// What exists on this machine goes before the hub.
    pub fn parse(text: &str) -> Result<Self, WeightsError> {
        let refuse = |reason: &str| WeightsError::NoSuchModel { text: text.to_owned(), reason: reason.to_owned() };
        let path = Path::new(text);
        if path.is_dir() {
            return Ok(Self::Folder(path.to_owned()));
        }
        if path.exists() {
            return match is_gguf(text) {
                true => Ok(Self::Gguf(path.to_owned())),
                false => Err(refuse("it is a file, but no .gguf")),
            };
        }
        let parts: Vec<&str> = text.split('/').collect();
        if text.starts_with(['/', '.', '~']) || text.ends_with('/') || text.contains('\\') {
            return Err(refuse("there is no such file or folder"));
        }
        if !parts.iter().all(|part| is_hub_name(part)) {
            return Err(refuse(
                "there is no such file or folder, and hub ids hold only letters, digits, '-', '_' and '.'",
            ));
        }
        match parts.as_slice() {
            [org, name] if !is_gguf(name) => Ok(Self::Hub { repo: format!("{org}/{name}"), gguf: None }),
            [org, name, file @ ..] if file.last().is_some_and(|file| is_gguf(file)) => {
                Ok(Self::Hub { repo: format!("{org}/{name}"), gguf: Some(file.join("/")) })
            }
            _ => Err(refuse("there is no such file or folder, and it has not the form of a hub id")),
        }
    }

    /// Finds the model, downloading it if need be.
    pub fn resolve(text: &str, hub: &HubOptions, progress: &dyn Progress) -> Result<ResolvedModel, WeightsError> {
        match Self::parse(text)? {
            Self::Folder(path) => Ok(ResolvedModel::Folder(path)),
            Self::Gguf(path) => Ok(ResolvedModel::Gguf(path)),
            Self::Hub { repo, gguf } => hub::fetch(&repo, gguf.as_deref(), hub, progress),
        }
    }
}

fn is_gguf(name: &str) -> bool {
    Path::new(name).extension().is_some_and(|ending| ending.eq_ignore_ascii_case("gguf"))
}

fn is_hub_name(text: &str) -> bool {
    let is_allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    text.starts_with(|c: char| c.is_ascii_alphanumeric()) && text.chars().all(is_allowed) && !text.contains("..")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_exists_is_taken_as_it_is() {
        let folder = tempfile::tempdir().unwrap();
        let file = |name: &str| {
            let path = folder.path().join(name);
            std::fs::write(&path, "").unwrap();
            path
        };
        let (gguf, other) = (file("m.GGUF"), file("model.safetensors"));
        let parse = |path: &Path| ModelPath::parse(path.to_str().unwrap());
        assert_eq!(parse(folder.path()).unwrap(), ModelPath::Folder(folder.path().to_owned()));
        assert_eq!(parse(&gguf).unwrap(), ModelPath::Gguf(gguf));
        assert!(parse(&other).unwrap_err().to_string().contains("but no .gguf"));
    }

    #[test]
    fn hub_ids_have_an_organization_and_a_name() {
        let hub = |repo: &str, gguf: Option<&str>| ModelPath::Hub { repo: repo.into(), gguf: gguf.map(str::to_owned) };
        assert_eq!(ModelPath::parse("org/Name-1.5_b").unwrap(), hub("org/Name-1.5_b", None));
        assert_eq!(ModelPath::parse("org/name/m.gguf").unwrap(), hub("org/name", Some("m.gguf")));
        assert_eq!(ModelPath::parse("org/name/q4/m.gguf").unwrap(), hub("org/name", Some("q4/m.gguf")));
    }

    #[test]
    fn mistyped_paths_do_not_become_hub_ids() {
        let texts = [
            "",
            "name",
            "/no/folder",
            "./org/name",
            "../name",
            "~/name",
            "org/name/",
            "a/b/c",
            "a/..",
            "a/b..c",
            "models/m.gguf",
            "org//m.gguf",
            "a\\b",
            "a/b c",
            "a/b?x",
            "org/../name/m.gguf",
        ];
        for text in texts {
            let error = ModelPath::parse(text).unwrap_err().to_string();
            assert!(error.contains("there is no such file or folder") && error.contains("hub id"), "{text}: {error}");
        }
    }
}
