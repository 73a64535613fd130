//! JSON as Python writes it, which is what models have seen of tools and their results.

use minijinja::value::ValueKind;
use minijinja::{Error, ErrorKind, Value};

/// The arguments of Python's `json.dumps`.
#[derive(Debug, Default)]
pub(super) struct Style {
    pub ensure_ascii: bool,
    pub indent: Option<usize>,
    /// Between items, and between a key and its value.
    pub separators: Option<(String, String)>,
    pub sort_keys: bool,
}

const MAX_DEPTH: usize = 100;
const MAX_INDENT: usize = 16;

pub(super) fn dumps(value: &Value, style: &Style) -> Result<String, Error> {
    if style.indent.is_some_and(|indent| indent > MAX_INDENT) {
        return Err(failed(format!("an indent of more than {MAX_INDENT} spaces")));
    }
    let (item, key) = match &style.separators {
        Some((item, key)) => (item.as_str(), key.as_str()),
        None => (if style.indent.is_some() { "," } else { ", " }, ": "),
    };
    let mut writer = Writer { output: String::new(), style, item, key };
    writer.write(value, 0)?;
    Ok(writer.output)
}

struct Writer<'a> {
    output: String,
    style: &'a Style,
    item: &'a str,
    key: &'a str,
}

impl Writer<'_> {
    fn write(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        if depth > MAX_DEPTH {
            return Err(failed(format!("a value nested deeper than {MAX_DEPTH}")));
        }
        match value.kind() {
            ValueKind::None => self.output.push_str("null"),
            ValueKind::Bool => self.output.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number if value.is_integer() => self.output.push_str(&value.to_string()),
            ValueKind::Number => {
                let number = f64::try_from(value.clone())?;
                self.output.push_str(&float(number));
            }
            ValueKind::String => self.string(value.as_str().unwrap_or_default()),
            ValueKind::Seq | ValueKind::Iterable => {
                let items = value.try_iter()?.checked().collect::<Result<Vec<_>, _>>()?;
                self.several(['[', ']'], depth, &items, |writer, item| writer.write(item, depth + 1))?;
            }
            ValueKind::Map => {
                let mut pairs = Vec::new();
                for key in value.try_iter()?.checked() {
                    let key = key?;
                    let value = value.get_item(&key)?;
                    pairs.push((key.to_string(), value));
                }
                if self.style.sort_keys {
                    pairs.sort_by(|(left, _), (right, _)| left.cmp(right));
                }
                self.several(['{', '}'], depth, &pairs, |writer, (key, value)| {
                    writer.string(key);
                    writer.output.push_str(writer.key);
                    writer.write(value, depth + 1)
                })?;
            }
            kind => return Err(failed(format!("{kind} value"))),
        }
        Ok(())
    }

    fn several<T>(
        &mut self,
        [open, close]: [char; 2],
        depth: usize,
        items: &[T],
        write: impl Fn(&mut Self, &T) -> Result<(), Error>,
    ) -> Result<(), Error> {
        self.output.push(open);
        for (at, item) in items.iter().enumerate() {
            if at > 0 {
                self.output.push_str(self.item);
            }
            self.break_line(depth + 1);
            write(self, item)?;
        }
        if !items.is_empty() {
            self.break_line(depth);
        }
        self.output.push(close);
        Ok(())
    }

    fn break_line(&mut self, depth: usize) {
        if let Some(indent) = self.style.indent {
            self.output.push('\n');
            self.output.extend(std::iter::repeat_n(' ', indent * depth));
        }
    }

    fn string(&mut self, string: &str) {
        self.output.push('"');
        for character in string.chars() {
            match character {
                '"' => self.output.push_str("\\\""),
                '\\' => self.output.push_str("\\\\"),
                '\n' => self.output.push_str("\\n"),
                '\r' => self.output.push_str("\\r"),
                '\t' => self.output.push_str("\\t"),
                '\u{8}' => self.output.push_str("\\b"),
                '\u{c}' => self.output.push_str("\\f"),
                character if character < ' ' || (self.style.ensure_ascii && !(' '..='~').contains(&character)) => {
                    for unit in character.encode_utf16(&mut [0; 2]) {
                        self.output.push_str(&format!("\\u{unit:04x}"));
                    }
                }
                character => self.output.push(character),
            }
        }
        self.output.push('"');
    }
}

fn failed(what: String) -> Error {
    Error::new(ErrorKind::BadSerialization, format!("tojson cannot write {what}"))
}

/// A float as Python's `repr` writes it.
fn float(number: f64) -> String {
    if number.is_nan() {
        return "NaN".to_owned();
    }
    if number.is_infinite() {
        return if number > 0.0 { "Infinity" } else { "-Infinity" }.to_owned();
    }
    let written = format!("{number:?}");
    match written.split_once('e') {
        Some((digits, exponent)) => {
            let digits = digits.strip_suffix(".0").unwrap_or(digits);
            let (sign, exponent) = exponent.strip_prefix('-').map_or(('+', exponent), |exponent| ('-', exponent));
            format!("{digits}e{sign}{exponent:0>2}")
        }
        None => written,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dumped(json: &str, style: &Style) -> String {
        dumps(&serde_json::from_str::<Value>(json).unwrap(), style).unwrap()
    }

    #[test]
    fn json_is_what_python_writes() {
        let object = r#"{"b":[1,2.0,-0.5,true,null],"a":{"é":"\"\\\n\u0001\u007f</x>'&"},"e":[],"o":{}}"#;
        for (style, expected) in [
            (
                Style::default(),
                "{\"b\": [1, 2.0, -0.5, true, null], \"a\": {\"é\": \"\\\"\\\\\\n\\u0001\u{7f}</x>'&\"}, \"e\": [], \"o\": {}}",
            ),
            (
                Style { ensure_ascii: true, sort_keys: true, ..Style::default() },
                "{\"a\": {\"\\u00e9\": \"\\\"\\\\\\n\\u0001\\u007f</x>'&\"}, \"b\": [1, 2.0, -0.5, true, null], \"e\": [], \"o\": {}}",
            ),
            (
                Style { separators: Some((",".to_owned(), ":".to_owned())), ..Style::default() },
                "{\"b\":[1,2.0,-0.5,true,null],\"a\":{\"é\":\"\\\"\\\\\\n\\u0001\u{7f}</x>'&\"},\"e\":[],\"o\":{}}",
            ),
            (
                Style { indent: Some(2), ..Style::default() },
                "{\n  \"b\": [\n    1,\n    2.0,\n    -0.5,\n    true,\n    null\n  ],\n  \"a\": {\n    \"é\": \"\\\"\\\\\\n\\u0001\u{7f}</x>'&\"\n  },\n  \"e\": [],\n  \"o\": {}\n}",
            ),
        ] {
            assert_eq!(dumped(object, &style), expected, "{style:?}");
        }
        let astral = Style { ensure_ascii: true, ..Style::default() };
        assert_eq!(dumped("\"👩\"", &astral), "\"\\ud83d\\udc69\"");
    }

    #[test]
    fn floats_are_what_python_writes() {
        for (number, expected) in [
            (1.0, "1.0"),
            (0.1, "0.1"),
            (1e16, "1e+16"),
            (123456789012345.0, "123456789012345.0"),
            (1.5e300, "1.5e+300"),
            (1e-5, "1e-05"),
            (0.0001, "0.0001"),
            (2.5e-7, "2.5e-07"),
            (-0.0, "-0.0"),
            (f64::NAN, "NaN"),
            (f64::NEG_INFINITY, "-Infinity"),
        ] {
            assert_eq!(float(number), expected);
        }
    }

    #[test]
    fn what_is_no_json_is_refused() {
        let error = dumps(&Value::UNDEFINED, &Style::default()).unwrap_err();
        assert_eq!(error.detail(), Some("tojson cannot write undefined value"));
        let nested = "[".repeat(110) + &"]".repeat(110);
        let error = dumps(&serde_json::from_str(&nested).unwrap(), &Style::default()).unwrap_err();
        assert_eq!(error.detail(), Some("tojson cannot write a value nested deeper than 100"));
    }
}
