//! Starts an engine on a thread of its own.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, mpsc},
    thread,
};

use crate::{
    api::Readiness,
    config::EngineConfig,
    core::Core,
    handle::{Command, EngineHandle, Shared},
    load::load,
};

/// Starts loading and returns at once; [`EngineHandle::readiness`](crate::api::Engine::readiness) says how far it is.
///
/// # Errors
/// If the system gives no thread.
pub fn start(config: EngineConfig) -> std::io::Result<EngineHandle> {
    let shared = Arc::new(Shared::new());
    let (commands, received) = mpsc::channel();
    let handle = EngineHandle::new(shared.clone(), commands, config.schedule.max_queued_requests);
    let run = move || {
        if catch_unwind(AssertUnwindSafe(|| run(&config, &shared, &received))).is_err() {
            // The hook has reported where. Streams see the end of their channel.
            shared.set_readiness(Readiness::Failed { message: "the engine stopped on a defect of its own".into() });
        }
        shared.forget_all();
    };
    let thread = thread::Builder::new().name("torus-engine".into()).spawn(run)?;
    Ok(handle.with_thread(thread))
}

fn run(config: &EngineConfig, shared: &Arc<Shared>, commands: &mpsc::Receiver<Command>) {
    let loaded = match load(config, shared) {
        Ok(loaded) => loaded,
        // Whatever went wrong then, nobody waits for it.
        Err(_) if shared.is_shutting_down() => return,
        Err(error) => {
            tracing::error!(model = config.name, "{error}");
            shared.set_readiness(Readiness::Failed { message: error.to_string() });
            return;
        }
    };
    let core = Core::new(config, loaded, shared.clone());
    shared.set_readiness(Readiness::Ready);
    tracing::info!(model = config.name, "the engine is ready");
    core.run(commands);
}
