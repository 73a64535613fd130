//! The published table of request fields, made from the types that requests are read into.

use std::fmt::Write;

use serde_json::{Map, Value};

use super::openapi::document;

/// A page that lists every field of every request, with what becomes of it.
///
/// # Panics
/// The server's own description can't be written as JSON.
pub fn markdown() -> String {
    let document = document();
    let mut page = String::from(
        "# Fields of requests\n\nGenerated from the types that requests are read into; a test holds it fresh. What is not listed is refused by name \
         (with `[server] unknown_fields = \"warn\"` it is named in the header `x-setu-warning` instead). A field that is null counts as absent.\n",
    );
    for (path, item) in document["paths"].as_object().into_iter().flatten() {
        let Some(operation) = item.get("post") else { continue };
        let schema = &operation["requestBody"]["content"]["application/json"]["schema"];
        let about = operation["summary"].as_str().or(operation["description"].as_str()).unwrap_or_default();
        let _ = write!(page, "\n## `POST {path}`\n\n{}\n", about.trim_end());
        let mut objects = std::collections::VecDeque::from([Nested::of(schema)]);
        while let Some(object) = objects.pop_front() {
            if !object.name.is_empty() {
                let _ = write!(page, "\n### {}\n", object.heading());
            }
            objects.extend(table(&mut page, &document, &object));
        }
    }
    page
}

/// An object in a request: the request itself, or what one of its fields holds.
struct Nested {
    /// Names of fields, separated by dots.
    name: String,
    /// What its field `type` says, where it is one of several kinds.
    kind: Option<String>,
    schema: Value,
}

impl Nested {
    fn of(schema: &Value) -> Nested {
        Nested { name: String::new(), kind: None, schema: schema.clone() }
    }

    fn heading(&self) -> String {
        let kind = self.kind.as_ref().map(|kind| format!(" of type `{kind}`")).unwrap_or_default();
        format!("`{}`{kind}", self.name)
    }
}

/// Writes the table of an object's fields; returns the objects in them.
fn table(page: &mut String, document: &Value, object: &Nested) -> Vec<Nested> {
    page.push_str("\n| field | takes | what becomes of it |\n| --- | --- | --- |\n");
    let schema = resolve(document, &object.schema);
    let required: Vec<&str> = schema["required"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
    let mut fields: Vec<(&String, &Value)> = schema["properties"].as_object().into_iter().flatten().collect();
    // What is provided first, and what must be given before that.
    fields.sort_by_key(|(name, field)| (is_refused(document, field), !required.contains(&name.as_str()), *name));
    let mut nested = Vec::new();
    for (name, field) in fields {
        if is_refused(document, field) {
            let _ = writeln!(page, "| `{name}` | | **refused**: known and not provided |");
            continue;
        }
        let text = description(document, field).replace('\n', " ");
        let must = if required.contains(&name.as_str()) { "**required.** " } else { "" };
        let _ = writeln!(
            page,
            "| `{name}` | {} | {} |",
            takes(document, field).replace('|', "\\|"),
            (must.to_owned() + &text).trim_end()
        );
        let path = if object.name.is_empty() { name.clone() } else { format!("{}.{name}", object.name) };
        nested.extend(objects_in(document, field).into_iter().map(|schema| {
            let kinds = schema["properties"]["type"]["enum"].as_array();
            let kind = kinds.filter(|kinds| kinds.len() == 1).and_then(|kinds| kinds[0].as_str()).map(str::to_owned);
            Nested { name: path.clone(), kind, schema }
        }));
    }
    nested
}

/// What is said of a field: by itself, beside its type where it may be null, or by its type.
fn description<'a>(document: &'a Value, field: &'a Value) -> &'a str {
    let alternatives = field["oneOf"].as_array().into_iter().flatten();
    let own = [field].into_iter().chain(alternatives.clone());
    let of_types = [field].into_iter().chain(alternatives).map(|schema| resolve(document, schema));
    own.chain(of_types).find_map(|schema| schema["description"].as_str()).unwrap_or_default()
}

/// The objects that a field holds, itself or in an array.
fn objects_in(document: &Value, field: &Value) -> Vec<Value> {
    let field = resolve(document, field);
    let several = ["oneOf", "anyOf"].into_iter().filter_map(|key| field[key].as_array()).flatten();
    let within: Vec<&Value> = several.chain(field.get("items")).collect();
    if field.get("properties").is_some() {
        return vec![field.clone()];
    }
    within.into_iter().flat_map(|schema| objects_in(document, schema)).collect()
}

fn is_refused(document: &Value, field: &Value) -> bool {
    resolve(document, field)["type"] == "null"
}

fn resolve<'a>(document: &'a Value, schema: &'a Value) -> &'a Value {
    let name = schema["$ref"].as_str().and_then(|reference| reference.strip_prefix("#/components/schemas/"));
    name.map_or(schema, |name| &document["components"]["schemas"][name])
}

/// What values a field takes, in a few words.
fn takes(document: &Value, field: &Value) -> String {
    let field = resolve(document, field);
    let several = ["oneOf", "anyOf"].into_iter().find_map(|key| field[key].as_array());
    if let Some(several) = several {
        let mut kinds: Vec<String> =
            several.iter().map(|one| takes(document, one)).filter(|kind| kind != "null" && !kind.is_empty()).collect();
        kinds.dedup();
        return kinds.join(" or ");
    }
    if let Some(values) = field["enum"].as_array() {
        return values.iter().map(|value| format!("`{value}`")).collect::<Vec<_>>().join(", ");
    }
    let kind = match &field["type"] {
        Value::Array(kinds) => {
            kinds.iter().filter_map(Value::as_str).find(|kind| *kind != "null").unwrap_or_default().to_owned()
        }
        kind => kind.as_str().unwrap_or_default().to_owned(),
    };
    match kind.as_str() {
        "array" => format!("array of {}", takes(document, &field["items"])),
        "integer" | "number" => format!("{kind}{}", range(field.as_object())),
        _ => kind,
    }
}

fn range(field: Option<&Map<String, Value>>) -> String {
    let bound = |key: &str| field.and_then(|field| field.get(key)).and_then(Value::as_f64);
    let low = bound("minimum").map(|low| format!("from {low}"));
    let low = low.or(bound("exclusiveMinimum").map(|low| format!("over {low}")));
    let high = bound("maximum").map(|high| format!("to {high}"));
    match (low, high) {
        (Some(low), Some(high)) => format!(" {low} {high}"),
        (Some(bound), None) | (None, Some(bound)) => format!(" {bound}"),
        (None, None) => String::new(),
    }
}
