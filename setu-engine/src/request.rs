//! What comes into the engine and what it sends back.

use crossbeam_channel::Sender;
use setu_core::ids::{SessionId, TenantId};
use setu_core::sampling::SamplingParams;
use setu_core::view::UNSET_PRIORITY;
use setu_core::{Error, Result};

use crate::constraint::Constraint;

/// A prompt and what is asked of its continuation.
pub struct Request {
    /// Token ids; at least one.
    pub prompt: Vec<u32>,
    pub params: SamplingParams,
    pub tenant: TenantId,
    /// The tenant's share under contention.
    pub tenant_weight: f64,
    /// Higher is more urgent; the scheduler defines the range, and what counts where none is given.
    pub priority: Option<i32>,
    /// The class of application that it belongs to, for estimates of its answer's length; 0 for none.
    pub class: u32,
    pub deadlines: Deadlines,
    /// Reads the prompt (for its log-probabilities) and generates nothing.
    pub prompt_only: bool,
    /// One a choice (`params.n`), or none: turns tokens into text and finds stop strings.
    pub text: Vec<Box<dyn TextSink>>,
    /// One a choice, or none: says which tokens may come next.
    pub constraints: Vec<Box<dyn Constraint>>,
}

impl Request {
    /// A request of the default tenant without deadlines.
    pub fn new(prompt: Vec<u32>, params: SamplingParams) -> Request {
        Request {
            prompt,
            params,
            tenant: TenantId(0),
            tenant_weight: 1.0,
            priority: None,
            class: 0,
            deadlines: Deadlines::default(),
            prompt_only: false,
            text: Vec::new(),
            constraints: Vec::new(),
        }
    }
}

/// When a request's tokens are due, in seconds; infinite where it doesn't matter.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Deadlines {
    /// From arrival to the first token.
    pub ttft_s: f64,
    /// Between two tokens.
    pub itl_s: f64,
    /// From arrival to the last token.
    pub total_s: f64,
}

impl Default for Deadlines {
    fn default() -> Deadlines {
        Deadlines { ttft_s: f64::INFINITY, itl_s: f64::INFINITY, total_s: f64::INFINITY }
    }
}

/// Turns a session's tokens into text, on the engine's thread, so that an answer ends exactly at a stop string.
pub trait TextSink: Send + Sync {
    /// Takes a token; returns the text that became complete and whether a stop string ended it.
    fn push(&mut self, token: u32) -> Piece;

    /// The text that was held back, once no more tokens come.
    fn finish(&mut self) -> String;

    /// The stop string that ended the text, if one did.
    fn stop(&self) -> Option<String> {
        None
    }
}

/// Where a session's events go.
pub trait EventSink: Send {
    /// Takes an event, on the engine's thread, which waits meanwhile: it must neither block nor panic. Returns false
    /// once nobody wants more, which ends the session.
    fn send(&mut self, event: Event) -> bool;
}

impl EventSink for Sender<Event> {
    fn send(&mut self, event: Event) -> bool {
        Sender::send(self, event).is_ok()
    }
}

impl<F: FnMut(Event) -> bool + Send> EventSink for F {
    fn send(&mut self, event: Event) -> bool {
        self(event)
    }
}

/// Text that a token completed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Piece {
    pub text: String,
    /// A stop string was completed; `text` ends in front of it.
    pub stopped: bool,
}

/// What a session's owner receives, in order; [`Finished`](Event::Finished) is the last.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// The log-probabilities of prompt tokens 1.., once the prompt is computed.
    Prompt(Vec<TokenLogprob>),
    Token(TokenEvent),
    Finished(Finished),
}

/// A generated token.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenEvent {
    pub token: u32,
    /// Text that it completed; empty without a text sink.
    pub text: String,
    pub logprob: Option<TokenLogprob>,
}

/// A token's natural log-probability under the model, with the likeliest tokens at its place.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct TokenLogprob {
    pub token: u32,
    pub logprob: f32,
    pub top: Vec<(u32, f32)>,
}

/// How a session ended.
#[derive(Clone, Debug, PartialEq)]
pub struct Finished {
    pub reason: FinishReason,
    /// Text that was held back until now.
    pub text: String,
    /// The stop string that ended it.
    pub stop: Option<String>,
    pub usage: Usage,
    pub timing: Timing,
}

/// When things happened to a session, in seconds from its arrival by the engine's clock; infinite where they didn't.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Timing {
    /// It first ran.
    pub run_s: f64,
    /// Its first token was there.
    pub first_token_s: f64,
    /// It ended.
    pub end_s: f64,
}

impl Default for Timing {
    fn default() -> Timing {
        Timing { run_s: f64::INFINITY, first_token_s: f64::INFINITY, end_s: 0.0 }
    }
}

/// Why a session ended.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum FinishReason {
    /// End of sequence, a stop token or a stop string; the token, if it was one.
    Stop(Option<u32>),
    /// `max_tokens`, or the model's length.
    Length,
    /// Its owner ended it.
    Aborted,
    /// The scheduler turned it away; when trying again may help.
    Rejected { reason: String, retry_after_s: Option<f64> },
    /// The engine couldn't go on with it.
    Failed(Error),
}

/// Tokens that a session took.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    pub prompt_tokens: u32,
    /// Of the prompt, those found in the prefix cache when it first ran.
    pub cached_tokens: u32,
    pub generated_tokens: u32,
    pub preemptions: u32,
}

/// Limits that a request is checked against.
#[derive(Clone, Debug)]
pub struct Limits {
    pub vocab_size: u32,
    pub max_model_len: u32,
    /// Longest session that the KV pages can hold.
    pub kv_tokens: u32,
}

impl Request {
    /// Checks the request.
    ///
    /// # Errors
    /// `InvalidInput`, naming the field and what is allowed.
    pub fn validate(&self, limits: &Limits) -> Result<()> {
        if self.prompt.is_empty() {
            return Err(Error::invalid("Prompt cannot be empty"));
        }
        self.params.validate(limits.vocab_size)?;
        if let Some(token) = self.prompt.iter().find(|&&token| token >= limits.vocab_size) {
            let vocab = limits.vocab_size;
            return Err(Error::invalid(format!("the prompt holds token {token}; the vocabulary has {vocab}")));
        }
        let longest = limits.max_model_len.min(limits.kv_tokens) as usize;
        let room = usize::from(!self.prompt_only);
        if self.prompt.len() + room > longest {
            let why = if limits.kv_tokens < limits.max_model_len {
                format!("the KV pages hold {} (raise [kv] memory)", limits.kv_tokens)
            } else {
                format!("the model's limit is {}", limits.max_model_len)
            };
            let needs = if self.prompt_only { "" } else { " and needs room for one more" };
            return Err(Error::invalid(format!("the prompt has {} tokens{needs}; {why}", self.prompt.len())));
        }
        let deadlines =
            [("ttft", self.deadlines.ttft_s), ("itl", self.deadlines.itl_s), ("total", self.deadlines.total_s)];
        if let Some((name, value)) = deadlines.into_iter().find(|(_, value)| value.is_nan() || *value <= 0.0) {
            return Err(Error::invalid(format!("the {name} deadline must be over 0 s, not {value}")));
        }
        if self.priority == Some(UNSET_PRIORITY) {
            return Err(Error::invalid(format!("a priority must be over {UNSET_PRIORITY}")));
        }
        if !(self.tenant_weight > 0.0 && self.tenant_weight.is_finite()) {
            return Err(Error::invalid(format!("a tenant's weight must be over 0, not {}", self.tenant_weight)));
        }
        if !self.text.is_empty() && self.text.len() != self.params.n as usize {
            return Err(Error::invalid("a request needs one text sink for each of its choices"));
        }
        if !self.constraints.is_empty() && self.constraints.len() != self.params.n as usize {
            return Err(Error::invalid("a request needs one constraint for each of its choices"));
        }
        Ok(())
    }
}

/// One choice of a request on its way into the engine.
pub struct Arrival {
    pub id: SessionId,
    pub request: std::sync::Arc<Request>,
    pub seed: u64,
    pub text: Option<Box<dyn TextSink>>,
    pub constraint: Option<Box<dyn Constraint>>,
    pub events: Box<dyn EventSink>,
}
