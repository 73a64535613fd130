//! A conversation on its way to the engine, and the answer on its way back, whichever API it came by.

use std::sync::Arc;
use std::time::SystemTime;

use serde_json::{Map, Value};
use setu_core::Error;
use setu_engine::grammar::Grammar;
use setu_engine::text::{ChatInput, ChatTemplate, ChatValue, EncodeOptions};
use setu_engine::{Event, FinishReason, TokenLogprob, Usage};

use super::dialect::{Dialect, special_token};
use super::error::ApiError;
use super::generation::{Generation, check, stopped};
use super::reasoning::{Marks, Splitter};
use super::text::blocking;
use super::tools::{Format, Function, Names, Rules, ToolChoice, Wanted};
use super::transcript::{Message, Transcript};
use crate::serving::Serving;

/// What the model is to answer to.
#[derive(Clone, Debug, Default)]
pub struct Conversation {
    /// As chat templates expect them.
    pub messages: Vec<Value>,
    pub functions: Vec<Function>,
    pub choice: ToolChoice,
    /// Whether the answer may hold several calls.
    pub parallel: bool,
    /// The form that the answer must have where it calls nothing, with the field that asks for it.
    pub form: Option<(&'static str, Grammar)>,
    /// Further variables of the chat template.
    pub variables: Map<String, Value>,
}

/// A conversation as the engine takes it.
pub struct Prepared {
    pub tokens: Vec<u32>,
    /// What the answer is held to, with the field that asks for it.
    pub held: Option<(&'static str, Grammar)>,
    pub reading: Reading,
    /// Special tokens that the answer's text must show.
    pub shown: Arc<[u32]>,
}

/// How answers are to be read.
#[derive(Clone)]
pub struct Reading {
    dialect: Dialect,
    /// Whether the prompt ends within a section of reasoning.
    opened: bool,
    /// The tools that may be called.
    names: Option<Names>,
    parallel: bool,
}

/// An answer that is complete.
#[derive(Clone, Debug)]
pub struct Answer {
    pub message: Message,
    pub logprobs: Vec<TokenLogprob>,
    pub reason: FinishReason,
    pub usage: Usage,
    pub reasoning_tokens: u32,
    /// The stop string that ended it.
    pub stop: Option<String>,
    /// The seed that repeats it.
    pub seed: u64,
}

impl Conversation {
    /// Renders and encodes it, beside the threads that serve.
    ///
    /// # Errors
    /// The model's chat template refuses it, or knows nothing of what it holds.
    pub async fn prepare(mut self, serving: &Arc<Serving>) -> Result<Prepared, ApiError> {
        if let ToolChoice::Named(name) = &self.choice
            && !self.functions.iter().any(|function| function.name == *name)
        {
            let message = format!("`tool_choice` names {name:?}, which is none of the `tools`");
            return Err(ApiError::invalid("tool_choice", message));
        }
        if self.choice == ToolChoice::Required && self.functions.is_empty() {
            return Err(ApiError::invalid("tool_choice", "`tool_choice` is `required`, and there are no `tools`"));
        }
        if self.choice == ToolChoice::None {
            self.functions.clear();
        }
        let serving = serving.clone();
        blocking(move || self.prepare_now(&serving)).await
    }

    fn prepare_now(self, serving: &Serving) -> Result<Prepared, ApiError> {
        let text = self.render(serving.template()?)?;
        let dialect = Dialect::of(serving);
        let tokenizer = serving.tokenizer();
        let calls = match dialect.calls {
            _ if self.functions.is_empty() => None,
            Some(format) => Some(format),
            None => {
                return Err(unsupported(
                    "tools",
                    "it isn't known how the model writes calls: set `[model] tool_format`",
                ));
            }
        };
        let opened = dialect.reasoning.is_some_and(|marks| text.trim_end().ends_with(marks.open));
        let token = |mark: &str| special_token(tokenizer, mark);
        // Where the prompt closed the section there is none to come.
        let to_come = dialect.reasoning.filter(|marks| !text.trim_end().ends_with(marks.close));
        let held = self.held(calls, to_come.map(|marks| (marks, opened)), &token)?;
        let names = calls.map(|_| Arc::new(self.functions.iter().map(|function| function.name.clone()).collect()));
        Ok(Prepared {
            tokens: tokenizer.encode(&text, EncodeOptions::RENDERED)?,
            held,
            shown: dialect.shown(tokenizer, calls.is_some()),
            reading: Reading { dialect, opened, names, parallel: self.parallel },
        })
    }

    /// What the answer is held to: calls, a form, or either, behind a section of reasoning where the model has one.
    fn held(
        &self,
        calls: Option<&'static dyn Format>,
        reasoning: Option<(Marks, bool)>,
        token: &dyn Fn(&str) -> Option<u32>,
    ) -> Result<Option<(&'static str, Grammar)>, ApiError> {
        let forced = self.choice.is_forced();
        let form = self.form.as_ref().filter(|_| !forced);
        let may_call = |function: &&Function| match &self.choice {
            ToolChoice::Named(name) => function.name == *name,
            _ => true,
        };
        let mut wanted = Wanted {
            functions: self.functions.iter().filter(may_call).collect(),
            forced,
            parallel: self.parallel,
            form: None,
            token,
        };
        let Some((field, grammar)) = form else {
            // A model that may call once is not left to itself: it might go on behind the call.
            let is_held =
                forced || !self.parallel || self.functions.iter().any(|function| function.strict == Some(true));
            let lark = calls.filter(|_| is_held).map(|format| format.grammar(&wanted).finish(&wanted, reasoning));
            return Ok(lark.map(|lark| ("tools", Grammar::Lark(lark))));
        };
        let opened = reasoning.is_some_and(|(_, opened)| opened);
        match (grammar.rule()?, calls) {
            (None, None) if !opened => Ok(Some((field, grammar.clone()))),
            (None, _) => {
                let message = format!("`{field}`: a grammar of one's own goes neither with `tools` nor with reasoning");
                Err(ApiError::invalid(*field, message))
            }
            (Some(_), None) if reasoning.is_none() => Ok(Some((field, grammar.clone()))),
            (Some(rule), None) => Ok(Some((field, Grammar::Lark(Rules::form(&rule).finish(&wanted, reasoning))))),
            (Some(rule), Some(format)) => {
                wanted.form = Some(rule);
                Ok(Some((field, Grammar::Lark(format.grammar(&wanted).finish(&wanted, reasoning)))))
            }
        }
    }

    /// The prompt. What the template would leave out in silence is refused.
    fn render(&self, template: &ChatTemplate) -> Result<String, ApiError> {
        let now = SystemTime::now();
        let rendered = |messages: &[Value], with_tools: bool| {
            let mut input = ChatInput::new(messages.iter().cloned().map(ChatValue::from).collect());
            input.now = now;
            let tools = || self.functions.iter().map(|function| ChatValue::from(function.value())).collect();
            input.tools = (with_tools && !self.functions.is_empty()).then(tools);
            input.variables = self.variables.iter().map(|(name, value)| (name.clone(), value.clone().into())).collect();
            template.render(&input)
        };
        let text = rendered(&self.messages, true).map_err(|error| in_messages(&error))?;
        if !self.functions.is_empty() && rendered(&self.messages, false).is_ok_and(|without| without == text) {
            return Err(unsupported("tools", NO_TOOLS));
        }
        // Calls under other names must make a difference.
        let mut renamed = self.messages.clone();
        let mut calling = None;
        for (index, message) in renamed.iter_mut().enumerate() {
            for call in message.get_mut("tool_calls").and_then(Value::as_array_mut).into_iter().flatten() {
                call["function"]["name"] = "another name".into();
                calling = Some(index);
            }
        }
        match calling {
            Some(index) if rendered(&renamed, true).is_ok_and(|other| other == text) => {
                Err(unsupported(&format!("messages[{index}].tool_calls"), NO_TOOLS))
            }
            _ => Ok(text),
        }
    }
}

const NO_TOOLS: &str =
    "the model's chat template doesn't know tools; a template that does is given by `[model] chat_template`";

fn unsupported(field: &str, why: &str) -> ApiError {
    ApiError::invalid(field, format!("`{field}` is not supported: {why}")).with_code("unsupported_field")
}

fn in_messages(error: &Error) -> ApiError {
    ApiError { param: Some("messages".to_owned()), ..error.clone().into() }
}

impl Reading {
    /// A transcript of one answer.
    pub fn transcript(&self) -> Transcript {
        let reasoning = self.dialect.reasoning.map(|marks| Splitter::new(marks, self.opened));
        let calls = self.dialect.calls.zip(self.names.as_ref());
        let calls = calls.map(|(format, names)| (format, format.parser(names.clone()), self.parallel));
        Transcript::new(reasoning, calls)
    }

    /// Whether the model marks its reasoning.
    pub fn tells_reasoning(&self) -> bool {
        self.dialect.reasoning.is_some()
    }

    /// Waits for all answers.
    ///
    /// # Errors
    /// One of them failed.
    pub async fn collect(&self, mut generation: Generation) -> Result<Vec<Answer>, ApiError> {
        let mut open: Vec<Open> = (0..generation.choices())
            .map(|_| Open {
                transcript: self.transcript(),
                message: Message::default(),
                logprobs: Vec::new(),
                ended: None,
            })
            .collect();
        while let Some((index, event)) = generation.next().await {
            let Open { transcript, message, logprobs, ended } = &mut open[index];
            match event {
                Event::Prompt(_) => {}
                Event::Token(token) => {
                    message.take(transcript.token(&token.text), false);
                    logprobs.extend(token.logprob);
                }
                Event::Finished(finished) => {
                    check(&finished.reason)?;
                    message.take(transcript.finish(&finished.text), finished.reason == FinishReason::Length);
                    *ended = Some((finished.reason, finished.usage, finished.stop));
                }
            }
        }
        let seeds = (0..open.len()).map(|index| generation.seed(index));
        let answer = |(Open { transcript, message, logprobs, ended }, seed)| {
            let (reason, usage, stop) = ended.ok_or_else(stopped)?;
            let reasoning_tokens = transcript.reasoning_tokens();
            Ok(Answer { message, logprobs, reason, usage, reasoning_tokens, stop, seed })
        };
        open.into_iter().zip(seeds).map(answer).collect()
    }
}

/// An answer that isn't complete.
struct Open {
    transcript: Transcript,
    message: Message,
    logprobs: Vec<TokenLogprob>,
    ended: Option<(FinishReason, Usage, Option<String>)>,
}
