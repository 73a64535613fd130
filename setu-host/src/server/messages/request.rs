//! What may be asked in Anthropic's API, in the two requests that it has.

use serde::Deserialize;
use serde_json::{Map, Value, json};
use setu_engine::grammar::Grammar;
use utoipa::ToSchema;

use super::blocks::{CacheControl, InputMessage, InputRole, TextBlocks};
use crate::server::content::Object;
use crate::server::conversation::Conversation;
use crate::server::dialect::Dialect;
use crate::server::error::ApiError;
use crate::server::shared::{Accepted, Refused};
use crate::server::tools::{Function, ToolChoice};
use crate::serving::Serving;

/// A request that holds a conversation: the struct's own fields and those that both have.
macro_rules! conversation_request {
    ($(#[$meta:meta])* pub struct $name:ident { $($own:tt)* }) => {
        $(#[$meta])*
        #[derive(Debug, Deserialize, ToSchema)]
        #[serde(deny_unknown_fields)]
        pub struct $name {
            /// The model's name.
            pub model: String,
            /// The conversation so far, which must not end with the assistant.
            #[schema(min_items = 1, value_type = Vec<InputMessage>)]
            pub messages: Vec<Object<InputMessage>>,
            /// What the model is told before the conversation: text, or blocks of text.
            #[serde(default)]
            pub system: Option<TextBlocks>,
            /// Tools that the model may call, where its chat template knows tools.
            #[serde(default)]
            #[schema(value_type = Option<Vec<CustomTool>>)]
            pub tools: Option<Vec<Object<CustomTool>>>,
            /// Whether the model is to call tools.
            #[serde(default)]
            #[schema(value_type = Option<Choice>)]
            pub tool_choice: Option<Object<Choice>>,
            /// Whether the model reasons before it answers, where its chat template has the choice.
            #[serde(default)]
            #[schema(value_type = Option<Thinking>)]
            pub thinking: Option<Object<Thinking>>,
            /// How the answer is to be.
            #[serde(default)]
            #[schema(value_type = Option<OutputConfig>)]
            pub output_config: Option<Object<OutputConfig>>,
            /// Accepted: the prefix cache finds what prompts have in common by itself.
            #[serde(default)]
            #[expect(dead_code, reason = "which values are taken is checked as they are read")]
            #[schema(value_type = Option<CacheControl>)]
            pub cache_control: Accepted<Object<CacheControl>>,
            /// Accepted: all requests are as fast as they can be.
            #[serde(default)]
            #[expect(dead_code, reason = "which values are taken is checked as they are read")]
            #[schema(value_type = Option<Speed>)]
            pub speed: Accepted<Speed>,
            #[serde(default)]
            pub mcp_servers: Refused,
            #[serde(default)]
            pub context_management: Refused,
            #[serde(default)]
            pub output_format: Refused,
            $($own)*
        }

        impl $name {
            /// What the model is to answer to.
            pub fn conversation(&self, serving: &Serving) -> Result<Conversation, ApiError> {
                self.mcp_servers.check("mcp_servers", "this server reaches no other")?;
                self.context_management.check("context_management", "conversations are taken as they are")?;
                self.output_format.check("output_format", "it is the older name of `output_config.format`")?;
                Parts {
                    messages: &self.messages,
                    system: self.system.as_ref(),
                    tools: self.tools.as_deref().unwrap_or_default(),
                    choice: self.tool_choice.as_ref().map(|choice| &choice.0),
                    thinking: self.thinking.as_ref().map(|thinking| &thinking.0),
                    output: self.output_config.as_ref().map(|output| &output.0),
                }
                .conversation(serving)
            }
        }
    };
}

conversation_request! {
    /// A conversation that is to be continued.
    pub struct MessagesRequest {
        /// Longest answer, in tokens.
        #[schema(minimum = 1)]
        pub max_tokens: u32,
        /// Texts that end the answer; not part of it.
        #[serde(default)]
        pub stop_sequences: Option<Vec<String>>,
        /// The answer comes as server-sent events, as it is generated.
        #[serde(default)]
        pub stream: Option<bool>,
        /// 0 takes the likeliest token; higher is more varied. Without it what `[sampling]` says, as for the next two.
        #[serde(default)]
        #[schema(minimum = 0, maximum = 100)]
        pub temperature: Option<f32>,
        /// Keeps the likeliest tokens that together reach this probability; over 0.
        #[serde(default)]
        #[schema(exclusive_minimum = 0, maximum = 1)]
        pub top_p: Option<f32>,
        /// Keeps the k likeliest tokens; 0 keeps all.
        #[serde(default)]
        pub top_k: Option<u32>,
        /// Whose the request is.
        #[serde(default)]
        #[schema(value_type = Option<Metadata>)]
        pub metadata: Option<Object<Metadata>>,
        /// Where it is served: both are the same here.
        #[serde(default)]
        #[expect(dead_code, reason = "which values are taken is checked as they are read")]
        #[schema(value_type = Option<Tier>)]
        pub service_tier: Accepted<Tier>,
        #[serde(default)]
        pub container: Refused,
        #[serde(default)]
        pub diagnostics: Refused,
        #[serde(default)]
        pub inference_geo: Refused,
    }
}

conversation_request! {
    /// A conversation whose tokens are to be counted.
    pub struct CountRequest {}
}

/// A tool that the model may call.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CustomTool {
    /// Accepted: tools of other types, which Anthropic runs, aren't provided.
    #[serde(default)]
    #[expect(dead_code, reason = "which values are taken is checked as they are read")]
    #[schema(value_type = Option<CustomType>)]
    pub r#type: Accepted<CustomType>,
    /// Up to 64 letters, digits, `_`, `-` and `.`.
    pub name: String,
    /// What it does; the model's chat template is given it.
    #[serde(default)]
    pub description: Option<String>,
    /// A JSON schema of its arguments, an object.
    #[schema(value_type = Object)]
    pub input_schema: Object<Map<String, Value>>,
    /// Holds the arguments to the schema, also where the model need not call anything.
    #[serde(default)]
    pub strict: Option<bool>,
    /// Accepted: the prefix cache finds what prompts have in common by itself.
    #[serde(default)]
    #[expect(dead_code, reason = "which values are taken is checked as they are read")]
    #[schema(value_type = Option<CacheControl>)]
    pub cache_control: Accepted<Object<CacheControl>>,
    /// Accepted: arguments are streamed as they come.
    #[serde(default)]
    #[expect(dead_code, reason = "which values are taken is checked as they are read")]
    #[schema(value_type = Option<bool>)]
    pub eager_input_streaming: Accepted<bool>,
    /// Who may call it: only `["direct"]` is provided.
    #[serde(default)]
    #[expect(dead_code, reason = "which values are taken is checked as they are read")]
    #[schema(value_type = Option<Vec<Caller>>)]
    pub allowed_callers: Accepted<Vec<Caller>>,
    /// Whether the model learns of it later: only false is provided.
    #[serde(default)]
    pub defer_loading: Option<bool>,
    #[serde(default)]
    pub input_examples: Refused,
}

/// What a tool is.
#[derive(Clone, Copy, Debug, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum CustomType {
    Custom,
}

/// Who calls a tool.
#[derive(Clone, Copy, Debug, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Caller {
    Direct,
}

/// Whether the model is to call tools: as it sees fit, one of them, this one, none. `disable_parallel_tool_use` has an
/// answer end with its first call.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(tag = "type", rename_all = "lowercase", deny_unknown_fields)]
pub enum Choice {
    Auto {
        #[serde(default)]
        disable_parallel_tool_use: Option<bool>,
    },
    Any {
        #[serde(default)]
        disable_parallel_tool_use: Option<bool>,
    },
    Tool {
        name: String,
        #[serde(default)]
        disable_parallel_tool_use: Option<bool>,
    },
    None {},
}

/// Whether the model reasons: as it sees fit, or not. How many tokens it may take for it can't be said, so `enabled`,
/// which needs `budget_tokens`, is refused.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(tag = "type", rename_all = "lowercase", deny_unknown_fields)]
pub enum Thinking {
    Adaptive {
        /// What of it the answer shows: only `summarized`, which is all of it, is provided.
        #[serde(default)]
        #[expect(dead_code, reason = "which values are taken is checked as they are read")]
        #[schema(value_type = Option<Display>)]
        display: Accepted<Display>,
    },
    Disabled {},
}

/// What an answer shows of reasoning.
#[derive(Clone, Copy, Debug, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Display {
    Summarized,
}

/// How an answer is to be.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct OutputConfig {
    /// How much the model is to reason, where its chat template knows `reasoning_effort`.
    #[serde(default)]
    pub effort: Option<Effort>,
    /// The form that the answer must have, where it calls no tools.
    #[serde(default)]
    #[schema(value_type = Option<OutputFormat>)]
    pub format: Option<Object<OutputFormat>>,
}

/// The form of an answer.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
pub enum OutputFormat {
    /// A JSON text that a schema describes.
    JsonSchema {
        #[schema(value_type = Object)]
        schema: Object<Map<String, Value>>,
    },
}

/// How much the model is to reason.
#[derive(Clone, Copy, Debug, Deserialize, serde::Serialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Effort {
    Low,
    Medium,
    High,
    Xhigh,
    Max,
}

/// Whose a request is.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Metadata {
    /// The tenant that it is accounted to.
    #[serde(default)]
    pub user_id: Option<String>,
}

/// Where a request is served.
#[derive(Clone, Copy, Debug, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Tier {
    Auto,
    StandardOnly,
}

/// How fast a request is served.
#[derive(Clone, Copy, Debug, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Speed {
    Standard,
}

/// What both requests say of the conversation.
struct Parts<'a> {
    messages: &'a [Object<InputMessage>],
    system: Option<&'a TextBlocks>,
    tools: &'a [Object<CustomTool>],
    choice: Option<&'a Choice>,
    thinking: Option<&'a Thinking>,
    output: Option<&'a OutputConfig>,
}

impl Parts<'_> {
    fn conversation(self, serving: &Serving) -> Result<Conversation, ApiError> {
        let mut messages = Vec::new();
        if let Some(system) = self.system {
            messages.push(json!({"role": "system", "content": system.text("system")?}));
        }
        match self.messages.last() {
            None => return Err(ApiError::invalid("messages", "`messages` is empty")),
            Some(last) if last.0.role == InputRole::Assistant => {
                let message = "`messages` ends with the assistant: beginnings of answers can't be given";
                return Err(ApiError::invalid("messages", message));
            }
            Some(_) => {}
        }
        for (index, message) in self.messages.iter().enumerate() {
            message.0.values(&format!("messages[{index}]"), &mut messages)?;
        }
        let functions: Vec<Function> = self.tools.iter().map(|tool| tool.0.function()).collect();
        Function::check_all(functions.iter(), |index| format!("tools[{index}]"))?;
        for (index, Object(tool)) in self.tools.iter().enumerate() {
            let place = |field: &str| format!("tools[{index}].{field}");
            tool.input_examples.check(&place("input_examples"), "tell the model in the description")?;
            if tool.defer_loading == Some(true) {
                let message =
                    format!("`{}` must be false: the model learns of all tools at once", place("defer_loading"));
                return Err(ApiError::invalid(place("defer_loading"), message));
            }
        }
        let (choice, is_single) = match self.choice {
            None => (ToolChoice::Auto, None),
            Some(Choice::Auto { disable_parallel_tool_use }) => (ToolChoice::Auto, *disable_parallel_tool_use),
            Some(Choice::Any { disable_parallel_tool_use }) => (ToolChoice::Required, *disable_parallel_tool_use),
            Some(Choice::Tool { name, disable_parallel_tool_use }) => {
                (ToolChoice::Named(name.clone()), *disable_parallel_tool_use)
            }
            Some(Choice::None {}) => (ToolChoice::None, None),
        };
        let variables = self.variables(serving)?;
        let format = self.output.and_then(|output| output.format.as_ref());
        let form = format.map(|Object(OutputFormat::JsonSchema { schema })| {
            ("output_config.format", Grammar::JsonSchema(Value::Object(schema.0.clone())))
        });
        Ok(Conversation { messages, functions, choice, parallel: is_single != Some(true), form, variables })
    }

    /// What the chat template is told of reasoning.
    fn variables(&self, serving: &Serving) -> Result<Map<String, Value>, ApiError> {
        let template = serving.template()?;
        let mut variables = Map::new();
        let reasons = Dialect::of(serving).reasoning.is_some();
        let refused = |field: &str, why: &str| {
            let message = format!("`{field}` is not supported: {why}");
            Err(ApiError::invalid(field, message).with_code("unsupported_field"))
        };
        if let Some(thinking) = self.thinking {
            let wanted = matches!(thinking, Thinking::Adaptive { .. });
            match (template.mentions("enable_thinking"), reasons) {
                (true, _) => {
                    variables.insert("enable_thinking".to_owned(), wanted.into());
                }
                (false, true) if !wanted => return refused("thinking.type", "the model always reasons"),
                (false, false) if wanted => return refused("thinking.type", "the model doesn't reason"),
                _ => {}
            }
        }
        if let Some(effort) = self.output.and_then(|output| output.effort) {
            if !template.mentions("reasoning_effort") {
                return refused("output_config.effort", "the model's chat template doesn't know `reasoning_effort`");
            }
            variables.insert("reasoning_effort".to_owned(), json!(effort));
        }
        Ok(variables)
    }
}

impl CustomTool {
    fn function(&self) -> Function {
        Function {
            name: self.name.clone(),
            description: self.description.clone(),
            parameters: Some(self.input_schema.clone()),
            strict: self.strict,
        }
    }
}
