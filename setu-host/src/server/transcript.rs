//! What an answer says, told apart as it comes: reasoning, text, and calls of tools.

use std::hash::{BuildHasher, RandomState};

use super::reasoning::{Section, Splitter};
use super::tools::{Format, Parser, Part};

/// Tells the parts of one answer apart.
pub struct Transcript {
    reasoning: Option<Splitter>,
    calls: Option<Calls>,
    reasoning_tokens: u32,
    /// Space that is text if text follows it, and nothing next to a call.
    space: String,
    /// Whether text has begun since the beginning, or since the last call.
    in_text: bool,
    begun: usize,
    complete: usize,
    ended: bool,
}

struct Calls {
    format: &'static dyn Format,
    parser: Box<dyn Parser>,
    /// Whether there may be more than one.
    parallel: bool,
}

/// What an answer goes on with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Delta {
    Reasoning(String),
    Text(String),
    /// A call begins.
    Call {
        id: String,
        name: String,
    },
    /// What of the last call's arguments came.
    Arguments(String),
    /// The last call is complete.
    CallEnd,
    /// The last call turned out to be none: `raw` is all of its text, of which `unsent` was in no delta.
    Broken {
        raw: String,
        unsent: String,
    },
}

/// A whole answer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Message {
    pub reasoning: String,
    pub text: String,
    pub calls: Vec<Call>,
}

/// A call of a tool.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Call {
    pub id: String,
    pub name: String,
    /// JSON of an object.
    pub arguments: String,
}

impl Transcript {
    /// Of an answer in which reasoning is told apart by `reasoning`, and calls by `calls`.
    pub fn new(reasoning: Option<Splitter>, calls: Option<(&'static dyn Format, Box<dyn Parser>, bool)>) -> Transcript {
        let calls = calls.map(|(format, parser, parallel)| Calls { format, parser, parallel });
        let (space, in_text) = (String::new(), calls.is_none());
        Transcript { reasoning, calls, reasoning_tokens: 0, space, in_text, begun: 0, complete: 0, ended: false }
    }

    /// Takes a token's text.
    pub fn token(&mut self, text: &str) -> Vec<Delta> {
        let is_reasoning = |transcript: &Transcript| transcript.reasoning.as_ref().is_some_and(Splitter::is_open);
        let was_reasoning = is_reasoning(self);
        let deltas = self.push(text);
        self.reasoning_tokens += u32::from(was_reasoning || is_reasoning(self));
        deltas
    }

    /// Takes text that was held back, and ends the answer.
    pub fn finish(&mut self, text: &str) -> Vec<Delta> {
        let mut deltas = self.push(text);
        if let Some(reasoning) = &mut self.reasoning {
            let mut sections = Vec::new();
            reasoning.finish(&mut sections);
            self.take(sections, &mut deltas);
        }
        let mut parts = Vec::new();
        if let Some(calls) = &mut self.calls {
            calls.parser.finish(&mut parts);
        }
        self.take_parts(parts, &mut deltas);
        if self.begun == 0 && !self.space.is_empty() {
            deltas.push(Delta::Text(std::mem::take(&mut self.space)));
        }
        deltas
    }

    /// Tokens of reasoning, those of its marks among them.
    pub fn reasoning_tokens(&self) -> u32 {
        self.reasoning_tokens
    }

    /// Whether calls are what the answer ends with: there are some, and all are complete.
    pub fn ends_with_calls(&self) -> bool {
        self.complete > 0 && self.complete == self.begun
    }

    fn push(&mut self, text: &str) -> Vec<Delta> {
        let mut sections = Vec::new();
        match &mut self.reasoning {
            Some(reasoning) => reasoning.push(text, &mut sections),
            None => sections.push(Section::Answer(text.to_owned())),
        }
        let mut deltas = Vec::new();
        self.take(sections, &mut deltas);
        deltas
    }

    fn take(&mut self, sections: Vec<Section>, deltas: &mut Vec<Delta>) {
        for section in sections {
            match section {
                Section::Reasoning(text) => deltas.push(Delta::Reasoning(text)),
                Section::Answer(text) => {
                    let mut parts = Vec::new();
                    match &mut self.calls {
                        Some(calls) => calls.parser.push(&text, &mut parts),
                        None => parts.push(Part::Text(text)),
                    }
                    self.take_parts(parts, deltas);
                }
            }
        }
    }

    fn take_parts(&mut self, parts: Vec<Part>, deltas: &mut Vec<Delta>) {
        for part in parts {
            if self.ended {
                return;
            }
            match part {
                Part::Text(text) => {
                    self.space.push_str(&text);
                    self.in_text |= !self.space.trim_start().is_empty();
                    if self.in_text && !self.space.is_empty() {
                        deltas.push(Delta::Text(std::mem::take(&mut self.space)));
                    }
                }
                Part::Call { name } => {
                    self.space.clear();
                    self.in_text = false;
                    self.begun += 1;
                    let random = RandomState::new().hash_one(self.begun);
                    let id = self.calls.as_ref().map_or_else(String::new, |calls| calls.format.id(random));
                    deltas.push(Delta::Call { id, name });
                }
                Part::Arguments(text) => deltas.push(Delta::Arguments(text)),
                Part::End => {
                    self.complete += 1;
                    deltas.push(Delta::CallEnd);
                    // Where one call is all that may be, the answer ends with it.
                    self.ended = self.calls.as_ref().is_some_and(|calls| !calls.parallel);
                }
                Part::Broken { raw, unsent } => {
                    self.in_text = true;
                    deltas.push(Delta::Broken { raw, unsent });
                }
            }
        }
    }
}

impl Message {
    /// Takes deltas in. A call that broke off is kept where the answer was `cut` off, and else is text.
    pub fn take(&mut self, deltas: Vec<Delta>, cut: bool) {
        for delta in deltas {
            match delta {
                Delta::Reasoning(text) => self.reasoning.push_str(&text),
                Delta::Text(text) => self.text.push_str(&text),
                Delta::Call { id, name } => self.calls.push(Call { id, name, arguments: String::new() }),
                Delta::Arguments(text) => {
                    if let Some(call) = self.calls.last_mut() {
                        call.arguments.push_str(&text);
                    }
                }
                Delta::CallEnd => {}
                Delta::Broken { .. } if cut => {}
                Delta::Broken { raw, .. } => {
                    self.calls.pop();
                    self.text.push_str(&raw);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::super::reasoning::THINK;
    use super::super::tools::Hermes;
    use super::*;

    const CALL: &str = r#"<tool_call>{"name": "now", "arguments": {"a": 1}}</tool_call>"#;

    fn transcript(parallel: bool) -> Transcript {
        let names = Arc::new(["now".to_owned()].into_iter().collect());
        let calls = (&Hermes as &dyn Format, Hermes.parser(names), parallel);
        Transcript::new(Some(Splitter::new(THINK, false)), Some(calls))
    }

    /// A whole answer of these tokens, with calls as `name arguments`, and whether it ends with calls.
    fn read(parallel: bool, tokens: &[&str], cut: bool) -> (String, String, Vec<String>, bool) {
        let mut transcript = transcript(parallel);
        let mut message = Message::default();
        tokens.iter().for_each(|token| message.take(transcript.token(token), false));
        message.take(transcript.finish(""), cut);
        let calls = message.calls.iter().map(|call| format!("{} {}", call.name, call.arguments));
        (message.reasoning, message.text, calls.collect(), transcript.ends_with_calls())
    }

    #[test]
    fn space_next_to_calls_is_nothing_and_else_is_text() {
        let call = || vec![r#"now {"a": 1}"#.to_owned()];
        for (tokens, text, calls, ends) in [
            (vec![" \n", CALL, "\n", " "], "", call(), true),
            (vec!["Well", ".\n", CALL, "\n"], "Well.\n", call(), true),
            (vec![CALL, "\n", " So."], "\n So.", call(), true),
            (vec![" ", "\n"], " \n", vec![], false),
            (vec![" ", "a", " "], " a ", vec![], false),
        ] {
            assert_eq!(read(true, &tokens, false), (String::new(), text.to_owned(), calls, ends), "{tokens:?}");
        }
        let two = read(true, &[CALL, "\n", CALL], false);
        assert_eq!((two.1.as_str(), two.2.len(), two.3), ("", 2, true));
        let one = read(false, &[CALL, "\n", CALL, "x"], false);
        assert_eq!((one.1.as_str(), one.2.len(), one.3), ("", 1, true));
    }

    #[test]
    fn a_call_that_breaks_off_is_kept_where_the_answer_was_cut_off_and_else_is_text() {
        let tokens = ["<tool_call>{\"name\": \"now\", ", "\"arguments\": {\"a\""];
        let cut = read(true, &tokens, true);
        assert_eq!((cut.1.as_str(), cut.2, cut.3), ("", vec![r#"now {"a""#.to_owned()], false));
        let broken = read(true, &tokens, false);
        assert_eq!((broken.1, broken.2, broken.3), (tokens.concat(), vec![], false));
    }

    #[test]
    fn tokens_of_reasoning_are_counted() {
        let mut transcript = transcript(true);
        for (token, counted) in [("<th", 0), ("ink>", 1), ("a", 2), ("</think", 3), (">", 4), ("b", 4)] {
            transcript.token(token);
            assert_eq!(transcript.reasoning_tokens(), counted, "{token}");
        }
    }
}
