//! SIGTERM and SIGINT: the first begins an orderly end, the second ends the process at once.

use std::io;

use tokio::signal::unix::{Signal, SignalKind, signal};

/// Listens from the moment it is made, so that no signal gets lost before somebody waits.
pub struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    /// Must be called on a runtime.
    pub fn new() -> io::Result<Self> {
        Ok(Self { terminate: signal(SignalKind::terminate())?, interrupt: signal(SignalKind::interrupt())? })
    }

    async fn next(&mut self) -> &'static str {
        tokio::select! {
            _ = self.terminate.recv() => "SIGTERM",
            _ = self.interrupt.recv() => "SIGINT",
        }
    }

    /// Waits for the first signal. From then on the second one ends the process.
    pub async fn first(mut self) {
        let name = self.next().await;
        tracing::info!("{name}: no more requests are taken, running ones may finish; a second signal ends at once");
        tokio::spawn(async move {
            let name = self.next().await;
            tracing::warn!("{name} again: ending at once");
            // What shells report of a process that a signal ended.
            const ENDED_BY_SIGNAL: i32 = 130;
            std::process::exit(ENDED_BY_SIGNAL);
        });
    }
}
