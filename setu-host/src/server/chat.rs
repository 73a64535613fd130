//! `/v1/chat/completions`.

use std::sync::Arc;

use axum::Json;
use axum::body::Bytes;
use axum::extract::State;
use axum::http::HeaderMap;
use axum::response::{IntoResponse, Response};
use futures_util::Stream;
use serde::{Deserialize, Serialize};
use setu_core::sampling::SamplingParams;
use setu_engine::grammar::Grammar;
use setu_engine::text::{ChatInput, ChatValue};
use setu_engine::{Event, TokenLogprob};
use utoipa::ToSchema;

use super::app::{App, now_s};
use super::body;
use super::content::{Content, Object};
use super::error::{ApiError, ErrorBody};
use super::generation::{Answer, Generation, Prompt, check, finish_name};
use super::keys::Caller;
use super::shared::{Accepted, Refused, StreamOptions, UsageBody, check as check_params, text_request};
use super::structured::{self, ResponseFormat};
use super::{sse, text};
use crate::request::RequestOptions;
use crate::serving::Serving;

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
        pub chat_template_kwargs: Option<serde_json::Map<String, serde_json::Value>>,
        /// The form that the answer must have.
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
        #[serde(default)]
        pub tools: Refused,
        #[serde(default)]
        pub tool_choice: Refused,
        #[serde(default)]
        pub parallel_tool_calls: Refused,
        #[serde(default)]
        pub functions: Refused,
        #[serde(default)]
        pub function_call: Refused,
        #[serde(default)]
        pub audio: Refused,
        #[serde(default)]
        pub prediction: Refused,
        #[serde(default)]
        pub reasoning_effort: Refused,
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

/// A message of a conversation.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ChatMessage {
    pub role: Role,
    /// Text, whole or in parts, which are joined.
    pub content: Content,
    /// Who speaks; the model's chat template is given it.
    #[serde(default)]
    pub name: Option<String>,
    #[serde(default)]
    pub tool_calls: Refused,
    #[serde(default)]
    pub tool_call_id: Refused,
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

/// An answer to a conversation.
#[derive(Serialize, ToSchema)]
pub struct ChatBody {
    id: String,
    object: &'static str,
    created: u64,
    model: String,
    choices: Vec<ChatChoice>,
    usage: UsageBody,
}

/// One of the answers.
#[derive(Serialize, ToSchema)]
struct ChatChoice {
    index: usize,
    message: AnswerMessage,
    logprobs: Option<ChatLogprobs>,
    finish_reason: &'static str,
    /// The seed that repeats it.
    seed: i64,
}

/// What the model says.
#[derive(Serialize, ToSchema)]
struct AnswerMessage {
    role: &'static str,
    content: String,
    refusal: Option<String>,
}

/// A piece of an answer.
#[derive(Serialize, ToSchema)]
pub struct ChatChunk {
    id: String,
    object: &'static str,
    created: u64,
    model: String,
    choices: Vec<ChunkChoice>,
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<UsageBody>,
}

/// A piece of one of the answers.
#[derive(Serialize, ToSchema)]
struct ChunkChoice {
    index: usize,
    delta: Delta,
    logprobs: Option<ChatLogprobs>,
    finish_reason: Option<&'static str>,
}

/// What a piece adds.
#[derive(Default, Serialize, ToSchema)]
struct Delta {
    #[serde(skip_serializing_if = "Option::is_none")]
    role: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    content: Option<String>,
}

/// Log-probabilities of the tokens of an answer or a piece.
#[derive(Default, Serialize, ToSchema)]
struct ChatLogprobs {
    content: Vec<ChatLogprob>,
    refusal: Option<Vec<ChatLogprob>>,
}

/// A token with its log-probability and the likeliest tokens at its place.
#[derive(Serialize, ToSchema)]
struct ChatLogprob {
    #[serde(flatten)]
    token: ChatToken,
    top_logprobs: Vec<ChatToken>,
}

/// A token with its log-probability.
#[derive(Serialize, ToSchema)]
struct ChatToken {
    token: String,
    logprob: f32,
    bytes: Vec<u8>,
}

/// Continues a conversation.
#[utoipa::path(post, path = "/v1/chat/completions", request_body = ChatRequest, responses(
    (status = 200, content((ChatBody = "application/json"), (ChatChunk = "text/event-stream"))),
    (status = "4XX", body = ErrorBody), (status = "5XX", body = ErrorBody)
))]
pub async fn create(
    State(app): State<Arc<App>>,
    caller: Caller,
    headers: HeaderMap,
    bytes: Bytes,
) -> Result<Response, ApiError> {
    let body::Body { request, unknown } = body::read::<ChatRequest>(&headers, &bytes, app.config.unknown_fields)?;
    let served = app.model(caller, request.model.as_deref()).await?;
    request.refuse()?;
    let params = request.params(&served.serving)?;
    let variables = request.chat_template_kwargs.clone().unwrap_or_default();
    let prompt = encode_with(&served.serving, &request.messages, variables).await?;
    let prompt = Prompt { tokens: prompt, only: false };
    let (field, form) = request.form()?;
    let grammar = structured::check(&served.serving, field, form).await?;
    let options = RequestOptions { grammar, ..request.options() };
    let generation = Generation::start(&served, vec![prompt], &params, &options).await?;
    let answer = Envelope { id: app.answer_id("chatcmpl"), created: now_s(), model: served.name };
    let response = if request.is_streamed() {
        sse::response(stream(served.serving, generation, answer, request.includes_usage()))
    } else {
        let answers = generation.collect().await?;
        Json(answer.whole(&served.serving, answers)).into_response()
    };
    Ok(app.warned(&unknown, response))
}

/// Tokens of a conversation, open for an answer.
pub async fn encode(serving: &Arc<Serving>, messages: &[Object<ChatMessage>]) -> Result<Vec<u32>, ApiError> {
    encode_with(serving, messages, serde_json::Map::new()).await
}

async fn encode_with(
    serving: &Arc<Serving>,
    messages: &[Object<ChatMessage>],
    variables: serde_json::Map<String, serde_json::Value>,
) -> Result<Vec<u32>, ApiError> {
    if messages.is_empty() {
        return Err(ApiError::invalid("messages", "`messages` is empty"));
    }
    let values = messages.iter().enumerate().map(|(index, Object(message))| message.value(index));
    let mut input = ChatInput::new(values.collect::<Result<_, _>>()?);
    input.variables = variables.into_iter().map(|(name, value)| (name, ChatValue::from(value))).collect();
    let serving = serving.clone();
    let encoded = text::blocking(move || serving.encode_input(&input)).await;
    encoded.map_err(|error| ApiError { param: error.param.or(Some("messages".to_owned())), ..error })
}

impl ChatMessage {
    /// What a chat template is given of the message at `index`.
    fn value(&self, index: usize) -> Result<ChatValue, ApiError> {
        let refused = [
            ("tool_calls", self.tool_calls),
            ("tool_call_id", self.tool_call_id),
            ("function_call", self.function_call),
            ("audio", self.audio),
            ("refusal", self.refusal),
            ("annotations", self.annotations),
        ];
        for (name, field) in refused {
            field.check(&format!("messages[{index}].{name}"), "messages are of text")?;
        }
        let role = match self.role {
            Role::System | Role::Developer => "system",
            Role::User => "user",
            Role::Assistant => "assistant",
        };
        let mut value = serde_json::json!({"role": role, "content": self.content.text()});
        if let Some(name) = &self.name {
            value["name"] = name.as_str().into();
        }
        Ok(ChatValue::from(value))
    }
}

impl ChatRequest {
    /// Refuses what is known and not provided.
    fn refuse(&self) -> Result<(), ApiError> {
        let text_only = "this server answers with text";
        let no_tools = "tools aren't provided by this version";
        self.tools.check("tools", no_tools)?;
        self.tool_choice.check("tool_choice", no_tools)?;
        self.parallel_tool_calls.check("parallel_tool_calls", no_tools)?;
        self.functions.check("functions", no_tools)?;
        self.function_call.check("function_call", no_tools)?;
        self.audio.check("audio", text_only)?;
        self.prediction.check("prediction", "predicted outputs aren't provided")?;
        self.reasoning_effort.check("reasoning_effort", "ask the chat template, by `chat_template_kwargs`")?;
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

    /// The form that the answer must have, and the field that asks for it.
    fn form(&self) -> Result<(&'static str, Option<Grammar>), ApiError> {
        let format = self.response_format.as_ref().and_then(|format| format.0.grammar());
        match (self.structured()?, format) {
            (Some(_), Some(_)) => {
                let message = "`structured_outputs` and `response_format` both say what the answer must be";
                Err(ApiError::invalid("structured_outputs", message))
            }
            (Some(grammar), None) => Ok(("structured_outputs", Some(grammar))),
            (None, grammar) => Ok(("response_format", grammar)),
        }
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

/// What all pieces of an answer say.
struct Envelope {
    id: String,
    created: u64,
    model: String,
}

impl Envelope {
    fn whole(self, serving: &Serving, answers: Vec<Answer>) -> ChatBody {
        let mut usage = UsageBody::default();
        let choice = |(index, answer): (usize, Answer)| {
            let seed = answer.seed as i64;
            usage.add(&answer.usage, index == 0);
            let content = answer.logprobs.iter().map(|logprob| chat_logprob(serving, logprob)).collect::<Vec<_>>();
            let logprobs = (!content.is_empty()).then_some(ChatLogprobs { content, refusal: None });
            let message = AnswerMessage { role: "assistant", content: answer.text, refusal: None };
            ChatChoice { index, message, logprobs, finish_reason: finish_name(answer.reason.as_ref()), seed }
        };
        let choices = answers.into_iter().enumerate().map(choice).collect();
        let Envelope { id, created, model } = self;
        ChatBody { id, object: "chat.completion", created, model, choices, usage }
    }

    fn chunk(&self, choices: Vec<ChunkChoice>, usage: Option<UsageBody>) -> ChatChunk {
        let Envelope { id, created, model } = self;
        let (id, model) = (id.clone(), model.clone());
        ChatChunk { id, object: "chat.completion.chunk", created: *created, model, choices, usage }
    }
}

fn stream(
    serving: Arc<Serving>,
    generation: Generation,
    answer: Envelope,
    include_usage: bool,
) -> impl Stream<Item = axum::response::sse::Event> + Send {
    async_stream::stream! {
        let mut generation = generation;
        let mut usage = UsageBody::default();
        for index in 0..generation.choices() {
            let delta = Delta { role: Some("assistant"), content: Some(String::new()) };
            let choice = ChunkChoice { index, delta, logprobs: None, finish_reason: None };
            yield sse::data(&answer.chunk(vec![choice], None));
        }
        // Log-probabilities of tokens whose text isn't complete go with the text that completes it.
        let mut waiting: Vec<Vec<ChatLogprob>> = std::iter::repeat_with(Vec::new).take(generation.choices()).collect();
        while let Some((index, event)) = generation.next().await {
            let (text, reason) = match event {
                Event::Prompt(_) => continue,
                Event::Token(token) => {
                    waiting[index].extend(token.logprob.iter().map(|logprob| chat_logprob(&serving, logprob)));
                    (token.text, None)
                }
                Event::Finished(finished) => {
                    if let Err(error) = check(&finished.reason) {
                        yield sse::error(&error);
                        return;
                    }
                    usage.add(&finished.usage, index == 0);
                    (finished.text, Some(finished.reason))
                }
            };
            if !text.is_empty() || (reason.is_some() && !waiting[index].is_empty()) {
                let content = std::mem::take(&mut waiting[index]);
                let logprobs = (!content.is_empty()).then_some(ChatLogprobs { content, refusal: None });
                let delta = Delta { role: None, content: Some(text) };
                yield sse::data(&answer.chunk(vec![ChunkChoice { index, delta, logprobs, finish_reason: None }], None));
            }
            if reason.is_some() {
                let finish_reason = Some(finish_name(reason.as_ref()));
                let choice = ChunkChoice { index, delta: Delta::default(), logprobs: None, finish_reason };
                yield sse::data(&answer.chunk(vec![choice], None));
            }
        }
        if include_usage {
            yield sse::data(&answer.chunk(Vec::new(), Some(usage)));
        }
        yield sse::done();
    }
}

fn chat_logprob(serving: &Serving, logprob: &TokenLogprob) -> ChatLogprob {
    let top_logprobs = logprob.top.iter().map(|&(token, logprob)| chat_token(serving, token, logprob)).collect();
    ChatLogprob { token: chat_token(serving, logprob.token, logprob.logprob), top_logprobs }
}

fn chat_token(serving: &Serving, token: u32, logprob: f32) -> ChatToken {
    let bytes = serving.tokenizer().token_bytes(token).unwrap_or_default().to_vec();
    // JSON has no infinities.
    ChatToken { token: serving.piece(token), logprob: logprob.max(f32::MIN), bytes }
}
