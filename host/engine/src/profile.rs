//! Records where steps spend their time, as a Chrome trace: the host's work, the steps, and in them the calls of native
//! kernels. Kernels of plugins loaded from files are not seen; they count as the rest of a step.

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
