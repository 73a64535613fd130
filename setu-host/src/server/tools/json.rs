//! Follows a JSON value through text that comes in pieces: whether it can still become one, and where it ends.

/// Deepest nesting; readers of JSON in general have a limit, serde_json's is 128.
const MOST_DEPTH: usize = 100;

/// Where in a value the text stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// A value is to begin.
    Value,
    /// An object was opened: a key or its end.
    FirstKey,
    Key,
    /// Within a key.
    InKey,
    /// A key was closed.
    Colon,
    /// An array was opened: a value or its end.
    FirstItem,
    /// Within a string, a number or a word.
    InValue,
    /// A value is complete within an object or an array.
    AfterValue,
    /// The whole value is complete.
    Done,
}

/// A JSON value, character by character.
#[derive(Clone, Debug)]
pub struct Scanner {
    place: Place,
    within: Within,
    /// For each container that is open whether it is an object.
    open: Vec<bool>,
}

/// What a string, a number or a word has come to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Within {
    Text(Surrogate),
    Escape(Surrogate),
    /// Digits that are missing, and those before.
    Unicode(u8, u32, Surrogate),
    Minus,
    Zero,
    Digits,
    Point,
    Fraction,
    Exponent,
    ExponentSign,
    ExponentDigits,
    /// What is missing of `true`, `false` or `null`.
    Word(&'static str),
}

/// Whether the first half of a character of two was read, behind which its second half must come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Surrogate {
    None,
    High,
}

impl Scanner {
    pub fn new() -> Scanner {
        Scanner { place: Place::Value, within: Within::Minus, open: Vec::new() }
    }

    pub fn place(&self) -> Place {
        self.place
    }

    /// Containers that are open.
    pub fn depth(&self) -> usize {
        self.open.len()
    }

    /// Takes a character; false where no JSON goes on with it, after which there is no use in going on.
    pub fn push(&mut self, c: char) -> bool {
        let is_space = matches!(c, ' ' | '\t' | '\n' | '\r');
        match self.place {
            Place::InKey => return self.string(c, Place::Colon),
            Place::InValue => return self.value(c),
            Place::Done => return false,
            _ if is_space => return true,
            _ => {}
        }
        match (self.place, c) {
            (Place::FirstKey | Place::Key, '"') => {
                self.place = Place::InKey;
                self.within = Within::Text(Surrogate::None);
            }
            (Place::Colon, ':') => self.place = Place::Value,
            (Place::AfterValue, ',') => {
                self.place = if self.open.last() == Some(&true) { Place::Key } else { Place::Value };
            }
            (Place::FirstKey, '}') => return self.close(true),
            (Place::FirstItem, ']') => return self.close(false),
            (Place::AfterValue, '}' | ']') => return self.close(c == '}'),
            (Place::Value | Place::FirstItem, _) => return self.begin(c),
            _ => return false,
        }
        true
    }

    fn begin(&mut self, c: char) -> bool {
        if c == '{' || c == '[' {
            self.open.push(c == '{');
            self.place = if c == '{' { Place::FirstKey } else { Place::FirstItem };
            return self.open.len() <= MOST_DEPTH;
        }
        self.within = match c {
            '"' => Within::Text(Surrogate::None),
            '-' => Within::Minus,
            '0' => Within::Zero,
            '1'..='9' => Within::Digits,
            't' => Within::Word("rue"),
            'f' => Within::Word("alse"),
            'n' => Within::Word("ull"),
            _ => return false,
        };
        self.place = Place::InValue;
        true
    }

    fn close(&mut self, object: bool) -> bool {
        let matches = self.open.pop() == Some(object);
        self.end();
        matches
    }

    fn end(&mut self) {
        self.place = if self.open.is_empty() { Place::Done } else { Place::AfterValue };
    }

    fn value(&mut self, c: char) -> bool {
        self.within = match (self.within, c) {
            (Within::Text(_) | Within::Escape(_) | Within::Unicode(..), _) => {
                let end = if self.open.is_empty() { Place::Done } else { Place::AfterValue };
                return self.string(c, end);
            }
            (Within::Word(rest), _) => {
                let Some(rest) = rest.strip_prefix(c) else { return false };
                if rest.is_empty() {
                    self.end();
                }
                Within::Word(rest)
            }
            (Within::Minus, '0') => Within::Zero,
            (Within::Minus, '1'..='9') | (Within::Digits, '0'..='9') => Within::Digits,
            (Within::Zero | Within::Digits, '.') => Within::Point,
            (Within::Point | Within::Fraction, '0'..='9') => Within::Fraction,
            (Within::Zero | Within::Digits | Within::Fraction, 'e' | 'E') => Within::Exponent,
            (Within::Exponent, '+' | '-') => Within::ExponentSign,
            (Within::Exponent | Within::ExponentSign | Within::ExponentDigits, '0'..='9') => Within::ExponentDigits,
            // A number ends with what stands behind it.
            (Within::Zero | Within::Digits | Within::Fraction | Within::ExponentDigits, _) => {
                self.end();
                return self.place != Place::Done && self.push(c);
            }
            _ => return false,
        };
        true
    }

    fn string(&mut self, c: char, end: Place) -> bool {
        self.within = match (self.within, c) {
            (Within::Text(Surrogate::None), '"') => {
                self.place = end;
                return true;
            }
            (Within::Text(surrogate), '\\') => Within::Escape(surrogate),
            (Within::Text(Surrogate::None), c) if c >= ' ' => Within::Text(Surrogate::None),
            (Within::Escape(surrogate), 'u') => Within::Unicode(4, 0, surrogate),
            (Within::Escape(Surrogate::None), '"' | '\\' | '/' | 'b' | 'f' | 'n' | 'r' | 't') => {
                Within::Text(Surrogate::None)
            }
            (Within::Unicode(left, value, surrogate), c) => {
                let Some(digit) = c.to_digit(16) else { return false };
                let value = value * 16 + digit;
                match (left, surrogate, value) {
                    (2.., _, _) => Within::Unicode(left - 1, value, surrogate),
                    (_, Surrogate::High, 0xdc00..=0xdfff) => Within::Text(Surrogate::None),
                    (_, Surrogate::High, _) | (_, Surrogate::None, 0xdc00..=0xdfff) => return false,
                    (_, Surrogate::None, 0xd800..=0xdbff) => Within::Text(Surrogate::High),
                    _ => Within::Text(Surrogate::None),
                }
            }
            _ => return false,
        };
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whether `text` begins a value, and whether it is one.
    fn scan(text: &str) -> (bool, bool) {
        let mut scanner = Scanner::new();
        let goes = text.chars().all(|c| scanner.push(c));
        (goes, goes && scanner.place() == Place::Done)
    }

    #[test]
    fn values_are_what_serde_json_takes() {
        for text in [
            r#"{}"#,
            r#"[]"#,
            r#"{"a": [1, -0.5e+3, true, false, null, "x\n\u00e9\ud83d\ude00\/"], "b": {"c": []}}"#,
            r#"{"a" : 0 , "b":[ [ ] , { } ]}"#,
            r#""text""#,
            "true",
            "{\"é\": \"日本\"}",
            "[10, 0.10, 1E5, -7]",
        ] {
            assert!(serde_json::from_str::<serde_json::Value>(text).is_ok(), "{text}");
            assert_eq!(scan(text), (true, true), "{text}");
            for (at, _) in text.char_indices() {
                assert_eq!(scan(&text[..at]), (true, false), "{}", &text[..at]);
            }
        }
    }

    #[test]
    fn what_no_json_begins_with_is_noticed_at_once() {
        for text in [
            "{a",
            "{\"a\" 1",
            "{\"a\":1,}",
            "[1,]",
            "[01",
            "[1.e",
            "[-a",
            "[tru ",
            "{\"a\":1}}",
            "[1}",
            "{]",
            "[\"\n",
            "[\"\\x",
            "[\"\\ud83d\"",
            "[\"\\ud83dx",
            "[\"\\ud83d\\n",
            "[\"\\ude00",
            "[\"\\u12g",
            "'",
            "[+",
            "[1 2",
            "{\"a\"}",
        ] {
            let (last, _) = text.char_indices().next_back().expect("text");
            assert!(scan(&text[..last]).0, "{text} up to its last character");
            assert!(!scan(text).0, "{text}");
        }
        assert!(scan(&"[".repeat(MOST_DEPTH)).0);
        assert!(!scan(&"[".repeat(MOST_DEPTH + 1)).0);
    }
}
