//! A project: an example of this repository under another name.

use std::{
    fs,
    path::{Component, Path, PathBuf},
};

use crate::{File, Name, NameError, ScaffoldError, api, embedded, write};

/// What a plugin is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Model,
    Attention,
    Speculative,
}

/// What was written.
#[derive(Debug)]
pub struct Project {
    pub folder: PathBuf,
    /// The copy of the plugin API, if one was written.
    pub api: Option<PathBuf>,
    /// The commands to type next, a line each.
    pub commands: String,
}

/// Name of the folder of the API within a project.
const API: &str = "torus-plugin-api";
/// How the examples name the facade.
const EXAMPLE_API: &str = "../../plugin-api/plugin";

impl Kind {
    /// The example and its names.
    fn example(self) -> (&'static [File], Name) {
        let (files, package, plugin, type_name) = match self {
            Kind::Model => (embedded::MODEL, "granite-model", "granite_model", "GraniteModel"),
            Kind::Attention => (embedded::ATTENTION, "paged-attention", "paged_attention", "PagedAttention"),
            Kind::Speculative => (embedded::SPECULATIVE, "prompt-lookup", "prompt_lookup", "PromptLookup"),
        };
        (files, Name { package: package.into(), plugin: plugin.into(), type_name: type_name.into() })
    }
}

/// Writes a project into `folder`, which must be empty or not exist. It is built with the plugin API in `api`, or with a
/// copy that is written beside it.
pub fn create(kind: Kind, name: &Name, folder: &Path, api: Option<&Path>) -> Result<Project, ScaffoldError> {
    let (files, example) = kind.example();
    check_name(name, &example, files)?;
    let failed = |path: &Path| {
        let path = path.to_owned();
        |source| ScaffoldError::Io { path, source }
    };
    if let Some(api) = api.filter(|api| !api.join("plugin/Cargo.toml").is_file()) {
        return Err(ScaffoldError::NoApi(api.to_owned()));
    }
    fs::create_dir_all(folder).map_err(failed(folder))?;
    if fs::read_dir(folder).map_err(failed(folder))?.next().is_some() {
        return Err(ScaffoldError::NotEmpty(folder.to_owned()));
    }
    let facade = match api {
        Some(api) => {
            let (from, to) = (folder.canonicalize().map_err(failed(folder))?, api.canonicalize().map_err(failed(api))?);
            relative(&from, &to.join("plugin"))
        }
        None => Path::new(API).join("plugin"),
    };
    let mut commands = String::new();
    for file in files {
        let mut text = rename(file.text, &example, name);
        match file.path {
            "Cargo.toml" => text = manifest(&text, &facade),
            "Cargo.lock" => text = sorted(&text),
            "README.md" => commands = first_shell_block(&text).to_owned(),
            _ => {}
        }
        write(&folder.join(file.path), &text)?;
    }
    write(&folder.join(".gitignore"), "/target/\n")?;
    let written = if api.is_none() { Some(folder.join(API)) } else { None };
    if let Some(api) = &written {
        api::create(api)?;
    }
    Ok(Project { folder: folder.to_owned(), api: written, commands })
}

/// Refuses names that would mean something else in the project.
fn check_name(name: &Name, example: &Name, files: &[File]) -> Result<(), NameError> {
    if name == example {
        return Ok(());
    }
    let lock = files.iter().find(|file| file.path == "Cargo.lock").map_or("", |file| file.text);
    let crates = lock.lines().filter_map(|line| line.strip_prefix("name = \"")?.strip_suffix('"'));
    if crates.map(|krate| krate.replace('-', "_")).any(|krate| krate == name.plugin) {
        return Err(NameError::Crate(name.package.clone()));
    }
    let sources = files.iter().filter(|file| file.path.ends_with(".rs"));
    if sources.flat_map(|file| words(file.text)).any(|word| word == name.type_name) {
        return Err(NameError::Type { name: name.package.clone(), type_name: name.type_name.clone() });
    }
    Ok(())
}

/// Identifiers, with what lies between them left out.
fn words(text: &str) -> impl Iterator<Item = &str> {
    text.split(|c: char| !c.is_alphanumeric() && c != '_').filter(|word| !word.is_empty())
}

/// The names of the example are unlike any word of prose, so each of their occurrences is meant. One pass: a new name may
/// contain an old one.
fn rename(mut text: &str, from: &Name, to: &Name) -> String {
    let names = [(&from.package, &to.package), (&from.plugin, &to.plugin), (&from.type_name, &to.type_name)];
    let mut renamed = String::with_capacity(text.len());
    while let Some((at, (old, new))) =
        names.iter().filter_map(|pair| Some((text.find(pair.0)?, pair))).min_by_key(|p| p.0)
    {
        renamed.push_str(&text[..at]);
        renamed.push_str(new);
        text = &text[at + old.len()..];
    }
    renamed + text
}

/// The manifest with the facade where it is, which must not be taken for a member of the project's workspace.
fn manifest(text: &str, facade: &Path) -> String {
    let workspace = format!("[workspace]\nexclude = [\"{API}\"]\n");
    text.replace("[workspace]\n", &workspace).replace(EXAMPLE_API, &facade.display().to_string())
}

/// The lock file with its packages in the order that cargo wants.
fn sorted(lock: &str) -> String {
    let mut parts = lock.trim_end().split("\n\n");
    let header = parts.next().unwrap_or_default();
    let mut packages: Vec<_> = parts.collect();
    packages.sort_by_key(|package| package.lines().nth(1).map(|name| name.trim_end_matches('"').to_owned()));
    format!("{header}\n\n{}\n", packages.join("\n\n"))
}

fn first_shell_block(text: &str) -> &str {
    let block = text.split_once("```sh\n").and_then(|(_, rest)| rest.split_once("```"));
    block.map_or("", |(block, _)| block)
}

/// The path from one folder to another; both are canonical.
fn relative(from: &Path, to: &Path) -> PathBuf {
    let (from, to): (Vec<_>, Vec<_>) = (from.components().collect(), to.components().collect());
    let shared = from.iter().zip(&to).take_while(|(a, b)| a == b).count();
    let up = from[shared..].iter().map(|_| Component::ParentDir);
    up.chain(to[shared..].iter().copied()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const KINDS: [Kind; 3] = [Kind::Model, Kind::Attention, Kind::Speculative];

    #[test]
    fn nothing_of_the_example_is_left_but_what_it_does() {
        for kind in KINDS {
            let folder = tempfile::tempdir().unwrap();
            let (files, example) = kind.example();
            let name = Name::new("zz-top").unwrap();
            let project = create(kind, &name, &folder.path().join("p"), None).unwrap();
            for file in files {
                let text = fs::read_to_string(project.folder.join(file.path)).unwrap();
                for old in [&example.package, &example.plugin, &example.type_name] {
                    assert!(!text.contains(old.as_str()), "{old} in {}", file.path);
                }
            }
            let library = fs::read_to_string(project.folder.join("src/lib.rs")).unwrap();
            assert!(library.contains("name: \"zz_top\"") && library.contains(": ZzTop"), "{library}");
            assert!(project.commands.contains("torus plugins check target/release/libzz_top.so"), "{project:?}");
            assert!(project.api.unwrap().join("plugin/src/lib.rs").is_file());
        }
    }

    #[test]
    fn an_existing_copy_of_the_api_is_used() {
        let folder = tempfile::tempdir().unwrap();
        let [first, second] = ["first", "second"].map(|name| folder.path().join(name));
        let api = create(Kind::Model, &Name::new("zz-top").unwrap(), &first, None).unwrap().api.unwrap();
        create(Kind::Attention, &Name::new("aa").unwrap(), &second, Some(&api)).unwrap();
        let manifest = fs::read_to_string(second.join("Cargo.toml")).unwrap();
        assert!(manifest.contains("{ path = \"../first/torus-plugin-api/plugin\" }"), "{manifest}");
        assert!(!second.join(API).exists());
        let error = create(Kind::Model, &Name::new("bb").unwrap(), &folder.path().join("third"), Some(&second));
        assert!(error.unwrap_err().to_string().contains("there is no plugin/Cargo.toml"));
        assert!(!folder.path().join("third").exists(), "nothing is written for a mistaken call");
    }

    #[test]
    fn nothing_is_overwritten() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("mine"), "").unwrap();
        let error = create(Kind::Model, &Name::new("zz").unwrap(), folder.path(), None).unwrap_err();
        assert!(matches!(error, ScaffoldError::NotEmpty(_)), "{error}");
    }

    #[test]
    fn names_that_mean_something_else_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let refused = |name: &str| {
            let error = create(Kind::Attention, &Name::new(name).unwrap(), &folder.path().join("p"), None).unwrap_err();
            assert!(!folder.path().join("p").exists());
            error.to_string()
        };
        for name in ["serde", "torus-plugin", "torus_hlo"] {
            assert!(refused(name).contains("built with a crate of that name"));
        }
        assert!(refused("attention").contains("try my-attention"));
    }

    #[test]
    fn a_new_name_may_contain_the_old_one() {
        let (old, new) = (Kind::Speculative.example().1, Name::new("my_prompt_lookup").unwrap());
        assert_eq!(
            rename("prompt-lookup, prompt_lookup: PromptLookup", &old, &new),
            "my_prompt_lookup, my_prompt_lookup: MyPromptLookup"
        );
    }

    #[test]
    fn lock_files_are_sorted() {
        let lock = "# made\nversion = 4\n\n[[package]]\nname = \"b\"\n\n[[package]]\nname = \"a-b\"\n\n[[package]]\nname = \"a\"\n";
        let order: Vec<_> =
            sorted(lock).lines().filter_map(|line| line.strip_prefix("name = ").map(str::to_owned)).collect();
        assert_eq!(order, ["\"a\"", "\"a-b\"", "\"b\""]);
    }
}
