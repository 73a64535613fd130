//! Sessions of a request, and their events as one asynchronous stream.

use axum::http::StatusCode;
use setu_core::sampling::SamplingParams;
use setu_engine::{Event, FinishReason, Handle, TokenLogprob, Usage};
use tokio::sync::mpsc::{self, UnboundedReceiver};

use super::error::ApiError;
use super::metrics::Watch;
use super::served::Served;
use crate::request::RequestOptions;

/// A prompt's tokens, and whether they are only read.
pub struct Prompt {
    pub tokens: Vec<u32>,
    pub only: bool,
}

/// What runs for one request. Dropping it ends its sessions.
///
/// Events wait here for a slow client: no more of them than the answers have tokens.
pub struct Generation {
    handles: Vec<Handle>,
    events: UnboundedReceiver<(usize, Event)>,
    /// The event that told that the request was let in.
    first: Option<(usize, Event)>,
    unfinished: usize,
    watch: Watch,
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
        let watch = Watch::new(served, options);
        let (sender, events) = mpsc::unbounded_channel();
        let mut handles = Vec::new();
        for prompt in prompts {
            let first = handles.len();
            let sink = |choice: u32| {
                let (sender, index) = (sender.clone(), first + choice as usize);
                let sink: Box<dyn setu_engine::EventSink> =
                    Box::new(move |event: Event| sender.send((index, event)).is_ok());
                sink
            };
            handles.extend(served.serving.add_with(prompt.tokens, prompt.only, params.clone(), options, sink)?);
        }
        let unfinished = handles.len();
        let mut generation = Generation { handles, events, first: None, unfinished, watch };
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

    pub fn choices(&self) -> usize {
        self.handles.len()
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
        let (index, event) = match self.events.recv().await {
            Some(received) => received,
            // The engine is gone, and with it whoever would have finished.
            None => return None,
        };
        self.watch.saw(index, &event);
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

fn stopped() -> ApiError {
    ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "the engine stopped before the answer was complete")
}
