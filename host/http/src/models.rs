//! The models that are served, by name, while they come and go.
//!
//! A [`Model`] is one generation: an engine with what its text needs. A request takes a [`Lease`] on one generation and
//! keeps it to its end, whatever happens to the name meanwhile. A generation ends when nobody holds it any more; its
//! engine is dropped on a thread of its own, since that waits for the engine's thread.

use std::{
    ops::Deref,
    sync::{
        Arc, Mutex, Weak,
        atomic::{AtomicU64, Ordering},
        mpsc,
    },
};

use tokio::sync::watch;
use torus_engine::api::{Engine, EngineStats, ModelInfo, Readiness};
use torus_text::{ChatTemplate, Tokenizer};

use crate::{
    app::describe,
    config::{GenerationDefaults, ServedModel},
    error::ApiError,
    metrics::{ModelMetrics, count_engine},
    operate::{ModelRequest, Recipe},
};

/// Requests that name this model get the first one, as clients of SGLang expect.
const DEFAULT_MODEL: &str = "default";

/// One generation of a served model.
pub(crate) struct Model {
    /// The name it was loaded under, which labels its metrics.
    pub label: String,
    /// Different for each generation of the process.
    pub generation: u64,
    pub engine: Arc<dyn Engine>,
    pub tokenizer: Arc<Tokenizer>,
    pub chat_template: Option<Arc<ChatTemplate>>,
    pub defaults: GenerationDefaults,
    pub model_path: String,
    pub tokenizer_path: String,
    pub created_s: u64,
    pub metrics: ModelMetrics,
    /// What it was loaded with, for those made by an [`Operator`](crate::Operator).
    pub origin: Option<(ModelRequest, Arc<dyn Recipe>)>,
    /// What its engine had counted when the metrics were last brought up to date.
    pub counted: Mutex<EngineStats>,
    in_flight: watch::Sender<usize>,
    /// Closed once the engine is gone.
    life: Option<watch::Sender<()>>,
    /// Set when this is dropped, and dropped after `engine`: fields go in order.
    engine_dropped: Option<mpsc::Sender<()>>,
}

impl Model {
    pub fn new(served: ServedModel) -> (Arc<Self>, Vec<String>) {
        static GENERATIONS: AtomicU64 = AtomicU64::new(1);
        let names = served.names;
        let label = names.first().cloned().unwrap_or_default();
        let model = Self {
            metrics: ModelMetrics::new(&label),
            label,
            generation: GENERATIONS.fetch_add(1, Ordering::Relaxed),
            engine: served.engine,
            tokenizer: served.tokenizer,
            chat_template: served.chat_template,
            defaults: served.defaults,
            model_path: served.model_path,
            tokenizer_path: served.tokenizer_path,
            created_s: served.created_s,
            origin: served.origin,
            counted: Mutex::default(),
            in_flight: watch::Sender::new(0),
            life: Some(watch::Sender::new(())),
            engine_dropped: None,
        };
        (Arc::new(model), names)
    }

    /// Facts about the model once it serves.
    pub fn ready_info(&self) -> Result<ModelInfo, ApiError> {
        let readiness = self.engine.readiness();
        match (&readiness, self.engine.info()) {
            (Readiness::Ready, Some(info)) => Ok(info),
            _ => Err(ApiError::unavailable(format!("the model is not ready: {}", describe(&readiness)))),
        }
    }

    /// Requests that hold this generation, as it changes.
    pub fn in_flight(&self) -> watch::Receiver<usize> {
        self.in_flight.subscribe()
    }

    /// Is closed when the engine is gone and its memory free.
    pub fn end_of_life(&self) -> Option<watch::Receiver<()>> {
        self.life.as_ref().map(watch::Sender::subscribe)
    }
}

impl Drop for Model {
    fn drop(&mut self) {
        count_engine(self);
        let (engine, life, generation) = (self.engine.clone(), self.life.take(), self.generation);
        let label = self.label.clone();
        let (sender, receiver) = mpsc::channel();
        self.engine_dropped = Some(sender);
        let end = move || {
            // Answered with an error once this generation's own reference is gone; then the one here is the last.
            let _ = receiver.recv();
            drop(engine);
            tracing::info!(model = label, generation, "generation ended");
            drop(life);
        };
        if let Err(error) = std::thread::Builder::new().name("torus-retire".into()).spawn(end) {
            tracing::warn!(%error, "an engine is ended on a thread that serves requests");
        }
    }
}

/// A request's hold on a generation.
pub(crate) struct Lease {
    model: Arc<Model>,
    /// The first of the names under which the model was served when the request came.
    name: String,
}

impl Lease {
    fn new(model: &Arc<Model>, name: &str) -> Arc<Self> {
        model.in_flight.send_modify(|count| *count += 1);
        Arc::new(Self { model: model.clone(), name: name.to_owned() })
    }

    /// The model's name in answers.
    pub fn id(&self) -> &str {
        &self.name
    }
}

impl Deref for Lease {
    type Target = Model;

    fn deref(&self) -> &Model {
        &self.model
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.model.in_flight.send_modify(|count| *count -= 1);
    }
}

/// What a name stands for.
#[derive(Clone)]
pub(crate) enum Serving {
    Model(Arc<Model>),
    /// Its model is being exchanged; requests wait.
    Paused,
    /// Its model was lost in an exchange that failed, for this reason.
    Lost(String),
}

/// One line of the table: names for one model.
#[derive(Clone)]
pub(crate) struct Entry {
    /// The first is the one in `/v1/models`.
    pub names: Vec<String>,
    pub serving: Serving,
}

impl Entry {
    pub fn id(&self) -> &str {
        self.names.first().map(String::as_str).unwrap_or_default()
    }

    pub fn model(&self) -> Option<&Arc<Model>> {
        match &self.serving {
            Serving::Model(model) => Some(model),
            Serving::Paused | Serving::Lost(_) => None,
        }
    }
}

#[derive(Clone, Default)]
struct Table {
    entries: Vec<Entry>,
    /// Generations that serve no name any more; some still have requests.
    retiring: Vec<Weak<Model>>,
}

impl Table {
    fn find(&self, name: &str) -> Option<&Entry> {
        let named = self.entries.iter().find(|entry| entry.names.iter().any(|known| known == name));
        named.or_else(|| self.entries.first().filter(|_| name == DEFAULT_MODEL))
    }

    fn position(&self, name: &str) -> Option<usize> {
        self.entries.iter().position(|entry| entry.names.iter().any(|known| known == name))
    }

    fn retire(&mut self, serving: Serving) {
        self.retiring.retain(|model| model.strong_count() > 0);
        if let Serving::Model(model) = serving {
            self.retiring.push(Arc::downgrade(&model));
        }
    }
}

/// All models of the server. Changes are made whole: no request sees half of one.
pub(crate) struct Models(watch::Sender<Table>);

impl Models {
    pub fn new(served: Vec<ServedModel>) -> Self {
        let entries = served.into_iter().map(|served| {
            let (model, names) = Model::new(served);
            Entry { names, serving: Serving::Model(model) }
        });
        Self(watch::Sender::new(Table { entries: entries.collect(), retiring: Vec::new() }))
    }

    /// Takes hold of the model called `name`, by default the first. Waits while it is being exchanged.
    pub async fn lease(&self, name: Option<&str>) -> Result<Arc<Lease>, ApiError> {
        let name = name.unwrap_or(DEFAULT_MODEL);
        let mut changes = self.0.subscribe();
        loop {
            // Leased under the table's lock: once a name is paused, nobody new holds its model.
            match changes.borrow_and_update().find(name) {
                None => return Err(ApiError::unknown_model(name)),
                Some(Entry { serving: Serving::Model(model), names }) => {
                    return Ok(Lease::new(model, names.first().map_or(name, String::as_str)));
                }
                Some(Entry { serving: Serving::Lost(reason), .. }) => {
                    return Err(ApiError::unavailable(format!("the model is not served: {reason}")));
                }
                Some(Entry { serving: Serving::Paused, .. }) => {}
            }
            changes.changed().await.map_err(|_| ApiError::internal())?;
        }
    }

    pub fn entries(&self) -> Vec<Entry> {
        self.0.borrow().entries.clone()
    }

    /// The entry that `name` stands for.
    pub fn entry(&self, name: &str) -> Option<Entry> {
        self.0.borrow().find(name).cloned()
    }

    /// The models that serve a name.
    pub fn serving(&self) -> Vec<Arc<Model>> {
        self.0.borrow().entries.iter().filter_map(Entry::model).cloned().collect()
    }

    /// Generations that serve no name and whose last requests still run.
    pub fn retiring(&self) -> Vec<Arc<Model>> {
        self.0.borrow().retiring.iter().filter_map(Weak::upgrade).collect()
    }

    /// Every generation that may have requests.
    pub fn all(&self) -> Vec<Arc<Model>> {
        [self.serving(), self.retiring()].concat()
    }

    /// Adds a model. False if one of its names is taken.
    pub fn add(&self, names: Vec<String>, model: Arc<Model>) -> bool {
        self.0.send_if_modified(|table| {
            let is_free = names.iter().all(|name| table.position(name).is_none());
            if is_free {
                table.entries.push(Entry { names, serving: Serving::Model(model) });
            }
            is_free
        })
    }

    /// Lets the names of an entry stand for something else. What they stood for serves its requests to their end.
    pub fn replace(&self, name: &str, serving: Serving) {
        self.0.send_modify(|table| {
            if let Some(index) = table.position(name) {
                let before = std::mem::replace(&mut table.entries[index].serving, serving);
                table.retire(before);
            }
        });
    }

    /// Lets the model called `taker` take over the names of `name` as well. False if there are no two such entries.
    pub fn take_over(&self, name: &str, taker: &str) -> bool {
        self.0.send_if_modified(|table| {
            let (Some(old), Some(new)) = (table.position(name), table.position(taker)) else { return false };
            if old == new {
                return false;
            }
            let taken = table.entries[new].clone();
            let entry = &mut table.entries[old];
            entry.names.extend(taken.names);
            let before = std::mem::replace(&mut entry.serving, taken.serving);
            table.entries.remove(new);
            table.retire(before);
            true
        })
    }

    /// Takes the model called `name` out of service.
    pub fn remove(&self, name: &str) {
        self.0.send_modify(|table| {
            if let Some(index) = table.position(name) {
                let entry = table.entries.remove(index);
                table.retire(entry.serving);
            }
        });
    }

    /// Lets go of all models and waits until their engines are gone.
    pub async fn end(&self) {
        let lives: Vec<_> = self.all().iter().filter_map(|model| model.end_of_life()).collect();
        self.0.send_modify(|table| *table = Table::default());
        for mut life in lives {
            // Nothing is ever sent: it ends with an error when the generation's life does.
            while life.changed().await.is_ok() {}
        }
    }

    /// Ends the wait of requests whose model is being exchanged: the server stops.
    pub fn end_waiting(&self) {
        self.0.send_modify(|table| {
            for entry in &mut table.entries {
                if matches!(entry.serving, Serving::Paused) {
                    entry.serving = Serving::Lost("the server is shutting down".to_owned());
                }
            }
        });
    }
}
