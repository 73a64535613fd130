//! What messages are made of in Anthropic's API: text, or blocks of several kinds.

#![allow(unused_qualifications, reason = "of what ToSchema derives for variants")]

use std::borrow::Cow;
use std::fmt;

use serde::Deserialize;
use serde::de::value::SeqAccessDeserializer;
use serde::de::{Deserializer, Error, SeqAccess, Visitor};
use serde_json::{Map, Value, json};
use utoipa::openapi::schema::{ArrayBuilder, ObjectBuilder, OneOfBuilder, Ref, Type};
use utoipa::openapi::{RefOr, Schema};
use utoipa::{PartialSchema, ToSchema};

use crate::server::content::Object;
use crate::server::error::ApiError;
use crate::server::shared::{Accepted, Refused};

/// A message of a conversation.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct InputMessage {
    pub role: InputRole,
    /// Text, or blocks; those of text are joined by line breaks.
    pub content: Blocks,
}

/// Who speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum InputRole {
    System,
    User,
    Assistant,
}

/// A part of a message.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
pub enum Block {
    Text {
        text: String,
        /// Accepted: the prefix cache finds what prompts have in common by itself.
        #[serde(default)]
        #[expect(dead_code, reason = "which values are taken is checked as they are read")]
        #[schema(value_type = Option<CacheControl>)]
        cache_control: Accepted<Object<CacheControl>>,
        #[serde(default)]
        citations: Refused,
    },
    /// A call of a tool in an earlier answer.
    ToolUse {
        id: String,
        name: String,
        /// The arguments.
        #[schema(value_type = Object)]
        input: Object<Map<String, Value>>,
        /// Accepted: the prefix cache finds what prompts have in common by itself.
        #[serde(default)]
        #[expect(dead_code, reason = "which values are taken is checked as they are read")]
        #[schema(value_type = Option<CacheControl>)]
        cache_control: Accepted<Object<CacheControl>>,
        #[serde(default)]
        caller: Refused,
        #[serde(default)]
        toolset_name: Refused,
    },
    /// What a tool answered.
    ToolResult {
        tool_use_id: String,
        /// Text, or blocks of text.
        #[serde(default)]
        content: Option<TextBlocks>,
        /// Whether the tool failed: the model then reads `Error: ` before the content.
        #[serde(default)]
        is_error: Option<bool>,
        /// Accepted: the prefix cache finds what prompts have in common by itself.
        #[serde(default)]
        #[expect(dead_code, reason = "which values are taken is checked as they are read")]
        #[schema(value_type = Option<CacheControl>)]
        cache_control: Accepted<Object<CacheControl>>,
        #[serde(default)]
        toolset_name: Refused,
    },
    /// How the assistant came to its answer; the model's chat template is given it.
    Thinking {
        thinking: String,
        /// Accepted: whoever sends it answers for it.
        #[serde(default)]
        #[expect(dead_code, reason = "which values are taken is checked as they are read")]
        #[schema(value_type = Option<String>)]
        signature: Accepted<String>,
    },
}

/// A part that is text.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
pub enum TextBlock {
    Text {
        text: String,
        /// Accepted: the prefix cache finds what prompts have in common by itself.
        #[serde(default)]
        #[expect(dead_code, reason = "which values are taken is checked as they are read")]
        #[schema(value_type = Option<CacheControl>)]
        cache_control: Accepted<Object<CacheControl>>,
        #[serde(default)]
        citations: Refused,
    },
}

/// What is to be cached.
#[derive(Clone, Copy, Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CacheControl {
    #[expect(dead_code, reason = "which values are taken is checked as they are read")]
    pub r#type: CacheType,
    /// Accepted: what was used least recently is forgotten first.
    #[serde(default)]
    #[expect(dead_code, reason = "which values are taken is checked as they are read")]
    #[schema(value_type = Option<CacheTime>)]
    pub ttl: Accepted<CacheTime>,
}

/// How something is cached.
#[derive(Clone, Copy, Debug, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum CacheType {
    Ephemeral,
}

/// How long something is cached.
#[derive(Clone, Copy, Debug, Deserialize, ToSchema)]
pub enum CacheTime {
    #[serde(rename = "5m")]
    Minutes,
    #[serde(rename = "1h")]
    Hour,
}

/// A text, or blocks.
#[derive(Clone, Debug)]
pub struct Blocks(Vec<Block>);

/// A text, or blocks of text.
#[derive(Clone, Debug)]
pub struct TextBlocks(Vec<TextBlock>);

macro_rules! text_or_blocks {
    ($name:ident, $block:ident) => {
        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<$name, D::Error> {
                struct Read;
                impl<'de> Visitor<'de> for Read {
                    type Value = $name;

                    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                        f.write_str("a string or an array of blocks")
                    }

                    fn visit_str<E: Error>(self, text: &str) -> Result<$name, E> {
                        let (cache_control, citations) = (Accepted::default(), Refused::default());
                        Ok($name(vec![$block::Text { text: text.to_owned(), cache_control, citations }]))
                    }

                    fn visit_seq<A: SeqAccess<'de>>(self, blocks: A) -> Result<$name, A::Error> {
                        let blocks = Vec::<Object<$block>>::deserialize(SeqAccessDeserializer::new(blocks))?;
                        Ok($name(blocks.into_iter().map(|Object(block)| block).collect()))
                    }
                }
                deserializer.deserialize_any(Read)
            }
        }

        impl PartialSchema for $name {
            fn schema() -> RefOr<Schema> {
                let blocks = ArrayBuilder::new().items(Ref::from_schema_name(stringify!($block)));
                OneOfBuilder::new().item(ObjectBuilder::new().schema_type(Type::String)).item(blocks).into()
            }
        }

        impl ToSchema for $name {
            fn name() -> Cow<'static, str> {
                stringify!($name).into()
            }

            fn schemas(schemas: &mut Vec<(String, RefOr<Schema>)>) {
                schemas.push((stringify!($block).to_owned(), $block::schema()));
                $block::schemas(schemas);
            }
        }
    };
}

text_or_blocks!(Blocks, Block);
text_or_blocks!(TextBlocks, TextBlock);

const TEXT_ONLY: &str = "answers cite nothing";

impl TextBlocks {
    /// All of the text. `place` is where it stands in the request.
    ///
    /// # Errors
    /// A field was given that is known and not provided.
    pub fn text(&self, place: &str) -> Result<String, ApiError> {
        let mut texts = Vec::new();
        for (index, TextBlock::Text { text, citations, .. }) in self.0.iter().enumerate() {
            citations.check(&format!("{place}[{index}].citations"), TEXT_ONLY)?;
            texts.push(text.as_str());
        }
        Ok(texts.join("\n"))
    }
}

impl InputMessage {
    /// What a chat template is given of the message at `place`: more than one message where it holds answers of tools.
    ///
    /// # Errors
    /// A block is in a message of a role that can't have it, or has a field that is known and not provided.
    pub fn values(&self, place: &str, values: &mut Vec<Value>) -> Result<(), ApiError> {
        let mut texts: Vec<&str> = Vec::new();
        let mut calls: Vec<Value> = Vec::new();
        let mut reasoning: Vec<&str> = Vec::new();
        for (index, block) in self.content.0.iter().enumerate() {
            let place = format!("{place}.content[{index}]");
            let only = |whose: InputRole, kind: &str, name: &str| {
                let message = format!("{place}: blocks of `{kind}` belong to messages of the role `{name}`");
                if self.role == whose { Ok(()) } else { Err(ApiError::invalid(place.as_str(), message)) }
            };
            match block {
                Block::Text { text, citations, .. } => {
                    citations.check(&format!("{place}.citations"), TEXT_ONLY)?;
                    texts.push(text);
                }
                Block::Thinking { thinking, .. } => {
                    only(InputRole::Assistant, "thinking", "assistant")?;
                    reasoning.push(thinking);
                }
                Block::ToolUse { id, name, input, caller, toolset_name, .. } => {
                    only(InputRole::Assistant, "tool_use", "assistant")?;
                    caller.check(&format!("{place}.caller"), "tools are called by the model alone")?;
                    toolset_name.check(&format!("{place}.toolset_name"), "there are no sets of tools")?;
                    let function = json!({"name": name, "arguments": input.0});
                    calls.push(json!({"id": id, "type": "function", "function": function}));
                }
                Block::ToolResult { tool_use_id, content, is_error, toolset_name, .. } => {
                    only(InputRole::User, "tool_result", "user")?;
                    toolset_name.check(&format!("{place}.toolset_name"), "there are no sets of tools")?;
                    let text = content.as_ref().map(|content| content.text(&format!("{place}.content"))).transpose()?;
                    let text = text.unwrap_or_default();
                    let text = if *is_error == Some(true) { format!("Error: {text}") } else { text };
                    if !texts.is_empty() {
                        values.push(json!({"role": "user", "content": std::mem::take(&mut texts).join("\n")}));
                    }
                    values.push(json!({"role": "tool", "content": text, "tool_call_id": tool_use_id}));
                }
            }
        }
        let answers_tools = values.last().is_some_and(|last| last["role"] == "tool");
        if self.role == InputRole::User && texts.is_empty() && answers_tools && !self.content.0.is_empty() {
            return Ok(());
        }
        let role = match self.role {
            InputRole::System => "system",
            InputRole::User => "user",
            InputRole::Assistant => "assistant",
        };
        let content = if texts.is_empty() && !calls.is_empty() { Value::Null } else { texts.join("\n").into() };
        let mut value = json!({"role": role, "content": content});
        if !reasoning.is_empty() {
            value["reasoning_content"] = reasoning.join("\n").into();
        }
        if !calls.is_empty() {
            value["tool_calls"] = calls.into();
        }
        values.push(value);
        Ok(())
    }
}
