//! Log lines on standard error, those of plugins included.

use std::io::IsTerminal;
use std::sync::OnceLock;

use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Registry, fmt, reload};

use crate::settings::LogConfig;

static FILTER: OnceLock<reload::Handle<EnvFilter, Registry>> = OnceLock::new();

/// Starts logging. Later calls in one process only adjust the filter.
///
/// # Errors
/// The filter is no list of levels.
pub fn start(config: &LogConfig, verbose: usize) -> Result<(), String> {
    if FILTER.get().is_some() {
        return adjust(config, verbose.min(3) as u8);
    }
    let (filter, handle) = reload::Layer::new(filter(config, verbose as u8)?);
    let lines = fmt::layer().with_writer(std::io::stderr).with_ansi(std::io::stderr().is_terminal());
    let registry = tracing_subscriber::registry().with(filter);
    let started = if config.json { registry.with(lines.json()).try_init() } else { registry.with(lines).try_init() };
    // Another subscriber, as a test may have, stays in place.
    if started.is_ok() {
        let _ = FILTER.set(handle);
    }
    Ok(())
}

/// Changes what is logged.
///
/// # Errors
/// The filter is no list of levels.
pub fn adjust(config: &LogConfig, verbose: u8) -> Result<(), String> {
    let filter = filter(config, verbose)?;
    if let Some(handle) = FILTER.get() {
        handle.reload(filter).map_err(|error| format!("logging can't be changed: {error}"))?;
    }
    Ok(())
}

fn filter(config: &LogConfig, verbose: u8) -> Result<EnvFilter, String> {
    let levels = match verbose {
        0 => config.filter.as_str(),
        1 => "info",
        2 => "debug",
        _ => "trace",
    };
    EnvFilter::try_new(levels).map_err(|error| format!("log.filter {levels:?} is no list of levels: {error}"))
}
