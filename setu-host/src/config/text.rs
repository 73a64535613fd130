//! Values as people type them into flags and environment variables.

use serde_json::{Map, Value};
use setu_core::config::{FieldInfo, FieldKind, Scalar};

use super::file::parse_value;

/// The value that `text` stands for in this field.
///
/// A list is `a,b,c` and a table `a=1,b=2`; both may also be written as in TOML, in brackets or braces.
/// What cannot be understood stays text, so that the check of the field refuses it in its own words.
pub fn text_value(field: &FieldInfo, text: &str) -> Value {
    let scalar = field.kind.scalar();
    let trimmed = text.trim();
    let toml = || parse_value(trimmed).unwrap_or_else(|| text.into());
    match field.kind {
        FieldKind::List(_) if trimmed.starts_with('[') => toml(),
        FieldKind::Map(_) if trimmed.starts_with('{') => toml(),
        FieldKind::List(_) | FieldKind::Map(_) if trimmed.is_empty() => match field.kind {
            FieldKind::Map(_) => Value::Object(Map::new()),
            _ => Value::Array(Vec::new()),
        },
        FieldKind::List(_) => trimmed.split(',').map(|item| scalar_value(scalar, item.trim())).collect(),
        FieldKind::Map(_) => {
            let entry = |entry: &str| {
                let (key, value) = entry.split_once('=')?;
                Some((key.trim().to_owned(), scalar_value(scalar, value.trim())))
            };
            match trimmed.split(',').map(entry).collect::<Option<Map<String, Value>>>() {
                Some(entries) => Value::Object(entries),
                None => text.into(),
            }
        }
        _ => scalar_value(scalar, text),
    }
}

fn scalar_value(scalar: Scalar, text: &str) -> Value {
    let number = text.trim();
    let value = match scalar {
        Scalar::Bool => number.parse().ok().map(Value::Bool),
        Scalar::Bytes => None,
        _ if scalar.is_float() => number.parse().ok().and_then(serde_json::Number::from_f64).map(Value::Number),
        _ if scalar.is_number() => {
            number.parse::<i64>().map(Value::from).or_else(|_| number.parse::<u64>().map(Value::from)).ok()
        }
        _ => None,
    };
    value.unwrap_or_else(|| text.into())
}
