//! Checks of values against a description, with the sentence that each violation deserves.

use std::fmt;

use serde_json::{Map, Value};

use super::field::{FieldKind, Number, Scalar};
use super::nearest::nearest;
use super::size::parse_size;
use super::spec::{ConfigSpec, FieldInfo};

/// One violation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// The setting, known or not.
    pub field: String,
    /// The element of a list or map that is wrong, where the whole isn't.
    pub item: Option<Item>,
    pub fault: Fault,
    /// The offending value as text.
    pub found: Option<String>,
    /// What would be right: [`FieldInfo::allowed`], or the known settings.
    pub allowed: String,
    pub nearest: Option<String>,
}

/// Where in a list or map.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Item {
    Index(usize),
    Key(String),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    UnknownField,
    Missing,
    WrongType,
    /// Of the right type, and none of the values allowed.
    NotAllowed,
}

/// Checks `value` against the field's type and constraints.
///
/// # Errors
/// The first violation found.
pub fn check_value(field: &FieldInfo, value: &Value) -> Result<(), Box<Problem>> {
    match (field.kind, value) {
        (FieldKind::One(_), value) => check_one(field, value, None),
        (FieldKind::List(_), Value::Array(items)) => {
            if field.non_empty && items.is_empty() {
                return Err(field.problem(Fault::NotAllowed, value, None));
            }
            items.iter().enumerate().try_for_each(|(n, item)| check_one(field, item, Some(Item::Index(n))))
        }
        (FieldKind::Map(_), Value::Object(entries)) => {
            if field.non_empty && entries.is_empty() {
                return Err(field.problem(Fault::NotAllowed, value, None));
            }
            entries.iter().try_for_each(|(key, item)| check_one(field, item, Some(Item::Key(key.clone()))))
        }
        (_, value) => Err(field.problem(Fault::WrongType, value, None)),
    }
}

impl ConfigSpec {
    /// Checks a whole table: every key known, every value allowed, nothing missing.
    pub fn check(&self, table: &Map<String, Value>) -> Vec<Problem> {
        let mut problems = Vec::new();
        for (key, value) in table {
            match self.field(key) {
                None => problems.push(self.unknown(key)),
                Some(field) if field.optional && value.is_null() => {}
                Some(field) => problems.extend(check_value(field, value).err().map(|problem| *problem)),
            }
        }
        problems.extend(self.missing(|name| table.contains_key(name)));
        problems
    }

    /// The problems of the required fields that `is_set` denies.
    pub fn missing(&self, is_set: impl Fn(&str) -> bool) -> impl Iterator<Item = Problem> {
        self.fields.iter().filter(move |field| field.is_required() && !is_set(&field.name)).map(|field| Problem {
            field: field.name.clone(),
            item: None,
            fault: Fault::Missing,
            found: None,
            allowed: field.allowed(),
            nearest: None,
        })
    }

    /// The problem of a key that is no field.
    pub fn unknown(&self, key: &str) -> Problem {
        let names: Vec<&str> = self.fields.iter().map(|field| field.name.as_str()).collect();
        Problem {
            field: key.to_owned(),
            item: None,
            fault: Fault::UnknownField,
            found: None,
            allowed: if names.is_empty() { "no settings here".into() } else { names.join(", ") },
            nearest: nearest(key, names).map(str::to_owned),
        }
    }
}

impl FieldInfo {
    /// The value in the form that typed reading expects: sizes as numbers of bytes.
    pub(super) fn canonical(&self, value: &Value) -> Value {
        if self.kind.scalar() != Scalar::Bytes {
            return value.clone();
        }
        let bytes = |value: &Value| match value.as_str().and_then(parse_size) {
            Some(bytes) => Value::from(bytes),
            None => value.clone(),
        };
        match value {
            Value::Array(items) => Value::Array(items.iter().map(bytes).collect()),
            Value::Object(entries) => entries.iter().map(|(key, value)| (key.clone(), bytes(value))).collect(),
            value => bytes(value),
        }
    }

    /// A violation of this field by `found`.
    pub(super) fn problem(&self, fault: Fault, found: &Value, item: Option<Item>) -> Box<Problem> {
        let text = found.as_str().unwrap_or_default();
        let suggestion = nearest(text, self.choices.iter().map(|choice| choice.name.as_str()));
        Box::new(Problem {
            field: self.name.clone(),
            allowed: if item.is_some() { self.one_allowed() } else { self.allowed() },
            item,
            fault,
            found: Some(shown(&found.to_string())),
            nearest: suggestion.map(str::to_owned),
        })
    }
}

fn check_one(field: &FieldInfo, value: &Value, item: Option<Item>) -> Result<(), Box<Problem>> {
    let scalar = field.kind.scalar();
    let wrong_type = |item| Err(field.problem(Fault::WrongType, value, item));
    if scalar.is_number() {
        let number = match value {
            Value::Number(number) => Number::from_json(number),
            Value::String(text) if scalar == Scalar::Bytes => parse_size(text).map(|bytes| Number::Int(bytes.into())),
            _ => None,
        };
        return match number {
            Some(Number::Float(_)) if !scalar.is_float() => wrong_type(item),
            Some(number) => check_number(field, number, value, item),
            None => wrong_type(item),
        };
    }
    match (scalar, value) {
        (Scalar::Bool, Value::Bool(_)) => Ok(()),
        (_, Value::String(text)) if scalar.is_text() => {
            let known = field.choices.is_empty() || field.choices.iter().any(|choice| choice.name == *text);
            let empty = item.is_none() && field.non_empty && text.is_empty();
            if known && !empty { Ok(()) } else { Err(field.problem(Fault::NotAllowed, value, item)) }
        }
        _ => wrong_type(item),
    }
}

fn check_number(field: &FieldInfo, number: Number, value: &Value, item: Option<Item>) -> Result<(), Box<Problem>> {
    let scalar = field.kind.scalar();
    let not_allowed = |item| Err(field.problem(Fault::NotAllowed, value, item));
    if scalar == Scalar::F32 && !(number.as_f64() as f32).is_finite() {
        return not_allowed(item);
    }
    let bounds = field.bounds();
    let too_low = bounds.lower.is_some_and(|low| number < low || (bounds.exclusive && number == low));
    if too_low || bounds.upper.is_some_and(|high| number > high) {
        let mut problem = field.problem(Fault::NotAllowed, value, item);
        // A bound of the type that the general text leaves out is the news here.
        if scalar.integer_range().is_some_and(|(low, high)| number < Number::Int(low) || number > Number::Int(high)) {
            problem.allowed = field.range_allowed();
        }
        return Err(problem);
    }
    if let Number::Int(int) = number {
        let power = u64::try_from(int).is_ok_and(u64::is_power_of_two);
        if (field.power_of_two && !power) || field.multiple_of.is_some_and(|n| int % i128::from(n.max(1)) != 0) {
            return not_allowed(item);
        }
    }
    Ok(())
}

/// A value as an error shows it: one line, cut short, control characters escaped.
pub fn shown(value: &str) -> String {
    const LONGEST: usize = 80;
    let mut text = String::new();
    for (n, char) in value.chars().enumerate() {
        if n == LONGEST {
            text.push('…');
            break;
        }
        if char.is_control() { text.extend(char.escape_unicode()) } else { text.push(char) }
    }
    text
}

impl Problem {
    /// The problem as a sentence about `<prefix><field>`, where the prefix is `scheduler.` or empty.
    pub fn sentence(&self, prefix: &str) -> String {
        let mut name = format!("{prefix}{}", shown(&self.field));
        match &self.item {
            Some(Item::Index(n)) => name += &format!("[{n}]"),
            Some(Item::Key(key)) => name += &format!(".{}", shown(key)),
            None => {}
        }
        let found = self.found.as_deref().unwrap_or("nothing");
        let mut text = match self.fault {
            Fault::UnknownField => format!("there is no setting {name}; known: {}", self.allowed),
            Fault::Missing => format!("{name} is missing: it must be {}", self.allowed),
            Fault::WrongType | Fault::NotAllowed => format!("{name} must be {}, found {found}", self.allowed),
        };
        if let Some(nearest) = &self.nearest {
            text += &format!("; did you mean {nearest:?}?");
        }
        text
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.sentence(""))
    }
}
