//! The engine as callers hold it: submits requests, carries events, reports state. The engine's own thread is on the
//! other end of a channel.

use std::{
    collections::HashMap,
    pin::Pin,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
        mpsc as sync_mpsc,
    },
    task::{Context, Poll},
    thread::JoinHandle,
    time::{Duration, Instant},
};

use crate::{
    api::{
        AbortTarget, Engine, EngineStats, Event, EventStream, FlushRefused, GenerateRequest, ModelInfo, ProfileError,
        Readiness, SubmitError, TOP_LOGPROBS_MAX,
    },
    mailbox::{Receiver, Sender, mailbox},
};

/// What the engine's thread is told.
pub(crate) enum Command {
    Submit(Submission),
    /// By submission number: the stream was dropped.
    Abandon(u64),
    Abort(AbortTarget),
    Flush(sync_mpsc::SyncSender<Result<usize, FlushRefused>>),
    StartProfile(Option<String>, sync_mpsc::SyncSender<Result<(), ProfileError>>),
    StopProfile(sync_mpsc::SyncSender<Result<String, ProfileError>>),
    Shutdown,
}

/// A request on its way to the engine's thread.
pub(crate) struct Submission {
    pub request: GenerateRequest,
    pub mailbox: Sender,
}

/// What the engine's thread and its callers share.
pub(crate) struct Shared {
    pub readiness: Mutex<Readiness>,
    pub info: Mutex<Option<Arc<ModelInfo>>>,
    pub stats: Mutex<EngineStats>,
    /// Requests that wait, on the channel or in the queue.
    pub waiting: AtomicUsize,
    pub shutting_down: AtomicBool,
    /// Compilations since the engine became ready. There must be none.
    pub serving_compiles: AtomicU64,
    /// Ids of unfinished requests, for [`Engine::abort`] to count.
    pub ids: Mutex<HashMap<String, usize>>,
}

/// A lock that a panicking holder does not take down with it: what these mutexes guard is replaced whole.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    pub fn new() -> Self {
        Self {
            readiness: Mutex::new(Readiness::Loading { done: 0, total: 0 }),
            info: Mutex::new(None),
            stats: Mutex::new(EngineStats::default()),
            waiting: AtomicUsize::new(0),
            shutting_down: AtomicBool::new(false),
            serving_compiles: AtomicU64::new(0),
            ids: Mutex::new(HashMap::new()),
        }
    }

    /// Says how far the engine is. Once it shuts down, that is all there is to say.
    pub fn set_readiness(&self, readiness: Readiness) {
        let mut current = lock(&self.readiness);
        if *current != Readiness::ShuttingDown {
            *current = readiness;
        }
    }

    pub fn is_shutting_down(&self) -> bool {
        self.shutting_down.load(Ordering::Acquire)
    }

    /// Nothing waits any more: the engine's thread has ended.
    pub fn forget_all(&self) {
        self.waiting.store(0, Ordering::Release);
        lock(&self.ids).clear();
    }

    /// A program was compiled, and not taken from the cache.
    pub fn note_compile(&self) {
        let serving = *lock(&self.readiness) == Readiness::Ready;
        self.serving_compiles.fetch_add(u64::from(serving), Ordering::Relaxed);
        let phase = if serving { "serving" } else { "startup" };
        metrics::counter!("torus:compiles", "phase" => phase).increment(1);
    }

    /// Forgets the id of a request that ended.
    pub fn forget(&self, id: &str) {
        let mut ids = lock(&self.ids);
        if let Some(count) = ids.get_mut(id) {
            *count -= 1;
            if *count == 0 {
                ids.remove(id);
            }
        }
    }
}

/// A running engine. Dropping the last handle stops it.
pub struct EngineHandle {
    pub(crate) shared: Arc<Shared>,
    commands: sync_mpsc::Sender<Command>,
    next_number: AtomicUsize,
    max_queued: usize,
    thread: Option<JoinHandle<()>>,
}

/// How long a handle that is dropped waits for the engine's thread: the process may end after it, and a thread that is
/// still in the device's library then takes it down.
const JOIN_TIMEOUT: Duration = Duration::from_secs(10);
/// How long an answer of the engine's thread may take.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);

impl EngineHandle {
    pub(crate) fn new(shared: Arc<Shared>, commands: sync_mpsc::Sender<Command>, max_queued: usize) -> Self {
        Self { shared, commands, next_number: AtomicUsize::new(0), max_queued, thread: None }
    }

    pub(crate) fn with_thread(mut self, thread: JoinHandle<()>) -> Self {
        self.thread = Some(thread);
        self
    }

    /// Stops admission. What runs goes on until it ends or is aborted.
    pub fn shut_down(&self) {
        self.shared.shutting_down.store(true, Ordering::Release);
        self.shared.set_readiness(Readiness::ShuttingDown);
        // An engine that is gone needs no telling.
        let _ = self.commands.send(Command::Shutdown);
    }

    fn ready_info(&self) -> Result<Arc<ModelInfo>, SubmitError> {
        if self.shared.is_shutting_down() {
            return Err(SubmitError::ShuttingDown);
        }
        let readiness = lock(&self.shared.readiness).clone();
        // The engine's own warm-up runs through the same door.
        if !matches!(readiness, Readiness::Ready | Readiness::WarmingUp) {
            return Err(SubmitError::NotReady { stage: stage(&readiness) });
        }
        let info = lock(&self.shared.info).clone();
        info.ok_or_else(|| SubmitError::NotReady { stage: "loading".into() })
    }

    /// Sends a command that is answered, and waits for the answer.
    fn ask<T>(&self, command: impl FnOnce(sync_mpsc::SyncSender<T>) -> Command) -> Option<T> {
        let (answer, answered) = sync_mpsc::sync_channel(1);
        self.commands.send(command(answer)).ok()?;
        answered.recv_timeout(ANSWER_TIMEOUT).ok()
    }
}

impl Drop for EngineHandle {
    fn drop(&mut self) {
        self.shut_down();
        let Some(thread) = self.thread.take() else { return };
        let waited_from = Instant::now();
        while !thread.is_finished() && waited_from.elapsed() < JOIN_TIMEOUT {
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

fn stage(readiness: &Readiness) -> String {
    match readiness {
        Readiness::Loading { done, total } if *total > 0 => format!("loading weights, {}%", done * 100 / total),
        Readiness::Loading { .. } => "loading".into(),
        Readiness::Compiling { done, total } => format!("compiling {done} of {total}"),
        Readiness::WaitingForMemory { .. } => "waiting for memory".into(),
        Readiness::WarmingUp => "warming up".into(),
        Readiness::Ready => "ready".into(),
        Readiness::Failed { .. } => "failed".into(),
        Readiness::ShuttingDown => "shutting down".into(),
    }
}

impl Engine for EngineHandle {
    fn submit(&self, request: GenerateRequest) -> Result<EventStream, SubmitError> {
        let info = self.ready_info()?;
        check(&request, &info)?;
        let waiting = self.shared.waiting.fetch_add(1, Ordering::AcqRel);
        if waiting >= self.max_queued {
            self.shared.waiting.fetch_sub(1, Ordering::AcqRel);
            return Err(SubmitError::QueueFull { queued: waiting });
        }
        let number = self.next_number.fetch_add(1, Ordering::Relaxed) as u64;
        *lock(&self.shared.ids).entry(request.id.clone()).or_default() += 1;
        let (sender, receiver) = mailbox(number);
        let submission = Submission { request, mailbox: sender };
        if let Err(refused) = self.commands.send(Command::Submit(submission)) {
            self.shared.waiting.fetch_sub(1, Ordering::AcqRel);
            if let Command::Submit(submission) = refused.0 {
                self.shared.forget(&submission.request.id);
            }
            return Err(SubmitError::ShuttingDown);
        }
        Ok(Box::pin(Events { receiver, number, commands: self.commands.clone(), finished: false }))
    }

    fn abort(&self, target: &AbortTarget) -> usize {
        let reached = {
            let ids = lock(&self.shared.ids);
            match target {
                AbortTarget::Id(id) => ids.get(id).copied().unwrap_or(0),
                AbortTarget::All => ids.values().sum(),
            }
        };
        if reached > 0 {
            // An engine that is gone has nothing to abort.
            let _ = self.commands.send(Command::Abort(target.clone()));
        }
        reached
    }

    fn flush_cache(&self) -> Result<usize, FlushRefused> {
        let pending = || {
            let stats = self.stats();
            Err(FlushRefused { waiting: stats.queued, running: stats.running })
        };
        if self.readiness() != Readiness::Ready {
            return pending();
        }
        self.ask(Command::Flush).unwrap_or_else(pending)
    }

    fn readiness(&self) -> Readiness {
        lock(&self.shared.readiness).clone()
    }

    fn info(&self) -> Option<ModelInfo> {
        lock(&self.shared.info).as_deref().cloned()
    }

    fn stats(&self) -> EngineStats {
        let mut stats = lock(&self.shared.stats).clone();
        stats.serving_compiles = self.shared.serving_compiles.load(Ordering::Relaxed);
        stats.queued = self.shared.waiting.load(Ordering::Acquire).max(stats.queued);
        stats
    }

    fn start_profile(&self, output_dir: Option<&str>) -> Result<(), ProfileError> {
        let directory = output_dir.map(str::to_owned);
        self.ask(|answer| Command::StartProfile(directory, answer)).unwrap_or_else(|| Err(gone()))
    }

    fn stop_profile(&self) -> Result<String, ProfileError> {
        self.ask(Command::StopProfile).unwrap_or_else(|| Err(gone()))
    }
}

fn gone() -> ProfileError {
    ProfileError("the engine has stopped".into())
}

/// Checks what the engine relies on. Callers with better messages check first.
fn check(request: &GenerateRequest, info: &ModelInfo) -> Result<(), SubmitError> {
    let invalid = |field, message: String| Err(SubmitError::Invalid { field, message });
    let sampling = &request.sampling;
    if request.prompt.is_empty() {
        return invalid("prompt", "must have at least one token".into());
    }
    let known = |token: u32| (token as usize) < info.vocab_size;
    if let Some(token) = request.prompt.iter().find(|token| !known(**token)) {
        return invalid("prompt", format!("token id {token} is not below the vocabulary size {}", info.vocab_size));
    }
    let longest = info.context_length.min(info.max_total_tokens);
    if request.prompt.len() >= longest {
        let message = format!("has {} tokens, and prompt and output together may have {longest}", request.prompt.len());
        return invalid("prompt", message);
    }
    if let Some((token, _)) = sampling.logit_bias.iter().find(|(token, bias)| !known(*token) || bias.is_nan()) {
        return invalid("logit_bias", format!("token id {token} is unknown or its bias is not a number"));
    }
    let numbers = [
        ("temperature", sampling.temperature, 0.0..=f32::MAX),
        ("top_p", sampling.top_p, f32::MIN_POSITIVE..=1.0),
        ("min_p", sampling.min_p, 0.0..=1.0),
        ("repetition_penalty", sampling.repetition_penalty, f32::MIN_POSITIVE..=f32::MAX),
        ("frequency_penalty", sampling.frequency_penalty, f32::MIN..=f32::MAX),
        ("presence_penalty", sampling.presence_penalty, f32::MIN..=f32::MAX),
    ];
    for (field, value, range) in numbers {
        if !range.contains(&value) {
            return invalid(field, format!("{value} is out of range"));
        }
    }
    if request.logprobs.top_n > TOP_LOGPROBS_MAX {
        return invalid("top_logprobs", format!("at most {TOP_LOGPROBS_MAX} can be returned"));
    }
    Ok(())
}

/// The events of one request. Dropped before the end, it tells the engine that nobody listens.
struct Events {
    receiver: Receiver,
    number: u64,
    commands: sync_mpsc::Sender<Command>,
    finished: bool,
}

impl futures_core::Stream for Events {
    type Item = Event;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Event>> {
        if self.finished {
            return Poll::Ready(None);
        }
        let Poll::Ready(event) = self.receiver.poll_next(context) else { return Poll::Pending };
        self.finished = matches!(event, Event::Finished(_));
        Poll::Ready(Some(event))
    }
}

impl Drop for Events {
    fn drop(&mut self) {
        if !self.finished {
            let _ = self.commands.send(Command::Abandon(self.number));
        }
    }
}
