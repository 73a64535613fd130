//! Between text and tokens.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};
use setu_engine::text::EncodeOptions;
use utoipa::ToSchema;

use super::app::App;
use super::body::Body;
use super::chat::{self, ChatMessage};
use super::content::Object;
use super::error::{ApiError, ErrorBody};
use super::keys::Caller;
use super::tools::Tool;
use crate::serving::Serving;

/// A text or a conversation whose tokens are asked for.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct TokenizeRequest {
    /// The model's name; without it the first that is served.
    #[serde(default)]
    pub model: Option<String>,
    /// The text; either this or `messages`.
    #[serde(default)]
    pub prompt: Option<String>,
    /// A conversation, which the model's chat template renders.
    #[serde(default)]
    #[schema(min_items = 1, value_type = Option<Vec<ChatMessage>>)]
    pub messages: Option<Vec<Object<ChatMessage>>>,
    /// Tools that the conversation's answer may call; needs `messages`.
    #[serde(default)]
    #[schema(value_type = Option<Vec<Tool>>)]
    pub tools: Option<Vec<Object<Tool>>>,
    /// Whether tokens that begin and end a prompt are added to a text; true where it isn't given.
    #[serde(default)]
    pub add_special_tokens: Option<bool>,
    /// Whether the text of each token is told as well.
    #[serde(default)]
    pub return_token_strs: Option<bool>,
}

/// Tokens.
#[derive(Serialize, ToSchema)]
pub struct TokenizeBody {
    tokens: Vec<u32>,
    count: usize,
    max_model_len: u32,
    token_strs: Option<Vec<String>>,
}

/// Tokens whose text is asked for.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct DetokenizeRequest {
    /// The model's name; without it the first that is served.
    #[serde(default)]
    pub model: Option<String>,
    /// The tokens.
    pub tokens: Vec<u32>,
}

/// Text.
#[derive(Serialize, ToSchema)]
pub struct DetokenizeBody {
    prompt: String,
}

/// Tells the tokens of a text or of a conversation.
#[utoipa::path(post, path = "/tokenize", request_body = TokenizeRequest, responses(
    (status = 200, body = TokenizeBody), (status = "4XX", body = ErrorBody)
))]
pub async fn tokenize(
    State(app): State<Arc<App>>,
    caller: Caller,
    Body { request, unknown }: Body<TokenizeRequest>,
) -> Result<Response, ApiError> {
    let served = app.model(caller, request.model.as_deref()).await?;
    if request.tools.is_some() && request.messages.is_none() {
        return Err(ApiError::invalid("tools", "`tools` needs `messages`"));
    }
    let tokens = match (request.prompt, &request.messages) {
        (Some(text), None) => {
            let add_special = request.add_special_tokens.unwrap_or(true);
            encode(&served.serving, text, EncodeOptions { add_special, parse_special: true }).await?
        }
        (None, Some(_)) if request.add_special_tokens.is_some() => {
            let message = "the chat template adds what `messages` need: leave `add_special_tokens` out";
            return Err(ApiError::invalid("add_special_tokens", message));
        }
        (None, Some(messages)) => chat::encode(&served.serving, messages, request.tools).await?,
        _ => return Err(ApiError::invalid("prompt", "give either `prompt` or `messages`")),
    };
    let piece = |&token: &u32| served.serving.piece(token);
    let token_strs = (request.return_token_strs == Some(true)).then(|| tokens.iter().map(piece).collect());
    let max_model_len = served.serving.engine().limits().max_model_len;
    let body = TokenizeBody { count: tokens.len(), tokens, max_model_len, token_strs };
    Ok(app.warned(&unknown, Json(body).into_response()))
}

/// Tells the text of tokens.
#[utoipa::path(post, path = "/detokenize", request_body = DetokenizeRequest, responses(
    (status = 200, body = DetokenizeBody), (status = "4XX", body = ErrorBody)
))]
pub async fn detokenize(
    State(app): State<Arc<App>>,
    caller: Caller,
    Body { request, unknown }: Body<DetokenizeRequest>,
) -> Result<Response, ApiError> {
    let served = app.model(caller, request.model.as_deref()).await?;
    let prompt = decode(&served.serving, &request.tokens)?;
    Ok(app.warned(&unknown, Json(DetokenizeBody { prompt }).into_response()))
}

/// Tokens of a text, found beside the threads that serve.
pub async fn encode(serving: &Arc<Serving>, text: String, options: EncodeOptions) -> Result<Vec<u32>, ApiError> {
    let serving = serving.clone();
    blocking(move || serving.tokenizer().encode(&text, options)).await
}

/// Text of tokens.
pub fn decode(serving: &Serving, tokens: &[u32]) -> Result<String, ApiError> {
    let decoded = serving.decode(tokens);
    decoded.map_err(|error| ApiError { param: Some("tokens".to_owned()), ..error.into() })
}

/// Runs what takes long beside the threads that serve.
pub async fn blocking<T: Send + 'static, E: Into<ApiError> + Send + 'static>(
    work: impl FnOnce() -> Result<T, E> + Send + 'static,
) -> Result<T, ApiError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result.map_err(E::into),
        Err(error) => std::panic::resume_unwind(error.into_panic()),
    }
}
