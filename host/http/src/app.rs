//! What all requests share.

use std::{
    collections::HashMap,
    path::PathBuf,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use metrics_exporter_prometheus::PrometheusHandle;
use serde_json::{Map, Value};
use tokio::{
    runtime::{Handle, RuntimeFlavor},
    sync::Semaphore,
    task::{block_in_place, spawn_blocking},
};
use torus_engine::api::{AbortTarget, Readiness};

use crate::{
    body::BodyBudget,
    config::{Limits, ServerConfig},
    error::ApiError,
    models::{Models, Serving},
    operate::Operator,
};

pub(crate) struct App {
    pub models: Models,
    pub operator: Option<Arc<dyn Operator>>,
    /// Held while plugins or models are changed: one change at a time.
    pub change: Arc<tokio::sync::Mutex<()>>,
    pub admin_api_key: Option<String>,
    pub active: Arc<ActiveRequests>,
    pub body_budget: BodyBudget,
    blocking: Arc<Semaphore>,
    /// Places for requests to the models.
    pub places: Arc<Semaphore>,
    /// One `/health_generate` at a time.
    pub health_probe: tokio::sync::Mutex<()>,
    is_shutting_down: AtomicBool,

    pub api_key: Option<String>,
    pub server_args: Map<String, Value>,
    pub metrics: PrometheusHandle,
    pub enable_cache_report: bool,
    pub stream_interval: u32,
    pub stream_output: bool,
    pub request_timeout: Option<Duration>,
    pub profile_dir: PathBuf,
    pub limits: Limits,
}

/// A stage in words. Why loading failed stays in the log.
pub(crate) fn describe(readiness: &Readiness) -> String {
    match readiness {
        Readiness::Loading { done, total } => format!("loading {done} of {total}"),
        Readiness::Compiling { done, total } => format!("compiling {done} of {total}"),
        Readiness::WaitingForMemory { .. } => "waiting for memory".to_owned(),
        Readiness::WarmingUp => "warming up".to_owned(),
        Readiness::Ready => "ready".to_owned(),
        Readiness::Failed { .. } => "failed, see the server's log".to_owned(),
        Readiness::ShuttingDown => "shutting down".to_owned(),
    }
}

impl App {
    pub fn new(config: ServerConfig) -> Self {
        let limits = config.limits;
        Self {
            models: Models::new(config.models),
            operator: config.operator,
            change: Arc::default(),
            admin_api_key: config.admin_api_key,
            active: Arc::default(),
            body_budget: BodyBudget::new(&limits),
            blocking: Arc::new(Semaphore::new(limits.blocking_tasks)),
            places: Arc::new(Semaphore::new(limits.concurrent_requests)),
            health_probe: tokio::sync::Mutex::default(),
            is_shutting_down: AtomicBool::new(false),
            api_key: config.api_key,
            server_args: config.server_args,
            metrics: config.metrics,
            enable_cache_report: config.enable_cache_report,
            stream_interval: config.stream_interval.max(1),
            stream_output: config.stream_output,
            request_timeout: config.request_timeout,
            profile_dir: config.profile_dir,
            limits,
        }
    }

    /// Runs `work`, on a blocking thread if it is large. How much large work runs at once is limited.
    pub async fn compute<T: Send + 'static>(
        &self,
        is_large: bool,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, ApiError> {
        if !is_large {
            return Ok(work());
        }
        let permit = Arc::clone(&self.blocking).acquire_owned().await.map_err(|_| ApiError::internal())?;
        let work = move || {
            // Held by the work, which goes on when the client leaves.
            let _permit = permit;
            work()
        };
        spawn_blocking(work).await.map_err(|error| {
            tracing::error!(%error, "a task failed");
            ApiError::internal()
        })
    }

    /// How far the server is from serving: the first model that does not serve decides.
    pub fn readiness(&self) -> Readiness {
        if self.is_shutting_down() {
            return Readiness::ShuttingDown;
        }
        let stages = self.models.entries().into_iter().map(|entry| match &entry.serving {
            Serving::Model(model) => model.engine.readiness(),
            // Its requests wait and are answered.
            Serving::Paused => Readiness::Ready,
            Serving::Lost(reason) => Readiness::Failed { message: reason.clone() },
        });
        stages.into_iter().find(|stage| *stage != Readiness::Ready).unwrap_or(Readiness::Ready)
    }

    pub fn is_shutting_down(&self) -> bool {
        self.is_shutting_down.load(Ordering::Acquire)
    }

    /// From now on requests to the models are refused.
    pub fn begin_shutdown(&self) {
        self.is_shutting_down.store(true, Ordering::Release);
        self.models.end_waiting();
    }

    /// Aborts the request that a client knows as `id`.
    pub fn abort(&self, id: &str) -> usize {
        let ids = self.active.sequences_of(id).unwrap_or_else(|| vec![id.to_owned()]);
        let targets: Vec<_> = ids.into_iter().map(AbortTarget::Id).collect();
        let models = self.models.all();
        models.iter().flat_map(|model| targets.iter().map(|target| model.engine.abort(target))).sum()
    }

    pub fn abort_all(&self) -> usize {
        self.models.all().iter().map(|model| model.engine.abort(&AbortTarget::All)).sum()
    }
}

/// Runs `work` where it is, but lets other tasks go on elsewhere if it is large.
pub(crate) fn in_place<T>(is_large: bool, work: impl FnOnce() -> T) -> T {
    let can_move_others = Handle::current().runtime_flavor() == RuntimeFlavor::MultiThread;
    if is_large && can_move_others { block_in_place(work) } else { work() }
}

/// Requests in progress, by the ids that clients know, with the ids of their sequences in the engine.
#[derive(Default)]
pub(crate) struct ActiveRequests(Mutex<HashMap<String, Vec<String>>>);

impl ActiveRequests {
    /// Enters requests, and each of their sequences by itself, until the guard is dropped. Refuses an id that is in use.
    pub fn register(self: &Arc<Self>, requests: Vec<(String, Vec<String>)>) -> Result<ActiveGuard, ApiError> {
        let in_use = |id: &str| {
            let message = format!("rid: '{id}' is the id of another request in progress");
            ApiError::bad_request("rid", message)
        };
        let sequences: Vec<String> = requests.iter().flat_map(|(_, sequences)| sequences.clone()).collect();
        let mut entries = HashMap::new();
        for (id, sequences) in requests {
            if entries.insert(id.clone(), sequences).is_some() {
                return Err(in_use(&id));
            }
        }
        for id in sequences {
            entries.entry(id.clone()).or_insert_with(|| vec![id]);
        }
        let mut active = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(id) = entries.keys().find(|id| active.contains_key(*id)) {
            return Err(in_use(id));
        }
        let ids = entries.keys().cloned().collect();
        active.extend(entries);
        Ok(ActiveGuard { requests: Arc::clone(self), ids })
    }

    fn sequences_of(&self, id: &str) -> Option<Vec<String>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).get(id).cloned()
    }
}

/// Keeps requests entered in [`ActiveRequests`].
pub(crate) struct ActiveGuard {
    requests: Arc<ActiveRequests>,
    ids: Vec<String>,
}

impl Drop for ActiveGuard {
    fn drop(&mut self) {
        let mut active = self.requests.0.lock().unwrap_or_else(PoisonError::into_inner);
        self.ids.iter().for_each(|id| {
            active.remove(id);
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_free_again_when_their_request_ends() {
        let active = Arc::new(ActiveRequests::default());
        let request = |id: &str| (id.to_owned(), vec![format!("{id}-0"), format!("{id}-1")]);
        let guard = active.register(vec![request("a"), request("b")]).unwrap();
        assert_eq!(active.sequences_of("b").unwrap(), ["b-0", "b-1"]);
        assert_eq!(active.sequences_of("b-1").unwrap(), ["b-1"]);
        for taken in ["a", "a-0"] {
            assert!(active.register(vec![request("c"), request(taken)]).is_err());
        }
        assert!(active.register(vec![request("d"), request("d")]).is_err());
        assert_eq!(active.sequences_of("c"), None);
        drop(guard);
        assert_eq!(active.sequences_of("a"), None);
        active.register(vec![request("a")]).unwrap();
    }
}
