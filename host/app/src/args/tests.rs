use std::time::Duration;

use clap::{CommandFactory, Parser};
use expect_test::expect_file;

use super::{Cli, Command, Device, Dtype, GenerateArgs, LogFormat, LogLevel, Policy, ServeArgs, values::ChunkSize};

fn help(path: &[&str]) -> String {
    let mut command = Cli::command().term_width(100);
    command.build();
    let command = path.iter().fold(&mut command, |command, name| command.find_subcommand_mut(name).unwrap());
    command.render_long_help().to_string()
}

#[test]
fn the_command_line_is_well_formed() {
    Cli::command().debug_assert();
}

#[test]
fn help_texts() {
    expect_file!["help/torus.txt"].assert_eq(&help(&[]));
    expect_file!["help/serve.txt"].assert_eq(&help(&["serve"]));
    expect_file!["help/generate.txt"].assert_eq(&help(&["generate"]));
    expect_file!["help/compile.txt"].assert_eq(&help(&["compile"]));
    expect_file!["help/plan.txt"].assert_eq(&help(&["plan"]));
    expect_file!["help/ctl.txt"].assert_eq(&help(&["ctl"]));
    expect_file!["help/ctl-swap.txt"].assert_eq(&help(&["ctl", "swap"]));
    expect_file!["help/plugins.txt"].assert_eq(&help(&["plugins"]));
    expect_file!["help/plugins-new.txt"].assert_eq(&help(&["plugins", "new"]));
    expect_file!["help/bench-serving.txt"].assert_eq(&help(&["bench", "serving"]));
    expect_file!["help/bench-one-batch.txt"].assert_eq(&help(&["bench", "one-batch"]));
    expect_file!["help/bench-compare.txt"].assert_eq(&help(&["bench", "compare"]));
    expect_file!["help/bench-step.txt"].assert_eq(&help(&["bench", "step"]));
    expect_file!["help/bench-host.txt"].assert_eq(&help(&["bench", "host"]));
    expect_file!["help/bench-kernels.txt"].assert_eq(&help(&["bench", "kernels"]));
    expect_file!["help/bench-interference.txt"].assert_eq(&help(&["bench", "interference"]));
}

fn serve(options: &str) -> ServeArgs {
    let line = "torus serve --model-path m".split(' ').chain(options.split_whitespace());
    match Cli::try_parse_from(line).unwrap_or_else(|error| panic!("{options}: {error}")).command {
        Command::Serve(args) => *args,
        other => panic!("{other:?}"),
    }
}

fn refuses(options: &str) -> String {
    let line = "torus serve --model-path m".split(' ').chain(options.split_whitespace());
    Cli::try_parse_from(line).unwrap_err().to_string()
}

#[test]
fn defaults_are_the_predecessors_where_both_have_them() {
    let args = serve("");
    assert_eq!((args.http.host.to_string().as_str(), args.http.port), ("127.0.0.1", 30_000));
    let schedule = &args.engine.schedule;
    assert_eq!((schedule.max_prefill_tokens, schedule.random_seed), (16_384, 42));
    assert_eq!((schedule.schedule_policy, schedule.watchdog_timeout), (Policy::Fcfs, Duration::from_secs(300)));
    assert_eq!((args.decode_log_interval, args.http.stream_interval), (40, 1));
    assert_eq!((args.engine.device.device, args.engine.model.dtype), (Device::Cpu, Dtype::Auto));
}

#[test]
fn model_options() {
    let args = Cli::try_parse_from(["torus", "serve", "--model", "a/b", "--trust-remote-code"]).unwrap();
    let Command::Serve(args) = args.command else { panic!("{args:?}") };
    assert_eq!(args.engine.model.only().as_deref(), Ok("a/b"));
    assert!(args.engine.model.trust_remote_code);
    let args = serve(
        "--tokenizer-path=t --context-length 4096 --dtype=float --revision r --download-dir d --chat-template c.jinja",
    );
    let model = &args.engine.model;
    assert_eq!(model.tokenizer_path.as_deref(), Some("t".as_ref()));
    assert_eq!((model.context_length, model.dtype), (Some(4096), Dtype::Float32));
    assert_eq!((model.revision.as_deref(), model.download_dir.as_deref()), (Some("r"), Some("d".as_ref())));
    assert_eq!(model.chat_template.as_deref(), Some("c.jinja"));
    assert!(refuses("--context-length 0").contains("--context-length"));
    assert!(refuses("--dtype int4").contains("--dtype"));
}

#[test]
fn device_options() {
    let args = serve("--device=tpu --pjrt-plugin p.so --cache-dir c --threads 3");
    let device = &args.engine.device;
    assert_eq!((device.device, device.threads), (Device::Tpu, Some(3)));
    assert_eq!(
        (device.pjrt_plugin.as_deref(), device.cache_dir.as_deref()),
        (Some("p.so".as_ref()), Some("c".as_ref()))
    );
    assert!(refuses("--device gpu").contains("--device"));
}

#[test]
fn memory_and_scheduling_options() {
    let args = serve(
        "--mem-fraction-static 0.5 --max-total-tokens 100 --max-running-requests=4 --max-queued-requests 0 \
         --max-prefill-tokens 99 --chunked-prefill-size 16 --enable-mixed-chunk --page-size 32 --schedule-policy lpm \
         --disable-overlap-schedule --disable-radix-cache --random-seed 7 --watchdog-timeout 0.5",
    );
    let schedule = &args.engine.schedule;
    assert_eq!((schedule.mem_fraction_static, schedule.max_total_tokens), (Some(0.5), Some(100)));
    assert_eq!((schedule.max_running_requests, schedule.max_queued_requests), (Some(4), 0));
    assert_eq!((schedule.max_prefill_tokens, schedule.chunked_prefill_size), (99, Some(ChunkSize::Tokens(16))));
    assert_eq!((schedule.page_size, schedule.schedule_policy, schedule.random_seed), (Some(32), Policy::Lpm, 7));
    assert!(schedule.disable_overlap_schedule && schedule.disable_radix_cache && schedule.enable_mixed_chunk);
    assert_eq!(schedule.watchdog_timeout, Duration::from_millis(500));
    for disabled in ["--chunked-prefill-size -1", "--chunked-prefill-size=-1"] {
        assert_eq!(serve(disabled).engine.schedule.chunked_prefill_size, Some(ChunkSize::Disabled));
    }
    for (name, policy) in [("fcfs", Policy::Fcfs), ("dfs-weight", Policy::DfsWeight), ("random", Policy::Random)] {
        assert_eq!(serve(&format!("--schedule-policy {name}")).engine.schedule.schedule_policy, policy);
    }
    assert!(refuses("--chunked-prefill-size 0").contains("-1 for no chunks"));
    assert!(refuses("--mem-fraction-static 1.5").contains("between 0 and 1"));
}

#[test]
fn plugin_options() {
    let args = serve("--plugin a.so --plugin=b.so --no-linked-plugins --attention-backend mine");
    let plugins = &args.engine.plugins;
    assert_eq!(plugins.files, ["a.so", "b.so"].map(std::path::PathBuf::from));
    assert_eq!((plugins.no_linked_plugins, plugins.attention_backend.as_str()), (true, "mine"));
}

#[test]
fn http_options() {
    let args = serve(
        "--host 0.0.0.0 --port 1 --api-key k --served-model-name a --served-model-name b --enable-cache-report \
         --stream-interval 4 --stream-output --allowed-origin * --request-timeout 1.5 --skip-server-warmup --shutdown-grace-seconds 0 \
         --preferred-sampling-params {\"temperature\":0}",
    );
    let http = &args.http;
    assert_eq!((http.host.to_string().as_str(), http.port, http.api_key.as_deref()), ("0.0.0.0", 1, Some("k")));
    assert_eq!((http.served_model_name.as_slice(), http.stream_interval), (["a", "b"].map(String::from).as_slice(), 4));
    assert_eq!(http.request_timeout, Some(Duration::from_millis(1_500)));
    assert_eq!(http.shutdown_grace_seconds, Duration::ZERO);
    assert!(http.enable_cache_report && http.skip_server_warmup && http.stream_output);
    assert_eq!(http.allowed_origins, ["*"]);
    assert_eq!(http.preferred_sampling_params.as_deref(), Some("{\"temperature\":0}"));
    assert_eq!(serve("--host localhost").http.host.to_string(), "127.0.0.1");
    assert!(refuses("--host example").contains("--host"));
}

#[test]
fn log_options() {
    let args = serve("--log-level warning --log-format json --decode-log-interval 8 --enable-metrics");
    assert_eq!((args.log.log_level, args.log.log_format), (Some(LogLevel::Warn), LogFormat::Json));
    assert_eq!((args.decode_log_interval, args.enable_metrics), (8, true));
}

fn generate(line: &[&str]) -> Result<GenerateArgs, clap::Error> {
    let line = ["torus", "generate", "--model-path", "m"].iter().chain(line);
    Cli::try_parse_from(line).map(|cli| match cli.command {
        Command::Generate(args) => *args,
        other => panic!("{other:?}"),
    })
}

#[test]
fn generation_options() {
    let args = generate(&[
        "Once upon",
        "--max-new-tokens=9",
        "--temperature",
        "0.7",
        "--top-k",
        "5",
        "--top-p",
        "0.9",
        "--seed",
        "3",
        "--ignore-eos",
        "--chat",
        "--logprobs",
        "2",
        "--json",
        "--dtype",
        "float32",
    ])
    .unwrap();
    let sampling = &args.sampling;
    assert_eq!((args.prompt.as_deref(), sampling.max_new_tokens), (Some("Once upon"), 9));
    assert_eq!((sampling.temperature, sampling.top_k, sampling.top_p), (0.7, 5, 0.9));
    assert_eq!((sampling.seed, sampling.logprobs), (Some(3), Some(2)));
    assert!(sampling.ignore_eos && sampling.chat && sampling.json);
    assert_eq!(generate(&["--input-ids", "1,2", "3"]).unwrap().sampling.input_ids, [1, 2, 3]);
    assert!(generate(&[]).is_err() && generate(&["text", "--input-ids", "1"]).is_err());
}

#[test]
fn bench_options_parse() {
    let parse = |line: &str| Cli::try_parse_from(line.split_whitespace());
    parse("torus bench serving --backend sgl-jax --num-prompts 3 --random-input 8 --request-rate inf --disable-tqdm")
        .unwrap();
    parse("torus bench one-batch --batch-size 1 2 --input-len 8 -- --model-path m --dtype float32").unwrap();
    assert!(parse("torus bench one-batch --base-url http://x -- --model-path m").is_err());
    parse("torus bench serving --backend openai --max-concurrency 1,8 --goodput ttft:500 tpot:50 --json").unwrap();
    parse("torus bench compare --base-url http://x --base-url http://y --scenario in=8,out=4,clients=2").unwrap();
    assert!(parse("torus bench compare --base-url http://x --scenario in=8").is_err());
    parse("torus bench interference --decode-streams 8 --input-len 128 --long-input-len 4096").unwrap();
}

#[test]
fn what_looks_ahead_takes_a_topology_and_the_servers_options() {
    let parse = |line: &str| Cli::try_parse_from(line.split_whitespace());
    let cli =
        parse("torus compile --topology v6e:2x2 --model-path m --steps 1,16 --max-total-tokens 4096 --json").unwrap();
    let Command::Compile(args) = cli.command else { panic!("{cli:?}") };
    assert_eq!((args.topology.devices(), args.steps.as_slice()), (4, [1, 16].as_slice()));
    assert_eq!(args.engine.schedule.max_total_tokens, Some(4096));
    let cli = parse("torus plan --topology tpu7x:2x2x1 --model-path m --plot p.svg").unwrap();
    let Command::Plan(args) = cli.command else { panic!("{cli:?}") };
    assert_eq!((args.topology.devices(), args.context.as_slice()), (8, [1024, 8192].as_slice()));
    let error = parse("torus plan --topology v6e --model-path m").unwrap_err().to_string();
    assert!(error.contains("--topology") && error.contains("known are v5e:1x1"), "{error}");
}
