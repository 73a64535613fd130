//! The page at `/`: a chat, and a view of the engine as it runs.
//!
//! Its files lie in `setu-host/page/` as a browser takes them, and are part of the program: nothing is built, and
//! nothing is fetched from elsewhere. They hold no data, and so need no key; what they show they ask for by the routes
//! that every client uses.

use axum::extract::Path;
use axum::http::{HeaderName, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};

use super::error::{ApiError, ErrorBody};

/// A file of the page: its name, its type and its text.
type File = (&'static str, &'static str, &'static str);

const INDEX: File = ("index.html", "text/html; charset=utf-8", include_str!("../../page/index.html"));

macro_rules! files {
    ($($name:literal: $kind:literal),+ $(,)?) => {
        &[$(($name, $kind, include_str!(concat!("../../page/", $name)))),+]
    };
}

const FILES: &[File] = files! {
    "api.js": "text/javascript; charset=utf-8",
    "chat.js": "text/javascript; charset=utf-8",
    "components.js": "text/javascript; charset=utf-8",
    "curves.js": "text/javascript; charset=utf-8",
    "icon.svg": "image/svg+xml",
    "live.js": "text/javascript; charset=utf-8",
    "main.js": "text/javascript; charset=utf-8",
    "markdown.js": "text/javascript; charset=utf-8",
    "pages.js": "text/javascript; charset=utf-8",
    "paint.js": "text/javascript; charset=utf-8",
    "sessions.js": "text/javascript; charset=utf-8",
    "settings.js": "text/javascript; charset=utf-8",
    "style.css": "text/css; charset=utf-8",
    "theme.js": "text/javascript; charset=utf-8",
    "timeline.js": "text/javascript; charset=utf-8",
};

/// What a browser may do with the page: run and show what comes from this server, and nothing that is written into the
/// page itself; a model's answer that got into it as HTML would still do nothing.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; \
    base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

/// The page: a chat, and a view of the engine.
#[utoipa::path(get, path = "/", responses((status = 200, body = String, content_type = "text/html")))]
pub async fn index() -> Response {
    respond(&INDEX)
}

/// A file of the page.
#[utoipa::path(get, path = "/page/{file}", params(("file" = String, Path)), responses(
    (status = 200, content((String = "text/javascript"), (String = "text/css"), (String = "image/svg+xml"))),
    (status = 404, body = ErrorBody)
))]
pub async fn file(Path(name): Path<String>) -> Result<Response, ApiError> {
    let found = FILES.iter().find(|(known, ..)| *known == name);
    found.map(respond).ok_or_else(|| ApiError::new(StatusCode::NOT_FOUND, format!("the page has no file {name:?}")))
}

fn respond((_, kind, text): &File) -> Response {
    let headers: [(HeaderName, HeaderValue); 6] = [
        (header::CONTENT_TYPE, HeaderValue::from_static(kind)),
        (header::CONTENT_SECURITY_POLICY, HeaderValue::from_static(POLICY)),
        (header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff")),
        (header::REFERRER_POLICY, HeaderValue::from_static("no-referrer")),
        (header::X_FRAME_OPTIONS, HeaderValue::from_static("DENY")),
        // A new version of the program has another page.
        (header::CACHE_CONTROL, HeaderValue::from_static("no-cache")),
    ];
    (headers, *text).into_response()
}
