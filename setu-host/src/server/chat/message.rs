//! Messages of a conversation, as OpenAI's clients send them.

use serde::Deserialize;
use serde_json::{Value, json};
use utoipa::ToSchema;

use crate::server::content::{Content, Object};
use crate::server::error::ApiError;
use crate::server::shared::Refused;
use crate::server::tools::ToolCall;

/// A message of a conversation.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ChatMessage {
    pub role: Role,
    /// Text, whole or in parts, which are joined. An assistant's message that calls tools need not have it.
    #[serde(default)]
    pub content: Option<Content>,
    /// Who speaks; the model's chat template is given it.
    #[serde(default)]
    pub name: Option<String>,
    /// What an assistant's message called.
    #[serde(default)]
    #[schema(value_type = Option<Vec<ToolCall>>)]
    pub tool_calls: Option<Vec<Object<ToolCall>>>,
    /// The call that a tool's message answers.
    #[serde(default)]
    pub tool_call_id: Option<String>,
    /// How an assistant came to its answer; the model's chat template is given it.
    #[serde(default)]
    pub reasoning_content: Option<String>,
    #[serde(default)]
    pub function_call: Refused,
    #[serde(default)]
    pub audio: Refused,
    #[serde(default)]
    pub refusal: Refused,
    #[serde(default)]
    pub annotations: Refused,
}

/// Who speaks. A developer is to the model what the system is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    System,
    Developer,
    User,
    Assistant,
    Tool,
}

/// Messages as chat templates expect them.
pub fn values(messages: &[Object<ChatMessage>]) -> Result<Vec<Value>, ApiError> {
    if messages.is_empty() {
        return Err(ApiError::invalid("messages", "`messages` is empty"));
    }
    messages.iter().enumerate().map(|(index, Object(message))| message.value(&format!("messages[{index}]"))).collect()
}

impl ChatMessage {
    /// What a chat template is given of the message at `place`.
    fn value(&self, place: &str) -> Result<Value, ApiError> {
        let refused = [
            ("function_call", self.function_call, "calls are in `tool_calls`"),
            ("audio", self.audio, "messages are of text"),
            ("refusal", self.refusal, "messages are of text"),
            ("annotations", self.annotations, "messages are of text"),
        ];
        for (name, field, why) in refused {
            field.check(&format!("{place}.{name}"), why)?;
        }
        let role = match self.role {
            Role::System | Role::Developer => "system",
            Role::User => "user",
            Role::Assistant => "assistant",
            Role::Tool => "tool",
        };
        let only = |field: &str, given: bool, whose: Role, name: &str| {
            if !given || self.role == whose {
                return Ok(());
            }
            let field = format!("{place}.{field}");
            Err(ApiError::invalid(field.as_str(), format!("`{field}` belongs to messages of the role `{name}`")))
        };
        only("tool_calls", self.tool_calls.is_some(), Role::Assistant, "assistant")?;
        only("reasoning_content", self.reasoning_content.is_some(), Role::Assistant, "assistant")?;
        only("tool_call_id", self.tool_call_id.is_some(), Role::Tool, "tool")?;
        let calls = self.tool_calls.as_deref().filter(|calls| !calls.is_empty());
        let missing = |field: &str| {
            let field = format!("{place}.{field}");
            ApiError::invalid(field.as_str(), format!("`{field}` is missing"))
        };
        let content = match &self.content {
            Some(content) => Value::from(content.text()),
            None if calls.is_some() => Value::Null,
            None => return Err(missing("content")),
        };
        let mut value = json!({"role": role, "content": content});
        if self.role == Role::Tool {
            value["tool_call_id"] = self.tool_call_id.as_deref().ok_or_else(|| missing("tool_call_id"))?.into();
        }
        if let Some(name) = &self.name {
            value["name"] = name.as_str().into();
        }
        if let Some(reasoning) = &self.reasoning_content {
            value["reasoning_content"] = reasoning.as_str().into();
        }
        if let Some(calls) = calls {
            let call =
                |(index, call): (usize, &Object<ToolCall>)| call.0.value(&format!("{place}.tool_calls[{index}]"));
            value["tool_calls"] = calls.iter().enumerate().map(call).collect::<Result<Vec<_>, _>>()?.into();
        }
        Ok(value)
    }
}
