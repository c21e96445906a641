//! `--kv-cache-dtype fp8_e4m3`: the scales of a checkpoint reach the layers they are for, in programs of layers one after the
//! other and in loops.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};
use torus_engine::{EngineConfig, KvCacheDtype, api::LogprobOptions, config::CompileMode};
use torus_weights::ResolvedModel;

use crate::{
    families::small,
    parallel::failure,
    support::{answer, block_on, greedy, ready, request},
};

fn model() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("data/llama/grouped-untied")
}

/// The model with further tensors of one number each.
fn with(numbers: &[(String, f32)]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    std::fs::copy(model().join("config.json"), folder.path().join("config.json")).unwrap();
    let file = std::fs::read(model().join("model.safetensors")).unwrap();
    let (length, rest) = file.split_first_chunk().unwrap();
    let (header, data) = rest.split_at(u64::from_le_bytes(*length) as usize);
    let (mut header, mut data) = (serde_json::from_slice::<Map<String, Value>>(header).unwrap(), data.to_vec());
    for (name, number) in numbers {
        let place = [data.len(), data.len() + 4];
        data.extend(number.to_le_bytes());
        header.insert(name.clone(), json!({ "dtype": "F32", "shape": [1], "data_offsets": place }));
    }
    let header = serde_json::to_vec(&header).unwrap();
    let file = [&(header.len() as u64).to_le_bytes(), header.as_slice(), &data].concat();
    std::fs::write(folder.path().join("model.safetensors"), file).unwrap();
    folder
}

/// With scales of keys and values for each layer.
fn with_scales(scales: &[[f32; 2]]) -> tempfile::TempDir {
    let tensors = scales.iter().enumerate().flat_map(|(layer, scales)| {
        let name = |part: &str| format!("model.layers.{layer}.self_attn.{part}_proj.{part}_scale");
        ["k", "v"].iter().zip(scales).map(|(part, scale)| (name(part), *scale)).collect::<Vec<_>>()
    });
    with(&tensors.collect::<Vec<_>>())
}

fn of(folder: &Path, kv_cache_dtype: KvCacheDtype) -> EngineConfig {
    EngineConfig { kv_cache_dtype, ..small(ResolvedModel::Folder(folder.to_owned())) }
}

/// Logprobs of a prompt's tokens.
fn logprobs(config: EngineConfig) -> Vec<f32> {
    let engine = ready(config);
    let prompt: Vec<u32> = (0..30).map(|i| 3 + i * 7 % 40).collect();
    let mut request = request("scales", &prompt, greedy(0));
    request.logprobs = LogprobOptions { output: false, top_n: 0, prompt_from: Some(0) };
    block_on(answer(&engine, request)).prompt_logprobs.iter().filter_map(|token| token.logprob).collect()
}

fn largest_difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!((a.len(), b.len()), (29, 29));
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

#[test]
fn caches_of_8_bits_have_the_scales_of_the_checkpoint() {
    let fp8 = |folder: &Path| logprobs(of(folder, KvCacheDtype::Fp8E4m3));
    let exact = logprobs(of(&model(), KvCacheDtype::Auto));
    let plain = fp8(&model());
    assert_eq!(plain, fp8(with_scales(&[[1.0; 2]; 2]).path()), "without scales they are 1");
    // So large that of the second layer's values hardly anything is left, and so small that of the first one's keys all are the
    // largest number.
    let scales = [[1e-6, 0.3], [0.7, 4000.0]];
    let (right, swapped) = (fp8(with_scales(&scales).path()), fp8(with_scales(&[scales[1], scales[0]]).path()));
    let fine = fp8(with_scales(&[[0.5, 0.3], [0.7, 0.2]]).path());
    for near in [&plain, &fine] {
        assert!(largest_difference(near, &exact) < 0.5, "{near:?} {exact:?}");
    }
    for (one, other) in [(&right, &exact), (&swapped, &exact), (&right, &swapped)] {
        assert!(largest_difference(one, other) > 1.0, "{right:?} {swapped:?} {exact:?}");
    }
    let folder = with_scales(&scales);
    let config = of(folder.path(), KvCacheDtype::Fp8E4m3);
    let in_loops = logprobs(EngineConfig { compile_mode: CompileMode::Fast, ..config });
    // A number may be rounded the other way.
    assert!(largest_difference(&right, &in_loops) < 0.2, "{right:?} {in_loops:?}");
}

#[test]
fn scales_that_are_no_use_are_left_or_refused_with_the_reason() {
    let half = with(&[("model.layers.0.self_attn.k_scale".to_owned(), 0.5)]);
    let wide = |folder: &Path| logprobs(of(folder, KvCacheDtype::Auto));
    assert_eq!(wide(half.path()), wide(&model()));
    let message = failure(of(half.path(), KvCacheDtype::Fp8E4m3));
    assert!(message.contains("layer 0 has no v_scale") && message.contains("--kv-cache-dtype"), "{message}");
}
