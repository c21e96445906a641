//! Log lines, to standard error.

use std::io::{self, IsTerminal};

use tracing_subscriber::{EnvFilter, filter::LevelFilter};

use crate::args::{LogArgs, LogFormat, LogLevel};

/// Starts logging. `RUST_LOG` decides what is printed, else `--log-level`, else `default`.
pub fn init(args: &LogArgs, default: LogLevel) -> anyhow::Result<()> {
    let level = match args.log_level.unwrap_or(default) {
        LogLevel::Trace => LevelFilter::TRACE,
        LogLevel::Debug => LevelFilter::DEBUG,
        LogLevel::Info => LevelFilter::INFO,
        LogLevel::Warn => LevelFilter::WARN,
        LogLevel::Error => LevelFilter::ERROR,
    };
    let filter = match std::env::var("RUST_LOG").ok().filter(|rules| !rules.is_empty()) {
        Some(rules) => EnvFilter::try_new(&rules).map_err(|error| anyhow::anyhow!("RUST_LOG={rules}: {error}"))?,
        // What libraries below this server say is of use to its authors only.
        None => EnvFilter::new(format!("{level},hyper=warn,h2=warn,tower_http=warn,ureq=warn")),
    };
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(io::stderr);
    match args.log_format {
        LogFormat::Plain => builder.with_ansi(io::stderr().is_terminal()).with_target(false).init(),
        LogFormat::Json => builder.json().flatten_event(true).init(),
    }
    Ok(())
}
