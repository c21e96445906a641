//! Records where steps spend their time, as a Chrome trace: the host's work, the steps, and in them the calls of native
//! kernels. Kernels of plugins loaded from files are not seen; they count as the rest of a step.

use std::{
    fs,
    path::PathBuf,
    time::{Duration, Instant},
};

use serde_json::json;

use crate::api::ProfileError;

/// Events a profile holds at most; later ones are dropped and counted.
const EVENTS_MAX: usize = 1_000_000;

#[derive(Default)]
pub(crate) struct Profiler {
    recording: Option<Recording>,
}

struct Recording {
    directory: PathBuf,
    started: Instant,
    events: Vec<Event>,
    dropped: usize,
}

struct Event {
    name: &'static str,
    begin: Instant,
    end: Instant,
    tokens: usize,
}

impl Profiler {
    pub fn start(&mut self, directory: Option<String>) -> Result<(), ProfileError> {
        if self.recording.is_some() {
            return Err(ProfileError("a profile is being recorded already; stop it first".into()));
        }
        let directory = directory.map_or_else(std::env::temp_dir, PathBuf::from);
        let failed = |error| ProfileError(format!("output_dir cannot be made: {error}"));
        fs::create_dir_all(&directory).map_err(failed)?;
        torus_cpu::ffi::start_profile();
        self.recording = Some(Recording { directory, started: Instant::now(), events: Vec::new(), dropped: 0 });
        Ok(())
    }

    /// Times the delivery of a step's rows.
    pub fn delivery(&self, rows: usize) -> Delivery {
        let every = if self.recording.is_some() { rows.div_ceil(TIMED_ROWS).max(1) } else { 0 };
        Delivery { rows, every, timed: 0, took: Duration::ZERO }
    }

    pub fn record(&mut self, name: &'static str, begin: Instant, end: Instant, tokens: usize) {
        let Some(recording) = &mut self.recording else { return };
        if recording.events.len() >= EVENTS_MAX {
            recording.dropped += 1;
            return;
        }
        recording.events.push(Event { name, begin, end, tokens });
    }

    /// Writes the trace (`chrome://tracing`, Perfetto) and returns its path.
    pub fn stop(&mut self) -> Result<String, ProfileError> {
        let recording = self.recording.take().ok_or_else(|| ProfileError("no profile is being recorded".into()))?;
        let since = |then: Instant| then.saturating_duration_since(recording.started).as_nanos() as f64 * 1e-3;
        // Rows of their own, so that steps in flight do not overlap with the host's work.
        const HOST: u32 = 0;
        const STEPS: u32 = 1;
        const KERNELS: u32 = 2;
        let events = recording.events.iter().map(|event| {
            let row = if event.name == "step" { STEPS } else { HOST };
            json!({"name": event.name, "cat": "engine", "ph": "X", "pid": 0, "tid": row, "ts": since(event.begin),
                "dur": since(event.end) - since(event.begin), "args": {"tokens": event.tokens}})
        });
        let kernels = torus_cpu::ffi::stop_profile().into_iter().map(|call| {
            json!({"name": call.name, "cat": "kernel", "ph": "X", "pid": 0, "tid": KERNELS, "ts": since(call.begin),
                "dur": since(call.end) - since(call.begin)})
        });
        let trace = json!({
            "traceEvents": events.chain(kernels).collect::<Vec<_>>(),
            "displayTimeUnit": "ms",
            "otherData": {"dropped": recording.dropped},
        });
        let seconds = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default().as_secs();
        let path = recording.directory.join(format!("torus-{seconds}.trace.json"));
        let failed = |error| ProfileError(format!("the trace cannot be written: {error}"));
        fs::write(&path, trace.to_string()).map_err(failed)?;
        Ok(path.display().to_string())
    }
}

/// How long a step's tokens take to be handed to their clients, from a sample of them: asking the time for each would cost
/// as much as what is measured.
pub(crate) struct Delivery {
    rows: usize,
    /// One row of so many is timed; 0 = none.
    every: usize,
    timed: u32,
    took: Duration,
}

/// Rows of a step that are timed.
const TIMED_ROWS: usize = 128;

impl Delivery {
    /// Runs `deliver` for a row.
    pub fn timed<T>(&mut self, row: usize, deliver: impl FnOnce() -> T) -> T {
        if self.every == 0 || !row.is_multiple_of(self.every) {
            return deliver();
        }
        let started = Instant::now();
        let delivered = deliver();
        self.took += started.elapsed();
        self.timed += 1;
        delivered
    }

    /// For all rows.
    pub fn total(&self) -> Duration {
        self.took.mul_f64(self.rows as f64 / f64::from(self.timed.max(1)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sample_of_the_rows_stands_for_all() {
        let idle = Profiler::default().delivery(1000);
        assert_eq!((idle.every, idle.total()), (0, Duration::ZERO));
        let mut delivery = Delivery { rows: 1000, every: 8, timed: 0, took: Duration::ZERO };
        let delivered: usize = (0..1000).map(|row| delivery.timed(row, || row)).sum();
        assert_eq!((delivered, delivery.timed), (499_500, 125));
        let known = Delivery { took: Duration::from_micros(25), ..delivery };
        assert_eq!(known.total(), Duration::from_micros(200));
    }

    #[test]
    fn a_trace_holds_what_was_recorded() {
        let folder = tempfile::tempdir().unwrap();
        let mut profiler = Profiler::default();
        assert!(profiler.stop().is_err());
        profiler.start(Some(folder.path().display().to_string())).unwrap();
        assert_eq!(profiler.delivery(1000).every, 8);
        let now = Instant::now();
        profiler.record("unpack", now, now + Duration::from_micros(5), 7);
        let trace: serde_json::Value = serde_json::from_slice(&fs::read(profiler.stop().unwrap()).unwrap()).unwrap();
        let events = trace["traceEvents"].as_array().unwrap();
        let event = events.iter().find(|event| event["name"] == "unpack").unwrap();
        assert_eq!((event["args"]["tokens"].as_u64(), event["tid"].as_u64()), (Some(7), Some(0)));
        assert!((event["dur"].as_f64().unwrap() - 5.0).abs() < 1e-9);
    }
}
