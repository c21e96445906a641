//! Counters of the step loop, and the snapshot that operators see.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

use crate::api::EngineStats;

/// Seconds over which throughput is measured.
const WINDOW: Duration = Duration::from_secs(10);

#[derive(Debug, Default)]
pub(crate) struct StepStats {
    steps: u64,
    tokens: u64,
    padding: u64,
    /// Sampled tokens.
    pub sampled: u64,
    pub failed_steps: u64,
    /// When steps ended, and how many tokens had been sampled by then.
    recent: VecDeque<(Instant, u64)>,
}

impl StepStats {
    pub fn launched(&mut self, tokens: usize, padding: usize) {
        self.steps += 1;
        self.tokens += tokens as u64;
        self.padding += padding as u64;
        metrics::counter!("torus:padding_tokens_total").increment(padding as u64);
    }

    /// A step's result has been taken; `waited` for it.
    pub fn finished(&mut self, waited: Duration) {
        metrics::histogram!("torus:step_wait_seconds").record(waited.as_secs_f64());
        self.recent.push_back((Instant::now(), self.sampled));
        while self.recent.front().is_some_and(|(then, _)| then.elapsed() > WINDOW) {
            self.recent.pop_front();
        }
    }

    /// Sampled tokens a second over the last seconds.
    fn throughput(&self) -> f64 {
        let (Some((first, before)), Some((_, after))) = (self.recent.front(), self.recent.back()) else { return 0.0 };
        let seconds = first.elapsed().as_secs_f64();
        if seconds > WINDOW.as_secs_f64() * 2.0 || seconds == 0.0 { 0.0 } else { (after - before) as f64 / seconds }
    }

    pub fn snapshot(&self, scheduler: &torus_sched::Stats) -> EngineStats {
        let pages = scheduler.pages;
        EngineStats {
            running: scheduler.running,
            queued: scheduler.queued,
            pages_total: pages.total,
            pages_free: pages.free,
            pages_cached: pages.evictable,
            pages_used: pages.private + pages.locked,
            prompt_tokens: scheduler.prompt_tokens,
            cached_prompt_tokens: scheduler.cached_tokens,
            generated_tokens: self.sampled,
            retractions: scheduler.retractions,
            steps: self.steps,
            failed_steps: self.failed_steps,
            // Counted where compiling is done; see `EngineHandle::stats`.
            serving_compiles: 0,
            generation_throughput: self.throughput(),
            padding_ratio: self.padding as f64 / (self.tokens + self.padding).max(1) as f64,
        }
    }
}
