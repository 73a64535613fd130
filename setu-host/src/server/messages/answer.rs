//! Answers in Anthropic's form, whole and as a stream of events.

use axum::response::sse::Event as SseEvent;
use futures_util::Stream;
use serde::Serialize;
use serde_json::{Map, Value};
use setu_engine::{Event, FinishReason, Usage};
use utoipa::ToSchema;

use super::error::error_event;
use crate::server::conversation::{Answer, Reading};
use crate::server::generation::{Generation, check};
use crate::server::transcript::{Delta, Message};

/// An answer to a conversation.
#[derive(Serialize, ToSchema)]
pub struct MessageBody {
    pub id: String,
    r#type: &'static str,
    role: &'static str,
    model: String,
    content: Vec<AnswerBlock>,
    /// `end_turn`, `max_tokens`, `stop_sequence` or `tool_use`; null at the beginning of a stream.
    stop_reason: Option<&'static str>,
    /// The one of `stop_sequences` that ended it.
    stop_sequence: Option<String>,
    usage: MessageUsage,
}

/// A part of an answer.
#[derive(Serialize, ToSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum AnswerBlock {
    Thinking {
        thinking: String,
        /// Always empty: nobody needs to prove that the model thought it.
        signature: &'static str,
    },
    Text {
        text: String,
    },
    ToolUse {
        id: String,
        name: String,
        /// The arguments.
        input: Map<String, Value>,
    },
}

/// Tokens that a request took.
#[derive(Clone, Copy, Debug, Default, Serialize, ToSchema)]
pub struct MessageUsage {
    /// Tokens of the prompt that were not in the prefix cache.
    input_tokens: u32,
    cache_creation_input_tokens: u32,
    /// Tokens of the prompt that were.
    cache_read_input_tokens: u32,
    output_tokens: u32,
    output_tokens_details: OutputDetails,
}

/// What an answer's tokens are.
#[derive(Clone, Copy, Debug, Default, Serialize, ToSchema)]
pub struct OutputDetails {
    /// Those of reasoning, with the marks around it.
    thinking_tokens: u32,
}

/// An event of a stream.
#[derive(Serialize, ToSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum MessageEvent {
    MessageStart { message: MessageBody },
    Ping {},
    ContentBlockStart { index: usize, content_block: AnswerBlock },
    ContentBlockDelta { index: usize, delta: BlockDelta },
    ContentBlockStop { index: usize },
    MessageDelta { delta: EndDelta, usage: MessageUsage },
    MessageStop {},
}

/// What a block goes on with.
#[derive(Serialize, ToSchema)]
#[serde(tag = "type")]
pub enum BlockDelta {
    #[serde(rename = "text_delta")]
    Text { text: String },
    #[serde(rename = "thinking_delta")]
    Thinking { thinking: String },
    #[serde(rename = "input_json_delta")]
    InputJson { partial_json: String },
}

/// How an answer ended.
#[derive(Serialize, ToSchema)]
pub struct EndDelta {
    stop_reason: &'static str,
    stop_sequence: Option<String>,
}

impl MessageUsage {
    fn new(usage: &Usage, thinking_tokens: u32) -> MessageUsage {
        MessageUsage {
            input_tokens: usage.prompt_tokens.saturating_sub(usage.cached_tokens),
            cache_creation_input_tokens: 0,
            cache_read_input_tokens: usage.cached_tokens.min(usage.prompt_tokens),
            output_tokens: usage.generated_tokens,
            output_tokens_details: OutputDetails { thinking_tokens },
        }
    }
}

impl EndDelta {
    fn new(reason: &FinishReason, calls: bool, stop: Option<String>) -> EndDelta {
        let stop_reason = match reason {
            FinishReason::Length => "max_tokens",
            _ if stop.is_some() => "stop_sequence",
            _ if calls => "tool_use",
            _ => "end_turn",
        };
        EndDelta { stop_reason, stop_sequence: stop }
    }
}

impl MessageBody {
    pub fn new(id: String, model: String, answer: Answer) -> MessageBody {
        let calls = !answer.message.calls.is_empty();
        let EndDelta { stop_reason, stop_sequence } = EndDelta::new(&answer.reason, calls, answer.stop);
        MessageBody {
            stop_reason: Some(stop_reason),
            stop_sequence,
            usage: MessageUsage::new(&answer.usage, answer.reasoning_tokens),
            content: blocks(answer.message),
            ..MessageBody::begun(id, model, 0)
        }
    }

    /// The beginning of a stream.
    fn begun(id: String, model: String, input_tokens: u32) -> MessageBody {
        MessageBody {
            id,
            r#type: "message",
            role: "assistant",
            model,
            content: Vec::new(),
            stop_reason: None,
            stop_sequence: None,
            usage: MessageUsage { input_tokens, ..MessageUsage::default() },
        }
    }
}

fn blocks(message: Message) -> Vec<AnswerBlock> {
    let Message { reasoning, text, calls } = message;
    let thinking = (!reasoning.is_empty()).then_some(AnswerBlock::Thinking { thinking: reasoning, signature: "" });
    let text = (!text.is_empty()).then_some(AnswerBlock::Text { text });
    let mut blocks: Vec<AnswerBlock> = thinking.into_iter().chain(text).collect();
    for call in calls {
        blocks.push(match serde_json::from_str(&call.arguments) {
            Ok(input) => AnswerBlock::ToolUse { id: call.id, name: call.name, input },
            // Cut off, or with numbers beyond what can be told.
            Err(_) => AnswerBlock::Text { text: format!("{}({}", call.name, call.arguments) },
        });
    }
    blocks
}

/// The events of an answer.
pub fn stream(
    generation: Generation,
    reading: Reading,
    (id, model): (String, String),
    prompt_tokens: u32,
) -> impl Stream<Item = SseEvent> + Send {
    async_stream::stream! {
        let mut generation = generation;
        let mut transcript = reading.transcript();
        let mut writer = BlockWriter::default();
        yield event(&MessageEvent::MessageStart { message: MessageBody::begun(id, model, prompt_tokens) });
        yield event(&MessageEvent::Ping {});
        while let Some((_, next)) = generation.next().await {
            let (deltas, finished) = match next {
                Event::Prompt(_) => continue,
                Event::Token(token) => (transcript.token(&token.text), None),
                Event::Finished(finished) => {
                    if let Err(error) = check(&finished.reason) {
                        yield error_event(&error);
                        return;
                    }
                    (transcript.finish(&finished.text), Some(finished))
                }
            };
            for told in deltas.into_iter().flat_map(|delta| writer.take(delta)).collect::<Vec<_>>() {
                yield event(&told);
            }
            if let Some(finished) = finished {
                if let Some(told) = writer.close() {
                    yield event(&told);
                }
                let delta = EndDelta::new(&finished.reason, transcript.ends_with_calls(), finished.stop);
                let usage = MessageUsage::new(&finished.usage, transcript.reasoning_tokens());
                yield event(&MessageEvent::MessageDelta { delta, usage });
                yield event(&MessageEvent::MessageStop {});
            }
        }
    }
}

/// Puts deltas into blocks.
#[derive(Debug, Default)]
struct BlockWriter {
    open: Option<Kind>,
    index: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Thinking,
    Text,
    ToolUse,
}

impl BlockWriter {
    fn take(&mut self, delta: Delta) -> Vec<MessageEvent> {
        let mut events = Vec::new();
        match delta {
            Delta::Reasoning(thinking) => {
                let block = || AnswerBlock::Thinking { thinking: String::new(), signature: "" };
                self.enter(Kind::Thinking, block, &mut events);
                self.push(BlockDelta::Thinking { thinking }, &mut events);
            }
            Delta::Text(text) | Delta::Broken { unsent: text, .. } if !text.is_empty() => {
                self.enter(Kind::Text, || AnswerBlock::Text { text: String::new() }, &mut events);
                self.push(BlockDelta::Text { text }, &mut events);
            }
            Delta::Call { id, name } => {
                events.extend(self.close());
                self.enter(Kind::ToolUse, || AnswerBlock::ToolUse { id, name, input: Map::new() }, &mut events);
            }
            Delta::Arguments(partial_json) => self.push(BlockDelta::InputJson { partial_json }, &mut events),
            Delta::CallEnd => events.extend(self.close()),
            Delta::Text(_) | Delta::Broken { .. } => {}
        }
        events
    }

    fn enter(&mut self, kind: Kind, block: impl FnOnce() -> AnswerBlock, events: &mut Vec<MessageEvent>) {
        if self.open == Some(kind) {
            return;
        }
        events.extend(self.close());
        self.open = Some(kind);
        events.push(MessageEvent::ContentBlockStart { index: self.index, content_block: block() });
    }

    fn push(&self, delta: BlockDelta, events: &mut Vec<MessageEvent>) {
        events.push(MessageEvent::ContentBlockDelta { index: self.index, delta });
    }

    fn close(&mut self) -> Option<MessageEvent> {
        self.open.take()?;
        self.index += 1;
        Some(MessageEvent::ContentBlockStop { index: self.index - 1 })
    }
}

fn event(told: &MessageEvent) -> SseEvent {
    let name = match told {
        MessageEvent::MessageStart { .. } => "message_start",
        MessageEvent::Ping {} => "ping",
        MessageEvent::ContentBlockStart { .. } => "content_block_start",
        MessageEvent::ContentBlockDelta { .. } => "content_block_delta",
        MessageEvent::ContentBlockStop { .. } => "content_block_stop",
        MessageEvent::MessageDelta { .. } => "message_delta",
        MessageEvent::MessageStop {} => "message_stop",
    };
    crate::server::sse::data(told).event(name)
}
