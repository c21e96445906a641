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
    events: Vec<Span>,
    dropped: usize,
}

/// Something that took time.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Span {
    pub name: &'static str,
    pub begin: Instant,
    pub end: Instant,
    /// Of how many tokens.
    pub tokens: usize,
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
        recording.events.push(Span { name, begin, end, tokens });
    }

    /// Writes the trace (`chrome://tracing`, Perfetto), with what was recorded of deliveries, and returns its path.
    pub fn stop(&mut self, deliveries: &[Span]) -> Result<String, ProfileError> {
        let recording = self.recording.take().ok_or_else(|| ProfileError("no profile is being recorded".into()))?;
        let since = |then: Instant| then.saturating_duration_since(recording.started).as_nanos() as f64 * 1e-3;
        // Rows of their own, so that steps in flight do not overlap with the host's work.
        const HOST: u32 = 0;
        const STEPS: u32 = 1;
        const KERNELS: u32 = 2;
        const DELIVERIES: u32 = 3;
        let events = recording.events.iter().chain(deliveries).map(|event| {
            let row = match event.name {
                "step" => STEPS,
                "deliver" => DELIVERIES,
                _ => HOST,
            };
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

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_trace_holds_what_was_recorded() {
        let folder = tempfile::tempdir().unwrap();
        let mut profiler = Profiler::default();
        assert!(profiler.stop(&[]).is_err());
        profiler.start(Some(folder.path().display().to_string())).unwrap();
        let begin = Instant::now();
        profiler.record("unpack", begin, begin + Duration::from_micros(5), 7);
        let delivery = Span { name: "deliver", begin, end: begin + Duration::from_micros(9), tokens: 14 };
        let path = profiler.stop(&[delivery]).unwrap();
        let trace: serde_json::Value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
        let events = trace["traceEvents"].as_array().unwrap();
        for (name, tokens, row, us) in [("unpack", 7, 0, 5.0), ("deliver", 14, 3, 9.0)] {
            let event = events.iter().find(|event| event["name"] == name).unwrap();
            assert_eq!((event["args"]["tokens"].as_u64(), event["tid"].as_u64()), (Some(tokens), Some(row)));
            assert!((event["dur"].as_f64().unwrap() - us).abs() < 1e-9);
        }
    }
}
