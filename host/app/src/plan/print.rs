//! A plan as a table for people and as JSON for tools.

use serde_json::{Value, json};

use super::{Case, Kind, Plan, bound};

impl Plan<'_> {
    pub fn print(&self) {
        let (args, fit, chip) = (self.args, self.fit, self.args.topology.chip);
        println!("{} on {} ({}), --tp-size {}", self.model.name, args.topology, chip.device_kind, fit.tp_size);
        println!(
            "each device: {:.2} GB of memory, {:.2} GB of weights, {:.1} KB of KV a token",
            gb(self.tpu.memory_bytes as f64),
            gb(fit.weight_bytes as f64),
            fit.kv_bytes_per_token as f64 / 1e3
        );
        match &fit.reason {
            None => println!("it fits, with {} KV tokens", fit.kv_tokens),
            Some(reason) => {
                println!("it does not fit: {reason}");
                for remedy in self.fits.remedies(args, self.tpu.memory_bytes) {
                    println!("  {remedy}");
                }
            }
        }
        let others = self.fits.fits.iter().filter(|other| other.tp_size != fit.tp_size && fit.reason.is_none());
        for other in others {
            match &other.reason {
                None => println!("  --tp-size {}: {} KV tokens", other.tp_size, other.kv_tokens),
                Some(reason) => println!("  --tp-size {}: does not fit: {reason}", other.tp_size),
            }
        }
        for (devices, reason) in &self.fits.refused {
            println!("  --tp-size {devices}: {reason}");
        }
        for (kind, title) in [(Kind::Decode, "decode"), (Kind::Prefill, "prefill")] {
            let cases: Vec<_> = self.cases.iter().filter(|case| case.kind == kind).collect();
            if !cases.is_empty() {
                print_table(title, &cases);
            }
        }
        if !self.cases.is_empty() {
            println!("{}", self.model_in_words());
        }
    }

    /// What the times are and are not.
    fn model_in_words(&self) -> String {
        let chip = self.args.topology.chip;
        let mut text = format!(
            "Times are lower bounds from data sheets ({:.0} GB/s of HBM and {:.0} TFLOP/s of bf16 a device, {:.0} GB/s a link): \
             the longer of HBM, and MXU plus sums over devices. Activations in HBM, elementwise work, sampling and latencies of \
             kernels are not in them.",
            chip.hbm_bytes_per_s / 1e9,
            chip.bf16_flops_per_s / 1e12,
            chip.link_bytes_per_s / 1e9
        );
        if self.cases.iter().any(|case| case.compiler.is_some()) {
            text.push_str(
                " The compiled program's bytes are those that go through HBM outside of kernels; its FLOPs are the compiler's \
                 estimate, which counts loops once and kernels as they say of themselves. Its estimate of time is of no use with \
                 kernels and is left out.",
            );
        }
        text
    }

    pub fn json(&self) -> Value {
        let chip = self.args.topology.chip;
        let others: Vec<_> =
            self.fits.refused.iter().map(|(n, reason)| json!({"tp_size": n, "reason": reason})).collect();
        json!({
            "model": self.model.name,
            "topology": self.args.topology.to_string(),
            "devices": self.args.topology.devices(),
            "tp_size": self.fit.tp_size,
            "chip": {
                "device_kind": chip.device_kind,
                "memory_bytes": self.tpu.memory_bytes,
                "hbm_bytes_per_s": chip.hbm_bytes_per_s,
                "bf16_flops_per_s": chip.bf16_flops_per_s,
                "vmem_bytes": chip.vmem_bytes,
                "link_bytes_per_s": chip.link_bytes_per_s,
            },
            "fits": self.fit.reason.is_none(),
            "fit": self.fit,
            "remedies": match self.fit.reason {
                Some(_) => self.fits.remedies(self.args, self.tpu.memory_bytes),
                None => Vec::new(),
            },
            "splits": self.fits.fits,
            "refused_splits": others,
            "cases": self.cases,
        })
    }
}

fn print_table(title: &str, cases: &[&Case]) {
    let compiled = cases.iter().any(|case| case.compiler.is_some());
    println!();
    print!(
        "{title:<8} {:>6} {:>8} {:>6}  {:>8} {:>8} {:>8} {:>8}  {:>8} {:>8} {:>8} {:>9}  {:<12} {:>9}",
        "tokens",
        "context",
        "step",
        "weights",
        "KV read",
        "written",
        "TFLOP",
        "HBM ms",
        "MXU ms",
        "sums ms",
        "step ms",
        "bound by",
        "tokens/s"
    );
    println!("{}", if compiled { "   compiled: GB  TFLOP  temp MB" } else { "" });
    println!("{:<31} {:>8} {:>8} {:>8}", "", "GB", "GB", "GB");
    for case in cases {
        print_case(case);
    }
}

fn print_case(case: &Case) {
    let (tokens, context) = match case.kind {
        Kind::Decode => (case.work.sequences, case.work.cached_tokens + 1),
        Kind::Prefill => (case.work.new_tokens, case.work.cached_tokens),
    };
    print!(
        "{:<8} {tokens:>6} {context:>8} {:>6}  {:>8.3} {:>8.3} {:>8.4} {:>8.3}  {:>8.3} {:>8.3} {:>8.3} {:>9.3}  {:<12} {:>9.0}",
        "",
        case.step_tokens,
        gb(case.cost.weight_bytes),
        gb(case.cost.kv_read_bytes),
        gb(case.cost.kv_written_bytes),
        case.cost.flops() / 1e12,
        case.time.hbm_s * 1e3,
        case.time.mxu_s * 1e3,
        case.time.interconnect_s * 1e3,
        case.step_s * 1e3,
        bound(case.time.bound),
        case.tokens_per_s
    );
    if let Some(estimate) = &case.compiler {
        let number =
            |value: Option<f64>, unit: f64| value.map_or("-".to_owned(), |value| format!("{:.3}", value / unit));
        let (bytes, flops) = (number(estimate.hbm_bytes.map(|bytes| bytes as f64), 1e9), number(estimate.flops, 1e12));
        print!("  {bytes:>13} {flops:>6} {:>8.2}", estimate.temp_bytes as f64 / 1e6);
    }
    println!("{}", if case.kv_fits { "" } else { "  more KV than fits" });
}

fn gb(bytes: f64) -> f64 {
    bytes / 1e9
}
