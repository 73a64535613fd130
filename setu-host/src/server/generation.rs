//! Sessions of a request, and their events as one asynchronous stream.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Instant;

use axum::http::StatusCode;
use setu_core::Error;
use setu_core::sampling::SamplingParams;
use setu_engine::{Event, EventSink, FinishReason, Finished, Handle, Timing, TokenLogprob, Usage};
use tokio::sync::mpsc::{self, UnboundedReceiver, UnboundedSender};

use super::error::ApiError;
use super::limits::{Meter, Running};
use super::metrics::Watch;
use super::served::Served;
use super::shared::UsageBody;
use crate::request::RequestOptions;

/// A prompt's tokens, and whether they are only read.
pub struct Prompt {
    pub tokens: Vec<u32>,
    pub only: bool,
}

/// What runs for one request. Dropping it ends its sessions.
///
/// Events wait here for a slow client, as many as `[server] max_backlog` allows; then the answer is cut off.
pub struct Generation {
    handles: Vec<Handle>,
    events: UnboundedReceiver<Sent>,
    /// Tokens among them.
    backlog: Arc<AtomicU32>,
    /// The event that told that the request was let in.
    first: Option<(usize, Event)>,
    unfinished: usize,
    /// Tokens read and generated so far.
    tokens: (u32, u32),
    watch: Watch,
    /// Its place among those that the caller's key lets run.
    #[expect(dead_code, reason = "it is held until all has ended")]
    running: Option<Running>,
}

/// An event, of which choice it is, and when it came.
type Sent = (usize, Instant, Event);

/// Takes a session's events on the engine's thread.
struct Sink {
    sender: UnboundedSender<Sent>,
    index: usize,
    /// Tokens of the request that wait to be read, and the most that may.
    backlog: Arc<AtomicU32>,
    most: u32,
    /// Charged with the tokens, whether or not they are read.
    meter: Option<Arc<Meter>>,
    is_cut: bool,
}

impl EventSink for Sink {
    fn send(&mut self, event: Event) -> bool {
        if self.is_cut {
            return false;
        }
        let now = Instant::now();
        if matches!(event, Event::Token(_)) {
            self.meter.iter().for_each(|meter| meter.generated(now, 1));
            if self.backlog.fetch_add(1, Ordering::Relaxed) >= self.most {
                self.is_cut = true;
                let error = Error::invalid("the answer is cut off: it is read too slowly, see [server] max_backlog");
                let reason = FinishReason::Failed(error);
                let (text, usage, timing) = (String::new(), Usage::default(), Timing::default());
                let end = Event::Finished(Finished { reason, text, stop: None, usage, timing });
                let _ = self.sender.send((self.index, now, end));
                return false;
            }
        }
        self.sender.send((self.index, now, event)).is_ok()
    }
}

impl Generation {
    /// Starts a request of one or several prompts, each with as many choices as `params` say, and waits until it is
    /// let in, so that a refusal is an error rather than an answer that ends at once.
    ///
    /// # Errors
    /// The request is invalid, or was turned away.
    pub async fn start(
        served: &Served,
        prompts: Vec<Prompt>,
        params: &SamplingParams,
        options: &RequestOptions,
    ) -> Result<Generation, ApiError> {
        let mut options = options.clone();
        served.caller.apply(&mut options)?;
        // Longer prompts than the model takes are refused, and not charged beyond that.
        let longest = served.serving.engine().limits().max_model_len as usize;
        let prompt_tokens: usize = prompts.iter().map(|prompt| prompt.tokens.len().min(longest)).sum();
        let prompt_tokens = u32::try_from(prompt_tokens).unwrap_or(u32::MAX);
        let running = served.caller.admit(prompt_tokens)?;
        let meter = running.as_ref().map(|running| running.meter().clone());
        let (sender, events) = mpsc::unbounded_channel();
        let backlog = Arc::new(AtomicU32::new(0));
        let sessions = u32::try_from(prompts.len()).unwrap_or(u32::MAX).saturating_mul(params.n);
        let most = served.max_backlog.saturating_mul(sessions);
        let mut handles = Vec::new();
        for prompt in prompts {
            let first = handles.len();
            let sink = |choice: u32| {
                let (sender, index) = (sender.clone(), first + choice as usize);
                let sink: Box<dyn EventSink> = Box::new(Sink {
                    sender,
                    index,
                    backlog: backlog.clone(),
                    most,
                    meter: meter.clone(),
                    is_cut: false,
                });
                sink
            };
            handles.extend(served.serving.add_with(prompt.tokens, prompt.only, params.clone(), &options, sink)?);
        }
        let unfinished = handles.len();
        let tenant = served.caller.tenant();
        let tenant = tenant.unwrap_or_else(|| served.serving.tenants().label(options.tenant.as_deref()));
        let watch = Watch::new(served, tenant, unfinished);
        let tokens = (prompt_tokens, 0);
        let mut generation = Generation { handles, events, first: None, unfinished, tokens, watch, backlog, running };
        let first = generation.receive().await;
        if let Some((_, Event::Finished(finished))) = &first {
            check(&finished.reason)?;
        }
        generation.first = first;
        Ok(generation)
    }

    /// The next event and the index of its choice; `None` behind the last.
    pub async fn next(&mut self) -> Option<(usize, Event)> {
        match self.first.take() {
            Some(first) => Some(first),
            None => self.receive().await,
        }
    }

    /// The seed that repeats the answer of this index.
    pub fn seed(&self, index: usize) -> u64 {
        self.handles[index].seed
    }

    pub fn choices(&self) -> usize {
        self.handles.len()
    }

    /// The tokens used so far, by all choices.
    pub fn usage(&self) -> UsageBody {
        let (prompt_tokens, completion_tokens) = self.tokens;
        let total_tokens = prompt_tokens.saturating_add(completion_tokens);
        UsageBody { prompt_tokens, completion_tokens, total_tokens, ..UsageBody::default() }
    }

    /// Waits for all answers.
    ///
    /// # Errors
    /// One of them failed.
    pub async fn collect(mut self) -> Result<Vec<Answer>, ApiError> {
        let seeds = self.handles.iter().map(|handle| handle.seed);
        let mut answers: Vec<Answer> = seeds.map(|seed| Answer { seed, ..Answer::default() }).collect();
        while let Some((index, event)) = self.next().await {
            answers[index].take(event);
        }
        for answer in &answers {
            match &answer.reason {
                Some(reason) => check(reason)?,
                None => return Err(stopped()),
            }
        }
        Ok(answers)
    }

    async fn receive(&mut self) -> Option<(usize, Event)> {
        if self.unfinished == 0 {
            return None;
        }
        // Where there is none the engine is gone, and with it whoever would have finished.
        let (index, at, event) = self.events.recv().await?;
        if matches!(event, Event::Token(_)) {
            self.backlog.fetch_sub(1, Ordering::Relaxed);
            self.tokens.1 = self.tokens.1.saturating_add(1);
        }
        self.watch.saw(index, at, &event);
        self.unfinished -= usize::from(matches!(event, Event::Finished(_)));
        Some((index, event))
    }
}

/// What a session yielded.
#[derive(Clone, Debug, Default)]
pub struct Answer {
    pub text: String,
    pub logprobs: Vec<TokenLogprob>,
    pub prompt_logprobs: Vec<TokenLogprob>,
    pub reason: Option<FinishReason>,
    pub usage: Usage,
    /// The seed that repeats it.
    pub seed: u64,
}

impl Answer {
    fn take(&mut self, event: Event) {
        match event {
            Event::Prompt(logprobs) => self.prompt_logprobs = logprobs,
            Event::Token(token) => {
                self.text.push_str(&token.text);
                self.logprobs.extend(token.logprob);
            }
            Event::Finished(finished) => {
                self.text.push_str(&finished.text);
                self.reason = Some(finished.reason);
                self.usage = finished.usage;
            }
        }
    }
}

/// An error where a session didn't end well.
///
/// # Errors
/// See above.
pub fn check(reason: &FinishReason) -> Result<(), ApiError> {
    match reason {
        FinishReason::Rejected { reason, retry_after_s } => Err(ApiError::busy(reason.clone(), *retry_after_s)),
        FinishReason::Failed(error) => Err(error.clone().into()),
        FinishReason::Aborted => Err(stopped()),
        _ => Ok(()),
    }
}

/// What OpenAI calls how an answer ended.
pub fn finish_name(reason: Option<&FinishReason>) -> &'static str {
    match reason {
        Some(FinishReason::Stop(_)) => "stop",
        Some(FinishReason::Length) => "length",
        _ => "error",
    }
}

/// The error of an answer that was left incomplete.
pub fn stopped() -> ApiError {
    ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "the engine stopped before the answer was complete")
}
