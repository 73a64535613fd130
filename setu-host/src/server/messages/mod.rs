//! `/v1/messages` and `/v1/messages/count_tokens`, for clients of Anthropic's API. A conversation becomes what chat
//! completions make of theirs ([`Conversation`]); what differs is how it is asked and told.
//!
//! [`Conversation`]: super::conversation::Conversation

mod answer;
mod blocks;
mod error;
mod request;

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use setu_core::sampling::SamplingParams;
use utoipa::ToSchema;

pub use error::in_shape;

use super::app::App;
use super::body::Body;
use super::conversation::Prepared;
use super::error::ApiError;
use super::generation::{Generation, Prompt};
use super::keys::Caller;
use super::shared::check;
use super::{sse, structured};
use crate::request::RequestOptions;
use crate::serving::Serving;
use answer::{MessageBody, MessageEvent};
use error::MessageErrorBody;
use request::{CountRequest, MessagesRequest};

/// How long a prompt is.
#[derive(Serialize, ToSchema)]
struct CountBody {
    input_tokens: usize,
}

sse::stream_event! {
    /// An event of a stream: what happened, or the error that ends it.
    MessageStreamEvent of MessageEvent | MessageErrorBody
}

/// Continues a conversation, in Anthropic's form.
#[utoipa::path(post, path = "/v1/messages", request_body = MessagesRequest, responses(
    (status = 200, content((MessageBody = "application/json"), (MessageStreamEvent = "text/event-stream"))),
    (status = "4XX", body = MessageErrorBody), (status = "5XX", body = MessageErrorBody)
))]
pub async fn create(
    State(app): State<Arc<App>>,
    caller: Caller,
    Body { request, unknown }: Body<MessagesRequest>,
) -> Result<Response, ApiError> {
    let served = app.model(caller, Some(&request.model)).await?;
    request.refuse()?;
    let params = request.params(&served.serving)?;
    let prepared = request.conversation(&served.serving)?.prepare(&served.serving).await?;
    let Prepared { tokens, held, reading, shown } = prepared;
    let grammar = structured::compile(&served.serving, held).await?;
    let tenant = request.metadata.and_then(|metadata| metadata.0.user_id);
    let options = RequestOptions { tenant, grammar, shown, ..RequestOptions::default() };
    let prompt_tokens = tokens.len() as u32;
    let prompt = Prompt { tokens, only: false };
    let generation = Generation::start(&served, vec![prompt], &params, &options).await?;
    let id = app.answer_id("msg");
    let response = if request.stream == Some(true) {
        sse::response(answer::stream(generation, reading, (id, served.name), prompt_tokens))
    } else {
        let mut answers = reading.collect(generation).await?;
        let answer = answers.pop().ok_or_else(super::generation::stopped)?;
        Json(MessageBody::new(id, served.name, answer)).into_response()
    };
    Ok(app.warned(&unknown, response))
}

/// Counts the tokens of a conversation, in Anthropic's form.
#[utoipa::path(post, path = "/v1/messages/count_tokens", request_body = CountRequest, responses(
    (status = 200, body = CountBody), (status = "4XX", body = MessageErrorBody)
))]
pub async fn count_tokens(
    State(app): State<Arc<App>>,
    caller: Caller,
    Body { request, unknown }: Body<CountRequest>,
) -> Result<Response, ApiError> {
    let served = app.model(caller, Some(&request.model)).await?;
    let prepared = request.conversation(&served.serving)?.prepare(&served.serving).await?;
    Ok(app.warned(&unknown, Json(CountBody { input_tokens: prepared.tokens.len() }).into_response()))
}

impl MessagesRequest {
    /// Refuses what is known and not provided.
    fn refuse(&self) -> Result<(), ApiError> {
        self.container.check("container", "this server runs no code")?;
        self.diagnostics.check("diagnostics", "`/metrics` tells how the server is")?;
        self.inference_geo.check("inference_geo", "requests are served where the server runs")
    }

    fn params(&self, serving: &Serving) -> Result<SamplingParams, ApiError> {
        let mut params = serving.sampling().clone();
        if self.max_tokens == 0 {
            return Err(ApiError::invalid("max_tokens", "`max_tokens` must be at least 1"));
        }
        params.max_tokens = Some(self.max_tokens);
        params.n = 1;
        params.temperature = self.temperature.unwrap_or(params.temperature);
        params.top_p = self.top_p.unwrap_or(params.top_p);
        params.top_k = self.top_k.unwrap_or(params.top_k);
        if let Some(stop) = &self.stop_sequences {
            params.stop.clone_from(stop);
        }
        check(&params, serving.engine().limits().vocab_size)?;
        Ok(params)
    }
}
