//! One call as it is read: an object with the tool's name and its arguments, or the arguments alone behind a name.

use super::json::{Place, Scanner};
use super::{Names, Part};

/// Reads one call. What isn't one is text again, as far as nobody has been told otherwise.
#[derive(Debug)]
pub struct CallReader {
    names: Names,
    /// Whether it is the arguments alone.
    bare: bool,
    /// All of the call's text, from the mark that opened it.
    raw: String,
    scanner: Scanner,
    /// Where in `raw` the key or value begins that is being read.
    start: usize,
    key: Key,
    /// A name that is known; keys may come in any order.
    name: Option<String>,
    /// Where in `raw` the arguments begin, and where they end.
    arguments: Option<usize>,
    end: Option<usize>,
    /// Where in `raw` the arguments go on that nobody has been told of.
    sent: usize,
    /// Whether somebody has been told of the call.
    told: bool,
}

/// What a value of the object is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Key {
    Name,
    Arguments,
    /// Allowed, and of no use.
    Other,
}

/// What has become of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// It goes on with what is to come.
    More,
    /// It is complete.
    Done,
    /// It is none; what follows is text.
    Broken,
}

impl CallReader {
    /// A call that is an object such as `{"name": …, "arguments": {…}}`, behind `raw`, which opened it.
    pub fn object(names: &Names, raw: &str) -> CallReader {
        CallReader {
            names: names.clone(),
            bare: false,
            raw: raw.to_owned(),
            scanner: Scanner::new(),
            start: 0,
            key: Key::Other,
            name: None,
            arguments: None,
            end: None,
            sent: 0,
            told: false,
        }
    }

    /// The arguments of a call of `name`, behind `raw`, which opened it.
    pub fn arguments(names: &Names, raw: &str, name: &str) -> CallReader {
        let name = Some(name.to_owned());
        CallReader { bare: true, name, key: Key::Arguments, ..CallReader::object(names, raw) }
    }

    /// Takes as much of `input` as belongs to the call. Once it is done or broken, the reader is of no more use.
    pub fn push(&mut self, input: &mut String, out: &mut Vec<Part>) -> Status {
        let mut taken = 0;
        let mut status = Status::More;
        for c in input.chars() {
            let before = self.raw.len();
            if !self.take(c) {
                // It may begin something else.
                self.raw.truncate(before);
                status = Status::Broken;
                break;
            }
            taken += c.len_utf8();
            if self.scanner.place() == Place::Done {
                status = Status::Done;
                break;
            }
        }
        input.drain(..taken);
        if status == Status::Done && self.name.is_none() {
            status = Status::Broken;
        }
        match status {
            Status::Broken => self.give_up(out),
            _ => self.tell(status == Status::Done, out),
        }
        status
    }

    /// Gives up: what nobody has been told of is text.
    pub fn give_up(&mut self, out: &mut Vec<Part>) {
        self.tell(false, out);
        let raw = std::mem::take(&mut self.raw);
        out.push(match self.told {
            true => Part::Broken { unsent: raw[self.sent..].to_owned(), raw },
            false => Part::Text(raw),
        });
    }

    fn tell(&mut self, done: bool, out: &mut Vec<Part>) {
        let Some(name) = self.name.as_ref().filter(|_| self.arguments.is_some() || done) else { return };
        if !std::mem::replace(&mut self.told, true) {
            out.push(Part::Call { name: name.clone() });
        }
        let end = self.end.unwrap_or(self.raw.len());
        if self.arguments.is_none() {
            out.push(Part::Arguments("{}".to_owned()));
        } else if end > self.sent {
            out.push(Part::Arguments(self.raw[self.sent..end].to_owned()));
            self.sent = end;
        }
        if done {
            out.push(Part::End);
        }
    }

    /// Takes a character; false where no call goes on with it.
    fn take(&mut self, c: char) -> bool {
        let (before, depth, at) = (self.scanner.place(), self.scanner.depth(), self.raw.len());
        // Where the values stand that matter.
        let own = usize::from(!self.bare);
        if before == Place::Value && !c.is_ascii_whitespace() {
            // What a value may be is seen from its first character.
            if depth == 0 && c != '{' {
                return false;
            }
            if depth == own {
                self.start = at;
                if c != if self.key == Key::Arguments { '{' } else { '"' } {
                    return false;
                }
                if self.key == Key::Arguments {
                    (self.arguments, self.sent) = (Some(at), at);
                }
            }
        }
        if matches!(before, Place::FirstKey | Place::Key) && c == '"' {
            self.start = at;
        }
        if !self.scanner.push(c) {
            return false;
        }
        self.raw.push(c);
        let (place, now) = (self.scanner.place(), self.scanner.depth());
        if !self.bare && now == 1 && (before, place) == (Place::InKey, Place::Colon) {
            return self.take_key();
        }
        let ended = now == own && matches!(place, Place::AfterValue | Place::Done);
        if ended && (before, depth) != (Place::AfterValue, own) {
            return self.take_value();
        }
        true
    }

    fn take_key(&mut self) -> bool {
        self.key = match &self.raw[self.start..] {
            "\"name\"" if self.name.is_none() => Key::Name,
            "\"arguments\"" | "\"parameters\"" if self.arguments.is_none() => Key::Arguments,
            "\"id\"" | "\"type\"" => Key::Other,
            _ => return false,
        };
        true
    }

    fn take_value(&mut self) -> bool {
        match self.key {
            Key::Other => true,
            Key::Arguments => {
                self.end = Some(self.raw.len());
                true
            }
            Key::Name => {
                let name: Option<String> = serde_json::from_str(&self.raw[self.start..]).ok();
                self.name = name.filter(|name| self.names.contains(name));
                self.name.is_some()
            }
        }
    }
}
