//! What an engine without a model runs on: the layouts of its steps, and a device that answers at once.

use std::sync::Arc;

use torus_abi::step::StepShape;

use crate::{
    api::ModelInfo,
    config::NullConfig,
    device::{NullDevice, StepDevice},
    handle::{Shared, lock},
    load::{Bucket, Loaded},
    program::{Rows, StepBytes, StepLayout},
};

const MAX_RUNNING: usize = 256;
const TOKEN_BUDGET: usize = 2048;

pub(crate) fn load_null(config: &NullConfig, shared: &Shared) -> Loaded {
    let max_running = config.schedule.max_running_requests.unwrap_or(MAX_RUNNING);
    let token_budget = config.schedule.chunked_prefill_size.unwrap_or(TOKEN_BUDGET);
    let pages_per_slot = config.context_length.div_ceil(config.page_size);
    let shape = |tokens: usize| StepShape {
        tokens: tokens as u64,
        seqs: tokens.min(max_running) as u64,
        page_size: config.page_size as u64,
        pages: (config.max_total_tokens / config.page_size + 1) as u64,
        page_table: (max_running * pages_per_slot + 1) as u64,
    };
    let bucket = |tokens: usize, rows| Bucket { layout: StepLayout::new(shape(tokens), rows), executable: None };
    let powers = (0..).map(|exponent| 1usize << exponent).take_while(|tokens| *tokens < token_budget);
    let mut buckets: Vec<_> = powers.map(|tokens| bucket(tokens, Rows::Sampled)).collect();
    buckets.push(bucket(token_budget, Rows::Sampled));
    *lock(&shared.info) = Some(Arc::new(ModelInfo {
        architecture: "null".to_owned(),
        vocab_size: config.vocab,
        context_length: config.context_length,
        max_total_tokens: config.max_total_tokens,
        max_running_requests: max_running,
        page_size: config.page_size,
        dtype: "none".to_owned(),
        weight_bytes: 0,
        attention_backend: "none".to_owned(),
        model_plugin: "none".to_owned(),
        reserved_bytes: 0,
        device: "null".to_owned(),
        end_token_ids: Vec::new(),
    }));
    Loaded {
        state: StepDevice::Null(NullDevice { vocab: config.vocab as i32, full_steps: config.full_steps as i32 }),
        buckets,
        prompt_logprobs: bucket(token_budget.min(max_running + 64), Rows::All),
        shape: shape(1),
        max_running,
        token_budget,
        context_length: config.context_length,
        vocab: config.vocab,
        end_tokens: Vec::new(),
        pages_per_slot,
        pages: vec![Vec::new(); max_running],
        pending_pages: Vec::new(),
        buffer: StepBytes::default(),
        keeping: None,
        reservation: None,
    }
}
