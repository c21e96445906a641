//! The engine's thread: takes commands, schedules steps, packs and runs them, hands out tokens.
//!
//! Up to two steps are in flight. While one runs, the next is scheduled and packed; its inputs that are not known yet
//! (the tokens the running step samples) stay on the device. The thread only waits for the oldest step, when there is
//! nothing else to do.

use std::{
    collections::{BTreeSet, VecDeque},
    sync::{
        Arc,
        atomic::Ordering,
        mpsc::{Receiver, RecvTimeoutError, TryRecvError},
    },
    time::{Duration, Instant},
};

use torus_pjrt::PjrtError;
use torus_sched::{Batch, Ended, Outcome, Request, RequestId, Row, Scheduler};

use crate::{
    api::{Abort, AbortTarget, FinishReason, FlushRefused, Readiness},
    config::LoopConfig,
    delivery::Delivery,
    device::Pending,
    handle::{Command, Shared, Submission, lock},
    load::Loaded,
    mailbox::Note,
    pace::{Pace, Tokens},
    pack::{self, Packed},
    profile::Profiler,
    program::{Rows, flag},
    request::RequestState,
    requests::Requests,
    results,
    stats::StepStats,
    watchdog::Watchdog,
};

/// A step whose result is awaited.
struct InFlight {
    batch: Batch,
    tokens: usize,
    copy: Pending,
    rows: Rows,
    launched: Instant,
}

pub(crate) struct Core {
    loaded: Loaded,
    scheduler: Scheduler,
    requests: Requests,
    delivery: Delivery,
    deadlines: BTreeSet<(Instant, RequestId)>,
    in_flight: VecDeque<InFlight>,
    shared: Arc<Shared>,
    stats: StepStats,
    profiler: Profiler,
    watchdog: Watchdog,
    pace: Pace,
    /// When the last step ended.
    last_finished: Option<Instant>,
    seed: u64,
    fail_on_token: Option<u32>,
    shutting_down: bool,
    /// What the last failed step said.
    failure: String,
    /// The device could not be recovered.
    broken: bool,
}

/// How often a loop that has nothing to do looks at the clock.
const IDLE_WAIT: Duration = Duration::from_millis(500);

impl Core {
    pub fn new(config: &LoopConfig, loaded: Loaded, delivery: Delivery, shared: Arc<Shared>) -> Self {
        let scheduler = Scheduler::new(torus_sched::Config {
            max_running: loaded.max_running,
            token_budget: loaded.token_budget,
            max_prefill_tokens: config.schedule.max_prefill_tokens,
            // The handle keeps the queue's bound, before a request gets here.
            max_queued: usize::MAX,
            page_size: loaded.shape.page_size as usize,
            pages: loaded.shape.pages as usize,
            mixed: true,
            in_flight_max: if config.schedule.overlap { 2 } else { 1 },
            policy: config.schedule.policy,
            prefix_cache: config.schedule.prefix_cache,
        });
        Self {
            watchdog: Watchdog::start(config.watchdog_timeout, shared.clone()),
            requests: Requests::new(loaded.max_running, loaded.vocab),
            delivery,
            loaded,
            scheduler,
            deadlines: BTreeSet::new(),
            in_flight: VecDeque::new(),
            shared,
            stats: StepStats::default(),
            profiler: Profiler::default(),
            pace: Pace::new(config.schedule.prefill_slowdown),
            last_finished: None,
            seed: config.random_seed,
            fail_on_token: config.fail_on_token,
            shutting_down: false,
            failure: String::new(),
            broken: false,
        }
    }

    /// Runs until it is told to shut down and nothing is left to do, or nobody can send anything any more.
    pub fn run(mut self, commands: &Receiver<Command>) {
        loop {
            if !self.take_commands(commands) {
                break;
            }
            self.expire();
            self.deliver();
            self.launch_steps();
            let tokens = self.in_flight.front().map(|step| step.tokens);
            self.finish_oldest();
            let finished = Instant::now();
            self.end_by_scheduler();
            self.deliver();
            self.publish();
            if let Some(tokens) = tokens {
                self.profiler.record("publish", finished, Instant::now(), tokens);
            }
            if self.shutting_down && self.requests.is_empty() && self.in_flight.is_empty() {
                break;
            }
        }
        self.publish();
    }

    /// Handles all commands that have come; waits for one if there is nothing to compute. False if none can come.
    fn take_commands(&mut self, commands: &Receiver<Command>) -> bool {
        while self.scheduler.is_idle() && !self.shutting_down {
            self.deliver();
            self.publish();
            match commands.recv_timeout(IDLE_WAIT) {
                Ok(command) => self.handle(command),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return false,
            }
        }
        loop {
            match commands.try_recv() {
                Ok(command) => self.handle(command),
                Err(TryRecvError::Empty) => return true,
                Err(TryRecvError::Disconnected) => {
                    // What runs has no listener left.
                    self.abort_all(&Abort::ShuttingDown);
                    self.shutting_down = true;
                    return true;
                }
            }
        }
    }

    fn handle(&mut self, command: Command) {
        match command {
            Command::Submit(submission) => self.submit(submission),
            Command::Abandon(number) => self.end(RequestId(number), FinishReason::Aborted(Abort::ByUser)),
            Command::Abort(AbortTarget::All) => self.abort_all(&Abort::ByUser),
            Command::Abort(AbortTarget::Id(name)) => {
                let ids = self.requests.ids(|request| request.id == name);
                ids.into_iter().for_each(|id| self.end(id, FinishReason::Aborted(Abort::ByUser)));
            }
            // A caller that no longer waits for its answer needs none.
            Command::Flush(answer) => {
                let flushed = self.scheduler.flush();
                let _ = answer.send(flushed.map_err(|(running, waiting)| FlushRefused { waiting, running }));
            }
            Command::StartProfile(directory, answer) => {
                let started = self.profiler.start(directory);
                started.iter().for_each(|()| self.delivery.start_profile());
                let _ = answer.send(started);
            }
            Command::StopProfile(answer) => {
                let _ = answer.send(self.profiler.stop(&self.delivery.stop_profile()));
            }
            Command::Shutdown => self.shutting_down = true,
        }
    }

    fn submit(&mut self, submission: Submission) {
        let Submission { request, mailbox } = submission;
        let id = RequestId(mailbox.number);
        // A seed for those that bring none, different for each.
        let seed = self.seed ^ mailbox.number.wrapping_mul(0x9E37_79B9_7F4A_7C15);
        let namespace = request.namespace.clone();
        let state = RequestState::new(request, &self.loaded.end_tokens, self.loaded.context_length, seed);
        let request = Request {
            id,
            prompt: state.prompt.clone(),
            // One token is sampled even if none is wanted: that is when the prompt is done.
            max_new_tokens: state.max_new_tokens.max(1),
            namespace,
            reuse_max_tokens: state.reuse_max_tokens(),
            step_tokens_max: state.wants_prompt_logprobs().then_some(self.loaded.prompt_logprobs.tokens()),
        };
        if let Some(deadline) = state.deadline {
            self.deadlines.insert((deadline, id));
        }
        let nothing_to_generate = state.max_new_tokens == 0 && !state.wants_prompt_logprobs();
        let key = self.requests.insert(id, state);
        self.delivery.open(key, mailbox);
        if self.broken {
            let message = "the device failed and could not be recovered".to_owned();
            self.end(id, FinishReason::Aborted(Abort::Failed(message)));
        } else if nothing_to_generate {
            self.end(id, FinishReason::Length);
        } else if let Err(error) = self.scheduler.submit(request) {
            self.end(id, FinishReason::Aborted(Abort::Failed(error.to_string())));
        }
    }

    fn abort_all(&mut self, why: &Abort) {
        let ids = self.requests.ids(|_| true);
        ids.into_iter().for_each(|id| self.end(id, FinishReason::Aborted(why.clone())));
    }

    /// Ends a request and tells its client.
    fn end(&mut self, id: RequestId, reason: FinishReason) {
        self.scheduler.abort(id);
        self.forget(id, reason);
    }

    fn forget(&mut self, id: RequestId, reason: FinishReason) {
        let Some((key, mut request)) = self.requests.remove(id) else { return };
        if let Some(deadline) = request.deadline {
            self.deadlines.remove(&(deadline, id));
        }
        self.no_longer_waiting(&mut request);
        self.delivery.note(key, Note::Finished(Box::new(reason)));
        self.shared.forget(&request.id);
    }

    fn no_longer_waiting(&self, request: &mut RequestState) {
        if std::mem::replace(&mut request.waiting, false) {
            self.shared.waiting.fetch_sub(1, Ordering::AcqRel);
        }
    }

    /// Hands over what clients are to be told, and ends requests whose clients read too slowly.
    fn deliver(&mut self) {
        for number in self.delivery.flush() {
            self.end(RequestId(number), FinishReason::Aborted(Abort::SlowClient));
        }
    }

    fn expire(&mut self) {
        let now = Instant::now();
        while let Some((deadline, id)) = self.deadlines.first().copied().filter(|(deadline, _)| *deadline <= now) {
            self.deadlines.remove(&(deadline, id));
            self.end(id, FinishReason::Aborted(Abort::TimedOut));
        }
    }

    /// Requests that the scheduler gave up.
    fn end_by_scheduler(&mut self) {
        for (id, ended) in self.scheduler.take_ended() {
            let why = match ended {
                Ended::OutOfPages => Abort::OutOfPages,
                Ended::Failed => Abort::Failed(format!("the model failed on this request: {}", self.failure)),
            };
            self.forget(id, FinishReason::Aborted(why));
        }
    }

    fn launch_steps(&mut self) {
        loop {
            let started = Instant::now();
            let Some(batch) = self.scheduler.schedule() else { break };
            let (id, tokens) = (batch.id, batch.tokens());
            self.profiler.record("schedule", started, Instant::now(), tokens);
            if let Err(error) = self.launch(batch, tokens) {
                tracing::error!(%error, "a step failed to start");
                self.blame(id, &error);
                return;
            }
        }
    }

    /// A step could not be started. If one in flight has failed, it is that one's doing.
    fn blame(&mut self, id: torus_sched::BatchId, error: &PjrtError) {
        let failed_before = self.stats.failed_steps;
        while !self.in_flight.is_empty() {
            self.finish_oldest();
            if self.stats.failed_steps > failed_before {
                return;
            }
        }
        self.recover(id, error);
    }

    fn launch(&mut self, batch: Batch, tokens: usize) -> Result<(), PjrtError> {
        let started = Instant::now();
        self.watchdog.begin();
        for row in &batch.rows {
            self.prepare_row(row)?;
        }
        let Packed { bucket, rows, padding } = pack::pack(&batch, tokens, &self.requests, &mut self.loaded)?;
        let packed = Instant::now();
        if self.is_to_fail(&batch) {
            return Err(PjrtError::Invalid("this step was told to fail".into()));
        }
        let program = match rows {
            Rows::All => &self.loaded.prompt_logprobs,
            Rows::Sampled => &self.loaded.buckets[bucket],
        };
        let copy = self.loaded.state.step(program, self.loaded.buffer.bytes())?;
        self.stats.launched(tokens, padding);
        let launched = Instant::now();
        self.profiler.record("pack", started, packed, tokens);
        self.profiler.record("launch", packed, launched, tokens);
        self.in_flight.push_back(InFlight { batch, tokens, copy, rows, launched });
        Ok(())
    }

    /// For tests of recovery.
    fn is_to_fail(&self, batch: &Batch) -> bool {
        let Some(token) = self.fail_on_token else { return false };
        batch.rows.iter().any(|row| row.tokens.contains(&token))
    }

    /// Sets up what a row needs on the device beside the step buffer.
    fn prepare_row(&mut self, row: &Row) -> Result<(), PjrtError> {
        let slot = row.slot.0;
        if let Some(cached) = row.admitted {
            self.requests.take_slot(row);
            self.loaded.pages[slot as usize].clear();
            let Some((_, request)) = self.requests.of_row_mut(row) else { return Ok(()) };
            request.cached_tokens.get_or_insert(cached);
            if std::mem::replace(&mut request.waiting, false) {
                self.shared.waiting.fetch_sub(1, Ordering::AcqRel);
            }
            if request.has_penalties() {
                self.loaded.state.load_counts(slot, &request.token_counts())?;
            }
            if request.has_bias() {
                request.stops_forbidden = request.forbids_stops(request.generated);
                self.loaded.state.load_bias(slot, &request.biases())?;
            }
        }
        let is_biased = self.requests.slot(row).is_some_and(|slot| slot.choice.needs(flag::BIAS));
        if let Some(sampled) = row.samples
            && is_biased
            && let Some((_, request)) = self.requests.of_row_mut(row)
            && request.stops_forbidden
            && !request.forbids_stops(sampled)
        {
            request.stops_forbidden = false;
            self.loaded.state.load_bias(slot, &request.biases())?;
        }
        Ok(())
    }

    /// Waits for the oldest step if another cannot be launched, and hands its tokens out.
    fn finish_oldest(&mut self) {
        let Some(step) = self.in_flight.pop_front() else { return };
        let waited_from = Instant::now();
        // If it is not the first of two, it is watched from here on.
        self.watchdog.begin();
        let outcome = step.copy.wait();
        self.watchdog.end();
        self.profiler.record("step", step.launched, Instant::now(), step.tokens);
        let result = match outcome {
            Ok(result) => result,
            Err(error) => {
                tracing::error!(%error, "a step failed");
                return self.recover(step.batch.id, &error);
            }
        };
        let finished = Instant::now();
        self.note_pace(&step.batch, step.launched, finished);
        let mut endings = Vec::new();
        let mut outcomes = Vec::with_capacity(step.batch.rows.len());
        let reader = results::Reader::new(&result);
        let mut first_token = 0;
        for (index, row) in step.batch.rows.iter().enumerate() {
            let place = results::Place { row: index, first_token, rows: step.rows };
            let request = self.requests.of_row_mut(row);
            let (outcome, ending) = request.map_or((Outcome::Nothing, None), |request| {
                results::take(request, row, place, &reader, &mut self.delivery)
            });
            self.stats.sampled += u64::from(matches!(outcome, Outcome::Token(_) | Outcome::Finished(_)));
            outcomes.push(outcome);
            endings.extend(ending.map(|reason| (row.request, reason)));
            first_token += row.len;
        }
        let taken = Instant::now();
        self.deliver();
        let delivered = Instant::now();
        self.scheduler.complete(step.batch.id, &outcomes);
        for (id, reason) in endings {
            self.end(id, reason);
        }
        self.stats.finished(finished - waited_from);
        self.profiler.record("unpack", finished, taken, step.tokens);
        self.profiler.record("stream", taken, delivered, step.tokens);
        self.profiler.record("complete", delivered, Instant::now(), step.tokens);
    }

    /// Learns what a step cost: it began when it was launched or when the one before ended.
    fn note_pace(&mut self, batch: &Batch, launched: Instant, finished: Instant) {
        let begun = self.last_finished.replace(finished).map_or(launched, |last| last.max(launched));
        let [mut decodes, mut prompts] = [Tokens::default(); 2];
        for row in &batch.rows {
            let decodes_one = row.len == 1 && row.samples.is_some();
            if decodes_one { &mut decodes } else { &mut prompts }.add(row.start, row.len);
        }
        self.pace.note(decodes, prompts, finished - begun);
        if let Some(limit) = self.pace.limit(decodes) {
            self.scheduler.limit_mixed_prefill(limit);
        }
    }

    /// After a failed step: the device's state is made anew and the scheduler decides who runs next.
    fn recover(&mut self, failed: torus_sched::BatchId, error: &PjrtError) {
        self.failure = error.to_string();
        self.stats.failed_steps += 1;
        self.in_flight.clear();
        self.scheduler.fail(failed);
        self.watchdog.begin();
        let reset = self.loaded.state.reset();
        self.watchdog.end();
        if let Err(error) = reset {
            tracing::error!(%error, "the device's state cannot be made anew");
            let message = "the device failed and could not be recovered".to_owned();
            self.shared.set_readiness(Readiness::Failed { message: message.clone() });
            self.abort_all(&Abort::Failed(message));
            self.broken = true;
        }
    }

    fn publish(&mut self) {
        let snapshot = self.stats.snapshot(&self.scheduler.stats());
        *lock(&self.shared.stats) = snapshot;
    }
}
