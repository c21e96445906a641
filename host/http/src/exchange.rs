//! Loading, swapping and unloading models while others, and the one that is replaced, serve.
//!
//! A swap makes the new generation completely (plugins, programs, weights, one token) before the name changes hands.
//! Where memory does not hold two generations, mode `drain` stops short of the weights: the name's new requests wait,
//! those in flight end, the old generation is released, and the new one reads its weights into the room. If that fails,
//! the old generation is made again from its recipe, and the requests that wait are its.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize};
use tokio::{
    sync::{OwnedMutexGuard, mpsc},
    time::timeout,
};
use torus_engine::api::Readiness;

use crate::{
    app::App,
    error::ApiError,
    models::{Model, Serving},
    operate::{ModelRequest, OperateError, Operator, Recipe},
    routes::{blocking, computes},
};

/// How often a loading engine is asked how far it is.
const POLL_INTERVAL: Duration = Duration::from_millis(20);
/// How long the first token of a new generation may take.
const WARM_UP_TIMEOUT: Duration = Duration::from_secs(120);

/// How a model takes the place of another.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum SwapMode {
    /// Both are in memory for a while; nothing waits.
    #[default]
    Overlap,
    /// The old one's requests end first; new ones wait.
    Drain,
}

/// How far a change is.
#[derive(Clone, Debug, Serialize)]
#[serde(untagged)]
pub(crate) enum Stage {
    Engine(Readiness),
    Draining { stage: &'static str, requests: usize },
    Note { stage: &'static str },
}

/// Tells whoever listens how far a change is. It goes on if nobody does.
#[derive(Clone)]
pub(crate) struct Progress(pub mpsc::UnboundedSender<Stage>);

impl Progress {
    fn tell(&self, stage: Stage) {
        let _ = self.0.send(stage);
    }
}

/// A change of the models of a server. At most one is made at a time.
pub(crate) struct Exchange {
    app: Arc<App>,
    operator: Arc<dyn Operator>,
    progress: Progress,
    /// Held to the end: one change at a time.
    _turn: OwnedMutexGuard<()>,
}

impl Exchange {
    /// `turn` is the lock of [`App::change`].
    pub fn new(app: Arc<App>, operator: Arc<dyn Operator>, turn: OwnedMutexGuard<()>, progress: Progress) -> Self {
        Self { app, operator, progress, _turn: turn }
    }

    pub fn app(&self) -> &App {
        &self.app
    }

    /// Loads a model beside the others.
    pub async fn load(&self, name: String, request: ModelRequest) -> Result<Arc<Model>, ApiError> {
        if request.model_path.is_none() {
            return Err(ApiError::bad_request("model_path", "model_path is required"));
        }
        self.check_free(&name)?;
        let recipe = self.recipe(&request).await?;
        let (model, names) = self.start(&recipe, request, vec![name.clone()], 0).await?;
        self.until_ready(&model).await?;
        if !self.app.models.add(names, model.clone()) {
            return Err(taken(&name));
        }
        tracing::info!(model = name, generation = model.generation, "model loaded");
        Ok(model)
    }

    /// Replaces the generation behind `name` by one made from `changes`.
    pub async fn swap(
        &self,
        name: &str,
        changes: ModelRequest,
        mode: SwapMode,
        drain_timeout: Duration,
    ) -> Result<Arc<Model>, ApiError> {
        let (name, old) = self.serving(name)?;
        let Some((base, old_recipe)) = old.origin.clone() else {
            return Err(ApiError::bad_request("model", format!("the model '{name}' cannot be loaded again")));
        };
        let request = changes.over(&base);
        let recipe = self.recipe(&request).await?;
        let released_bytes = match mode {
            SwapMode::Overlap => 0,
            SwapMode::Drain => old.engine.info().map_or(0, |info| info.reserved_bytes),
        };
        let label = vec![old.label.clone()];
        let (new, _) = self.start(&recipe, request, label, released_bytes).await?;
        if released_bytes > 0 {
            self.until(&new, |stage| matches!(stage, Readiness::WaitingForMemory { .. } | Readiness::Ready)).await?;
            return self.replace_drained(&name, old, old_recipe, new, drain_timeout).await;
        }
        self.until_ready(&new).await?;
        self.app.models.replace(&name, Serving::Model(new.clone()));
        tracing::info!(model = name, old = old.generation, new = new.generation, "model swapped");
        Ok(new)
    }

    /// Lets `taker`, which is loaded already, take over the names of `name`.
    pub fn take_over(&self, name: &str, taker: &str) -> Result<Arc<Model>, ApiError> {
        let (name, _) = self.serving(name)?;
        let (taker, new) = self.serving(taker).map_err(|error| ApiError { param: Some("with".into()), ..error })?;
        if !self.app.models.take_over(&name, &taker) {
            return Err(ApiError::bad_request("with", format!("'{name}' and '{taker}' are the same model")));
        }
        tracing::info!(model = name, taken_by = taker, generation = new.generation, "model swapped");
        Ok(new)
    }

    /// Takes a model out of service. Its requests end as they would have.
    pub fn unload(&self, name: &str) -> Result<(), ApiError> {
        let entry = self.app.models.entry(name).ok_or_else(|| ApiError::unknown_model(name))?;
        self.app.models.remove(entry.id());
        tracing::info!(model = name, "model unloaded");
        Ok(())
    }

    /// The second half of a swap in mode `drain`: the new generation is ready but for its weights. The caller keeps no
    /// reference to `old`, whose end is waited for.
    async fn replace_drained(
        &self,
        name: &str,
        old: Arc<Model>,
        old_recipe: Arc<dyn Recipe>,
        new: Arc<Model>,
        drain_timeout: Duration,
    ) -> Result<Arc<Model>, ApiError> {
        let models = &self.app.models;
        models.replace(name, Serving::Paused);
        if timeout(drain_timeout, self.until_idle(&old)).await.is_err() {
            models.replace(name, Serving::Model(old));
            let message = format!("requests did not end within {} seconds", drain_timeout.as_secs_f64());
            return Err(ApiError::conflict(format!("{message}; '{name}' serves on as before")));
        }
        let (label, request) = (old.label.clone(), old.origin.as_ref().map(|(request, _)| request.clone()));
        release(old).await;
        let failed = match self.until_ready(&new).await {
            Ok(()) => {
                models.replace(name, Serving::Model(new.clone()));
                tracing::info!(model = name, new = new.generation, "model swapped");
                return Ok(new);
            }
            Err(error) => error,
        };
        tracing::error!(model = name, error = failed.message, "swap failed; the old generation is loaded again");
        self.progress.tell(Stage::Note { stage: "restoring" });
        release(new).await;
        let restored = async {
            let (old, _) = self.start(&old_recipe, request.unwrap_or_default(), vec![label], 0).await?;
            self.until_ready(&old).await.map(|()| old)
        };
        match restored.await {
            Ok(old) => models.replace(name, Serving::Model(old)),
            Err(error) => {
                tracing::error!(model = name, error = error.message, "the old generation could not be loaded again");
                models.replace(name, Serving::Lost("it was lost in a swap that failed".to_owned()));
            }
        }
        Err(failed)
    }

    /// The model that `name` stands for, with the first of its names: `default` is not one of them.
    fn serving(&self, name: &str) -> Result<(String, Arc<Model>), ApiError> {
        let entry = self.app.models.entry(name).ok_or_else(|| ApiError::unknown_model(name))?;
        let model = entry.model().cloned();
        let model = model.ok_or_else(|| ApiError::conflict(format!("the model '{name}' is not served")))?;
        Ok((entry.id().to_owned(), model))
    }

    fn check_free(&self, name: &str) -> Result<(), ApiError> {
        let is_valid = (1..=200).contains(&name.len()) && name.bytes().all(|byte| byte.is_ascii_graphic());
        if !is_valid {
            let message = "model must be a name of 1 to 200 printable ASCII characters without spaces";
            return Err(ApiError::bad_request("model", message));
        }
        let is_taken = self.app.models.entries().iter().any(|entry| entry.names.iter().any(|known| known == name));
        if is_taken { Err(taken(name)) } else { Ok(()) }
    }

    async fn recipe(&self, request: &ModelRequest) -> Result<Arc<dyn Recipe>, ApiError> {
        self.progress.tell(Stage::Note { stage: "opening" });
        let (operator, request) = (self.operator.clone(), request.clone());
        Ok(blocking(move || operator.recipe(&request)).await??)
    }

    async fn start(
        &self,
        recipe: &Arc<dyn Recipe>,
        request: ModelRequest,
        names: Vec<String>,
        released_bytes: u64,
    ) -> Result<(Arc<Model>, Vec<String>), ApiError> {
        let maker = recipe.clone();
        let mut served = blocking(move || maker.start(names, released_bytes)).await??;
        served.origin = Some((request, recipe.clone()));
        Ok(Model::new(served))
    }

    /// Follows an engine until it is ready and has computed a token.
    async fn until_ready(&self, model: &Model) -> Result<(), ApiError> {
        self.until(model, |stage| *stage == Readiness::Ready).await?;
        self.progress.tell(Stage::Engine(Readiness::WarmingUp));
        if !computes(model, Instant::now() + WARM_UP_TIMEOUT).await? {
            return Err(ApiError::unprocessable("the model was loaded and computes nothing; see the server's log"));
        }
        Ok(())
    }

    async fn until(&self, model: &Model, is_reached: impl Fn(&Readiness) -> bool) -> Result<(), ApiError> {
        let mut told = None;
        loop {
            let stage = model.engine.readiness();
            if is_reached(&stage) {
                return Ok(());
            }
            if let Readiness::Failed { message } = stage {
                return Err(ApiError::unprocessable(format!("the model cannot be loaded: {message}")));
            }
            if self.app.is_shutting_down() {
                return Err(ApiError::unavailable("the server is shutting down"));
            }
            if told.as_ref() != Some(&stage) {
                self.progress.tell(Stage::Engine(stage.clone()));
                told = Some(stage);
            }
            tokio::time::sleep(POLL_INTERVAL).await;
        }
    }

    async fn until_idle(&self, model: &Model) {
        let mut in_flight = model.in_flight();
        loop {
            let requests = *in_flight.borrow_and_update();
            self.progress.tell(Stage::Draining { stage: "draining", requests });
            // The sender lives as long as the model.
            if requests == 0 || in_flight.changed().await.is_err() {
                return;
            }
        }
    }
}

/// Lets go of a generation and waits until its engine is gone.
async fn release(model: Arc<Model>) {
    let end = model.end_of_life();
    drop(model);
    if let Some(mut end) = end {
        // Nothing is ever sent: it ends with an error when the generation's life does.
        while end.changed().await.is_ok() {}
    }
}

fn taken(name: &str) -> ApiError {
    let message = format!("a model called '{name}' is served already; swap it, or choose another name");
    ApiError { param: Some("model".into()), ..ApiError::conflict(message) }
}

impl From<OperateError> for ApiError {
    fn from(error: OperateError) -> Self {
        match error {
            OperateError::Invalid { field: Some(field), message } => Self::bad_request(field, message),
            OperateError::Invalid { field: None, message } => Self::unprocessable(message),
            OperateError::Conflict(message) => Self::conflict(message),
        }
    }
}
