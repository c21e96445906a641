//! The CPU's native kernels in a whole engine: against plain StableHLO, and quantized against float32.

use std::{
    fs::{self, File},
    os::unix::fs::FileExt,
    time::{Duration, Instant},
};

use serde_json::json;
use torus_abi::{
    DType,
    model::{ModelDescription, Parallel, WeightRole, WeightSource, WeightSpec},
};
use torus_engine::{
    EngineConfig, KvCacheDtype,
    api::{Engine, LogprobOptions},
    config::{DtypeChoice, WeightCacheConfig},
};
use torus_text::{GgufTokenizer, Tokenizer};
use torus_weights::{
    AlignedBytes, Checkpoint, LoadPlan, NoProgress, PlannedWeight, ResolvedModel, SinkError, StorageDType, WeightSink,
};

use crate::{
    golden::{TOKENS, assert_golden, cases},
    support::{answer, block_on, config, greedy, linked_plugins, ready, request, smollm2},
};

#[test]
fn plain_stablehlo_gives_the_same_tokens_in_float32() {
    let mut plain = config(ResolvedModel::Gguf(smollm2()));
    plain.cpu_kernels = false;
    plain.attention_backend = Some("native".into());
    let engine = ready(plain);
    assert_eq!(engine.info().unwrap().attention_backend, "native");
    for golden in cases(include_str!("data/smollm2-135m.json")).iter().take(2) {
        let found = block_on(answer(&engine, request("plain", &golden.prompt, greedy(TOKENS))));
        assert_golden(golden, &found);
    }
}

/// The first 2,000 tokens of the licence.
fn text() -> Vec<u32> {
    const LEN: usize = 2000;
    let model = ResolvedModel::Gguf(smollm2());
    let parts = Checkpoint::open(&model).unwrap().gguf_tokenizer().unwrap().unwrap();
    let tokenizer = Tokenizer::from_gguf(&GgufTokenizer {
        model: parts.model,
        pre: parts.pre,
        tokens: parts.tokens,
        token_types: parts.token_types,
        merges: parts.merges,
        bos_id: parts.bos_id,
        eos_id: parts.eos_id,
        ..GgufTokenizer::default()
    });
    let mut tokens = tokenizer.unwrap().encode(include_str!("../LICENSE"), false).unwrap();
    assert!(tokens.len() >= LEN, "{} tokens", tokens.len());
    tokens.truncate(LEN);
    tokens
}

/// Dtypes of activations and of the cache, and whether weights that are stored as floats become bytes.
type Case = (DtypeChoice, KvCacheDtype, bool);

/// The sum of the logprobs of all tokens but the first.
fn log_likelihood(model: &ResolvedModel, text: &[u32], (dtype, kv_cache_dtype, quantize_int8): Case) -> f64 {
    let mut config = config(model.clone());
    config.dtype = dtype;
    config.kv_cache_dtype = kv_cache_dtype;
    config.quantize_int8 = quantize_int8;
    config.schedule.chunked_prefill_size = Some(128);
    let engine = ready(config);
    assert_eq!(engine.info().unwrap().attention_backend, "fa");
    let mut request = request("text", text, greedy(0));
    request.logprobs = LogprobOptions { output: false, top_n: 0, prompt_from: Some(0) };
    let answer = block_on(answer(&engine, request));
    let logprobs: Vec<f32> = answer.prompt_logprobs.iter().filter_map(|token| token.logprob).collect();
    assert_eq!(logprobs.len(), text.len() - 1);
    logprobs.iter().map(|logprob| f64::from(*logprob)).sum()
}

/// How far the likelihood may be off that of the same weights in float32.
const TOLERANCE: f64 = 5e-3;

fn assert_likelihoods(model: &ResolvedModel, cases: &[Case]) {
    let text = text();
    let exact = log_likelihood(model, &text, (DtypeChoice::Float32, KvCacheDtype::Auto, false));
    assert!(exact < -500.0, "{exact}");
    for case in cases {
        let found = log_likelihood(model, &text, *case);
        let off = (found - exact).abs() / exact.abs();
        assert!(off < TOLERANCE, "{case:?}: {found}, and {exact} in float32");
    }
}

#[test]
fn quantized_weights_and_caches_keep_the_likelihood_of_a_text() {
    let cases = [
        (DtypeChoice::Auto, KvCacheDtype::Auto, false),
        (DtypeChoice::Bfloat16, KvCacheDtype::Int8, false),
        (DtypeChoice::Float32, KvCacheDtype::Int8, false),
    ];
    assert_likelihoods(&ResolvedModel::Gguf(smollm2()), &cases);
}

/// Gathers weights as the tensors of a safetensors file.
#[derive(Default)]
struct Safetensors {
    header: serde_json::Map<String, serde_json::Value>,
    data: Vec<u8>,
}

impl WeightSink for Safetensors {
    fn put(&mut self, weight: &PlannedWeight, bytes: AlignedBytes) -> Result<(), SinkError> {
        let place = [self.data.len(), self.data.len() + bytes.len()];
        self.data.extend_from_slice(&bytes);
        let entry = json!({"dtype": "BF16", "shape": weight.shape, "data_offsets": place});
        self.header.insert(weight.name.clone(), entry);
        Ok(())
    }
}

/// The small model as a folder whose weights are bfloat16.
fn in_bfloat16() -> tempfile::TempDir {
    let checkpoint = Checkpoint::open(&ResolvedModel::Gguf(smollm2())).unwrap();
    let plugins = linked_plugins();
    let model = plugins.gguf_model("llama").unwrap().model().unwrap();
    let answer = model.from_gguf(&checkpoint.gguf_query().unwrap()).unwrap();
    let weights = answer.tensors.iter().filter_map(|(name, tensor)| {
        let shape = checkpoint.tensors().get(&tensor.name)?.shape.clone();
        let sources = vec![WeightSource::new(name, shape.as_slice())];
        Some(WeightSpec { name: name.clone(), shape, role: WeightRole::Vector, sources })
    });
    let description = ModelDescription {
        architecture: "a list of tensors".into(),
        hidden: 0,
        vocab: 0,
        context_length: 0,
        dtype: DType::Bf16,
        kinds: vec![],
        layers: vec![],
        weights: weights.collect(),
        ignored_tensors: vec![],
        parallel: Parallel::default(),
    };
    let plan = LoadPlan::new(&checkpoint, &description, Some(&answer), |_| StorageDType::Bf16).unwrap();
    let mut file = Safetensors::default();
    plan.run(&mut file, &NoProgress).unwrap();
    let header = serde_json::to_vec(&file.header).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let content = [&(header.len() as u64).to_le_bytes(), &header[..], &file.data].concat();
    fs::write(folder.path().join("model.safetensors"), content).unwrap();
    fs::write(folder.path().join("config.json"), answer.config.to_string()).unwrap();
    folder
}

#[test]
fn bfloat16_weights_and_those_in_bytes_keep_the_likelihood_of_a_text() {
    let folder = in_bfloat16();
    let model = ResolvedModel::Folder(folder.path().to_owned());
    let cases = [false, true].map(|bytes| (DtypeChoice::Bfloat16, KvCacheDtype::Auto, bytes));
    assert_likelihoods(&model, &cases);
}

/// An engine over a copy of the small model that keeps its packed weights in `folder`.
fn cached(folder: &std::path::Path) -> EngineConfig {
    let mut config = config(ResolvedModel::Gguf(folder.join("model.gguf")));
    config.dtype = DtypeChoice::Auto;
    config.weight_cache = Some(WeightCacheConfig { folder: folder.join("weights"), from_bytes: 0 });
    config
}

/// The files of the cache, once there is one that is whole.
fn entries(folder: &std::path::Path) -> Vec<std::path::PathBuf> {
    let started = Instant::now();
    loop {
        let files: Vec<_> = fs::read_dir(folder.join("weights")).into_iter().flatten().flatten().collect();
        let paths: Vec<_> = files.into_iter().map(|file| file.path()).collect();
        if !paths.is_empty() && paths.iter().all(|path| path.extension().is_some_and(|kind| kind == "packed")) {
            return paths;
        }
        assert!(started.elapsed() < Duration::from_secs(120), "{paths:?}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn packed_weights_are_mapped_at_the_next_start_and_packed_again_where_they_are_damaged() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    fs::copy(smollm2(), &path).unwrap();
    let prompt = &cases(include_str!("data/smollm2-135m.json"))[0].prompt;
    let generate = || {
        let engine = ready(cached(folder.path()));
        let found = block_on(answer(&engine, request("cached", prompt, greedy(TOKENS))));
        (found.tokens, entries(folder.path()))
    };
    let (packed, files) = generate();

    // Weights are gone from the file, which looks as it was: what is generated comes from the cache.
    let modified = path.metadata().unwrap().modified().unwrap();
    let file = File::options().read(true).write(true).open(&path).unwrap();
    let (len, whole) = (path.metadata().unwrap().len(), fs::read(&path).unwrap());
    file.write_all_at(&vec![0; len as usize / 2], len / 4).unwrap();
    file.set_modified(modified).unwrap();
    let (mapped, same) = generate();
    assert_eq!((&mapped, &same), (&packed, &files));

    // A damaged entry is replaced.
    file.write_all_at(&whole, 0).unwrap();
    file.set_modified(modified).unwrap();
    let entry = fs::read(&files[0]).unwrap();
    fs::write(&files[0], &entry[..entry.len() / 2]).unwrap();
    let (again, same) = generate();
    assert_eq!((&again, &same), (&packed, &files));
    let restored = || fs::read(&files[0]).unwrap() == entry;
    let started = Instant::now();
    while !restored() {
        assert!(started.elapsed() < Duration::from_secs(120), "the entry is not written again");
        std::thread::sleep(Duration::from_millis(20));
    }
}
