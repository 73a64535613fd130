//! Grammars of answers that call tools, as text in llguidance's dialect of Lark. What is common to the formats.

use std::fmt::Write;

use serde_json::{Map, Value, json};

use super::declared::Function;
use crate::server::reasoning::Marks;

/// What calls a grammar is to hold an answer to.
pub struct Wanted<'a> {
    /// Those that may be called.
    pub functions: Vec<&'a Function>,
    /// Whether the answer must be calls; else it may be text, and calls in it are as they should be.
    pub forced: bool,
    /// Whether there may be several calls.
    pub parallel: bool,
    /// What the answer must be where it calls nothing: the body of a rule.
    pub form: Option<String>,
    /// The special token that the vocabulary has for a mark.
    pub token: &'a dyn Fn(&str) -> Option<u32>,
}

impl Wanted<'_> {
    /// A mark as a grammar writes it: its token, or its text.
    pub fn mark(&self, mark: &str) -> String {
        (self.token)(mark).map_or_else(|| quoted(mark), |id| format!("<[{id}]>"))
    }

    /// Whether the answer may not be any text.
    fn is_held(&self) -> bool {
        self.forced || self.form.is_some()
    }
}

/// A grammar's rules, one a line. The rule `function` is the call of any of the functions.
#[derive(Debug)]
pub struct Rules(String);

impl Rules {
    /// Of an answer that is the body of a rule.
    pub fn form(body: &str) -> Rules {
        let mut rules = Rules(String::new());
        rules.push("answer", body);
        rules
    }

    /// A call is the arguments within what `frame` says for a name as a JSON string.
    pub fn framed(wanted: &Wanted<'_>, frame: impl Fn(&str) -> (String, String)) -> Rules {
        Rules::new(wanted, |function, arguments| {
            let (before, behind) = frame(&quoted(&function.name));
            format!("{} {arguments} {}", quoted(&before), quoted(&behind))
        })
    }

    /// A call is what `call` makes of a function and its arguments.
    pub fn new(wanted: &Wanted<'_>, call: impl Fn(&Function, &str) -> String) -> Rules {
        let mut rules = Rules(String::new());
        let names: Vec<String> = (0..wanted.functions.len()).map(|index| format!("function{index}")).collect();
        rules.push("function", &names.join(" | "));
        for (index, function) in wanted.functions.iter().enumerate() {
            let constrained = wanted.is_held() || function.strict == Some(true);
            let arguments = match (&function.parameters, constrained) {
                (None, true) => quoted("{}"),
                (Some(parameters), true) => format!("%json {}", schema(&parameters.0)),
                (_, false) => format!("%json {}", schema(&Map::new())),
            };
            let name = format!("arguments{index}");
            rules.push(&names[index], &call(function, &name));
            rules.push(&name, &arguments);
        }
        rules
    }

    pub fn push(&mut self, name: &str, body: &str) {
        let _ = writeln!(self.0, "{name}: {body}");
    }

    /// The answer is calls, each the rule `call` behind the mark `open`, with text around them unless they are forced.
    pub fn marked(&mut self, wanted: &Wanted<'_>, open: &str, call: &str, separator: &str) {
        let mark = wanted.mark(open);
        if wanted.is_held() {
            let more = if wanted.parallel { format!(" ({separator} {mark} {call})*") } else { String::new() };
            self.held(wanted, &format!("{mark} {call}{more}"));
            return;
        }
        let has_token = (wanted.token)(open).is_some();
        // An answer that may hold one call ends with it.
        let answer = match (has_token, wanted.parallel) {
            (true, true) => format!("TEXT? ({mark} {call} TEXT?)*"),
            (true, false) => format!("TEXT? ({mark} {call})?"),
            (false, true) => format!("(open {call})* TEXT"),
            (false, false) => format!("open {call} | TEXT"),
        };
        self.push("answer", &answer);
        if has_token {
            self.push("TEXT", r"/(.|\n)+/");
        } else {
            // Text that no token ends goes as far as the mark, and no further.
            self.push("open[lazy]", &format!("TEXT {mark}"));
            self.push("TEXT", r"/(.|\n)*/");
        }
    }

    /// The answer is calls that no mark opens, or text that begins otherwise.
    pub fn unmarked(&mut self, wanted: &Wanted<'_>, separator: &str, mark: &str, text: &str) {
        let more = if wanted.parallel { format!(" ({separator} function)*") } else { String::new() };
        if wanted.is_held() {
            self.held(wanted, &format!("function{more}"));
            return;
        }
        self.push("calls", &format!("function{more}"));
        let marked = (wanted.token)(mark).map_or(String::new(), |id| format!("<[{id}]>? "));
        self.push("answer", &format!("{marked}calls | TEXT"));
        self.push("TEXT", text);
    }

    /// The answer is calls, or else what it must be.
    fn held(&mut self, wanted: &Wanted<'_>, calls: &str) {
        match &wanted.form {
            Some(form) => {
                self.push("answer", "calls | form");
                self.push("calls", calls);
                self.push("form", form);
            }
            None => self.push("answer", calls),
        }
    }

    /// The text of the whole. The answer may reason first, and does where the prompt `opened` the section.
    pub fn finish(mut self, wanted: &Wanted<'_>, reasoning: Option<(Marks, bool)>) -> String {
        let Some((marks, opened)) = reasoning else { return format!("start: answer\n{}", self.0) };
        let close = wanted.mark(marks.close);
        if (wanted.token)(marks.close).is_some() {
            self.push("reasoning", &format!("THOUGHT? {close} BREAKS?"));
            self.push("THOUGHT", r"/(.|\n)+/");
        } else {
            self.push("reasoning", "thought BREAKS?");
            self.push("thought[lazy]", &format!(r"/(.|\n)*/ {close}"));
        }
        self.push("BREAKS", r"/\n+/");
        let first = if opened { "reasoning".to_owned() } else { format!("({} reasoning)?", wanted.mark(marks.open)) };
        format!("start: {first} answer\n{}", self.0)
    }
}

/// A text as a grammar writes it.
pub fn quoted(text: &str) -> String {
    Value::from(text).to_string()
}

/// Arguments are an object, written as models were shown them in training.
fn schema(parameters: &Map<String, Value>) -> Value {
    let mut schema = parameters.clone();
    schema.entry("type").or_insert_with(|| "object".into());
    let style = json!({"whitespace_flexible": false, "item_separator": ", ", "key_separator": ": "});
    schema.insert("x-guidance".to_owned(), style);
    Value::Object(schema)
}
