//! Answers to conversations, whole and as streams of chunks.

use std::sync::Arc;

use axum::response::sse::Event as SseEvent;
use futures_util::Stream;
use serde::Serialize;
use setu_engine::{Event, FinishReason, TokenLogprob};
use utoipa::ToSchema;

use crate::server::conversation::{Answer, Reading};
use crate::server::generation::{Generation, check, finish_name};
use crate::server::shared::{CompletionDetails, StreamOptions, UsageBody};
use crate::server::sse;
use crate::server::transcript::{self, Call, Message, Transcript};
use crate::serving::Serving;

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
pub struct AnswerMessage {
    role: &'static str,
    /// Null where it only calls tools.
    content: Option<String>,
    refusal: Option<String>,
    /// How the model came to it, where it says so.
    #[serde(skip_serializing_if = "Option::is_none")]
    reasoning_content: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tool_calls: Option<Vec<AnswerCall>>,
}

/// A call of a tool.
#[derive(Serialize, ToSchema)]
struct AnswerCall {
    id: String,
    r#type: &'static str,
    function: AnswerFunction,
}

/// What is called.
#[derive(Serialize, ToSchema)]
struct AnswerFunction {
    name: String,
    /// JSON of an object; not all of it where the answer was cut off.
    arguments: String,
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
    #[serde(skip_serializing_if = "Option::is_none")]
    reasoning_content: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tool_calls: Option<[CallDelta; 1]>,
}

/// What a piece adds to a call.
#[derive(Serialize, ToSchema)]
struct CallDelta {
    /// Which call of the answer.
    index: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    r#type: Option<&'static str>,
    function: FunctionDelta,
}

/// The name of what is called comes first, then its arguments, piece by piece.
#[derive(Serialize, ToSchema)]
struct FunctionDelta {
    #[serde(skip_serializing_if = "Option::is_none")]
    name: Option<String>,
    arguments: String,
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

/// What all pieces of an answer say.
pub struct Envelope {
    pub id: String,
    pub created: u64,
    pub model: String,
}

impl Envelope {
    pub fn whole(self, serving: &Serving, answers: Vec<Answer>, tells_reasoning: bool) -> ChatBody {
        let mut usage = UsageBody::default();
        let mut reasoning_tokens = 0;
        let choice = |(index, answer): (usize, Answer)| {
            usage.add(&answer.usage, index == 0);
            reasoning_tokens += answer.reasoning_tokens;
            let content = answer.logprobs.iter().map(|logprob| chat_logprob(serving, logprob)).collect::<Vec<_>>();
            let logprobs = (!content.is_empty()).then_some(ChatLogprobs { content, refusal: None });
            let finish_reason = finish_reason(&answer.reason, !answer.message.calls.is_empty());
            let message = AnswerMessage::from(answer.message);
            ChatChoice { index, message, logprobs, finish_reason, seed: answer.seed as i64 }
        };
        let choices = answers.into_iter().enumerate().map(choice).collect();
        usage.completion_tokens_details = tells_reasoning.then_some(CompletionDetails { reasoning_tokens });
        let Envelope { id, created, model } = self;
        ChatBody { id, object: "chat.completion", created, model, choices, usage }
    }

    fn chunk(&self, choices: Vec<ChunkChoice>, usage: Option<UsageBody>) -> ChatChunk {
        let Envelope { id, created, model } = self;
        let (id, model) = (id.clone(), model.clone());
        ChatChunk { id, object: "chat.completion.chunk", created: *created, model, choices, usage }
    }
}

impl From<Message> for AnswerMessage {
    fn from(message: Message) -> AnswerMessage {
        let Message { reasoning, text, calls } = message;
        let call = |Call { id, name, arguments }| AnswerCall {
            id,
            r#type: "function",
            function: AnswerFunction { name, arguments },
        };
        let calls: Vec<AnswerCall> = calls.into_iter().map(call).collect();
        AnswerMessage {
            role: "assistant",
            content: (calls.is_empty() || !text.is_empty()).then_some(text),
            refusal: None,
            reasoning_content: (!reasoning.is_empty()).then_some(reasoning),
            tool_calls: (!calls.is_empty()).then_some(calls),
        }
    }
}

/// What a stream tells of a delta of an answer in which so many calls have begun.
fn piece(delta: transcript::Delta, calls: &mut usize) -> Option<Delta> {
    let text = |text: String| (!text.is_empty()).then(|| Delta { content: Some(text), ..Delta::default() });
    let call = |index: usize, id: Option<String>, name: Option<String>, arguments: String| {
        let r#type = id.is_some().then_some("function");
        let call = CallDelta { index, id, r#type, function: FunctionDelta { name, arguments } };
        Some(Delta { tool_calls: Some([call]), ..Delta::default() })
    };
    match delta {
        transcript::Delta::Text(more) => text(more),
        transcript::Delta::Broken { unsent, .. } => text(unsent),
        transcript::Delta::Reasoning(text) => Some(Delta { reasoning_content: Some(text), ..Delta::default() }),
        transcript::Delta::Call { id, name } => {
            *calls += 1;
            call(*calls - 1, Some(id), Some(name), String::new())
        }
        transcript::Delta::Arguments(arguments) => call(calls.saturating_sub(1), None, None, arguments),
        transcript::Delta::CallEnd => None,
    }
}

fn finish_reason(reason: &FinishReason, calls: bool) -> &'static str {
    match reason {
        FinishReason::Stop(_) if calls => "tool_calls",
        reason => finish_name(Some(reason)),
    }
}

/// One answer of a stream.
struct Speaker {
    transcript: Transcript,
    calls: usize,
    /// Log-probabilities of tokens whose text isn't complete go with the text that completes it.
    logprobs: Vec<ChatLogprob>,
}

impl Speaker {
    /// Chunks' choices for what the answer goes on with, and for log-probabilities alone at its `end`.
    fn choices(&mut self, index: usize, deltas: Vec<transcript::Delta>, end: bool) -> Vec<ChunkChoice> {
        let mut deltas: Vec<Delta> = deltas.into_iter().filter_map(|delta| piece(delta, &mut self.calls)).collect();
        if end && deltas.is_empty() && !self.logprobs.is_empty() {
            deltas.push(Delta { content: Some(String::new()), ..Delta::default() });
        }
        let choice = |delta| {
            let content = std::mem::take(&mut self.logprobs);
            let logprobs = (!content.is_empty()).then_some(ChatLogprobs { content, refusal: None });
            ChunkChoice { index, delta, logprobs, finish_reason: None }
        };
        deltas.into_iter().map(choice).collect()
    }
}

/// The events of a stream of answers.
pub fn stream(
    serving: Arc<Serving>,
    generation: Generation,
    reading: Reading,
    answer: Envelope,
    options: StreamOptions,
) -> impl Stream<Item = SseEvent> + Send {
    async_stream::stream! {
        let mut generation = generation;
        let mut usage = UsageBody::default();
        let mut reasoning_tokens = 0;
        for index in 0..generation.choices() {
            let delta = Delta { role: Some("assistant"), content: Some(String::new()), ..Delta::default() };
            let choice = ChunkChoice { index, delta, logprobs: None, finish_reason: None };
            yield sse::data(&answer.chunk(vec![choice], options.usage_so_far(&generation)));
        }
        let speaker = || Speaker { transcript: reading.transcript(), calls: 0, logprobs: Vec::new() };
        let mut speakers: Vec<Speaker> = std::iter::repeat_with(speaker).take(generation.choices()).collect();
        while let Some((index, event)) = generation.next().await {
            let speaker = &mut speakers[index];
            let (deltas, reason) = match event {
                Event::Prompt(_) => continue,
                Event::Token(token) => {
                    speaker.logprobs.extend(token.logprob.iter().map(|logprob| chat_logprob(&serving, logprob)));
                    (speaker.transcript.token(&token.text), None)
                }
                Event::Finished(finished) => {
                    if let Err(error) = check(&finished.reason) {
                        yield sse::error(&error);
                        return;
                    }
                    usage.add(&finished.usage, index == 0);
                    reasoning_tokens += speaker.transcript.reasoning_tokens();
                    (speaker.transcript.finish(&finished.text), Some(finished.reason))
                }
            };
            for choice in speaker.choices(index, deltas, reason.is_some()) {
                yield sse::data(&answer.chunk(vec![choice], options.usage_so_far(&generation)));
            }
            if let Some(reason) = reason {
                let finish_reason = Some(finish_reason(&reason, speaker.transcript.ends_with_calls()));
                let choice = ChunkChoice { index, delta: Delta::default(), logprobs: None, finish_reason };
                yield sse::data(&answer.chunk(vec![choice], options.usage_so_far(&generation)));
            }
        }
        if options.ends_with_usage() {
            usage.completion_tokens_details = reading.tells_reasoning().then_some(CompletionDetails { reasoning_tokens });
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
