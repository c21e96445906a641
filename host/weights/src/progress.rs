//! Telling an operator how far a download or a load is.

use std::{
    io::{IsTerminal, stderr},
    sync::Mutex,
};

use indicatif::{HumanBytes, ProgressBar, ProgressStyle};

/// Follows one piece of work after the other; `advance` may be called from several threads.
pub trait Progress: Sync {
    fn begin(&self, what: &str, total_bytes: u64);
    fn advance(&self, bytes: u64);
    /// Also called after a failure.
    fn finish(&self);
}

/// Says nothing.
#[derive(Clone, Copy, Debug)]
pub struct NoProgress;

impl Progress for NoProgress {
    fn begin(&self, _: &str, _: u64) {}
    fn advance(&self, _: u64) {}
    fn finish(&self) {}
}

/// A bar if standard error is a terminal, otherwise a log line every ten percent.
#[derive(Debug)]
pub struct ConsoleProgress {
    is_terminal: bool,
    work: Mutex<Option<Work>>,
}

#[derive(Debug)]
enum Work {
    Bar(ProgressBar),
    Lines(Lines),
}

impl ConsoleProgress {
    pub fn new() -> Self {
        Self { is_terminal: stderr().is_terminal(), work: Mutex::default() }
    }

    fn with_work(&self, act: impl FnOnce(&mut Option<Work>)) {
        // Whatever a panicking thread left is only a number on a screen.
        act(&mut self.work.lock().unwrap_or_else(|poisoned| poisoned.into_inner()));
    }
}

impl Default for ConsoleProgress {
    fn default() -> Self {
        Self::new()
    }
}

impl Progress for ConsoleProgress {
    fn begin(&self, what: &str, total_bytes: u64) {
        let work = match self.is_terminal {
            true => Work::Bar(bar(what, total_bytes)),
            false => {
                tracing::info!("{what}: {}", HumanBytes(total_bytes));
                Work::Lines(Lines::new(what, total_bytes))
            }
        };
        self.with_work(|current| *current = Some(work));
    }

    fn advance(&self, bytes: u64) {
        self.with_work(|work| match work {
            Some(Work::Bar(bar)) => bar.inc(bytes),
            Some(Work::Lines(lines)) => {
                if let Some(percent) = lines.advance(bytes) {
                    tracing::info!("{}: {percent} %", lines.what);
                }
            }
            None => {}
        });
    }

    fn finish(&self) {
        self.with_work(|work| {
            if let Some(Work::Bar(bar)) = work.take() {
                bar.finish_and_clear();
            }
        });
    }
}

fn bar(what: &str, total_bytes: u64) -> ProgressBar {
    let template = "{msg} [{wide_bar}] {bytes}/{total_bytes} {bytes_per_sec} {eta}";
    let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
    ProgressBar::new(total_bytes).with_style(style).with_message(what.to_owned())
}

/// When to write a line.
#[derive(Debug)]
struct Lines {
    what: String,
    total: u64,
    done: u64,
    tenths_told: u128,
}

impl Lines {
    fn new(what: &str, total: u64) -> Self {
        Self { what: what.to_owned(), total, done: 0, tenths_told: 0 }
    }

    /// The percentage to tell, each time another ten percent are full.
    fn advance(&mut self, bytes: u64) -> Option<u128> {
        self.done = self.done.saturating_add(bytes).min(self.total);
        let tenths = (u128::from(self.done) * 10).checked_div(self.total.into())?;
        let is_news = tenths > self.tenths_told;
        self.tenths_told = self.tenths_told.max(tenths);
        is_news.then_some(tenths * 10)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_come_every_ten_percent_once() {
        let mut lines = Lines::new("x", 1000);
        let told: Vec<_> = (0..100).filter_map(|_| lines.advance(10)).collect();
        assert_eq!(told, [10, 20, 30, 40, 50, 60, 70, 80, 90, 100]);
        assert_eq!(lines.advance(500), None, "more than expected is still 100 %");
    }

    #[test]
    fn large_steps_skip_lines() {
        let mut lines = Lines::new("x", 100);
        assert_eq!((lines.advance(35), lines.advance(1), lines.advance(64)), (Some(30), None, Some(100)));
        assert_eq!(Lines::new("x", 0).advance(1), None);
        assert_eq!(Lines::new("x", u64::MAX).advance(u64::MAX), Some(100));
    }
}
