//! The models that are served.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Path, State};
use serde::Serialize;
use utoipa::ToSchema;

use super::app::App;
use super::error::{ApiError, ErrorBody};

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
    /// Longest prompt and answer together, in tokens.
    max_model_len: u32,
}

/// Lists the models that requests may name.
#[utoipa::path(get, path = "/v1/models", responses((status = 200, body = ModelList)))]
pub async fn list(State(app): State<Arc<App>>) -> Json<ModelList> {
    let others = app.config.model_names.iter().map(String::as_str);
    let data = [app.serving.model_name()].into_iter().chain(others).map(|name| body(&app, name)).collect();
    Json(ModelList { object: "list", data })
}

/// Tells about one model.
#[utoipa::path(get, path = "/v1/models/{model}", params(("model" = String, Path)), responses(
    (status = 200, body = ModelBody), (status = 404, body = ErrorBody)
))]
pub async fn retrieve(State(app): State<Arc<App>>, Path(model): Path<String>) -> Result<Json<ModelBody>, ApiError> {
    let name = app.model(Some(&model))?;
    Ok(Json(body(&app, name)))
}

fn body(app: &App, name: &str) -> ModelBody {
    ModelBody {
        id: name.to_owned(),
        object: "model",
        created: app.created_s,
        owned_by: "setu",
        max_model_len: app.serving.engine().limits().max_model_len,
    }
}
