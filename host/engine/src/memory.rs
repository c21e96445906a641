//! How memory and buckets are laid out: page size, pool, slots, step sizes.

use torus_abi::{model::ModelDescription, step::StepShape};

use crate::{
    config::{EngineConfig, MemoryConfig, Platform},
    load::StartError,
};

/// Sizes that do not change while an engine runs.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    pub page_size: u64,
    /// Pages of a layer's pool, the trash page included.
    pub pages: u64,
    pub max_running: usize,
    /// Tokens of a step at most.
    pub token_budget: usize,
    /// Longest prompt plus output.
    pub context_length: usize,
    pub pages_per_slot: usize,
}

/// Contexts of full length for which the pool has room, for each slot, unless told otherwise.
const CACHED_CONTEXTS_PER_SLOT: u64 = 4;
const GIB: u64 = 1 << 30;
/// KV memory on a CPU unless told otherwise: at most this, and at most a quarter of what is left.
const CPU_KV_BYTES_MAX: u64 = 4 * GIB;
/// Entries of the page table that a TPU's kernels have room for: eight bytes each in 1 MiB of scalar memory, beside little
/// else.
const TPU_TABLE_ENTRIES: usize = 120_000;
/// Share of the memory that is left which serves KV off the CPU unless told otherwise.
const DEVICE_FRACTION: f64 = 0.88;

fn config_error(field: &'static str, message: String) -> StartError {
    StartError::Config { field, message }
}

/// Everything but the pool.
pub(crate) fn plan(config: &EngineConfig, description: &ModelDescription) -> Result<Plan, StartError> {
    let on_cpu = config.device.platform() == Platform::Cpu;
    let page_size = config.memory.page_size.unwrap_or(if on_cpu { 16 } else { 128 });
    if !(1..=4096).contains(&page_size) {
        return Err(config_error("--page-size", format!("{page_size} is not between 1 and 4096")));
    }
    let model_length = description.context_length as usize;
    let context_length = config.context_length.unwrap_or(model_length);
    if context_length > model_length {
        let message = format!("{context_length} is more than the {model_length} tokens the model was made for");
        return Err(config_error("--context-length", message));
    }
    let token_budget = config.schedule.chunked_prefill_size.unwrap_or(if on_cpu { 512 } else { 2048 });
    let pages_per_slot = context_length.div_ceil(page_size);
    let default_running = default_running(config.device.platform(), pages_per_slot);
    let max_running = config.schedule.max_running_requests.unwrap_or(default_running);
    if max_running == 0 || token_budget < 1 {
        return Err(config_error("--max-running-requests", "must be at least 1".into()));
    }
    Ok(Plan { page_size: page_size as u64, pages: 2, max_running, token_budget, context_length, pages_per_slot })
}

/// Requests that run at once unless told otherwise.
fn default_running(platform: Platform, pages_per_slot: usize) -> usize {
    match platform {
        Platform::Cpu => 64,
        Platform::Tpu => (TPU_TABLE_ENTRIES / pages_per_slot.max(1)).clamp(1, 256),
        Platform::Cuda => 256,
    }
}

impl Plan {
    /// Sizes the pool, and limits what depends on it. Both sizes are those of one device.
    pub fn with_pages(mut self, config: &EngineConfig, page_bytes: u64, weight_bytes: u64) -> Result<Self, StartError> {
        let wanted = config.memory.max_total_tokens.map(|tokens| (tokens as u64).div_ceil(self.page_size));
        let shards = config.device.shards_per_memory();
        let possible = kv_bytes(config, weight_bytes * shards) / (page_bytes * shards).max(1);
        // A tiny model would else fill the memory with a cache it never needs.
        let useful = (self.max_running * self.pages_per_slot) as u64 * CACHED_CONTEXTS_PER_SLOT;
        let pages = wanted.unwrap_or(possible.min(useful));
        if let Some(wanted) = wanted.filter(|wanted| *wanted > possible && config.memory.mem_fraction_static.is_some())
        {
            let message = format!("{wanted} pages do not fit the {possible} that --mem-fraction-static leaves");
            return Err(config_error("--max-total-tokens", message));
        }
        if pages < 2 {
            let gb = |bytes: u64| bytes as f64 / 1e9;
            let message = format!(
                "memory holds {pages} pages of {} tokens: {:.2} GB of weights are to lie in {:.2} GB; free memory or lower \
                 --page-size",
                self.page_size,
                gb(weight_bytes),
                gb(available_bytes(&config.memory))
            );
            return Err(config_error("--max-total-tokens", message));
        }
        self.pages = pages + 1;
        self.context_length = self.context_length.min(self.kv_tokens());
        self.pages_per_slot = self.context_length.div_ceil(self.page_size as usize);
        Ok(self)
    }

    /// Tokens that the pool holds.
    pub fn kv_tokens(&self) -> usize {
        ((self.pages - 1) * self.page_size) as usize
    }

    /// The shape of a step; sequences are at most as many as tokens and slots.
    pub fn shape(&self, tokens: usize, seqs: usize) -> StepShape {
        StepShape {
            tokens: tokens as u64,
            seqs: tokens.min(seqs) as u64,
            page_size: self.page_size,
            pages: self.pages,
            // One entry past all slots, for padding.
            page_table: (self.max_running * self.pages_per_slot + 1) as u64,
        }
    }

    /// Tokens of a step that gives logprobs of prompt tokens: room for prompts beside all that may decode.
    pub fn prompt_logprob_tokens(&self) -> usize {
        const PROMPT_TOKENS: usize = 64;
        self.token_budget.min(self.max_running + PROMPT_TOKENS)
    }

    /// Powers of two up to the budget, and the budget.
    pub fn buckets(&self) -> Vec<usize> {
        let powers = (0..).map(|exponent| 1usize << exponent);
        let mut buckets: Vec<_> = powers.take_while(|tokens| *tokens < self.token_budget).collect();
        buckets.push(self.token_budget);
        buckets
    }
}

/// What this engine may take, weights and KV together.
fn available_bytes(memory: &MemoryConfig) -> u64 {
    let free = memory.budget.free_bytes() + memory.released_bytes;
    let share = memory.share.map(|share| (memory.budget.total_bytes() as f64 * share) as u64);
    share.map_or(free, |share| share.min(free))
}

/// Bytes for KV, beside the weights.
fn kv_bytes(config: &EngineConfig, weight_bytes: u64) -> u64 {
    let available = available_bytes(&config.memory).saturating_sub(weight_bytes);
    match (config.memory.mem_fraction_static, config.device.platform()) {
        (Some(fraction), _) => {
            ((available_bytes(&config.memory) as f64 * fraction) as u64).saturating_sub(weight_bytes)
        }
        (None, Platform::Cpu) => CPU_KV_BYTES_MAX.min(available / 4),
        (None, _) => ((available_bytes(&config.memory) as f64 * DEVICE_FRACTION) as u64).saturating_sub(weight_bytes),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(token_budget: usize) -> Plan {
        Plan { page_size: 16, pages: 101, max_running: 8, token_budget, context_length: 100, pages_per_slot: 7 }
    }

    #[test]
    fn buckets_cover_every_step_up_to_the_budget() {
        assert_eq!(plan(1).buckets(), [1]);
        assert_eq!(plan(8).buckets(), [1, 2, 4, 8]);
        assert_eq!(plan(12).buckets(), [1, 2, 4, 8, 12]);
    }

    #[test]
    fn long_contexts_leave_a_tpu_fewer_requests() {
        // Contexts of 40,960 tokens, as Qwen3 has them, and of 131,072 in pages of 128.
        let found = [320, 1024].map(|pages| default_running(Platform::Tpu, pages));
        assert_eq!((found, default_running(Platform::Cpu, 8192)), ([256, 117], 64));
        assert_eq!(default_running(Platform::Tpu, 1 << 20), 1);
    }

    #[test]
    fn sequences_are_at_most_tokens_and_slots() {
        let plan = plan(64);
        assert_eq!((plan.shape(4, 8).seqs, plan.shape(64, 8).seqs), (4, 8));
        assert_eq!((plan.kv_tokens(), plan.shape(1, 1).page_table), (1600, 57));
    }
}
