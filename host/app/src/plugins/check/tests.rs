use torus_abi::{
    attention::{AttentionAnswer, AttentionQuery, EmitAttention},
    author::Attention as Author,
    fault::Fault,
    fragment::Package,
};
use torus_attention_native::Native;
use torus_testkit::attention::InProcess;

use super::*;

fn cpu(plugins: &[&Arc<Plugin>]) -> cpu::Cpu {
    let cpu = cpu::Cpu::new(&CacheDir::new(None).unwrap(), None, plugins);
    cpu.unwrap_or_else(|error| panic!("{error:#}; run .make/setup.sh test"))
}

/// The stock backend with a window that is one too long.
struct Wrong;

impl Author for Wrong {
    fn query(query: &AttentionQuery) -> Result<AttentionAnswer, Fault> {
        Native::query(query)
    }

    fn emit(request: &EmitAttention) -> Result<Package, Fault> {
        let mut request = request.clone();
        request.query.spec.window = request.query.spec.window.map(|window| window + 1);
        Native::emit(&request)
    }
}

#[test]
fn a_backend_that_computes_something_else_fails_by_the_names_of_the_cases() {
    let target = Target { platform: "cpu".to_owned(), device_kind: "cpu".to_owned() };
    let report = attention::run(&InProcess::<Wrong>::default(), &cpu(&[]), &target);
    let (failed, others): (Vec<_>, Vec<_>) =
        report.findings.iter().partition(|finding| finding.outcome == Outcome::Failed);
    assert_eq!(failed.len(), 8, "{report}");
    assert!(failed.iter().all(|finding| finding.check.contains("window")), "{report}");
    assert!(others.iter().all(|finding| finding.outcome == Outcome::Passed && !finding.check.contains("window")));
}

#[test]
fn the_stock_model_conforms() {
    let registry = Registry::linked().unwrap();
    let plugin = registry.plugins().iter().find(|plugin| plugin.name() == "llama").unwrap();
    let config = serde_json::json!({
        "architectures": ["LlamaForCausalLM"], "hidden_size": 24, "intermediate_size": 40, "vocab_size": 31,
        "num_hidden_layers": 2, "num_attention_heads": 3, "num_key_value_heads": 1,
    });
    let report = on_cpu(plugin, Some(&config), &CacheDir::new(None).unwrap(), None).unwrap();
    report.assert();
    assert!(report.findings.iter().any(|finding| finding.check == "token by token = at once"), "{report}");
}

#[test]
fn without_a_config_a_model_is_checked_as_far_as_that_goes() {
    let registry = Registry::linked().unwrap();
    let plugin = registry.plugins().iter().find(|plugin| plugin.name() == "llama").unwrap();
    let report = on_cpu(plugin, None, &CacheDir::new(None).unwrap(), None).unwrap();
    report.assert();
    assert!(report.to_string().contains("--config FILE") && counts(&report).ends_with("1 skipped"), "{report}");
}
