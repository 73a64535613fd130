//! What a request says of tools: those that the model may call, whether it must, and calls of earlier answers.

use std::fmt;

use serde::Deserialize;
use serde::de::value::MapAccessDeserializer;
use serde::de::{Deserializer, Error, MapAccess, Visitor};
use serde_json::{Map, Value, json};
use utoipa::openapi::schema::{ObjectBuilder, OneOfBuilder, Type};
use utoipa::openapi::{RefOr, Schema};
use utoipa::{PartialSchema, ToSchema};

use crate::server::content::Object;
use crate::server::error::ApiError;

/// Most tools of one request.
const MOST_TOOLS: usize = 128;
/// Longest name of a tool.
const MOST_NAME: usize = 64;

/// A tool that the model may call.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Tool {
    #[expect(dead_code, reason = "which values are taken is checked as they are read")]
    pub r#type: ToolType,
    #[schema(value_type = Function)]
    pub function: Object<Function>,
}

/// What a tool is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum ToolType {
    Function,
}

/// A function that the model may call.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Function {
    /// Up to 64 letters, digits, `_`, `-` and `.`.
    pub name: String,
    /// What it does; the model's chat template is given it.
    #[serde(default)]
    pub description: Option<String>,
    /// A JSON schema of its arguments, an object; without it there are none.
    #[serde(default)]
    #[schema(value_type = Option<Object>)]
    pub parameters: Option<Object<Map<String, Value>>>,
    /// Holds the arguments to the schema, also where the model need not call anything.
    #[serde(default)]
    pub strict: Option<bool>,
}

/// Whether the model is to call tools, and which.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum ToolChoice {
    /// As the model sees fit.
    #[default]
    Auto,
    None,
    /// One of the tools, or several.
    Required,
    /// This one.
    Named(String),
}

/// A call in an earlier answer.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ToolCall {
    pub id: String,
    #[expect(dead_code, reason = "which values are taken is checked as they are read")]
    pub r#type: ToolType,
    #[schema(value_type = CalledFunction)]
    pub function: Object<CalledFunction>,
}

/// What was called.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CalledFunction {
    pub name: String,
    /// JSON of an object.
    pub arguments: String,
}

impl Function {
    /// As chat templates expect it.
    pub fn value(&self) -> Value {
        let mut function = json!({"name": self.name});
        if let Some(description) = &self.description {
            function["description"] = description.as_str().into();
        }
        let none = || json!({"type": "object", "properties": {}});
        function["parameters"] = self.parameters.as_ref().map_or_else(none, |given| Value::Object(given.0.clone()));
        json!({"type": "function", "function": function})
    }

    /// Checks functions that stand at `place`, such as `tools[2].function`.
    ///
    /// # Errors
    /// Names that are no names or not unique; too many functions.
    pub fn check_all<'a>(
        functions: impl ExactSizeIterator<Item = &'a Function>,
        place: impl Fn(usize) -> String,
    ) -> Result<(), ApiError> {
        if functions.len() > MOST_TOOLS {
            let message = format!("there are {} tools; at most {MOST_TOOLS} are allowed", functions.len());
            return Err(ApiError::invalid("tools", message));
        }
        let mut names = std::collections::HashSet::new();
        for (index, Function { name, .. }) in functions.enumerate() {
            let place = format!("{}.name", place(index));
            let is_part = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.');
            if name.is_empty() || name.len() > MOST_NAME || !name.chars().all(is_part) {
                let allowed = "1 to 64 letters, digits, `_`, `-` and `.` are";
                return Err(ApiError::invalid(place, format!("{name:?} is no name of a tool: {allowed}")));
            }
            if !names.insert(name) {
                return Err(ApiError::invalid(place, format!("there are two tools named {name:?}")));
            }
        }
        Ok(())
    }
}

impl ToolCall {
    /// As chat templates expect it, with the arguments as an object.
    ///
    /// # Errors
    /// The arguments are none. `place` is where it stands in the request.
    pub fn value(&self, place: &str) -> Result<Value, ApiError> {
        let CalledFunction { name, arguments } = &self.function.0;
        let place = || format!("{place}.function.arguments");
        let arguments = match arguments.trim() {
            "" => Value::Object(Map::new()),
            text => serde_json::from_str(text)
                .map_err(|error| ApiError::invalid(place(), format!("{} is no JSON: {error}", place())))?,
        };
        if !arguments.is_object() {
            return Err(ApiError::invalid(place(), format!("{} is no JSON of an object", place())));
        }
        Ok(json!({"id": self.id, "type": "function", "function": {"name": name, "arguments": arguments}}))
    }
}

impl ToolChoice {
    /// Whether the model must call something.
    pub fn is_forced(&self) -> bool {
        matches!(self, ToolChoice::Required | ToolChoice::Named(_))
    }
}

/// A choice of one tool.
#[derive(Deserialize)]
#[serde(tag = "type", rename_all = "lowercase", deny_unknown_fields)]
enum NamedChoice {
    Function { function: Object<Name> },
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Name {
    name: String,
}

impl<'de> Deserialize<'de> for ToolChoice {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<ToolChoice, D::Error> {
        struct Read;
        impl<'de> Visitor<'de> for Read {
            type Value = ToolChoice;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("`auto`, `none`, `required` or an object that names a function")
            }

            fn visit_str<E: Error>(self, text: &str) -> Result<ToolChoice, E> {
                match text {
                    "auto" => Ok(ToolChoice::Auto),
                    "none" => Ok(ToolChoice::None),
                    "required" => Ok(ToolChoice::Required),
                    other => Err(E::unknown_variant(other, &["auto", "none", "required"])),
                }
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<ToolChoice, A::Error> {
                let NamedChoice::Function { function } = NamedChoice::deserialize(MapAccessDeserializer::new(map))?;
                Ok(ToolChoice::Named(function.0.name))
            }
        }
        deserializer.deserialize_any(Read)
    }
}

impl PartialSchema for ToolChoice {
    fn schema() -> RefOr<Schema> {
        let string = || ObjectBuilder::new().schema_type(Type::String);
        let closed = || {
            let closed = utoipa::openapi::schema::AdditionalProperties::<Schema>::FreeForm(false);
            ObjectBuilder::new().additional_properties(Some(closed))
        };
        let named = closed()
            .property("type", string().enum_values(Some(["function"])))
            .property("function", closed().property("name", string()).required("name"))
            .required("type")
            .required("function");
        OneOfBuilder::new().item(string().enum_values(Some(["auto", "none", "required"]))).item(named).into()
    }
}

impl ToSchema for ToolChoice {}
