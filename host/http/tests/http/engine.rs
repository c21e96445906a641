//! An engine that computes nothing: it says what it was told to say, when it was told to.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use futures::{Stream, stream};
use tokio::sync::{Notify, Semaphore, watch};
use torus_engine::api::{
    Abort, AbortTarget, Engine, EngineStats, Event, EventStream, FinishReason, FlushRefused, GenerateRequest,
    ModelInfo, ProfileError, Readiness, SubmitError, TokenLogprob,
};

use crate::support::{IM_END, VOCAB_SIZE};

/// What the engine does with requests.
#[derive(Clone)]
pub struct Script {
    /// Tokens it generates, one byte each; then the end token.
    pub says: Vec<u32>,
    /// Tokens per event.
    pub portion: usize,
    pub cached_tokens: usize,
    /// After how many tokens a request fails, and how.
    pub fails_after: Option<(usize, Abort)>,
    /// Requests of which more than this would run at once are refused.
    pub capacity: usize,
    /// Portions need a permit from [`MockEngine::gate`].
    pub is_gated: bool,
}

impl Default for Script {
    fn default() -> Self {
        Self {
            says: bytes("Hello, wörld!"),
            portion: 1,
            cached_tokens: 0,
            fails_after: None,
            capacity: usize::MAX,
            is_gated: false,
        }
    }
}

pub fn bytes(text: &str) -> Vec<u32> {
    text.bytes().map(u32::from).collect()
}

pub struct MockEngine {
    pub script: Script,
    /// Portions that may be generated.
    pub gate: Semaphore,
    state: Mutex<State>,
    /// Requests running.
    running: watch::Sender<usize>,
}

struct State {
    readiness: Readiness,
    info: Option<ModelInfo>,
    submitted: Vec<GenerateRequest>,
    /// Ids of requests whose stream was dropped before its end.
    dropped: Vec<String>,
    aborts: HashMap<String, Arc<Notify>>,
    stats: EngineStats,
    is_profiling: bool,
}

impl MockEngine {
    pub fn new(script: Script) -> Arc<Self> {
        let info = ModelInfo {
            architecture: "MockForCausalLM".into(),
            vocab_size: VOCAB_SIZE,
            context_length: 200,
            max_total_tokens: 1600,
            max_running_requests: 8,
            page_size: 16,
            weight_bytes: 0,
            dtype: "float32".into(),
            attention_backend: "native".into(),
            model_plugin: "test 0.1.0".into(),
            reserved_bytes: 0,
            device: "cpu".into(),
            end_token_ids: vec![IM_END],
        };
        let state = State {
            readiness: Readiness::Ready,
            info: Some(info),
            submitted: Vec::new(),
            dropped: Vec::new(),
            aborts: HashMap::new(),
            stats: EngineStats { pages_total: 100, pages_free: 90, pages_used: 10, ..EngineStats::default() },
            is_profiling: false,
        };
        Arc::new(Self { script, gate: Semaphore::new(0), state: Mutex::new(state), running: watch::Sender::new(0) })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn set_readiness(&self, readiness: Readiness) {
        self.state().readiness = readiness;
    }

    pub fn set_stats(&self, stats: EngineStats) {
        self.state().stats = stats;
    }

    pub fn set_info(&self, change: impl FnOnce(&mut ModelInfo)) {
        change(self.state().info.as_mut().unwrap());
    }

    pub fn submitted(&self) -> Vec<GenerateRequest> {
        self.state().submitted.clone()
    }

    /// Ids of requests whose stream was dropped before its end, sorted.
    pub fn dropped(&self) -> Vec<String> {
        let mut dropped = self.state().dropped.clone();
        dropped.sort();
        dropped
    }

    /// Waits until this many requests run.
    pub async fn wait_for_running(&self, count: usize) {
        self.running.subscribe().wait_for(|running| *running == count).await.unwrap();
    }
}

/// A request in the engine.
struct Running {
    engine: Arc<MockEngine>,
    request: GenerateRequest,
    abort: Arc<Notify>,
    generated: usize,
    phase: Phase,
}

#[derive(Clone, Copy, PartialEq)]
enum Phase {
    Prefill,
    Decode,
    Finished,
}

impl Drop for Running {
    fn drop(&mut self) {
        {
            let mut state = self.engine.state();
            state.aborts.remove(&self.request.id);
            if self.phase != Phase::Finished {
                state.dropped.push(self.request.id.clone());
            }
        }
        self.engine.running.send_modify(|running| *running -= 1);
    }
}

impl Running {
    async fn next(mut self) -> Option<(Event, Self)> {
        let event = match self.phase {
            Phase::Finished => return None,
            Phase::Prefill => {
                self.phase = Phase::Decode;
                self.prefilled()
            }
            Phase::Decode => self.decode().await,
        };
        if matches!(event, Event::Finished(_)) {
            self.phase = Phase::Finished;
        }
        Some((event, self))
    }

    fn prefilled(&self) -> Event {
        let prompt = &self.request.prompt;
        let of_position = |position: usize| {
            let token = prompt[position];
            TokenLogprob { logprob: (position > 0).then(|| logprob(token)), ..self.logprob(token) }
        };
        let from = self.request.logprobs.prompt_from.unwrap_or(prompt.len());
        let prompt_logprobs = (from..prompt.len()).map(of_position).collect();
        Event::Prefilled { cached_tokens: self.engine.script.cached_tokens.min(prompt.len()), prompt_logprobs }
    }

    async fn decode(&mut self) -> Event {
        let max = self.request.sampling.max_new_tokens.unwrap() as usize;
        if self.generated > 0 && self.last_token() == IM_END && !self.request.sampling.ignore_eos {
            return Event::Finished(FinishReason::Stop { token: IM_END });
        }
        if self.generated == max {
            return Event::Finished(FinishReason::Length);
        }
        if let Some((after, abort)) = &self.engine.script.fails_after
            && self.generated >= *after
        {
            return Event::Finished(FinishReason::Aborted(abort.clone()));
        }
        if self.engine.script.is_gated {
            let deadline = self.request.deadline.map(tokio::time::Instant::from_std);
            let timed_out = async {
                match deadline {
                    Some(deadline) => tokio::time::sleep_until(deadline).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                permit = self.engine.gate.acquire() => permit.unwrap().forget(),
                () = self.abort.notified() => return Event::Finished(FinishReason::Aborted(Abort::ByUser)),
                () = timed_out => return Event::Finished(FinishReason::Aborted(Abort::TimedOut)),
            }
        }
        let until = (self.generated + self.engine.script.portion).min(max).min(self.end() + 1);
        let tokens: Vec<u32> = (self.generated..until).map(|index| self.token(index)).collect();
        self.generated = until;
        let with_logprobs = self.request.logprobs.output;
        let logprobs = tokens.iter().filter(|_| with_logprobs).map(|token| self.logprob(*token)).collect();
        Event::Tokens { tokens, logprobs }
    }

    /// Where the end token comes.
    fn end(&self) -> usize {
        if self.request.sampling.ignore_eos { usize::MAX - 1 } else { self.engine.script.says.len() }
    }

    fn token(&self, index: usize) -> u32 {
        let says = &self.engine.script.says;
        if index == self.end() { IM_END } else { says[index % says.len()] }
    }

    fn last_token(&self) -> u32 {
        self.token(self.generated - 1)
    }

    fn logprob(&self, token: u32) -> TokenLogprob {
        let alternatives = (0..self.request.logprobs.top_n).map(|rank| (token + rank, logprob(token) - rank as f32));
        TokenLogprob { token, logprob: Some(logprob(token)), top: alternatives.collect() }
    }
}

/// Of token `id`, to be recognized in answers.
pub fn logprob(id: u32) -> f32 {
    -(id as f32) / 8.0
}

fn events(running: Running) -> impl Stream<Item = Event> + Send {
    stream::unfold(running, Running::next)
}

/// The engine that the server sees.
pub struct Handle(pub Arc<MockEngine>);

impl Engine for Handle {
    fn submit(&self, request: GenerateRequest) -> Result<EventStream, SubmitError> {
        let engine = Arc::clone(&self.0);
        let running = *engine.running.borrow();
        let abort = Arc::new(Notify::new());
        {
            let mut state = engine.state();
            if state.readiness != Readiness::Ready {
                return Err(SubmitError::NotReady { stage: "starting".into() });
            }
            if running >= engine.script.capacity {
                return Err(SubmitError::QueueFull { queued: running });
            }
            state.submitted.push(request.clone());
            state.aborts.insert(request.id.clone(), Arc::clone(&abort));
        }
        engine.running.send_modify(|running| *running += 1);
        Ok(Box::pin(events(Running { engine, request, abort, generated: 0, phase: Phase::Prefill })))
    }

    fn abort(&self, target: &AbortTarget) -> usize {
        let state = self.0.state();
        let aborted = state.aborts.iter().filter(|(id, _)| match target {
            AbortTarget::Id(wanted) => wanted == *id,
            AbortTarget::All => true,
        });
        aborted.map(|(_, abort)| abort.notify_one()).count()
    }

    fn flush_cache(&self) -> Result<usize, FlushRefused> {
        match *self.0.running.borrow() {
            0 => Ok(7),
            running => Err(FlushRefused { waiting: 0, running }),
        }
    }

    fn readiness(&self) -> Readiness {
        self.0.state().readiness.clone()
    }

    fn info(&self) -> Option<ModelInfo> {
        self.0.state().info.clone()
    }

    fn stats(&self) -> EngineStats {
        self.0.state().stats.clone()
    }

    fn start_profile(&self, output_dir: Option<&str>) -> Result<(), ProfileError> {
        let mut state = self.0.state();
        if std::mem::replace(&mut state.is_profiling, true) {
            return Err(ProfileError("a profile is already being recorded".into()));
        }
        assert!(output_dir.is_some_and(|folder| folder.ends_with("run-1")));
        Ok(())
    }

    fn stop_profile(&self) -> Result<String, ProfileError> {
        if std::mem::take(&mut self.0.state().is_profiling) {
            Ok("trace.json".into())
        } else {
            Err(ProfileError("no profile is being recorded".into()))
        }
    }
}
