//! From a request's body to its type: what is wrong is told by path, and unknown fields with the nearest known name.

use std::sync::Arc;

use axum::body::Bytes;
use axum::extract::{FromRequest, Request};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::de::DeserializeOwned;
use serde_json::Value;
use serde_path_to_error::{Path, Segment};

use super::app::App;
use super::config::UnknownFields;
use super::content::Object;
use super::error::ApiError;

/// Most unknown fields that a request may have where they are only warned of.
const MOST_UNKNOWN: usize = 64;

/// A request, and its fields that nobody knows.
pub struct Body<T> {
    pub request: T,
    pub unknown: Vec<String>,
}

impl<T: DeserializeOwned> FromRequest<Arc<App>> for Body<T> {
    type Rejection = Response;

    async fn from_request(request: Request, app: &Arc<App>) -> Result<Body<T>, Response> {
        let headers = request.headers().clone();
        let bytes = Bytes::from_request(request, app).await.map_err(IntoResponse::into_response)?;
        read(&headers, &bytes, app.config.unknown_fields).map_err(IntoResponse::into_response)
    }
}

/// Reads a body of JSON.
fn read<T: DeserializeOwned>(
    headers: &HeaderMap,
    body: &Bytes,
    unknown_fields: UnknownFields,
) -> Result<Body<T>, ApiError> {
    let content_type = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let media_type = content_type.split(';').next().unwrap_or_default().trim();
    if !media_type.eq_ignore_ascii_case("application/json") {
        let message = format!("the body must be application/json, not {media_type:?}");
        return Err(ApiError::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, message));
    }
    // What stands behind the object counts as well.
    serde_json::from_slice::<serde::de::IgnoredAny>(body).map_err(|error| not_json(&error))?;
    let error = match parse(body) {
        Ok(request) => return Ok(Body { request, unknown: Vec::new() }),
        Err(error) => error,
    };
    if unknown_fields == UnknownFields::Refuse || unknown_name(&error).is_none() {
        return Err(explain(&error));
    }
    let mut value: Value = serde_json::from_slice(body).map_err(|error| not_json(&error))?;
    let mut unknown = Vec::new();
    loop {
        let error = match serde_path_to_error::deserialize(&value) {
            Ok(Object(request)) => return Ok(Body { request, unknown }),
            Err(error) => error,
        };
        let Some(name) = unknown_name(&error).filter(|_| unknown.len() < MOST_UNKNOWN) else {
            return Err(explain(&error));
        };
        if !remove(&mut value, error.path(), &name) {
            return Err(explain(&error));
        }
        unknown.push(if ends_with(error.path(), &name) { place(error.path()) } else { name });
    }
}

fn parse<T: DeserializeOwned>(body: &Bytes) -> Result<T, serde_path_to_error::Error<serde_json::Error>> {
    serde_path_to_error::deserialize(&mut serde_json::Deserializer::from_slice(body)).map(|Object(request)| request)
}

/// The field that serde doesn't know.
fn unknown_name(error: &serde_path_to_error::Error<serde_json::Error>) -> Option<String> {
    let message = error.inner().to_string();
    Some(message.strip_prefix("unknown field `")?.split('`').next()?.to_owned())
}

/// Takes the field `name` out of the object that `path` leads to.
fn remove(value: &mut Value, path: &Path, name: &str) -> bool {
    let mut segments: Vec<&Segment> = path.iter().collect();
    if ends_with(path, name) {
        segments.pop();
    }
    let mut place = value;
    for segment in segments {
        let next = match segment {
            Segment::Map { key } => place.get_mut(key),
            Segment::Seq { index } => place.get_mut(index),
            _ => return false,
        };
        let Some(next) = next else { return false };
        place = next;
    }
    place.as_object_mut().is_some_and(|object| object.remove(name).is_some())
}

/// Whether `path` leads to the field `name` itself rather than to what it is in, as for objects that are read as one of
/// several kinds.
fn ends_with(path: &Path, name: &str) -> bool {
    matches!(path.iter().next_back(), Some(Segment::Map { key }) if key == name)
}

/// A path as requests write it, empty for the request itself.
fn place(path: &Path) -> String {
    let path = path.to_string();
    if path == "." { String::new() } else { path }
}

fn explain(error: &serde_path_to_error::Error<serde_json::Error>) -> ApiError {
    let inner = error.inner();
    if inner.is_syntax() || inner.is_eof() {
        return not_json(inner);
    }
    let path = place(error.path());
    let message = without_place(inner);
    if let Some(name) = unknown_name(error) {
        let known: Vec<&str> = message.split('`').skip(3).step_by(2).collect();
        let nearest = known
            .iter()
            .map(|known| (strsim::jaro_winkler(known, &name), known))
            .filter(|(likeness, _)| *likeness > 0.8)
            .max_by(|a, b| a.0.total_cmp(&b.0));
        let hint = nearest.map_or(String::new(), |(_, nearest)| format!("; did you mean `{nearest}`?"));
        let message = format!("there is no field `{name}`{hint}");
        let (param, message) = if path.is_empty() {
            (name, message)
        } else if ends_with(error.path(), &name) {
            (path, message)
        } else {
            // It may be further within.
            (path.clone(), format!("{path}: {message}"))
        };
        return ApiError::invalid(param, message).with_code("unknown_field");
    }
    if path.is_empty() {
        let missing = message.strip_prefix("missing field `").and_then(|rest| rest.split('`').next());
        return match missing {
            Some(name) => ApiError::invalid(name, format!("`{name}` is missing")),
            None => ApiError::new(StatusCode::BAD_REQUEST, message),
        };
    }
    ApiError::invalid(path.clone(), format!("{path}: {message}"))
}

fn not_json(error: &serde_json::Error) -> ApiError {
    ApiError::new(StatusCode::BAD_REQUEST, format!("the body isn't JSON: {error}"))
}

/// The message without serde_json's line and column, which tell nobody anything about a body on one line.
fn without_place(error: &serde_json::Error) -> String {
    let message = error.to_string();
    let place = format!(" at line {} column {}", error.line(), error.column());
    message.strip_suffix(&place).unwrap_or(&message).to_owned()
}
