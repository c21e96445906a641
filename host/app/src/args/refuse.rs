//! Options that are known and not served yet.

use clap::error::{ContextKind, ContextValue, ErrorKind};

use super::{Dtype, EngineArgs};

/// An option that was given and cannot be served.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("{option}: {reason}")]
pub struct Refused {
    pub option: String,
    pub reason: String,
}

fn refused(option: &str, reason: impl Into<String>) -> Result<(), Refused> {
    Err(Refused { option: option.to_owned(), reason: reason.into() })
}

/// Refuses options of [`EngineArgs`] whose feature is not there yet.
pub fn check(args: &EngineArgs) -> Result<(), Refused> {
    let (parallel, speculative) = (&args.parallel, &args.speculative);
    if parallel.nnodes != 1 {
        refused("--nnodes", "several machines for one model are not supported yet; leave it out or give 1")?;
    }
    if parallel.node_rank != 0 {
        refused("--node-rank", "several machines for one model are not supported yet; leave it out or give 0")?;
    }
    if parallel.dist_init_addr.is_some() {
        refused("--dist-init-addr", "several machines for one model are not supported yet; leave it out")?;
    }
    let speculative_options = [
        ("--speculative-algorithm", &speculative.speculative_algorithm),
        ("--speculative-draft-model-path", &speculative.speculative_draft_model_path),
        ("--speculative-draft-model-revision", &speculative.speculative_draft_model_revision),
        ("--speculative-num-steps", &speculative.speculative_num_steps),
        ("--speculative-eagle-topk", &speculative.speculative_eagle_topk),
        ("--speculative-num-draft-tokens", &speculative.speculative_num_draft_tokens),
        ("--speculative-accept-threshold-single", &speculative.speculative_accept_threshold_single),
        ("--speculative-accept-threshold-acc", &speculative.speculative_accept_threshold_acc),
    ];
    if let Some((option, _)) = speculative_options.iter().find(|(_, value)| value.is_some()) {
        refused(option, "speculative decoding is not supported yet; leave it out")?;
    }
    if args.model.dtype == Dtype::Float16 {
        refused("--dtype float16", "this dtype is not supported yet; give bfloat16, float32 or auto")?;
    }
    Ok(())
}

/// Options of the predecessor that this server does not have, by why.
const KNOWN: &[(&str, &[&str])] = &[
    (
        "LoRA adapters are not supported yet; leave it out",
        &[
            "--enable-lora",
            "--lora-paths",
            "--max-loras-per-batch",
            "--max-lora-rank",
            "--max-loaded-loras",
            "--lora-target-modules",
            "--lora-eviction-policy",
            "--enable-static-lora",
            "--lora-scaling",
        ],
    ),
    (
        "files that say how to quantize are not supported yet; leave it out, or give --quantization int8",
        &["--quantization-param-path", "--quantization-config-path"],
    ),
    ("dtypes for single parts of a model are not supported yet; leave it out", &["--dtype-config"]),
    (
        "data parallelism is not supported yet; leave it out",
        &["--dp-size", "--dp", "--data-parallel-size", "--dp-schedule-policy"],
    ),
    ("sequence parallelism is not supported yet; leave it out", &["--enable-sequence-parallel"]),
    ("choosing among devices is not supported yet; leave it out", &["--device-indexes"]),
    ("several machines for one model are not supported yet; leave it out", &["--dist-timeout"]),
    (
        "mixture-of-experts models are not supported yet; leave it out",
        &[
            "--ep-size",
            "--ep",
            "--ep-num-redundant-experts",
            "--ep-dispatch-algorithm",
            "--moe-backend",
            "--disable-jax-allreduce-metadata",
            "--disable-topk-kernel",
            "--enable-return-routed-experts",
            "--enable-expert-balance-debug",
            "--expert-balance-segment-counter",
            "--expert-balance-output-file",
            "--init-expert-location",
            "--enable-expert-distribution-recorder",
            "--expert-distribution-recorder-buffer-size",
            "--expert-distribution-recorder-output-file",
        ],
    ),
    (
        "prefill and decode on separate machines are not supported yet; leave it out",
        &[
            "--disaggregation-mode",
            "--disaggregation-bootstrap-url",
            "--disaggregation-bootstrap-port",
            "--disaggregation-transfer-port",
            "--disaggregation-side-channel-port",
            "--disaggregation-enable-d2h",
            "--no-disaggregation-enable-d2h",
            "--disaggregation-use-raiden",
            "--no-disaggregation-use-raiden",
            "--disaggregation-enable-chunk-prefill-transfer",
            "--no-disaggregation-enable-chunk-prefill-transfer",
            "--disaggregation-d2h-pool-size",
            "--disaggregation-d2h-max-tokens",
            "--disaggregation-channel-number",
            "--disaggregation-host-ip",
            "--disaggregation-bootstrap-timeout-seconds",
            "--disaggregation-pull-timeout-seconds",
            "--disaggregation-ack-timeout-seconds",
            "--disaggregation-orphan-reaper-interval-seconds",
            "--disaggregation-decode-watchdog-seconds",
            "--disaggregation-num-reserved-decode-tokens",
            "--disaggregation-max-inflight-transfers",
            "--disaggregation-shared-secret",
            "--pd-disaggregation",
            "--pd-prefill-mem-fraction",
            "--pd-decode-mem-fraction",
            "--pd-prefill-max-tokens",
            "--pd-decode-max-tokens",
            "--pd-num-prefill",
            "--pd-num-decode",
            "--pd-prefill-tp-size",
            "--pd-prefill-ep-size",
            "--kv-events-config",
        ],
    ),
    (
        "a KV cache in host memory or on disk is not supported yet; leave it out",
        &[
            "--hicache-storage",
            "--hicache-ratio",
            "--hicache-write-through-threshold",
            "--hicache-write-policy",
            "--enable-unified-radix-tree",
        ],
    ),
    (
        "a pool of its own for sliding-window layers is not supported yet; leave it out",
        &["--swa-full-tokens-ratio", "--disable-hybrid-swa-memory"],
    ),
    (
        "models with recurrent layers are not supported yet; leave it out",
        &[
            "--recurrent-state-memory-ratio",
            "--max-recurrent-state-size",
            "--recurrent-track-interval",
            "--enable-recurrent-extra-buffer",
            "--gdn-prefill-impl",
        ],
    ),
    ("sparse attention is not supported yet; leave it out", &["--dsa-use-pallas"]),
    (
        "output that follows a grammar is not supported yet; leave it out",
        &["--grammar-backend", "--constrained-json-whitespace-pattern", "--constrained-json-disable-any-whitespace"],
    ),
    ("reading tool calls from a model's text is not supported yet; leave it out", &["--tool-call-parser"]),
    ("separating a model's reasoning from its text is not supported yet; leave it out", &["--reasoning-parser"]),
    ("embedding models are not supported yet; leave it out", &["--is-embedding"]),
    ("images, audio and video are not supported yet; leave it out", &["--multimodal"]),
    (
        "the tokenizer is built in and there is one; leave it out",
        &["--tokenizer-mode", "--tokenizer-backend", "--enable-tokenizer-batch-encode"],
    ),
    ("serving without a tokenizer is not supported yet; leave it out", &["--skip-tokenizer-init"]),
    (
        "the files themselves say how to read them, and a model plugin which model it is; leave it out",
        &["--load-format", "--model-loader-extra-config", "--model-impl"],
    ),
    (
        "changing a model's configuration is not supported yet; edit the config.json of a copy",
        &["--json-model-override-args", "--model-layer-nums"],
    ),
    (
        "the sizes of steps are chosen and compiled before the server says that it is ready; leave it out",
        &["--precompile-token-paddings", "--precompile-bs-paddings", "--disable-precompile"],
    ),
    ("a request is never retracted for an estimate; leave it out", &["--schedule-conservativeness"]),
    (
        "a prompt that is too long is refused and cannot be cut off yet; leave it out",
        &["--allow-auto-truncate", "--max-seq-len"],
    ),
    (
        "sampling depends on nothing but a request's seed and the position; send 'seed' with a request instead",
        &["--enable-deterministic-sampling"],
    ),
    ("the way of sampling cannot be chosen; leave it out", &["--use-sort-for-toppk-minp"]),
    ("a check for NaN is not supported yet; leave it out", &["--enable-nan-detection"]),
    ("a trace of intermediate tensors is not supported yet; leave it out", &["--enable-precision-tracer"]),
    ("one warm-up request is sent, and --skip-server-warmup leaves it out; others are not supported", &["--warmups"]),
    ("this server keeps no files of clients; leave it out", &["--file-storage-path"]),
    (
        "there is one process, which sleeps when idle; leave it out",
        &["--sleep-on-idle", "--enable-single-process", "--enable-engine-loop-run-forever-daemon"],
    ),
    ("give --log-level, or RUST_LOG=torus_http=LEVEL for the HTTP server alone", &["--log-level-http"]),
    (
        "logging whole requests is not supported yet; leave it out",
        &["--log-requests", "--log-requests-level", "--crash-dump-folder"],
    ),
    (
        "times are in the metrics at /metrics; leave it out",
        &[
            "--show-time-cost",
            "--enable-request-time-stats-logging",
            "--enable-metrics-for-all-schedulers",
            "--bucket-time-to-first-token",
            "--bucket-inter-token-latency",
            "--bucket-e2e-request-latency",
        ],
    ),
];

/// What to say of an option that `clap` does not know, if it is one of the predecessor's.
pub fn explain(error: &clap::Error) -> Option<Refused> {
    if error.kind() != ErrorKind::UnknownArgument {
        return None;
    }
    let Some(ContextValue::String(argument)) = error.get(ContextKind::InvalidArg) else { return None };
    let option = argument.split(['=', ' ']).next().unwrap_or_default();
    let (reason, _) = KNOWN.iter().find(|(_, options)| options.contains(&option))?;
    Some(Refused { option: option.to_owned(), reason: (*reason).to_owned() })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use clap::{CommandFactory, Parser};

    use super::*;
    use crate::args::{Cli, Command};

    fn parse(options: &str) -> Result<Cli, clap::Error> {
        Cli::try_parse_from("torus serve --model-path m".split(' ').chain(options.split_whitespace()))
    }

    #[test]
    fn each_known_option_is_listed_once_and_is_none_of_ours() {
        let command = Cli::command();
        let serve = command.find_subcommand("serve").unwrap();
        let ours: BTreeSet<_> = serve
            .get_arguments()
            .flat_map(|argument| argument.get_long_and_visible_aliases().unwrap_or_default())
            .map(|name| format!("--{name}"))
            .collect();
        let mut seen = BTreeSet::new();
        for option in KNOWN.iter().flat_map(|(_, options)| *options) {
            assert!(seen.insert(option), "{option} is listed twice");
            assert!(!ours.contains(*option), "{option} exists");
        }
    }

    #[test]
    fn every_known_option_is_explained_with_and_without_a_value() {
        for option in KNOWN.iter().flat_map(|(_, options)| *options) {
            for given in [(*option).to_owned(), format!("{option}=7"), format!("{option} 7")] {
                let error = parse(&given).unwrap_err();
                let refused = explain(&error).unwrap_or_else(|| panic!("{given}: {error}"));
                assert_eq!(refused.option, *option);
            }
        }
    }

    #[test]
    fn an_option_that_nobody_knows_stays_an_error_of_clap() {
        assert_eq!(explain(&parse("--no-such-option").unwrap_err()), None);
        assert_eq!(explain(&parse("--port x").unwrap_err()), None);
    }

    #[test]
    fn options_without_their_feature_are_refused_by_name() {
        let check = |options: &str| match parse(options).unwrap().command {
            Command::Serve(args) => check(&args.engine).err().map(|refused| refused.option),
            other => panic!("{other:?}"),
        };
        assert_eq!(check("--tp=4 --xla-flags --xla_a=1 --compile-mode fast"), None);
        assert_eq!(check("--tp-size 1 --nnodes=1 --node-rank 0 --dtype bfloat16 --device tpu"), None);
        assert_eq!(check("--device cuda"), None);
        let cases = [
            ("--nnodes 2", "--nnodes"),
            ("--node-rank 1", "--node-rank"),
            ("--dist-init-addr a:1", "--dist-init-addr"),
            ("--speculative-algorithm EAGLE", "--speculative-algorithm"),
            ("--speculative-draft-model d", "--speculative-draft-model-path"),
            ("--speculative-num-steps=3", "--speculative-num-steps"),
            ("--dtype half", "--dtype float16"),
        ];
        for (options, expected) in cases {
            assert_eq!(check(options).as_deref(), Some(expected), "{options}");
        }
    }
}
