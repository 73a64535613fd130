//! JSON Schema (draft 2020-12) of settings, for editors that complete and check a configuration file.

use serde_json::{Map, Value, json};

use super::field::{FieldKind, Number, Scalar};
use super::size::PATTERN;
use super::spec::{ConfigSpec, FieldInfo};

impl ConfigSpec {
    /// `{"<setting>": <schema>, …}`, for the `properties` of a table.
    pub fn schema_properties(&self) -> Map<String, Value> {
        self.fields.iter().map(|field| (field.name.clone(), field.schema())).collect()
    }
}

impl FieldInfo {
    /// The schema of the field's value.
    pub fn schema(&self) -> Value {
        let element = self.element_schema();
        let mut schema = match self.kind {
            FieldKind::One(_) => element,
            FieldKind::List(_) => Map::from_iter([("type".into(), "array".into()), ("items".into(), element.into())]),
            FieldKind::Map(_) => {
                Map::from_iter([("type".into(), "object".into()), ("additionalProperties".into(), element.into())])
            }
        };
        if self.non_empty {
            let key = match self.kind {
                FieldKind::One(_) => "minLength",
                FieldKind::List(_) => "minItems",
                FieldKind::Map(_) => "minProperties",
            };
            schema.insert(key.into(), 1.into());
        }
        let mut description = format!("{} ({})", self.help, self.allowed());
        for choice in self.choices.iter().filter(|choice| !choice.help.is_empty()) {
            description += &format!("\n- {}: {}", choice.name, choice.help);
        }
        if let Some(instead) = &self.deprecated {
            description += &format!("\nDeprecated: {instead}");
            schema.insert("deprecated".into(), true.into());
        }
        schema.insert("description".into(), description.into());
        if let Some(default) = &self.default {
            schema.insert("default".into(), default.clone());
        }
        if let Some(example) = &self.example {
            schema.insert("examples".into(), json!([example]));
        }
        schema.into_iter().collect()
    }

    fn element_schema(&self) -> Map<String, Value> {
        let scalar = self.kind.scalar();
        let mut schema = Map::new();
        if scalar.is_number() {
            schema = self.number_schema();
            if scalar == Scalar::Bytes {
                schema.insert("pattern".into(), PATTERN.into());
                schema.insert("type".into(), json!(["integer", "string"]));
            }
            return schema;
        }
        let kind = if scalar == Scalar::Bool { "boolean" } else { "string" };
        schema.insert("type".into(), kind.into());
        if !self.choices.is_empty() {
            let names: Vec<&str> = self.choices.iter().map(|choice| choice.name.as_str()).collect();
            schema.insert("enum".into(), names.into());
        }
        schema
    }

    fn number_schema(&self) -> Map<String, Value> {
        let scalar = self.kind.scalar();
        let bounds = self.bounds();
        let kind = if scalar.is_float() { "number" } else { "integer" };
        let mut schema = Map::from_iter([("type".into(), kind.into())]);
        let mut bound = |key: &str, number: Option<Number>| {
            if let Some(number) = number.and_then(Number::to_json) {
                schema.insert(key.into(), Value::Number(number));
            }
        };
        bound(if bounds.exclusive { "exclusiveMinimum" } else { "minimum" }, bounds.lower);
        bound("maximum", bounds.upper);
        if let Some(n) = self.multiple_of {
            schema.insert("multipleOf".into(), n.into());
        }
        // JSON Schema knows no powers; sizes, which may be texts too, go without.
        if self.power_of_two && scalar != Scalar::Bytes {
            let powers = (0..64).map(|n| 1u64 << n).filter(|power| {
                let power = Number::Int((*power).into());
                bounds.lower.is_none_or(|low| power > low || (!bounds.exclusive && power == low))
                    && bounds.upper.is_none_or(|high| power <= high)
            });
            schema.insert("enum".into(), powers.collect::<Vec<u64>>().into());
        }
        schema
    }
}
