//! Faults of plugins while an engine is loaded: each fails that load, with the plugin's name, and nothing else.

use std::path::Path;

use torus_abi::{
    TensorType,
    attention::{AttentionAnswer, AttentionQuery, EmitAttention},
    author::Attention,
    fault::Fault,
    fragment::Package,
};
use torus_attention_native::Native;
use torus_engine::api::{Engine, Readiness};
use torus_weights::ResolvedModel;

use crate::support::{answer, block_on, config, greedy, ready, request};

/// The stock backend with something wrong, chosen by the size of a page: nobody else asks for these sizes.
struct Wrong;

torus_abi::declare_plugin! { name: "wrong", description: "A test of what can be wrong", attention: Wrong }

const DOES_NOT_PARSE: u64 = 3;
const OTHER_SIGNATURE: u64 = 5;
const PANICS: u64 = 7;
const REFUSES: u64 = 9;
const HAS_NO_EXPORT: u64 = 11;

impl Attention for Wrong {
    fn query(query: &AttentionQuery) -> Result<AttentionAnswer, Fault> {
        Native::query(query)
    }

    fn emit(request: &EmitAttention) -> Result<Package, Fault> {
        let mut package = Native::emit(request)?;
        let fragment = &mut package.fragment;
        match request.query.shape.page_size {
            DOES_NOT_PARSE => {
                fragment.functions.iter_mut().for_each(|function| function.text.push_str(" what is this"))
            }
            OTHER_SIGNATURE => fragment.functions.iter_mut().for_each(|function| {
                let twice = |tensor: &TensorType| TensorType::new(tensor.dtype, [&tensor.dims[..], &[2]].concat());
                function.results = function.results.iter().map(twice).collect();
            }),
            PANICS => panic!("out of ideas"),
            REFUSES => return Err(Fault::unsupported("not on a Monday")),
            HAS_NO_EXPORT => drop(fragment.exports.remove("attention")),
            _ => {}
        }
        Ok(package)
    }
}

#[test]
fn each_fails_the_load_with_the_plugins_name() {
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("data/llama/grouped-untied");
    let with = |page_size: u64| {
        let mut config = config(ResolvedModel::Folder(model.clone()));
        config.attention_backend = Some("wrong".into());
        config.memory.page_size = Some(page_size as usize);
        config.memory.max_total_tokens = Some(256);
        config.schedule.chunked_prefill_size = Some(2);
        config.schedule.max_running_requests = Some(2);
        config
    };
    for (page_size, reason) in [
        (DOES_NOT_PARSE, "does not compile"),
        (OTHER_SIGNATURE, "part 0 of its context is i32[2,2], and it promised i32[2]"),
        (PANICS, "panicked: out of ideas"),
        (REFUSES, "not on a Monday"),
        (HAS_NO_EXPORT, "exports no 'attention'"),
    ] {
        let engine = torus_engine::start(with(page_size)).unwrap();
        let message = loop {
            match engine.readiness() {
                Readiness::Failed { message } => break message,
                Readiness::Ready => panic!("page size {page_size}: it must not load"),
                _ => std::thread::yield_now(),
            }
        };
        assert!(message.contains("'wrong'") && message.contains(reason), "page size {page_size}: {message}");
    }
    // The process is none the worse for it.
    let engine = ready(with(4));
    assert_eq!(block_on(answer(&engine, request("r", &[5, 9, 7], greedy(3)))).tokens.len(), 3);
}
