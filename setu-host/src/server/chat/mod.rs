//! `/v1/chat/completions`.

mod answer;
mod message;

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use setu_core::sampling::SamplingParams;
use setu_engine::grammar::Grammar;
use utoipa::ToSchema;

pub use message::ChatMessage;

use super::app::{App, now_s};
use super::body::Body;
use super::content::Object;
use super::conversation::{Conversation, Prepared};
use super::error::{ApiError, ErrorBody};
use super::generation::{Generation, Prompt};
use super::keys::Caller;
use super::shared::{Accepted, Refused, StreamOptions, check as check_params, text_request};
use super::sse;
use super::structured::{self, ResponseFormat};
use super::tools::{Function, Tool, ToolChoice};
use crate::request::RequestOptions;
use crate::serving::Serving;
use answer::{ChatBody, ChatChunk, Envelope, stream};
use message::values;

sse::stream_event! {
    /// An event of a stream: a piece of the answer, or the error that ends it.
    ChatEvent of ChatChunk | ErrorBody, ends "[DONE]"
}

text_request! {
    /// A conversation that is to be continued.
    pub struct ChatRequest {
        /// The conversation so far.
        #[schema(min_items = 1, value_type = Vec<ChatMessage>)]
        pub messages: Vec<Object<ChatMessage>>,
        /// Longest answer, in tokens; without it what the model's length leaves.
        #[serde(default)]
        #[schema(minimum = 1)]
        pub max_completion_tokens: Option<u32>,
        /// The older name of `max_completion_tokens`; only one of them may be given.
        #[serde(default)]
        #[schema(minimum = 1)]
        pub max_tokens: Option<u32>,
        /// Whether the log-probability of each token is told.
        #[serde(default)]
        pub logprobs: Option<bool>,
        /// How many of the likeliest tokens are told with each; needs `logprobs`.
        #[serde(default)]
        #[schema(maximum = 100)]
        pub top_logprobs: Option<u32>,
        /// Variables of the model's chat template, such as `enable_thinking`.
        #[serde(default)]
        pub chat_template_kwargs: Option<serde_json::Map<String, Value>>,
        /// The form that the answer must have, where it calls no tools.
        #[serde(default)]
        #[schema(value_type = Option<ResponseFormat>)]
        pub response_format: Option<Object<ResponseFormat>>,
        /// What the answer is made of: only `["text"]` is provided.
        #[serde(default)]
        #[expect(dead_code, reason = "which values are taken is checked as they are read")]
        #[schema(value_type = Option<Vec<Modality>>)]
        pub modalities: Accepted<Vec<Modality>>,
        /// Where it is served: `auto` and `default` are the same here.
        #[serde(default)]
        #[expect(dead_code, reason = "which values are taken is checked as they are read")]
        #[schema(value_type = Option<ServiceTier>)]
        pub service_tier: Accepted<ServiceTier>,
        /// Whether the answer is kept: only false is provided.
        #[serde(default)]
        pub store: Option<bool>,
        /// Accepted: the prefix cache finds what prompts have in common by itself.
        #[serde(default)]
        #[expect(dead_code, reason = "which values are taken is checked as they are read")]
        #[schema(value_type = Option<String>)]
        pub prompt_cache_key: Accepted<String>,
        /// Tools that the model may call, where its chat template knows tools.
        #[serde(default)]
        #[schema(value_type = Option<Vec<Tool>>)]
        pub tools: Option<Vec<Object<Tool>>>,
        /// Whether the model is to call tools: `auto`, `none`, `required`, or one of them.
        #[serde(default)]
        pub tool_choice: Option<ToolChoice>,
        /// Whether an answer may hold several calls, as it may by default; where it may not, it ends with the first.
        #[serde(default)]
        pub parallel_tool_calls: Option<bool>,
        /// How much the model is to reason, where its chat template knows `reasoning_effort`.
        #[serde(default)]
        #[schema(value_type = Option<ReasoningEffort>)]
        pub reasoning_effort: Option<ReasoningEffort>,
        #[serde(default)]
        pub functions: Refused,
        #[serde(default)]
        pub function_call: Refused,
        #[serde(default)]
        pub audio: Refused,
        #[serde(default)]
        pub prediction: Refused,
        #[serde(default)]
        pub verbosity: Refused,
        #[serde(default)]
        pub web_search_options: Refused,
        #[serde(default)]
        pub metadata: Refused,
        #[serde(default)]
        pub moderation: Refused,
        #[serde(default)]
        pub prompt_cache_retention: Refused,
        #[serde(default)]
        pub safety_identifier: Refused,
    }
}

/// How much the model is to reason.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum ReasoningEffort {
    None,
    Minimal,
    Low,
    Medium,
    High,
    Xhigh,
}

/// What an answer is made of.
#[derive(Clone, Copy, Debug, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Modality {
    Text,
}

/// Where a request is served.
#[derive(Clone, Copy, Debug, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum ServiceTier {
    Auto,
    Default,
}

/// Continues a conversation.
#[utoipa::path(post, path = "/v1/chat/completions", request_body = ChatRequest, responses(
    (status = 200, content((ChatBody = "application/json"), (ChatEvent = "text/event-stream"))),
    (status = "4XX", body = ErrorBody), (status = "5XX", body = ErrorBody)
))]
pub async fn create(
    State(app): State<Arc<App>>,
    caller: Caller,
    Body { request, unknown }: Body<ChatRequest>,
) -> Result<Response, ApiError> {
    let served = app.model(caller, request.model.as_deref()).await?;
    request.refuse()?;
    let params = request.params(&served.serving)?;
    let (is_streamed, stream_options) = (request.is_streamed(), request.stream_options());
    let options = request.options();
    let prepared = request.conversation(&served.serving)?.prepare(&served.serving).await?;
    let Prepared { tokens, held, reading, shown } = prepared;
    let grammar = structured::compile(&served.serving, held).await?;
    let options = RequestOptions { grammar, shown, ..options };
    let prompt = Prompt { tokens, only: false };
    let generation = Generation::start(&served, vec![prompt], &params, &options).await?;
    let answer = Envelope { id: app.answer_id("chatcmpl"), created: now_s(), model: served.name };
    let response = if is_streamed {
        sse::response(stream(served.serving, generation, reading, answer, stream_options))
    } else {
        let answers = reading.collect(generation).await?;
        Json(answer.whole(&served.serving, answers, reading.tells_reasoning())).into_response()
    };
    Ok(app.warned(&unknown, response))
}

/// Tokens of a conversation, open for an answer.
pub async fn encode(
    serving: &Arc<Serving>,
    messages: &[Object<ChatMessage>],
    tools: Option<Vec<Object<Tool>>>,
) -> Result<Vec<u32>, ApiError> {
    let functions = functions(tools)?;
    let conversation = Conversation { messages: values(messages)?, functions, ..Conversation::default() };
    Ok(conversation.prepare(serving).await?.tokens)
}

fn functions(tools: Option<Vec<Object<Tool>>>) -> Result<Vec<Function>, ApiError> {
    let functions: Vec<Function> = tools.into_iter().flatten().map(|Object(tool)| tool.function.0).collect();
    Function::check_all(functions.iter(), |index| format!("tools[{index}].function"))?;
    Ok(functions)
}

impl ChatRequest {
    /// Refuses what is known and not provided.
    fn refuse(&self) -> Result<(), ApiError> {
        let text_only = "this server answers with text";
        self.functions.check("functions", "it is the older name of `tools`")?;
        self.function_call.check("function_call", "it is the older name of `tool_choice`")?;
        self.audio.check("audio", text_only)?;
        self.prediction.check("prediction", "predicted outputs aren't provided")?;
        self.verbosity.check("verbosity", "models here know no such setting")?;
        self.web_search_options.check("web_search_options", "this server reaches no web")?;
        self.metadata.check("metadata", "answers aren't stored")?;
        self.moderation.check("moderation", "this server moderates nothing")?;
        self.prompt_cache_retention
            .check("prompt_cache_retention", "the cache forgets what was used least recently")?;
        self.safety_identifier.check("safety_identifier", "name the request's owner by `user`")?;
        if self.store == Some(true) {
            return Err(ApiError::invalid("store", "answers aren't stored: leave `store` out or false"));
        }
        Ok(())
    }

    /// The form that the answer must have, with the field that asks for it.
    fn form(&self) -> Result<Option<(&'static str, Grammar)>, ApiError> {
        let format = self.response_format.as_ref().and_then(|format| format.0.grammar());
        match (self.structured()?, format) {
            (Some(_), Some(_)) => {
                let message = "`structured_outputs` and `response_format` both say what the answer must be";
                Err(ApiError::invalid("structured_outputs", message))
            }
            (Some(grammar), None) => Ok(Some(("structured_outputs", grammar))),
            (None, format) => Ok(format.map(|grammar| ("response_format", grammar))),
        }
    }

    /// What the model is to answer to.
    fn conversation(self, serving: &Serving) -> Result<Conversation, ApiError> {
        let form = self.form()?;
        let mut variables = self.chat_template_kwargs.unwrap_or_default();
        if let Some(effort) = self.reasoning_effort {
            const NAME: &str = "reasoning_effort";
            if !serving.template()?.mentions(NAME) {
                let why = "the model's chat template doesn't know it; `chat_template_kwargs` sets what it knows";
                let message = format!("`{NAME}` is not supported: {why}");
                return Err(ApiError::invalid(NAME, message).with_code("unsupported_field"));
            }
            variables.insert(NAME.to_owned(), json!(effort));
        }
        Ok(Conversation {
            messages: values(&self.messages)?,
            functions: functions(self.tools)?,
            choice: self.tool_choice.unwrap_or_default(),
            parallel: self.parallel_tool_calls != Some(false),
            form,
            variables,
        })
    }

    fn params(&self, serving: &Serving) -> Result<SamplingParams, ApiError> {
        let mut params = self.sampling(serving.sampling())?;
        if self.max_tokens.is_some() && self.max_completion_tokens.is_some() {
            let message = "give either `max_completion_tokens` or `max_tokens`, which is its older name";
            return Err(ApiError::invalid("max_tokens", message));
        }
        params.max_tokens = self.max_completion_tokens.or(self.max_tokens).or(params.max_tokens);
        params.logprobs = match (self.logprobs, self.top_logprobs) {
            (Some(true), top) => Some(top.unwrap_or(0)),
            (_, None) => None,
            (_, Some(_)) => {
                return Err(ApiError::invalid("top_logprobs", "`top_logprobs` needs `logprobs` to be true"));
            }
        };
        check_params(&params, serving.engine().limits().vocab_size)?;
        Ok(params)
    }
}
