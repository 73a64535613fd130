//! The models that are served.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Path, State};
use serde::Serialize;
use utoipa::ToSchema;

use super::app::App;
use super::error::{ApiError, ErrorBody};
use super::served::{Model, State as LoadState};

/// The models.
#[derive(Serialize, ToSchema)]
pub struct ModelList {
    object: &'static str,
    data: Vec<ModelBody>,
}

/// One model.
#[derive(Serialize, ToSchema)]
pub struct ModelBody {
    id: String,
    object: &'static str,
    /// When the server started, in seconds since 1970.
    created: u64,
    owned_by: &'static str,
    /// Longest prompt and answer together, in tokens; known once the model is loaded.
    max_model_len: Option<u32>,
    status: ModelStatus,
}

/// Whether a model is loaded. One that isn't is, once a request names it.
#[derive(Clone, Copy, Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
enum ModelStatus {
    NotLoaded,
    Loading,
    Loaded,
    /// The last attempt failed; the next request tries again.
    Failed,
}

/// Lists the models that requests may name.
#[utoipa::path(get, path = "/v1/models", responses((status = 200, body = ModelList)))]
pub async fn list(State(app): State<Arc<App>>) -> Json<ModelList> {
    let data = app.models.names().map(|(name, model)| body(&app, name, model)).collect();
    Json(ModelList { object: "list", data })
}

/// Tells about one model.
#[utoipa::path(get, path = "/v1/models/{model}", params(("model" = String, Path)), responses(
    (status = 200, body = ModelBody), (status = 404, body = ErrorBody)
))]
pub async fn retrieve(State(app): State<Arc<App>>, Path(name): Path<String>) -> Result<Json<ModelBody>, ApiError> {
    let model = app.models.find(Some(&name))?;
    Ok(Json(body(&app, &name, model)))
}

fn body(app: &App, name: &str, model: &Model) -> ModelBody {
    let (status, max_model_len) = match model.state() {
        LoadState::Unloaded => (ModelStatus::NotLoaded, None),
        LoadState::Loading => (ModelStatus::Loading, None),
        LoadState::Loaded(serving) => (ModelStatus::Loaded, Some(serving.engine().limits().max_model_len)),
        LoadState::Failed(_) => (ModelStatus::Failed, None),
    };
    ModelBody { id: name.to_owned(), object: "model", created: app.created_s, owned_by: "setu", max_model_len, status }
}
