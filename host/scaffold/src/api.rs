//! The plugin API as a workspace of its own: the crates of `plugin-api` without their tests.

use std::{collections::BTreeSet, path::Path};

use crate::{ScaffoldError, embedded, write};

const HEADER: &str = "# The plugin API of Torus, as the binary that wrote it has it.\n\n";

/// Writes the API into `folder`.
pub fn create(folder: &Path) -> Result<(), ScaffoldError> {
    for (path, text) in files() {
        write(&folder.join(path), &text)?;
    }
    Ok(())
}

/// Paths and contents.
fn files() -> Vec<(String, String)> {
    let mut files = vec![("Cargo.toml".to_owned(), workspace())];
    for file in embedded::API.iter().filter(|file| !is_test(file.path)) {
        let manifest = file.path.ends_with("Cargo.toml");
        let text = if manifest { without_tests(file.text) } else { file.text.to_owned() };
        files.push((file.path.to_owned(), text));
    }
    files
}

fn is_test(path: &str) -> bool {
    path.ends_with("/tests.rs") || path.contains("/tests/")
}

/// The crates' folders.
fn members() -> Vec<&'static str> {
    embedded::API.iter().filter_map(|file| file.path.strip_suffix("/Cargo.toml")).collect()
}

/// The manifest of the workspace: this repository's own, reduced to what the API needs.
fn workspace() -> String {
    let members: Vec<_> = members().iter().map(|member| format!("\"{member}\"")).collect();
    let mut text = format!("{HEADER}[workspace]\nresolver = \"3\"\nmembers = [{}]\n", members.join(", "));
    let needed = needed();
    for section in sections(embedded::WORKSPACE) {
        match header(section) {
            "[workspace.dependencies]" => {
                text += "\n[workspace.dependencies]\n";
                let lines = section.lines().filter(|line| key(line).is_some_and(|key| needed.contains(key)));
                lines.for_each(|line| text += &(line.replace("\"plugin-api/", "\"") + "\n"));
            }
            "[workspace.package]" => text += &format!("\n{}\n", section.trim_end()),
            header if header.starts_with("[workspace.lints") => text += &format!("\n{}\n", section.trim_end()),
            _ => {}
        }
    }
    text
}

/// Names of all dependencies of the crates.
fn needed() -> BTreeSet<&'static str> {
    let manifests = embedded::API.iter().filter(|file| file.path.ends_with("Cargo.toml"));
    let dependencies = manifests.flat_map(|file| sections(file.text)).filter(|s| header(s) == "[dependencies]");
    dependencies.flat_map(str::lines).filter_map(key).collect()
}

/// `serde` of `serde.workspace = true` and of `serde = "1"`.
fn key(line: &str) -> Option<&str> {
    let (key, _) = line.split_once(['.', ' ', '='])?;
    (!key.is_empty() && !key.starts_with(['[', '#'])).then_some(key)
}

/// A crate's manifest without what only its tests need.
fn without_tests(manifest: &str) -> String {
    let test = |section: &str| {
        ["[dev-dependencies", "[[test]]", "[[bench]]", "[[example]]"].iter().any(|s| header(section).starts_with(s))
    };
    let kept: String = sections(manifest).into_iter().filter(|section| !test(section)).collect();
    kept.trim_end().to_owned() + "\n"
}

/// A manifest cut into its sections, each with the comments before its header.
fn sections(manifest: &str) -> Vec<&str> {
    let mut starts = vec![0];
    for (header, _) in manifest.match_indices("\n[") {
        let mut start = header + 1;
        while let Some(line) = manifest[..start].lines().next_back().filter(|line| line.starts_with('#')) {
            start -= line.len() + 1;
        }
        starts.push(start);
    }
    starts.push(manifest.len());
    starts.windows(2).map(|range| &manifest[range[0]..range[1]]).collect()
}

fn header(section: &str) -> &str {
    section.lines().find(|line| line.starts_with('[')).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_workspace_has_what_the_crates_name_and_nothing_else() {
        let text = workspace();
        let section = sections(&text).into_iter().find(|s| header(s) == "[workspace.dependencies]").unwrap().to_owned();
        let given: BTreeSet<_> = section.lines().filter_map(key).collect();
        assert_eq!(given, needed());
        assert!(!text.contains("profile"), "{text}");
        assert!(text.contains("torus-abi = { path = \"abi\" }\n"), "{text}");
        assert!(text.contains("[workspace.package]") && text.contains("[workspace.lints.clippy]"), "{text}");
    }

    #[test]
    fn tests_and_their_dependencies_are_left_out() {
        let files = files();
        assert!(files.iter().all(|(path, _)| !is_test(path)));
        let hlo = &files.iter().find(|(path, _)| path == "hlo/Cargo.toml").unwrap().1;
        assert!(hlo.contains("[dependencies]") && !hlo.contains("dev-dependencies") && !hlo.contains("torus-pjrt"));
    }
}
