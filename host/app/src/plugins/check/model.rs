//! Checks of a model plugin that need no model: what it claims, and that it refuses what is none.

use std::collections::BTreeMap;

use serde_json::json;
use torus_abi::{
    fault::FaultCode,
    model::{GgufQuery, ModelOptions},
};
use torus_plugins::{CallError, ModelInterface, Plugin};

use torus_testkit::Report;

pub fn check(plugin: &Plugin, model: &ModelInterface, report: &mut Report) {
    let manifest = &plugin.manifest;
    if manifest.architectures.is_empty() && manifest.gguf_architectures.is_empty() {
        report.failed("architectures", "it names none, so no checkpoint leads to it");
    } else {
        let names: Vec<_> = manifest.architectures.iter().chain(&manifest.gguf_architectures).cloned().collect();
        report.passed("architectures", names.join(", "));
    }
    for architecture in &manifest.architectures {
        let config = json!({"architectures": [architecture]});
        let opened = model.open(&ModelOptions { config, parallel: Default::default() });
        refusal(&format!("open of a config with nothing but '{architecture}'"), opened.map(|_| ()), report);
    }
    for architecture in &manifest.gguf_architectures {
        let metadata = BTreeMap::from([("general.architecture".to_owned(), json!(architecture))]);
        let answer = model.from_gguf(&GgufQuery { metadata, tensors: BTreeMap::new() });
        refusal(&format!("from_gguf of a file with nothing but '{architecture}'"), answer.map(|_| ()), report);
    }
}

/// A refusal must say why, in words of the plugin; a panic or a malformed answer is its author's mistake.
fn refusal(check: &str, outcome: Result<(), CallError>, report: &mut Report) {
    match outcome {
        Ok(()) => report.failed(check, "it is accepted, though sizes are missing"),
        Err(CallError::Fault { fault, .. }) if fault.code != FaultCode::Internal && !fault.message.is_empty() => {
            report.passed(check, format_args!("refused: {fault}"));
        }
        Err(error) => report.failed(check, error),
    }
}

#[cfg(test)]
mod tests {
    use torus_plugins::Registry;

    use super::*;

    #[test]
    fn the_stock_model_refuses_what_is_no_model_in_its_own_words() {
        let registry = Registry::linked().unwrap();
        let plugin = registry.plugins().iter().find(|plugin| plugin.name() == "llama").unwrap();
        let mut report = Report::default();
        check(plugin, plugin.model().unwrap(), &mut report);
        assert_eq!(report.findings.len(), 3, "{report}");
        report.assert();
    }
}
