//! Compiles what a plugin emits for a TPU that need not be there, and says what it takes.

use std::{collections::BTreeMap, path::Path, sync::Arc};

use anyhow::Context;
use torus_abi::{DType, attention::Target, fragment::Fragment, step::StepShape};
use torus_pjrt::{CompileOptions, Topology};
use torus_plugins::{AttentionInterface, Plugin};
use torus_testkit::{
    Outcome, Report,
    attention::{self, Checked},
    model::hidden_program,
};

use super::{
    adapters::{Attention, open_model},
    stock_attention,
};
use crate::{
    args::{CheckTarget, Device},
    cache_dir::CacheDir,
};

/// Steps that a model's hidden part is compiled for: decoding, and a chunk of a prompt.
const STEPS: [(&str, u64); 2] = [("decode of 64 sequences", 64), ("prefill of 512 tokens", 512)];

pub fn check(
    plugin: &Arc<Plugin>,
    config: Option<&serde_json::Value>,
    cache: &CacheDir,
    libtpu: Option<&Path>,
    target: CheckTarget,
) -> anyhow::Result<Report> {
    let name = target.topology().context("a CPU is no topology")?;
    let compiler = torus_pjrt::Plugin::load(cache.pjrt_plugin(Device::Tpu, libtpu)?)?;
    let topology = compiler.topology(name, &[])?;
    let kind = topology.devices().first().map(|device| device.kind.clone()).unwrap_or_default();
    let tpu = Tpu { topology, target: Target { platform: "tpu".to_owned(), device_kind: kind.clone() } };
    let mut report = Report::default();
    report.passed("compiler", format_args!("{name}, {kind}"));
    if let Some(backend) = plugin.attention() {
        tpu.attention(backend, &mut report);
    }
    if let Some(interface) = plugin.model() {
        match config.map(|config| open_model(interface, config)) {
            None => super::no_config(&mut report),
            Some(Err(reason)) => report.failed("open", reason),
            Some(Ok(model)) => {
                let native = stock_attention()?;
                let backend = Attention(native.attention().context("the stock backend offers no attention")?);
                for (name, tokens) in STEPS {
                    let shape = StepShape { tokens, seqs: 64, page_size: 64, pages: 512, page_table: 1024 };
                    let program = hidden_program(&*model, &backend, &tpu.target, shape, DType::Bf16);
                    tpu.compile(name, program.map(|program| program.text), &mut report);
                }
            }
        }
    }
    if plugin.speculative().is_some() {
        report.add("speculative", Outcome::Skipped, "it runs on the host: check it with --target cpu");
    }
    Ok(report)
}

struct Tpu {
    topology: Topology,
    target: Target,
}

impl Tpu {
    fn attention(&self, backend: &AttentionInterface, report: &mut Report) {
        let cases = attention::target_cases();
        let declined =
            |report: &Report| report.findings.iter().filter(|found| found.outcome == Outcome::Declined).count();
        let declined_before = declined(report);
        for case in &cases {
            match attention::examine(&Attention(backend), case, &self.target) {
                Ok(Checked::Declined(reason)) => report.add(&case.name, Outcome::Declined, reason),
                Ok(Checked::Emitted(answer, fragment)) => {
                    let text = without_kernels(&fragment).and_then(|()| attention::program(case, &answer, &fragment));
                    self.compile(&case.name, text, report);
                }
                Err(reason) => report.failed(&case.name, reason),
            }
        }
        if declined(report) - declined_before == cases.len() {
            report.failed("attention", "it serves none of the kinds that were asked for");
        }
    }

    fn compile(&self, name: &str, text: Result<String, String>, report: &mut Report) {
        match text.and_then(|text| self.measure(&text)) {
            Ok(measured) => report.add_measured(name, Outcome::Passed, sentence(&measured), measured),
            Err(reason) => report.failed(name, reason),
        }
    }

    /// Memory in bytes and the compiler's estimates of one run.
    fn measure(&self, text: &str) -> Result<BTreeMap<&'static str, f64>, String> {
        let compiled = self.topology.compile(text, &CompileOptions::partitioned(1));
        let executable = compiled.map_err(|error| format!("it does not compile: {error}"))?;
        let memory = executable.memory_stats().map_err(|error| error.to_string())?;
        let cost = executable.cost_analysis().map_err(|error| error.to_string())?;
        let mut measured = BTreeMap::from([
            ("argument_bytes", memory.argument_bytes as f64),
            ("output_bytes", memory.output_bytes as f64),
            ("alias_bytes", memory.alias_bytes as f64),
            ("temp_bytes", memory.temp_bytes as f64),
            ("code_bytes", memory.code_bytes as f64),
        ]);
        for (key, name) in
            [("flops", "flops"), ("bytes_accessed", "bytes accessed"), ("optimal_seconds", "optimal_seconds")]
        {
            // Below 0 where the compiler cannot tell, such as for loops of unknown length.
            let estimate = cost.get(name).and_then(|value| value.as_float()).filter(|estimate| *estimate >= 0.0);
            measured.extend(estimate.map(|estimate| (key, estimate)));
        }
        Ok(measured)
    }
}

fn without_kernels(fragment: &Fragment) -> Result<(), String> {
    match fragment.functions.iter().flat_map(|function| &function.kernels).next() {
        None => Ok(()),
        Some(kernel) => Err(format!("it calls the native kernel '{kernel}', and native kernels run on CPUs only")),
    }
}

fn sentence(measured: &BTreeMap<&'static str, f64>) -> String {
    let of = |name: &str| measured.get(name).copied();
    let mib = |name: &str| of(name).unwrap_or(0.0) / f64::from(1 << 20);
    let time = match of("optimal_seconds") {
        Some(seconds) => format!("{:.0} us as the compiler estimates", seconds * 1e6),
        None => "no estimate of the time".to_owned(),
    };
    format!(
        "{:.1} MiB of arguments ({:.1} updated in place), {:.1} temporary, {:.2} of code; {:.3} GFLOP, {:.1} MiB accessed, {time}",
        mib("argument_bytes"),
        mib("alias_bytes"),
        mib("temp_bytes"),
        mib("code_bytes"),
        of("flops").unwrap_or(0.0) / 1e9,
        mib("bytes_accessed"),
    )
}
