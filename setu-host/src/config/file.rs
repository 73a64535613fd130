//! `setu.toml` as a tree whose every key and value remembers its place.

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use serde_json::{Map, Value};
use setu_core::config::{Item, shown};
use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::diagnostic::{Diagnostic, Place, Report};
use super::source::Source;

/// Enough for anything that a setting can hold; the parser's own limit allows thousands.
const MAX_DEPTH: usize = 16;
/// A file that is no TOML has as many errors as lines.
const MAX_SYNTAX_ERRORS: usize = 8;
/// In larger files only the first syntax error is told, since each of a million would take memory.
const MAX_RECOVERY_BYTES: usize = 1 << 16;
const PARSER_STACK_BYTES: usize = 32 << 20;

/// A parsed file.
#[derive(Clone, Debug)]
pub struct ConfigFile {
    pub source: Arc<Source>,
    pub(super) entries: Vec<Entry>,
}

/// `key = value`, or a table with its name.
#[derive(Clone, Debug)]
pub(super) struct Entry {
    pub key: String,
    pub key_span: Range<usize>,
    pub node: Node,
}

#[derive(Clone, Debug)]
pub(super) struct Node {
    pub span: Range<usize>,
    pub kind: NodeKind,
}

#[derive(Clone, Debug)]
pub(super) enum NodeKind {
    Scalar(Value),
    /// What no setting can hold: a date, NaN, an infinity, an integer beyond 64 bits, a depth beyond reason.
    Unfit,
    List(Vec<Node>),
    Table(Vec<Entry>),
}

impl ConfigFile {
    /// Reads and parses a file.
    ///
    /// # Errors
    /// The file cannot be read, is no text or too large, or is not TOML.
    pub fn load(path: &Path) -> Result<ConfigFile, Report> {
        ConfigFile::parse(Source::read(path)?)
    }

    /// Parses a text.
    ///
    /// # Errors
    /// Every place, up to a handful, where it is not TOML.
    pub fn parse(source: Source) -> Result<ConfigFile, Report> {
        let source = Arc::new(source);
        // The parser allows 80 levels of braces with 80 dotted keys each, and such a tree frees itself recursively.
        let parsed = std::thread::scope(|scope| {
            let parser = std::thread::Builder::new().stack_size(PARSER_STACK_BYTES);
            parser.spawn_scoped(scope, || parse_entries(&source)).ok().and_then(|thread| thread.join().ok())
        });
        match parsed {
            Some(Ok(entries)) => Ok(ConfigFile { source, entries }),
            Some(Err(diagnostics)) => Err(Report::new(Some(source), diagnostics)),
            None => Err(Diagnostic::error(format!("{}: the parser of TOML failed", source.name)).into()),
        }
    }

    pub(super) fn entry(&self, key: &str) -> Option<&Entry> {
        self.entries.iter().find(|entry| entry.key == key)
    }
}

impl Node {
    /// The value as JSON; `null`, which no setting takes, for what is unfit.
    pub fn to_json(&self) -> Value {
        match &self.kind {
            NodeKind::Scalar(value) => value.clone(),
            NodeKind::Unfit => Value::Null,
            NodeKind::List(items) => items.iter().map(Node::to_json).collect(),
            NodeKind::Table(entries) => Value::Object(
                entries.iter().map(|entry| (entry.key.clone(), entry.node.to_json())).collect::<Map<_, _>>(),
            ),
        }
    }

    /// The place of an element, or of the whole.
    pub fn span_of(&self, item: Option<&Item>) -> Range<usize> {
        let element = match (item, &self.kind) {
            (Some(Item::Index(n)), NodeKind::List(items)) => items.get(*n),
            (Some(Item::Key(key)), NodeKind::Table(entries)) => {
                entries.iter().find(|entry| entry.key == *key).map(|entry| &entry.node)
            }
            _ => None,
        };
        element.unwrap_or(self).span.clone()
    }
}

/// A TOML value alone, as flags and variables may write lists and tables.
pub(super) fn parse_value(text: &str) -> Option<Value> {
    let value = DeValue::parse(text).ok()?;
    Some(node(&value, 0).to_json())
}

fn parse_entries(source: &Source) -> Result<Vec<Entry>, Vec<Diagnostic>> {
    let first = match DeTable::parse(&source.text) {
        Ok(table) => return Ok(entries(table.get_ref(), 0)),
        Err(error) => error,
    };
    let errors = match source.text.len() {
        0..MAX_RECOVERY_BYTES => DeTable::parse_recoverable(&source.text).1,
        _ => vec![first],
    };
    let mut problems: Vec<(usize, Diagnostic)> = Vec::new();
    for error in errors {
        let span = error.span().unwrap_or(0..0);
        // Recovery often stumbles over the rest of the line that the first error broke.
        let line = source.position(span.start).line;
        if problems.len() < MAX_SYNTAX_ERRORS && problems.iter().all(|(other, _)| *other != line) {
            let message = syntax_message(source, &span, error.message());
            problems.push((line, Diagnostic::error(message).at(Place::File(span))));
        }
    }
    Err(problems.into_iter().map(|(_, problem)| problem).collect())
}

fn entries(table: &DeTable<'_>, depth: usize) -> Vec<Entry> {
    let entry = |(key, value): (&Spanned<std::borrow::Cow<'_, str>>, &Spanned<DeValue<'_>>)| Entry {
        key: key.get_ref().to_string(),
        key_span: key.span(),
        node: node(value, depth + 1),
    };
    table.iter().map(entry).collect()
}

fn node(value: &Spanned<DeValue<'_>>, depth: usize) -> Node {
    let kind = match value.get_ref() {
        _ if depth > MAX_DEPTH => NodeKind::Unfit,
        DeValue::String(text) => NodeKind::Scalar(Value::String(text.to_string())),
        DeValue::Boolean(value) => NodeKind::Scalar(Value::Bool(*value)),
        DeValue::Integer(integer) => {
            let (text, radix) = (integer.as_str(), integer.radix());
            let value = i64::from_str_radix(text, radix).map(Value::from);
            value
                .or_else(|_| u64::from_str_radix(text, radix).map(Value::from))
                .map_or(NodeKind::Unfit, NodeKind::Scalar)
        }
        DeValue::Float(float) => {
            let number = float.as_str().parse().ok().and_then(serde_json::Number::from_f64);
            number.map_or(NodeKind::Unfit, |number| NodeKind::Scalar(Value::Number(number)))
        }
        DeValue::Datetime(_) => NodeKind::Unfit,
        DeValue::Array(items) => NodeKind::List(items.iter().map(|item| node(item, depth + 1)).collect()),
        DeValue::Table(table) => NodeKind::Table(entries(table, depth)),
    };
    Node { span: value.span(), kind }
}

/// The parser's words, put plainly where the mistake is a common one.
fn syntax_message(source: &Source, span: &Range<usize>, message: &str) -> String {
    let text = shown(source.slice(span.clone()));
    let bare_word = !text.is_empty() && text.chars().all(|char| char.is_alphanumeric() || "_-./".contains(char));
    let unquoted = message.starts_with("string values must be quoted") || message.starts_with("invalid boolean");
    if message.contains("duplicate") {
        return format!("{:?} is set twice in one table; remove one of the two", text.trim_matches(['"', '\'']));
    }
    match (unquoted, bare_word) {
        (true, true) => format!("not TOML: {text} is no value; text stands in quotes: \"{text}\""),
        (true, false) if text.is_empty() => "not TOML: a value must follow the `=`".into(),
        _ => format!("not TOML: {message}"),
    }
}
