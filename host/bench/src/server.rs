//! A server started for a bench, and stopped after it.

use std::{
    net::TcpListener,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, bail};
use rustix::process::{Pid, Signal, kill_process};

use crate::client::Client;

const POLL_INTERVAL: Duration = Duration::from_millis(100);
const GRACE: Duration = Duration::from_secs(10);

/// A `serve` child of this binary on a port of its own. Killed when dropped.
pub struct SpawnedServer {
    child: Child,
    url: String,
}

impl SpawnedServer {
    /// Starts `serve` with `options` and waits until it is ready. Its messages go to this process's standard error.
    pub async fn start(options: &[String]) -> anyhow::Result<Self> {
        // The port is free now; that somebody takes it before the server does is reported by the server.
        let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        let program = std::env::current_exe().context("the path of this program is not known")?;
        let child = Command::new(program)
            .args(["serve", "--host", "127.0.0.1", "--port", &port.to_string(), "--log-level", "warn"])
            .args(options)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .context("the server cannot be started")?;
        let mut server = Self { child, url: format!("http://127.0.0.1:{port}") };
        server.wait_until_ready().await?;
        Ok(server)
    }

    pub fn url(&self) -> &str {
        &self.url
    }

    async fn wait_until_ready(&mut self) -> anyhow::Result<()> {
        let client = Client::new(&self.url, None)?;
        while client.get("/health").await.is_err() {
            if let Some(status) = self.child.try_wait()? {
                bail!("the server ended before it was ready ({status}); its message is above");
            }
            tokio::time::sleep(POLL_INTERVAL).await;
        }
        Ok(())
    }

    /// Ends the server the way an operator does.
    pub async fn stop(mut self) -> anyhow::Result<()> {
        kill_process(Pid::from_child(&self.child), Signal::TERM).context("the server cannot be stopped")?;
        let start = Instant::now();
        while self.child.try_wait()?.is_none() && start.elapsed() < GRACE {
            tokio::time::sleep(POLL_INTERVAL).await;
        }
        Ok(())
    }
}

impl Drop for SpawnedServer {
    fn drop(&mut self) {
        // An error here means that it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
