//! `/openapi.json`: what the server takes and answers, from the very types that it reads and writes.

use axum::Json;
use utoipa::OpenApi;

use super::{chat, completions, live, messages, metrics, models, page, status, text};

#[derive(OpenApi)]
#[openapi(
    info(title = "Setu", description = "An LLM inference engine whose every part is a plugin."),
    paths(
        chat::create,
        completions::create,
        messages::create,
        messages::count_tokens,
        models::list,
        models::retrieve,
        text::tokenize,
        text::detokenize,
        status::health,
        status::ready,
        status::version,
        metrics::render,
        live::stream,
        page::index,
        page::file,
        get,
    )
)]
struct Document;

/// The description of the whole server.
pub fn document() -> utoipa::openapi::OpenApi {
    Document::openapi()
}

/// Describes the server.
#[utoipa::path(get, path = "/openapi.json", responses((status = 200, body = Object)))]
pub async fn get() -> Json<utoipa::openapi::OpenApi> {
    Json(document())
}
