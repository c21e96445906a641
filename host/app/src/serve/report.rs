//! The periodic line in the log that says how busy a server is.

use std::{sync::Arc, time::Duration};

use torus_engine::api::{Engine, EngineStats};

/// At most one line in this time.
const INTERVAL: Duration = Duration::from_secs(1);

/// Writes a line after every `steps` steps while the server is busy.
pub async fn run(engine: Arc<dyn Engine>, steps: u64) {
    let mut ticks = tokio::time::interval(INTERVAL);
    let mut reporter = Reporter::new(steps);
    loop {
        ticks.tick().await;
        let page_size = engine.info().map_or(0, |info| info.page_size);
        if let Some(line) = reporter.line(&engine.stats(), page_size) {
            tracing::info!("{line}");
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
