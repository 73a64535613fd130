//! Calls as Hermes and Qwen write them: `<tool_call>{"name": …, "arguments": {…}}</tool_call>`, anywhere in the text.

use super::call::{CallReader, Status};
use super::grammar::{Rules, Wanted};
use super::input::{Input, Match};
use super::{Format, Names, Parser, Part};

const OPEN: &str = "<tool_call>";
const CLOSE: &str = "</tool_call>";

#[derive(Debug)]
pub struct Hermes;

impl Format for Hermes {
    fn marks(&self) -> &'static [&'static str] {
        &[OPEN, CLOSE]
    }

    fn parser(&self, names: Names) -> Box<dyn Parser> {
        Box::new(HermesParser { names, input: Input::default(), state: State::Text })
    }

    fn grammar(&self, wanted: &Wanted<'_>) -> Rules {
        let frame = |name: &str| (format!("\n{{\"name\": {name}, \"arguments\": "), "}\n".to_owned());
        let mut rules = Rules::framed(wanted, frame);
        rules.push("call", &format!("function {}", wanted.mark(CLOSE)));
        rules.marked(wanted, OPEN, "call", r#""\n""#);
        rules
    }
}

struct HermesParser {
    names: Names,
    input: Input,
    state: State,
}

enum State {
    Text,
    Call(CallReader),
    /// Behind a call that is complete: the mark that closes it, which some leave out.
    Close,
}

impl Parser for HermesParser {
    fn input(&mut self) -> &mut Input {
        &mut self.input
    }

    fn run(&mut self, at_end: bool, out: &mut Vec<Part>) {
        loop {
            match &mut self.state {
                State::Text => {
                    if !self.input.text_until(OPEN, at_end, out) {
                        return;
                    }
                    self.state = State::Call(CallReader::object(&self.names, OPEN));
                }
                State::Call(reader) => match reader.push(self.input.rest(), out) {
                    Status::Done => self.state = State::Close,
                    Status::Broken => self.state = State::Text,
                    Status::More if at_end => {
                        reader.give_up(out);
                        return;
                    }
                    Status::More => return,
                },
                State::Close => {
                    match self.input.next_is(CLOSE) {
                        Match::Maybe if !at_end => return,
                        Match::Yes => self.input.skip_through(CLOSE),
                        _ => {}
                    }
                    self.state = State::Text;
                }
            }
        }
    }
}
