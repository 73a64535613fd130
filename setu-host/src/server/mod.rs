//! `setu serve`: the engine behind HTTP, for any client of OpenAI's API.
//!
//! A request is read (`body`), turned into sessions of the engine (`generation`) and their events into an answer,
//! whole or as a stream (`chat`, `completions`). The engine's thread knows nothing of HTTP: it hands events to
//! channels, and a client that goes away drops its sessions, which frees their pages within a step.
//!
//! **Honour or refuse.** Every field that a request may have is declared, with what becomes of it, in the request's
//! type; from it come the reading, `/openapi.json` and the published table of fields. What isn't declared is refused
//! by name, and so is what is known and not provided.

mod app;
mod body;
mod chat;
mod completions;
mod config;
mod connections;
mod content;
mod conversation;
mod dialect;
mod error;
mod fields;
mod generation;
mod keys;
mod limits;
mod live;
mod messages;
mod metrics;
mod models;
mod openapi;
mod page;
mod reasoning;
mod served;
mod shared;
mod sse;
mod status;
mod structured;
mod text;
mod tools;
mod transcript;

use std::future::Future;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::TcpListener;

pub use app::router;
pub use config::{ServerConfig, UnknownFields};
pub use fields::markdown;
pub use keys::{Key, Keys, NewKey};
pub use limits::Limits;
pub use metrics::{METRICS, Metric, markdown as metrics_markdown};
pub use openapi::document;
pub use served::{Loader, ModelSource, Source};

use crate::cli::Failure;
use app::App;

/// Serves until `stop` is ready, then lets running requests end for as long as the configuration says.
///
/// # Errors
/// The address can't be listened on.
pub fn serve(
    models: Vec<ModelSource>,
    keys: Option<Keys>,
    config: ServerConfig,
    on_listening: impl FnOnce(SocketAddr),
    stop: impl Future<Output = ()> + Send + 'static,
) -> Result<(), Failure> {
    let failed = |what: &str, error: std::io::Error| Failure::Failed(format!("{what}: {error}"));
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(config.threads as usize)
        .thread_name("setu-http")
        .enable_all()
        .build()
        .map_err(|error| failed("the server's threads can't be started", error))?;
    let drain = Duration::from_secs_f64(config.drain_s);
    let result = runtime.block_on(async {
        let address = format!("{}:{}", config.host, config.port);
        let listener = TcpListener::bind(&address).await;
        let listener = listener.map_err(|error| failed(&format!("{address} can't be listened on"), error))?;
        let address = listener.local_addr().map_err(|error| failed("the address can't be read", error))?;
        if keys.is_none() && !address.ip().is_loopback() {
            tracing::warn!(
                %address,
                "others than this machine can connect, and there are no keys: whoever can reach it may use it; see `setu keys add`"
            );
        }
        let keys = keys.map(Arc::new);
        if let Some(keys) = keys.clone() {
            tokio::spawn(reload_on_hangup(keys));
        }
        on_listening(address);
        let app = Arc::new(App::new(models, keys, config.clone()));
        let (draining, drained) = (app.clone(), tokio::sync::Notify::new());
        let drained = Arc::new(drained);
        let begun = drained.clone();
        let stop = async move {
            stop.await;
            draining.drain();
            begun.notify_one();
        };
        tokio::select! {
            () = connections::serve(listener, router(app), &config, stop) => Ok(()),
            () = async { drained.notified().await; tokio::time::sleep(drain).await } => {
                tracing::warn!(drain_s = drain.as_secs_f64(), "requests that still run are cut off");
                Ok(())
            }
        }
    });
    runtime.shutdown_timeout(Duration::from_secs(1));
    result
}

/// Reads the file of keys again whenever the process is told to by SIGHUP.
#[cfg(unix)]
async fn reload_on_hangup(keys: Arc<Keys>) {
    use tokio::signal::unix::{SignalKind, signal};
    let Ok(mut signal) = signal(SignalKind::hangup()) else { return };
    while signal.recv().await.is_some() {
        let reading = keys.clone();
        match tokio::task::spawn_blocking(move || reading.reload()).await {
            Ok(Ok(count)) => tracing::info!(count, file = %keys.path().display(), "the keys were read again"),
            Ok(Err(report)) => {
                tracing::error!("the keys stay as they were, since the file of keys is refused: {report}")
            }
            Err(error) => tracing::error!(%error, "the keys stay as they were"),
        }
    }
}

#[cfg(not(unix))]
async fn reload_on_hangup(_keys: Arc<Keys>) {}
