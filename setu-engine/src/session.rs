//! One session as the engine's thread keeps it.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use setu_core::ids::SessionId;
use setu_core::sampling::SamplingParams;
use setu_core::view::{SessionState, SessionView, UNSET_PRIORITY};
use setu_core::{Error, Result};

use crate::core::NextToken;
use crate::guard::panic_message;
use crate::kv::{GroupTable, PrefixKeys};
use crate::request::{Arrival, EventSink, Piece, Request, TextSink, TokenLogprob, Usage};

/// A live session. What policies see of it is in the [`SessionView`] beside it.
pub(crate) struct Session {
    pub id: SessionId,
    pub request: Arc<Request>,
    pub seed: u64,
    pub text: Option<Box<dyn TextSink>>,
    /// For a constrained session, what may come next.
    pub next_token: Option<NextToken>,
    pub events: Box<dyn EventSink>,
    /// Confirmed tokens.
    pub output: Vec<u32>,
    pub tables: Vec<GroupTable>,
    pub keys: PrefixKeys,
    /// Full pages whose content is published.
    pub published_pages: u32,
    pub slot: Option<u32>,
    /// Whether the backend knows the slot's parameters.
    pub slot_open: bool,
    /// Counts preemptions, so that a step in flight from before one is recognised.
    pub epoch: u32,
    /// Number of the latest step that it takes part in.
    pub last_step: u64,
    /// Steps in flight that sample a token of it.
    pub samples_in_flight: u32,
    /// The want of step `last_step` that samples its next token.
    pub carried_want: Option<u32>,
    /// The session whose prompt it waits to share (a further choice of the same request).
    pub leader: Option<SessionId>,
    pub prompt_logprobs: Vec<TokenLogprob>,
    /// Whether its owner has been told these.
    pub prompt_sent: bool,
    pub usage: Usage,
    /// When its first token was there; infinite before.
    pub first_token_s: f64,
}

impl Session {
    pub fn new(arrival: Arrival, tables: Vec<GroupTable>, leader: Option<SessionId>) -> Session {
        let request = arrival.request;
        let keys = PrefixKeys::new(&request.tenant.0.to_le_bytes(), 0);
        let usage = Usage { prompt_tokens: request.prompt.len() as u32, ..Usage::default() };
        Session {
            id: arrival.id,
            request,
            seed: arrival.seed,
            text: arrival.text,
            next_token: arrival.constraint.map(|constraint| NextToken::Known(constraint, Vec::new())),
            events: arrival.events,
            output: Vec::new(),
            tables,
            keys,
            published_pages: 0,
            slot: None,
            slot_open: false,
            epoch: 0,
            last_step: 0,
            samples_in_flight: 0,
            carried_want: None,
            leader,
            prompt_logprobs: Vec::new(),
            prompt_sent: false,
            usage,
            first_token_s: f64::INFINITY,
        }
    }

    pub fn params(&self) -> &SamplingParams {
        &self.request.params
    }

    pub fn prompt(&self) -> &[u32] {
        &self.request.prompt
    }

    /// The confirmed token at `position`.
    pub fn token(&self, position: u32) -> Option<u32> {
        let (position, prompt) = (position as usize, self.prompt());
        prompt.get(position).or_else(|| self.output.get(position - prompt.len())).copied()
    }

    /// Turns a token into text.
    ///
    /// # Errors
    /// The sink panicked, and is never called again.
    pub fn push_text(&mut self, token: u32) -> Result<Piece> {
        let Some(mut sink) = self.text.take() else { return Ok(Piece::default()) };
        match catch_unwind(AssertUnwindSafe(|| sink.push(token))) {
            Ok(piece) => {
                self.text = Some(sink);
                Ok(piece)
            }
            Err(payload) => Err(text_failed(sink, payload)),
        }
    }

    /// The text that was held back, and the stop string that ended it; none if the sink panics.
    pub fn finish_text(&mut self) -> (String, Option<String>) {
        let Some(mut sink) = self.text.take() else { return Default::default() };
        catch_unwind(AssertUnwindSafe(|| (sink.finish(), sink.stop()))).unwrap_or_else(|payload| {
            let error = text_failed(sink, payload);
            tracing::error!(session = %self.id, error = error.message(), "the rest of the text is lost");
            Default::default()
        })
    }

    /// Most tokens that it may take from the prefix cache rather than compute: all but the last, and no prompt
    /// token whose logits tell a log-probability that is still wanted.
    pub fn cacheable_tokens(&self) -> usize {
        match self.params().prompt_logprobs {
            Some(_) if self.prompt_logprobs.len() + 1 < self.prompt().len() => self.prompt_logprobs.len(),
            _ => self.prompt().len() + self.output.len() - 1,
        }
    }

    /// A first view of it.
    pub fn view(&self, now_s: f64, max_tokens: u32) -> SessionView {
        let request = &self.request;
        let mut view = SessionView::default();
        view.id = self.id;
        view.tenant = request.tenant;
        view.tenant_weight = request.tenant_weight;
        view.priority = request.priority.unwrap_or(UNSET_PRIORITY);
        view.class = request.class;
        view.arrival_s = now_s;
        view.ttft_deadline_s = now_s + request.deadlines.ttft_s;
        view.itl_limit_s = request.deadlines.itl_s;
        view.total_deadline_s = now_s + request.deadlines.total_s;
        view.prompt_tokens = request.prompt.len() as u32;
        view.len_tokens = view.prompt_tokens;
        view.max_tokens = max_tokens;
        view.set_state(if self.leader.is_some() { SessionState::Held } else { SessionState::Waiting });
        view
    }
}

fn text_failed(sink: Box<dyn TextSink>, payload: Box<dyn Any + Send>) -> Error {
    // Its state may be broken, so not even its drop may run.
    std::mem::forget(sink);
    Error::internal(format!("turning tokens into text {}", panic_message(payload)))
}
