//! Plugins from outside of the tree: what `torus plugins new` writes builds, passes its own tests and loads.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    process::{Command, Output},
};

use crate::server::{plugins_target, torus};

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..").canonicalize().unwrap()
}

fn run(command: &mut Command) -> Output {
    let output = command.output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(output.status.success(), "{command:?}:\n{}{}", text(&output.stdout), text(&output.stderr));
    output
}

fn cargo(command: &str, project: &Path) {
    // `--locked`: the lock file that was written is complete, and `--offline`: nothing else is needed.
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or("cargo".into()));
    cargo.args([command, "--release", "--locked", "--offline", "--target-dir"]).arg(plugins_target());
    run(cargo.current_dir(project));
}

#[test]
fn a_new_project_of_each_kind_builds_passes_its_tests_and_loads() {
    // Always the same folder, because cargo keeps what it built for each path.
    let folder = plugins_target().join("projects");
    if folder.exists() {
        fs::remove_dir_all(&folder).unwrap();
    }
    let mut api = None;
    for kind in ["attention", "model", "speculative"] {
        let (name, project) = (format!("new-{kind}"), folder.join(kind));
        let mut new = Command::new(torus());
        new.args(["plugin", "new", "--kind", kind, &name, "--path"]).arg(&project);
        // The first writes the plugin API beside it, the others are built with that copy.
        let written = run(new.args(api.iter().flat_map(|api: &PathBuf| [Path::new("--api"), api.as_path()])));
        let library = format!("target/release/libnew_{kind}.so");
        assert!(String::from_utf8(written.stdout).unwrap().contains(&format!("  torus plugins check {library}\n")));
        api.get_or_insert(project.join("torus-plugin-api"));
        cargo("test", &project);
        cargo("build", &project);
        let built = plugins_target().join("release").join(format!("libnew_{kind}.so"));
        let report = run(Command::new(torus()).args(["plugins", "check"]).arg(&built));
        let report = String::from_utf8(report.stdout).unwrap();
        assert!(
            report.contains(&format!("new_{kind} 0.1.0")) && report.contains(&format!("offers: {kind}")),
            "{report}"
        );
    }
}

#[test]
fn a_mistaken_call_is_explained_and_writes_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let refused = |arguments: &[&str]| {
        let output =
            Command::new(torus()).args(["plugins", "new", "--kind"]).args(arguments).current_dir(&folder).output();
        let output = output.unwrap();
        assert!(!output.status.success());
        String::from_utf8(output.stderr).unwrap()
    };
    assert!(refused(&["kernel", "mine"]).contains("[possible values: model, attention, speculative]"));
    assert!(refused(&["model", "Mine"]).contains("use lower-case letters"));
    assert!(refused(&["model", "mine", "--api", "nowhere"]).contains("no plugin/Cargo.toml"));
    assert_eq!(fs::read_dir(&folder).unwrap().count(), 0);
}

/// Each external crate of a lock file, with its version and hash.
fn locked(file: &Path) -> BTreeSet<String> {
    let text = fs::read_to_string(file).unwrap();
    let packages = text.split("\n\n").filter(|package| package.contains("\nchecksum = "));
    packages.map(|package| package.split("dependencies = ").next().unwrap().trim().to_owned()).collect()
}

#[test]
fn examples_are_locked_to_the_versions_that_are_tested() {
    let ours = locked(&repository().join("Cargo.lock"));
    for kind in ["attention", "model", "speculative"] {
        let example = locked(&repository().join(format!("examples/{kind}-plugin/Cargo.lock")));
        let other: Vec<_> = example.difference(&ours).collect();
        assert!(example.len() > 10 && other.is_empty(), "{kind}: {other:#?}");
    }
}
