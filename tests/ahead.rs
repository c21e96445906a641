//! `torus compile` and `torus plan`: models by their configuration alone, for TPUs that are not there.

use std::{
    path::{Path, PathBuf},
    process::{Command, Output},
};

use serde_json::{Value, json};
use torus_attention::{Generation, KvFormat, Layout, Shape, Spec, Tuning, Work, queue::Sequence};

use crate::server::torus;

/// The architecture parameters of a public model.
fn shape(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("data/shapes").join(format!("{name}.json"))
}

fn run(command: &str, options: &[&str]) -> Output {
    // The children share a cache folder only where a test says so.
    Command::new(torus()).arg(command).args(options).output().unwrap()
}

fn json(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout)
        .unwrap_or_else(|error| panic!("{error}: {}", String::from_utf8_lossy(&output.stderr)))
}

/// A model of two layers and a small vocabulary in a folder.
fn two_layers(name: &str, folder: &Path) -> String {
    layers(2, name, folder)
}

fn layers(count: usize, name: &str, folder: &Path) -> String {
    let mut config: Value = serde_json::from_slice(&std::fs::read(shape(name)).unwrap()).unwrap();
    config["num_hidden_layers"] = json!(count);
    config["vocab_size"] = json!(4096);
    if config["model_type"] == "gemma3_text" {
        // One of each kind.
        config["sliding_window_pattern"] = json!(2);
    }
    let path = folder.join(format!("{name}.json"));
    std::fs::write(&path, config.to_string()).unwrap();
    path.to_str().unwrap().to_owned()
}

/// One decoding step, one that computes a prompt and one that gives logprobs of prompts.
const SMALL: &str = "--max-running-requests 8 --chunked-prefill-size 64 --max-total-tokens 4096 --steps 8,64 --json";

/// Compiles, with the cache in `folder`, beside the compiler that the setup script fetches.
fn compile(model: &str, topology: &str, folder: &Path, options: &str) -> Value {
    let libtpu = crate::support::fetched("pjrt/libtpu-0.0.52/libtpu.so");
    let mut arguments = vec!["--model-path", model, "--topology", topology];
    arguments.extend(["--cache-dir", folder.to_str().unwrap(), "--pjrt-plugin", libtpu.to_str().unwrap()]);
    arguments.extend(options.split(' '));
    let output = run("compile", &arguments);
    assert!(output.status.success(), "{model} {topology}: {}", String::from_utf8_lossy(&output.stderr));
    json(&output)
}

/// What holds of each program that was compiled.
fn check_programs(report: &Value, count: usize) {
    let programs = report["programs"].as_array().unwrap();
    assert_eq!(programs.len(), count, "{report}");
    for program in programs {
        let of = |name: &str| program[name].as_u64().unwrap_or_else(|| panic!("{name}: {program}"));
        // Pools, and the rows that stay on the device, are updated where they are, and nothing else is. Layouts may pad them.
        let donated = if program["tokens"].is_u64() { report["donated_bytes"].as_u64().unwrap() } else { 0 };
        let alias = of("alias_bytes");
        assert!(alias >= donated && alias - donated <= donated / 100 + (1 << 16), "{donated} {program}");
        let held = report["weight_bytes"].as_u64().unwrap() + report["pool_bytes"].as_u64().unwrap();
        assert!(of("argument_bytes") >= held && of("code_bytes") > 0 && of("stored_bytes") > 0, "{program}");
        assert!(of("temp_bytes") < report["pool_bytes"].as_u64().unwrap(), "{program}");
    }
}

#[test]
fn two_layers_of_each_family_compile_for_two_generations() {
    let folder = tempfile::tempdir().unwrap();
    // A step that only decodes compiles in a third of the time of one that also reads prompts.
    let decode = SMALL.replace("--steps 8,64", "--steps 8");
    // Qwen3 is in the test below.
    for name in ["llama-3.3-70b", "qwen2.5-7b", "gemma-3-1b"] {
        let model = two_layers(name, folder.path());
        for topology in ["v6e:1x1", "tpu7x:1x1x1"] {
            check_programs(&compile(&model, topology, folder.path(), &decode), 1);
        }
    }
}

#[test]
fn a_step_of_each_kind_compiles_for_two_generations() {
    let folder = tempfile::tempdir().unwrap();
    let model = two_layers("qwen3-8b", folder.path());
    for topology in ["v6e:1x1", "tpu7x:1x1x1"] {
        check_programs(&compile(&model, topology, folder.path(), SMALL), 3);
    }
}

/// With caches of 8 bits, half of the pool; each layer's scales are updated in place as well.
#[test]
fn caches_of_8_bits_compile() {
    let folder = tempfile::tempdir().unwrap();
    let decode = SMALL.replace("--steps 8,64", "--steps 8");
    let model = two_layers("qwen3-8b", folder.path());
    let of = |dtype: &str| {
        let options = format!("{decode} --attention-backend fa --kv-cache-dtype {dtype}");
        compile(&model, "v6e:1x1", folder.path(), &options)
    };
    // Keys and values of 2 layers, 8 heads of 128, 32 pages and the one of nobody.
    let pool = 2 * 2 * 8 * 128 * 33 * 128;
    for dtype in ["fp8_e4m3", "int8"] {
        let narrow = of(dtype);
        check_programs(&narrow, 1);
        assert_eq!(narrow["pool_bytes"], pool, "{narrow}");
        assert_eq!(narrow["programs"][0]["custom_calls"]["tpu_custom_call"], 2, "{narrow}");
    }
}

/// As a server refuses it: int8 without scales would be whole numbers. Nothing is compiled before.
#[test]
fn a_cache_of_int8_is_refused_where_the_checkpoint_has_no_scales() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::rename(two_layers("qwen3-8b", folder.path()), folder.path().join("config.json")).unwrap();
    let header = r#"{"model.norm.weight":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#;
    let file = [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &[0; 4]].concat();
    std::fs::write(folder.path().join("model.safetensors"), file).unwrap();
    let libtpu = crate::support::fetched("pjrt/libtpu-0.0.52/libtpu.so");
    let (folder, libtpu) = (folder.path().to_str().unwrap(), libtpu.to_str().unwrap());
    let mut options =
        vec!["--model-path", folder, "--topology", "v6e:1x1", "--cache-dir", folder, "--pjrt-plugin", libtpu];
    options.extend(SMALL.split(' ').chain(["--attention-backend", "fa", "--kv-cache-dtype", "int8"]));
    let output = run("compile", &options);
    let message = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && output.stdout.is_empty(), "{message}");
    for part in ["kv_cache_dtype", "plugin 'fa'", "k_scale, v_scale", "which has none; 'fp8_e4m3' does without"] {
        assert!(message.contains(part), "{message}");
    }
}

#[test]
fn layers_in_loops_compile_with_the_scales_of_each() {
    let folder = tempfile::tempdir().unwrap();
    let options = SMALL.replace("--steps 8,64", "--steps 8") + " --compile-mode fast --kv-cache-dtype fp8_e4m3";
    let report = compile(&layers(4, "qwen3-8b", folder.path()), "v6e:1x1", folder.path(), &options);
    check_programs(&report, 1);
    // One body for all of them.
    assert_eq!(report["programs"][0]["custom_calls"]["tpu_custom_call"], 1, "{report}");
}

#[test]
fn a_plan_with_a_cache_of_8_bits_holds_twice_the_tokens_and_reads_half() {
    let plan_of = |dtype: &str| {
        let options =
            ["--batch-size", "64", "--context", "4096", "--attention-backend", "fa", "--kv-cache-dtype", dtype];
        let (fits, plan) = plan("qwen3-8b", "v6e:1x1", &options);
        assert!(fits, "{plan}");
        let of = |value: &Value| value.as_f64().unwrap_or_else(|| panic!("{plan}"));
        let (fit, case) = (&plan["fit"], &plan["cases"][0]);
        [&fit["kv_bytes_per_token"], &fit["kv_tokens"], &case["kv_read_bytes"], &case["step_s"]].map(of)
    };
    let [token, tokens, read, step] = plan_of("bf16");
    for dtype in ["fp8_e4m3", "int8"] {
        let narrow = plan_of(dtype);
        assert_eq!((2.0 * narrow[0], 2.0 * narrow[2]), (token, read));
        // Two pages are lost to rounding and to what nobody owns.
        assert!((narrow[1] - 2.0 * tokens).abs() <= 256.0 && narrow[3] < step, "{narrow:?} {tokens} {step}");
    }
}

/// What the attention kernels of one layer move for Qwen3-8B's heads on one of four devices.
fn kernel_bytes(sequences: usize, old: usize) -> u64 {
    let spec = Spec {
        q_heads: 8,
        kv_heads: 2,
        head_dim: 128,
        kv: KvFormat::Bf16,
        page_size: 128,
        scale: 1.0,
        window: None,
        soft_cap: None,
        sinks: false,
        mask: false,
        generation: Generation::V6e,
    };
    let pages = (old + 1).div_ceil(128);
    let shape = Shape { tokens: sequences, seqs: sequences, pages: 2048, page_table: 65_536, draft: 1 };
    let batch: Vec<_> = (0..sequences).map(|_| Sequence { new: 1, old, pages: (1..=pages).collect() }).collect();
    let tuning = Tuning::new(&spec, &Layout::new(&spec).unwrap());
    Work::of(&spec, &shape, &tuning, &batch).unwrap().hbm_bytes()
}

/// All layers and the whole vocabulary, for the one step that a busy server runs most.
#[test]
fn a_step_of_a_full_model_moves_little_more_than_it_must() {
    let folder = tempfile::tempdir().unwrap();
    let model = shape("qwen3-8b");
    let options = "--tp-size 4 --max-total-tokens 262144 --steps 256 --json";
    let report = compile(model.to_str().unwrap(), "v6e:2x2", folder.path(), options);
    check_programs(&report, 1);
    let program = &report["programs"][0];
    assert_eq!(
        (report["attention_plugin"].as_str(), &program["custom_calls"]["tpu_custom_call"]),
        (Some("fa"), &json!(36))
    );
    let (_, plan) = plan("qwen3-8b", "v6e:2x2", &["--tp-size", "4", "--batch-size", "256", "--context", "1024"]);
    let number = |of: &Value, name: &str| of[name].as_f64().unwrap_or_else(|| panic!("{name}: {of}"));
    let of_plan = |name: &str| number(&plan["cases"][0], name);
    let floor = of_plan("weight_bytes") + of_plan("kv_read_bytes") + of_plan("kv_written_bytes");
    let moved = number(program, "hbm_bytes_outside_kernels") + 36.0 * kernel_bytes(256, 1023) as f64;
    assert!(moved >= floor && moved <= 1.1 * floor, "{moved} of {floor}: {program}");
    // It fills the queue of pages, 1,024 a round: two rounds here.
    assert_eq!(program["loops_of_unknown_length"], 1);
    // Each layer's two sums and the embedding's; of the logits only the best of each device are gathered.
    let collectives = &program["collectives"];
    assert_eq!(collectives.as_object().unwrap().len(), 2, "{collectives}");
    assert_eq!(
        (&collectives["all-reduce"]["count"], &collectives["all-reduce"]["largest_bytes"]),
        (&json!(73), &json!(256 * 4096 * 2))
    );
    assert!(number(&collectives["all-gather"], "largest_bytes") <= (256 * 4 * 4 * 4) as f64, "{collectives}");
}

#[test]
fn what_was_compiled_is_kept() {
    let folder = tempfile::tempdir().unwrap();
    let model = two_layers("qwen3-8b", folder.path());
    let options = SMALL.replace("--steps 8,64", "--steps 8");
    let kept = |options: &str| {
        let report = compile(&model, "v6e:1x1", folder.path(), options);
        assert_eq!(report["programs"].as_array().unwrap().len(), 1, "{report}");
        report["programs"][0]["kept"].as_bool().unwrap()
    };
    assert!(!kept(&options) && kept(&options));
    assert!(!kept(&options.replace("4096", "2048")), "another pool is another program");
}

#[test]
fn a_topology_or_a_step_that_there_is_not_is_refused_with_those_there_are() {
    let folder = tempfile::tempdir().unwrap();
    let model = two_layers("qwen3-8b", folder.path());
    let message = |options: &[&str]| {
        let output = run("compile", &[&["--model-path", &model][..], options].concat());
        assert!(!output.status.success());
        String::from_utf8_lossy(&output.stderr).into_owned()
    };
    let unknown = message(&["--topology", "v6e:2"]);
    assert!(unknown.contains("'v6e:2' is no topology") && unknown.contains("tpu7x:2x2x1"), "{unknown}");
    let cache = folder.path().to_str().unwrap();
    let absent = message(&["--topology", "v6e:2x2", "--cache-dir", cache]);
    assert!(absent.contains("pip download --no-deps libtpu=="), "{absent}");
    let step = message(&["--topology", "v6e:1x1", "--steps", "7"]);
    assert!(step.contains("--steps 7") && step.contains("1, 2, 4, 8"), "{step}");
}

fn plan(name: &str, topology: &str, options: &[&str]) -> (bool, Value) {
    let model = shape(name);
    let given = ["--model-path", model.to_str().unwrap(), "--topology", topology, "--json"];
    let output = run("plan", &[&given[..], options].concat());
    (output.status.success(), json(&output))
}

#[test]
fn a_plan_counts_what_a_step_moves_and_computes() {
    let options = ["--batch-size", "16", "--context", "1024", "--prefill", "512", "--attention-backend", "native"];
    let (fits, plan) = plan("qwen3-8b", "v6e:1x1", &options);
    assert!(fits && plan["fits"] == true, "{plan}");
    // 8.19 thousand million parameters, two bytes each; norms have four.
    let layer = 4096 * (32 + 2 * 8) * 128 + 32 * 128 * 4096 + 3 * 4096 * 12288u64;
    let (matrices, head) = (36 * layer, 151_936 * 4096u64);
    let norms = 36 * (2 * 4096 + 2 * 128) + 4096u64;
    assert_eq!(plan["fit"]["weight_bytes"], 2 * (matrices + 2 * head) + 4 * norms);
    let kv_token = 36 * 2 * 8 * 128 * 2u64;
    assert_eq!(plan["fit"]["kv_bytes_per_token"], kv_token);
    let room = 0.88 * plan["chip"]["memory_bytes"].as_f64().unwrap() - plan["fit"]["weight_bytes"].as_f64().unwrap();
    let tokens = plan["fit"]["kv_tokens"].as_f64().unwrap();
    assert!(tokens <= room / kv_token as f64 && tokens > room / kv_token as f64 - 256.0, "{tokens}");

    let cases = plan["cases"].as_array().unwrap();
    let (decode, prefill) = (&cases[0], &cases[1]);
    let of = |case: &Value, name: &str| case[name].as_f64().unwrap_or_else(|| panic!("{name}: {case}"));
    assert_eq!((decode["kind"].as_str(), decode["bound"].as_str()), (Some("decode"), Some("hbm")));
    let read = (2 * (matrices + head) + 4 * norms + 16 * 2 * 4096) as f64;
    assert_eq!((of(decode, "weight_bytes"), of(decode, "kv_read_bytes")), (read, (16 * 1024 * kv_token) as f64));
    assert_eq!(of(decode, "matrix_flops"), (2 * 16 * (matrices + head)) as f64);
    assert_eq!(of(decode, "attention_flops"), (16 * 1024 * 36 * 4 * 32 * 128u64) as f64);
    let step = (read + (16 * 1025 * kv_token) as f64) / 1640e9;
    assert!((of(decode, "step_s") - step).abs() < 1e-9, "{decode}");
    assert!((of(decode, "tokens_per_s") - 16.0 / step).abs() < 1e-3);
    assert_eq!((prefill["kind"].as_str(), prefill["bound"].as_str()), (Some("prefill"), Some("hbm")));
    assert_eq!(of(prefill, "attention_flops"), (512 * 513 / 2 * 36 * 4 * 32 * 128u64) as f64);
}

#[test]
fn devices_share_weights_heads_and_sums() {
    let options = ["--tp-size", "4", "--batch-size", "256", "--context", "1024", "--prefill", "512"];
    let native = ["--attention-backend", "native"];
    let (fits, plan) = plan("qwen3-8b", "v6e:2x2", &[&options[..], &native[..]].concat());
    assert!(fits, "{plan}");
    let decode = &plan["cases"][0];
    let of = |name: &str| decode[name].as_f64().unwrap_or_else(|| panic!("{name}: {decode}"));
    // A quarter of the KV heads; two sums a layer and one of the embedding, each of all tokens' hidden states in bf16.
    assert_eq!(of("kv_read_bytes"), (256 * 1024 * 36 * 2 * 2 * 128 * 2u64) as f64);
    assert_eq!((of("sums"), of("summed_bytes")), (73.0, (73 * 256 * 4096 * 2u64) as f64));
    let hops = 73.0 * 2.0 * 2.0 * 1e-6;
    assert!((of("interconnect_s") - (2.0 * 0.75 * of("summed_bytes") / 180e9 + hops)).abs() < 1e-9, "{decode}");
    let splits: Vec<_> =
        plan["splits"].as_array().unwrap().iter().map(|fit| fit["tp_size"].as_u64().unwrap()).collect();
    assert_eq!(splits, [1, 2, 4]);
    let (fits, plan) = self::plan("qwen3-32b", "v6e:2x2", &native);
    assert!(!fits && plan["remedies"][0].as_str().unwrap().starts_with("--tp-size 4 leaves room for"), "{plan}");
}

#[test]
fn what_does_not_fit_is_said_with_what_would() {
    let (fits, plan) = plan("llama-3.3-70b", "v6e:1x1", &["--attention-backend", "native"]);
    assert!(!fits && plan["fits"] == false && plan["cases"].as_array().unwrap().is_empty(), "{plan}");
    assert!(plan["fit"]["reason"].as_str().unwrap().contains("GB of weights"), "{plan}");
    let remedies = plan["remedies"].to_string();
    assert!(remedies.contains("v6e:2x4") && remedies.contains("tpu7x:1x1x1"), "{remedies}");
}

#[test]
fn a_plan_is_a_table_and_a_drawing() {
    let folder = tempfile::tempdir().unwrap();
    let (drawing, model) = (folder.path().join("plan.svg"), shape("gemma-3-1b"));
    let output = run(
        "plan",
        &["--model-path", model.to_str().unwrap(), "--topology", "tpu7x:1x1x1", "--plot", drawing.to_str().unwrap()],
    );
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    for part in ["gemma-3-1b on tpu7x:1x1x1 (TPU7x)", "it fits, with", "decode", "prefill", "tokens/s", "lower bounds"]
    {
        assert!(text.contains(part), "{part}: {text}");
    }
    let svg = std::fs::read_to_string(drawing).unwrap();
    assert!(svg.matches("<polyline").count() >= 8 && svg.contains("Throughput") && !svg.contains("NaN"), "{svg}");
}
