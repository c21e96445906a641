//! The periodic line in the log that says how busy a server is.

use std::{collections::HashMap, time::Duration};

use torus_engine::api::EngineStats;
use torus_http::ServingModels;

/// At most one line in this time.
const INTERVAL: Duration = Duration::from_secs(1);

/// Writes a line after every `steps` steps of a model while it is busy.
pub async fn run(models: ServingModels, steps: u64) {
    let mut ticks = tokio::time::interval(INTERVAL);
    let mut reporters: HashMap<u64, Reporter> = HashMap::new();
    loop {
        ticks.tick().await;
        let models = models.stats();
        reporters.retain(|generation, _| models.iter().any(|model| model.generation == *generation));
        for model in &models {
            let reporter = reporters.entry(model.generation).or_insert_with(|| Reporter::new(steps));
            if let Some(line) = reporter.line(&model.stats, model.page_size) {
                tracing::info!(model = model.name, "{line}");
            }
        }
    }
}

/// Compares what an engine has counted with what it had counted at the last line.
struct Reporter {
    every_steps: u64,
    reported: EngineStats,
}

impl Reporter {
    fn new(every_steps: u64) -> Self {
        Self { every_steps, reported: EngineStats::default() }
    }

    fn line(&mut self, stats: &EngineStats, page_size: usize) -> Option<String> {
        if stats.steps < self.reported.steps + self.every_steps {
            return None;
        }
        let prompt = stats.prompt_tokens - self.reported.prompt_tokens;
        let cached = stats.cached_prompt_tokens - self.reported.cached_prompt_tokens;
        self.reported = stats.clone();
        let share = |part: f64, whole: f64| if whole == 0.0 { 0.0 } else { part / whole };
        Some(format!(
            "Decode batch. #running-req: {}, #token: {}, token usage: {:.2}, #new-token: {prompt}, cache hit rate: \
             {:.0}%, gen throughput (token/s): {:.2}, #queue-req: {}",
            stats.running,
            stats.pages_used * page_size,
            share(stats.pages_used as f64, stats.pages_total as f64),
            100.0 * share(cached as f64, prompt as f64),
            stats.generation_throughput,
            stats.queued,
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_comes_after_so_many_steps_and_tells_of_what_is_new() {
        let mut reporter = Reporter::new(40);
        let mut stats = EngineStats { steps: 39, ..EngineStats::default() };
        assert_eq!(reporter.line(&stats, 16), None);
        stats = EngineStats {
            steps: 40,
            running: 3,
            queued: 2,
            pages_used: 5,
            pages_total: 10,
            prompt_tokens: 100,
            cached_prompt_tokens: 25,
            generation_throughput: 12.345,
            ..stats
        };
        assert_eq!(
            reporter.line(&stats, 16).as_deref(),
            Some(
                "Decode batch. #running-req: 3, #token: 80, token usage: 0.50, #new-token: 100, cache hit rate: 25%, \
                 gen throughput (token/s): 12.35, #queue-req: 2"
            )
        );
        assert_eq!(reporter.line(&stats, 16), None);
        stats.steps = 90;
        let line = reporter.line(&stats, 16).unwrap();
        assert!(line.contains("#new-token: 0, cache hit rate: 0%"), "{line}");
    }
}
