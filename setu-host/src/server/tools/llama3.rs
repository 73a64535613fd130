//! Calls as Llama 3 writes them: the answer is `{"name": …, "parameters": {…}}`, of which several are separated by
//! `;`. Where the mark `<|python_tag|>` stands in front of it, text may precede it.

use super::call::{CallReader, Status};
use super::grammar::{Rules, Wanted};
use super::input::{Input, Match};
use super::{Format, Names, Parser, Part};

const TAG: &str = "<|python_tag|>";

#[derive(Debug)]
pub struct Llama3;

impl Format for Llama3 {
    fn marks(&self) -> &'static [&'static str] {
        &[TAG]
    }

    fn parser(&self, names: Names) -> Box<dyn Parser> {
        Box::new(Llama3Parser { names, input: Input::default(), state: State::Start })
    }

    fn grammar(&self, wanted: &Wanted<'_>) -> Rules {
        let frame = |name: &str| (format!("{{\"name\": {name}, \"parameters\": "), "}".to_owned());
        let mut rules = Rules::framed(wanted, frame);
        rules.unmarked(wanted, r#""; ""#, TAG, r"/[^{](.|\n)*/");
        rules
    }
}

struct Llama3Parser {
    names: Names,
    input: Input,
    state: State,
}

enum State {
    /// Where a call may begin without a mark: nothing but space stands before it.
    Start,
    Text,
    Call(CallReader),
    /// Behind a call: another one, or text.
    Next,
}

impl Parser for Llama3Parser {
    fn input(&mut self) -> &mut Input {
        &mut self.input
    }

    fn run(&mut self, at_end: bool, out: &mut Vec<Part>) {
        loop {
            match &mut self.state {
                State::Start => match self.input.next_is("{") {
                    Match::Yes => self.state = State::Call(CallReader::object(&self.names, "")),
                    Match::Maybe if !at_end => return,
                    _ => self.state = State::Text,
                },
                State::Text => {
                    if !self.input.text_until(TAG, at_end, out) {
                        return;
                    }
                    self.state = State::Call(CallReader::object(&self.names, TAG));
                }
                State::Call(reader) => match reader.push(self.input.rest(), out) {
                    Status::Done => self.state = State::Next,
                    Status::Broken => self.state = State::Text,
                    Status::More if at_end => {
                        reader.give_up(out);
                        return;
                    }
                    Status::More => return,
                },
                State::Next => {
                    let separated = self.input.next_is(";") == Match::Yes;
                    let behind = if separated { self.input.next_behind(";", "{") } else { self.input.next_is("{") };
                    match behind {
                        Match::Yes => {
                            let opening = if separated { self.input.take_through(";") } else { String::new() };
                            self.state = State::Call(CallReader::object(&self.names, &opening));
                        }
                        Match::Maybe if !at_end => return,
                        _ => self.state = State::Text,
                    }
                }
            }
        }
    }
}
