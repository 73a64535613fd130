//! `/openapi.json`: what the server takes and answers, from the very types that it reads and writes.

use std::collections::BTreeSet;

use axum::Json;
use serde_json::{Value, json};
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
///
/// # Panics
/// It can't be written as JSON.
pub fn document() -> Value {
    let mut document = serde_json::to_value(Document::openapi()).expect("a description is JSON");
    close_requests(&mut document);
    document
}

/// Says of all objects in requests that they have no further fields. utoipa says so of structs that refuse unknown fields
/// and not of enums' variants, though these refuse them as well.
fn close_requests(document: &mut Value) {
    const SCHEMAS: &str = "#/components/schemas/";
    let mut waiting = Vec::new();
    let paths = document["paths"].as_object().into_iter().flatten();
    for operation in paths.filter_map(|(_, item)| item.as_object()).flatten().map(|(_, operation)| operation) {
        waiting.extend(references(&operation["requestBody"]));
    }
    let mut seen = BTreeSet::new();
    while let Some(reference) = waiting.pop() {
        let Some(name) = reference.strip_prefix(SCHEMAS) else { continue };
        if let Some(schema) = document["components"]["schemas"].get_mut(name).filter(|_| seen.insert(name.to_owned())) {
            close(schema);
            waiting.extend(references(schema));
        }
    }
}

/// Closes an object and those written down within it.
fn close(schema: &mut Value) {
    match schema {
        Value::Object(fields) => {
            if fields.get("type") == Some(&json!("object")) && fields.contains_key("properties") {
                fields.entry("additionalProperties").or_insert(false.into());
            }
            fields.values_mut().for_each(close);
        }
        Value::Array(items) => items.iter_mut().for_each(close),
        _ => {}
    }
}

/// All that a schema refers to.
fn references(schema: &Value) -> Vec<String> {
    match schema {
        Value::Object(fields) => {
            let own = fields.get("$ref").and_then(Value::as_str).map(str::to_owned);
            own.into_iter().chain(fields.values().flat_map(references)).collect()
        }
        Value::Array(items) => items.iter().flat_map(references).collect(),
        _ => Vec::new(),
    }
}

/// Describes the server.
#[utoipa::path(get, path = "/openapi.json", responses((status = 200, body = Object)))]
pub async fn get() -> Json<Value> {
    Json(document())
}
