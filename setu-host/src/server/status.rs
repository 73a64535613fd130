//! Whether the server lives, whether it wants requests, and what it is.

use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use serde::Serialize;
use setu_engine::Health;
use utoipa::ToSchema;

use super::app::App;
use super::error::ApiError;

/// A turn of the engine that takes longer is a hang.
const PATIENCE: Duration = Duration::from_secs(60);

/// It is well.
#[derive(Serialize, ToSchema)]
pub struct StatusBody {
    status: &'static str,
}

/// What runs here.
#[derive(Serialize, ToSchema)]
pub struct VersionBody {
    version: &'static str,
}

/// Whether the engine of every model that is loaded makes progress.
#[utoipa::path(get, path = "/health", responses(
    (status = 200, body = StatusBody), (status = 503, body = super::error::ErrorBody)
))]
pub async fn health(State(app): State<Arc<App>>) -> Result<Json<StatusBody>, ApiError> {
    let unavailable = |message: String| ApiError::new(StatusCode::SERVICE_UNAVAILABLE, message);
    for (name, serving) in app.models.loaded() {
        match serving.engine().health(PATIENCE) {
            Health::Ok => {}
            Health::Hanging { seconds } => {
                return Err(unavailable(format!("the engine of {name} has hung for {seconds:.0} s")));
            }
            Health::Stopped => return Err(unavailable(format!("the engine of {name} has stopped"))),
        }
    }
    Ok(Json(StatusBody { status: "ok" }))
}

/// Whether requests are welcome: the engines make progress, and the server isn't about to stop.
#[utoipa::path(get, path = "/ready", responses(
    (status = 200, body = StatusBody), (status = 503, body = super::error::ErrorBody)
))]
pub async fn ready(State(app): State<Arc<App>>) -> Result<Json<StatusBody>, ApiError> {
    if app.is_draining() {
        return Err(ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "the server is about to stop"));
    }
    health(State(app)).await
}

/// The server's version.
#[utoipa::path(get, path = "/version", responses((status = 200, body = VersionBody)))]
pub async fn version() -> Json<VersionBody> {
    Json(VersionBody { version: env!("CARGO_PKG_VERSION") })
}
