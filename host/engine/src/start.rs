//! Starts an engine on a thread of its own.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, mpsc},
    thread,
    time::Duration,
};

use crate::{
    api::Readiness,
    config::{EngineConfig, LoopConfig, NullConfig},
    core::Core,
    delivery::Delivery,
    handle::{Command, EngineHandle, Shared},
    load::{Loaded, StartError, load},
    null::load_null,
};

/// Starts loading and returns at once; [`EngineHandle::readiness`](crate::api::Engine::readiness) says how far it is.
///
/// # Errors
/// If the system gives no thread.
pub fn start(config: EngineConfig) -> std::io::Result<EngineHandle> {
    let max_queued = config.schedule.max_queued_requests;
    launch(max_queued, LoopConfig::from(&config), config.name.clone(), move |shared| load(&config, shared))
}

/// Starts an engine without a model; see [`NullConfig`].
///
/// # Errors
/// If the system gives no thread.
pub fn start_null(config: NullConfig) -> std::io::Result<EngineHandle> {
    let loop_config = LoopConfig {
        schedule: config.schedule.clone(),
        random_seed: 0,
        watchdog_timeout: Duration::from_secs(300),
        fail_on_token: None,
    };
    let max_queued = config.schedule.max_queued_requests;
    launch(max_queued, loop_config, "null".to_owned(), move |shared| Ok(load_null(&config, shared)))
}

/// Runs the thread that loads and then steps.
fn launch(
    max_queued: usize,
    config: LoopConfig,
    name: String,
    load: impl FnOnce(&Shared) -> Result<Loaded, StartError> + Send + 'static,
) -> std::io::Result<EngineHandle> {
    let shared = Arc::new(Shared::new());
    let (commands, received) = mpsc::channel();
    let handle = EngineHandle::new(shared.clone(), commands, max_queued);
    let run = move || {
        if catch_unwind(AssertUnwindSafe(|| run(&config, &name, load, &shared, &received))).is_err() {
            // The hook has reported where. Streams see the end of their channel.
            shared.set_readiness(Readiness::Failed { message: "the engine stopped on a defect of its own".into() });
        }
        shared.forget_all();
    };
    let thread = thread::Builder::new().name("torus-engine".into()).spawn(run)?;
    Ok(handle.with_thread(thread))
}

fn run(
    config: &LoopConfig,
    name: &str,
    load: impl FnOnce(&Shared) -> Result<Loaded, StartError>,
    shared: &Arc<Shared>,
    commands: &mpsc::Receiver<Command>,
) {
    let loaded = match load(shared) {
        Ok(loaded) => loaded,
        // Whatever went wrong then, nobody waits for it.
        Err(_) if shared.is_shutting_down() => return,
        Err(error) => {
            tracing::error!(model = name, "{error}");
            shared.set_readiness(Readiness::Failed { message: error.to_string() });
            return;
        }
    };
    let delivery = match Delivery::start() {
        Ok(delivery) => delivery,
        Err(error) => {
            let message = format!("no thread can be had for the streams: {error}");
            tracing::error!(model = name, "{message}");
            return shared.set_readiness(Readiness::Failed { message });
        }
    };
    let core = Core::new(config, loaded, delivery, shared.clone());
    shared.set_readiness(Readiness::Ready);
    tracing::info!(model = name, "the engine is ready");
    core.run(commands);
}
