//! The form that an answer must have, as requests ask for it.

use std::sync::Arc;

use serde::Deserialize;
use serde_json::Value;
use setu_engine::grammar::{CompiledGrammar, Grammar};
use utoipa::ToSchema;

use super::content::Object;
use super::error::ApiError;
use super::text::blocking;
use crate::serving::Serving;

/// The form of an answer, as OpenAI's clients ask for it.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
pub enum ResponseFormat {
    /// Any text.
    Text {},
    /// A JSON object.
    JsonObject {},
    /// A JSON text that a schema describes.
    JsonSchema {
        #[schema(value_type = JsonSchemaFormat)]
        json_schema: Object<JsonSchemaFormat>,
    },
}

/// A schema with its name.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct JsonSchemaFormat {
    /// Accepted: answers don't show it.
    #[expect(dead_code, reason = "which values are taken is checked as they are read")]
    pub name: String,
    /// Accepted: tell the model in the prompt what the answer is for.
    #[serde(default)]
    #[expect(dead_code, reason = "which values are taken is checked as they are read")]
    pub description: Option<String>,
    /// The schema; without it any JSON text is taken. A keyword that isn't provided is refused.
    #[serde(default)]
    #[schema(value_type = Option<Object>)]
    pub schema: Option<Value>,
    /// Accepted: schemas are always held to.
    #[serde(default)]
    #[expect(dead_code, reason = "which values are taken is checked as they are read")]
    pub strict: Option<bool>,
}

/// The form of an answer, as vLLM's clients ask for it: by exactly one of these.
#[derive(Clone, Debug, Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct StructuredOutputs {
    /// A JSON schema that describes the answer, as an object or as text.
    #[serde(default)]
    #[schema(value_type = Option<Object>)]
    pub json: Option<Value>,
    /// True: the answer is a JSON object.
    #[serde(default)]
    pub json_object: Option<bool>,
    /// A regular expression that matches the whole answer; in the syntax of Rust's crate `regex`.
    #[serde(default)]
    pub regex: Option<String>,
    /// Texts of which the answer is one.
    #[serde(default)]
    #[schema(min_items = 1)]
    pub choice: Option<Vec<String>>,
    /// A context-free grammar of the answer, in llguidance's dialect of Lark.
    #[serde(default)]
    pub grammar: Option<String>,
}

impl ResponseFormat {
    pub fn grammar(&self) -> Option<Grammar> {
        match self {
            ResponseFormat::Text {} => None,
            ResponseFormat::JsonObject {} => Some(Grammar::json_object()),
            ResponseFormat::JsonSchema { json_schema: Object(format) } => {
                Some(Grammar::JsonSchema(format.schema.clone().unwrap_or(Value::Bool(true))))
            }
        }
    }
}

impl StructuredOutputs {
    /// # Errors
    /// None or several of the fields are given, or a schema's text isn't JSON.
    pub fn grammar(&self) -> Result<Grammar, ApiError> {
        let schema = |schema: &Value| match schema {
            Value::String(text) => serde_json::from_str(text).map(Grammar::JsonSchema).map_err(|error| {
                ApiError::invalid("structured_outputs.json", format!("the schema isn't JSON: {error}"))
            }),
            schema => Ok(Grammar::JsonSchema(schema.clone())),
        };
        let object = self.json_object.filter(|&wanted| wanted).map(|_| Ok(Grammar::json_object()));
        let given = [
            self.json.as_ref().map(schema),
            object,
            self.regex.clone().map(|regex| Ok(Grammar::Regex(regex))),
            self.choice.clone().map(|texts| Ok(Grammar::Choice(texts))),
            self.grammar.clone().map(|lark| Ok(Grammar::Lark(lark))),
        ];
        let mut given = given.into_iter().flatten();
        match (given.next(), given.next()) {
            (Some(grammar), None) => grammar,
            _ => Err(ApiError::invalid(
                "structured_outputs",
                "`structured_outputs` takes exactly one of `json`, `json_object`, `regex`, `choice` and `grammar`",
            )),
        }
    }
}

/// Compiles what a field asks for, so that what is wrong with it is told at once and by the field's name.
///
/// # Errors
/// The grammar is refused.
pub async fn compile(
    serving: &Arc<Serving>,
    held: Option<(&'static str, Grammar)>,
) -> Result<Option<Arc<CompiledGrammar>>, ApiError> {
    let Some((field, grammar)) = held else { return Ok(None) };
    let serving = serving.clone();
    let compiled = blocking(move || serving.grammar(&grammar)).await;
    compiled.map(Some).map_err(|error| ApiError { param: Some(field.to_owned()), ..error })
}
