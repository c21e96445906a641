//! Records where steps spend their time, as a Chrome trace.

use std::{fs, path::PathBuf, time::Instant};

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
    begin_us: u64,
    duration_us: u64,
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
        self.recording = Some(Recording { directory, started: Instant::now(), events: Vec::new(), dropped: 0 });
        Ok(())
    }

    pub fn record(&mut self, name: &'static str, begin: Instant, end: Instant, tokens: usize) {
        let Some(recording) = &mut self.recording else { return };
        if recording.events.len() >= EVENTS_MAX {
            recording.dropped += 1;
            return;
        }
        recording.events.push(Event {
            name,
            begin_us: begin.saturating_duration_since(recording.started).as_micros() as u64,
            duration_us: end.saturating_duration_since(begin).as_micros() as u64,
            tokens,
        });
    }

    /// Writes the trace (`chrome://tracing`, Perfetto) and returns its path.
    pub fn stop(&mut self) -> Result<String, ProfileError> {
        let recording = self.recording.take().ok_or_else(|| ProfileError("no profile is being recorded".into()))?;
        let events = recording.events.iter().map(|event| {
            // One row for each name, so that steps in flight do not overlap with the host's work.
            let thread = match event.name {
                "step" => 1,
                _ => 0,
            };
            json!({"name": event.name, "ph": "X", "pid": 0, "tid": thread, "ts": event.begin_us,
                "dur": event.duration_us, "args": {"tokens": event.tokens}})
        });
        let trace = json!({
            "traceEvents": events.collect::<Vec<_>>(),
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
