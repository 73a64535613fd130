//! Connections: how many there may be, and how long each may keep the server waiting.
//!
//! A client that sends its request a byte at a time, or stops to read its answer, holds a place that others need. Both
//! have a time after which the connection is closed; beyond the limit, connections wait to be taken.

use std::future::Future;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio_io_timeout::TimeoutWriter;

use super::config::ServerConfig;

/// Pause where no connection can be taken, as when there are no file descriptors left.
const PAUSE: Duration = Duration::from_millis(100);

/// Answers connections until `stop` is ready, then lets those end that are being answered.
pub async fn serve(listener: TcpListener, router: Router, config: &ServerConfig, stop: impl Future<Output = ()>) {
    let places = Arc::new(Semaphore::new(config.max_connections as usize));
    let mut http = http1::Builder::new();
    // It also ends connections that are kept open and ask for nothing.
    http.timer(TokioTimer::new()).header_read_timeout(Duration::from_secs_f64(config.request_timeout_s));
    let patience = Duration::from_secs_f64(config.write_timeout_s);
    let connections = GracefulShutdown::new();
    let mut stop = pin!(stop);
    loop {
        let next = async {
            let place = places.clone().acquire_owned().await;
            (place, listener.accept().await)
        };
        let (place, stream) = tokio::select! {
            (place, accepted) = next => match accepted {
                Ok((stream, _)) => (place, stream),
                Err(error) => {
                    tracing::warn!(%error, "a connection can't be taken");
                    tokio::time::sleep(PAUSE).await;
                    continue;
                }
            },
            () = &mut stop => break,
        };
        // Tokens are small and must not wait for one another.
        let _ = stream.set_nodelay(true);
        let mut stream = TimeoutWriter::new(stream);
        stream.set_timeout(Some(patience));
        let service = TowerToHyperService::new(router.clone());
        let connection = connections.watch(http.serve_connection(TokioIo::new(Box::pin(stream)), service));
        tokio::spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!(%error, "a connection ends badly");
            }
            drop(place);
        });
    }
    drop(listener);
    connections.shutdown().await;
}
