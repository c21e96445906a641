//! The arrows between crates that the design allows, held against `cargo metadata`.

use std::collections::BTreeMap;

use cargo_metadata::{DependencyKind, MetadataCommand};

/// From each crate of the workspace to the workspace crates it depends on to be built.
fn arrows() -> BTreeMap<String, Vec<String>> {
    let metadata = MetadataCommand::new().no_deps().exec().expect("cargo metadata");
    let members: Vec<_> = metadata.workspace_packages().iter().map(|package| package.name.to_string()).collect();
    let normal = |package: &cargo_metadata::Package| {
        let dependencies = package.dependencies.iter();
        let normal = dependencies.filter(|d| d.kind == DependencyKind::Normal && members.contains(&d.name));
        normal.map(|d| d.name.clone()).collect()
    };
    metadata.workspace_packages().into_iter().map(|package| (package.name.to_string(), normal(package))).collect()
}

/// The top-level folder of each crate of the workspace.
fn folders() -> BTreeMap<String, String> {
    let metadata = MetadataCommand::new().no_deps().exec().expect("cargo metadata");
    let root = metadata.workspace_root.clone();
    let folder = |package: &cargo_metadata::Package| {
        let relative = package.manifest_path.strip_prefix(&root).expect("a member outside of the workspace");
        relative.components().next().expect("an empty path").to_string()
    };
    metadata.workspace_packages().into_iter().map(|package| (package.name.to_string(), folder(package))).collect()
}

#[test]
fn dependencies_point_only_where_the_design_allows() {
    let folders = folders();
    for (from, targets) in arrows() {
        for to in targets {
            let allowed = match (folders[&from].as_str(), folders[&to].as_str()) {
                ("plugin-api", "plugin-api") => true,
                ("kernels", "kernels") | ("kernels", "plugin-api") => true,
                ("plugins", "plugin-api") | ("plugins", "kernels") => true,
                ("host", "host") | ("host", "plugin-api") | ("host", "kernels") => true,
                // Stock plugins are linked in by the binary and by nothing else.
                ("host", "plugins") => from == "torus-app",
                ("tests", _) => true,
                _ => false,
            };
            assert!(allowed, "{from} must not depend on {to}");
        }
    }
}

#[test]
fn pure_crates_stay_pure() {
    let arrows = arrows();
    assert_eq!(arrows["torus-abi"], Vec::<String>::new());
    assert_eq!(arrows["torus-cache"], Vec::<String>::new());
    assert_eq!(arrows["torus-sched"], ["torus-cache"]);
    assert_eq!(arrows["torus-openai"], Vec::<String>::new());
}
