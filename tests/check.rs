//! `torus plugins check` on the stock plugins and on those of `examples`.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use serde_json::Value;

use crate::server::{example_library, stock_library, torus};

/// Whether a plugin conforms, and the findings.
fn check(library: &Path, options: &[&str]) -> (bool, Vec<Value>) {
    let output =
        Command::new(torus()).args(["plugins", "check", "--json"]).arg(library).args(options).output().unwrap();
    let findings: Value = serde_json::from_slice(&output.stdout)
        .unwrap_or_else(|error| panic!("{error}: {}", String::from_utf8_lossy(&output.stderr)));
    (output.status.success(), findings.as_array().unwrap().clone())
}

fn outcomes<'f>(findings: &'f [Value], outcome: &str) -> Vec<&'f Value> {
    findings.iter().filter(|finding| finding["outcome"] == outcome).collect()
}

fn config(case: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("data").join(case).join("config.json")
}

#[test]
fn stock_and_example_plugins_conform_on_a_cpu() {
    for (library, case, passed_min) in [
        (stock_library("torus_attention_native"), None, 35),
        (stock_library("torus_attention_flash"), None, 30),
        (example_library("native_loop"), None, 18),
        (example_library("prompt_lookup"), None, 8),
        (stock_library("torus_model_llama"), Some("llama/odd-sizes"), 18),
        (stock_library("torus_model_qwen"), Some("qwen/qwen3-grouped-tied"), 18),
        (example_library("granite_model"), Some("granite/odd-sizes-tied"), 17),
    ] {
        let config = case.map(|case| config(case).to_str().unwrap().to_owned());
        let options: Vec<_> = config.iter().flat_map(|config| ["--config", config]).collect();
        let (conforms, findings) = check(&library, &options);
        assert!(conforms, "{}: {:?}", library.display(), outcomes(&findings, "failed"));
        assert!(outcomes(&findings, "passed").len() >= passed_min, "{}: {findings:?}", library.display());
    }
}

#[test]
fn what_stock_plugins_emit_compiles_for_tpus_and_is_measured() {
    let llama = config("llama/odd-sizes");
    let model = ["--config", llama.to_str().unwrap()];
    for (library, options) in
        [(stock_library("torus_attention_native"), &[][..]), (stock_library("torus_model_llama"), &model)]
    {
        for target in ["v6e", "tpu7x"] {
            let (conforms, findings) = check(&library, &[options, &["--target", target]].concat());
            assert!(conforms, "{target}: {findings:?}");
            let measured: Vec<_> = findings.iter().filter(|finding| finding["measured"].is_object()).collect();
            assert!(measured.len() >= 2, "{findings:?}");
            for finding in measured {
                let of = |name: &str| finding["measured"][name].as_f64().unwrap();
                assert!(of("argument_bytes") > of("alias_bytes") && of("code_bytes") > 0.0, "{finding}");
                // Pools are updated in place: nothing else is that large among the results.
                assert!(of("alias_bytes") > 0.0 && of("flops") > 0.0 && of("bytes_accessed") > 0.0, "{finding}");
            }
        }
    }
}

#[test]
fn a_plugin_that_does_not_fit_the_target_is_told_apart() {
    let (conforms, findings) = check(&example_library("native_loop"), &["--target", "v6e"]);
    assert!(!conforms && outcomes(&findings, "declined").len() == 6, "{findings:?}");
    let (conforms, findings) = check(&stock_library("torus_model_llama"), &[]);
    assert!(conforms && outcomes(&findings, "skipped").len() == 1, "{findings:?}");
    let (conforms, findings) = check(&config("llama/odd-sizes"), &[]);
    assert!(!conforms && findings[0]["check"] == "load", "{findings:?}");
}
