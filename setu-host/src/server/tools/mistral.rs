//! Calls as Mistral's models write them: `[TOOL_CALLS][{"name": …, "arguments": {…}}, …]`, and of late
//! `[TOOL_CALLS]name[ARGS]{…}` for each, where `[ARGS]` may be missing.

use super::call::{CallReader, Status};
use super::grammar::{Rules, Wanted, quoted};
use super::input::{Input, Match};
use super::{Format, Names, Parser, Part};

const CALLS: &str = "[TOOL_CALLS]";
const ARGUMENTS: &str = "[ARGS]";
const ID: &str = "[CALL_ID]";

/// Longest name or id, in characters.
const MOST_NAME: usize = 256;

#[derive(Debug)]
pub struct Mistral {
    /// Whether the model writes each call with its name in front.
    pub named: bool,
}

impl Format for Mistral {
    fn marks(&self) -> &'static [&'static str] {
        &[CALLS, ARGUMENTS, ID]
    }

    fn parser(&self, names: Names) -> Box<dyn Parser> {
        Box::new(MistralParser { names, input: Input::default(), state: State::Text })
    }

    /// Nine letters and digits: their templates take no other.
    fn id(&self, random: u64) -> String {
        const DIGITS: &[u8; 62] = b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz";
        let digits = std::iter::successors(Some(random), |rest| Some(rest / 62));
        digits.take(9).map(|rest| char::from(DIGITS[(rest % 62) as usize])).collect()
    }

    fn grammar(&self, wanted: &Wanted<'_>) -> Rules {
        if self.named {
            let mark = wanted.mark(ARGUMENTS);
            let mut rules =
                Rules::new(wanted, |function, arguments| format!("{} {mark} {arguments}", quoted(&function.name)));
            rules.marked(wanted, CALLS, "function", "");
            return rules;
        }
        let frame = |name: &str| (format!("{{\"name\": {name}, \"arguments\": "), "}".to_owned());
        let mut rules = Rules::framed(wanted, frame);
        let more = if wanted.parallel { r#" (", " function)*"# } else { "" };
        rules.push("list", &format!(r#"/ ?\[/ function{more} "]""#));
        let once = Wanted { parallel: false, functions: Vec::new(), form: wanted.form.clone(), ..*wanted };
        rules.marked(&once, CALLS, "list", "");
        rules
    }
}

struct MistralParser {
    names: Names,
    input: Input,
    state: State,
}

enum State {
    Text,
    /// Behind the mark: a list, or a name.
    Head,
    Call(CallReader),
    /// In a list behind the first element.
    Element(CallReader),
    /// Behind an element of a list.
    Next,
}

impl Parser for MistralParser {
    fn input(&mut self) -> &mut Input {
        &mut self.input
    }

    fn run(&mut self, at_end: bool, out: &mut Vec<Part>) {
        loop {
            match &mut self.state {
                State::Text => {
                    if !self.input.text_until(CALLS, at_end, out) {
                        return;
                    }
                    self.state = State::Head;
                }
                State::Head => {
                    let Some(state) = self.head(at_end) else { return };
                    self.state = state.unwrap_or_else(|| {
                        out.push(Part::Text(CALLS.to_owned()));
                        State::Text
                    });
                }
                State::Call(reader) | State::Element(reader) => {
                    let status = reader.push(self.input.rest(), out);
                    match status {
                        Status::Done => {
                            let listed = matches!(self.state, State::Element(_));
                            self.state = if listed { State::Next } else { State::Text };
                        }
                        Status::Broken => self.state = State::Text,
                        Status::More if at_end => {
                            reader.give_up(out);
                            return;
                        }
                        Status::More => return,
                    }
                }
                State::Next => {
                    let (end, more) = (self.input.next_is("]"), self.input.next_is(","));
                    match (end, more) {
                        (_, Match::Yes) => {
                            let opening = self.input.take_through(",");
                            self.state = State::Element(CallReader::object(&self.names, &opening));
                        }
                        (Match::Maybe, _) if !at_end => return,
                        _ => {
                            if end == Match::Yes {
                                self.input.skip_through("]");
                            }
                            self.state = State::Text;
                        }
                    }
                }
            }
        }
    }
}

impl MistralParser {
    /// What stands behind the mark: `None` where that can't be told yet, `Some(None)` where it is no call.
    fn head(&mut self, at_end: bool) -> Option<Option<State>> {
        let wait = (!at_end).then_some(());
        match self.input.next_is("[") {
            Match::Yes => {
                let opening = CALLS.to_owned() + &self.input.take_through("[");
                return Some(Some(State::Element(CallReader::object(&self.names, &opening))));
            }
            Match::Maybe => return if wait.is_some() { None } else { Some(None) },
            Match::No => {}
        }
        let rest = self.input.as_str();
        let begins = rest.len() - rest.trim_start().len();
        let is_part = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.');
        let length = |text: &str| text.find(|c| !is_part(c)).unwrap_or(text.len());
        let name_end = begins + length(&rest[begins..]);
        let name = &rest[begins..name_end];
        if name.is_empty() || name.len() > MOST_NAME || (name_end < rest.len() && !self.names.contains(name)) {
            return Some(None);
        }
        // Behind the name an id, perhaps; the mark of the arguments, perhaps; the arguments.
        let mut end = name_end;
        for mark in [ID, ARGUMENTS] {
            match Match::of(&rest[end..], mark) {
                Match::Maybe if !at_end => return None,
                Match::Yes => end += mark.len(),
                _ => continue,
            }
            if mark == ID {
                let id = length(&rest[end..]);
                if id > MOST_NAME {
                    return Some(None);
                }
                end += id;
            }
        }
        match Match::of(rest[end..].trim_start(), "{") {
            Match::Maybe if !at_end => None,
            Match::Yes => {
                let opening = format!("{CALLS}{}", &rest[..end]);
                let reader = CallReader::arguments(&self.names, &opening, name);
                self.input.skip(end);
                Some(Some(State::Call(reader)))
            }
            _ => Some(None),
        }
    }
}
