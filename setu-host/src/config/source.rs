//! A configuration file's text, and where in it things stand.

use std::io::Read;
use std::ops::Range;
use std::path::Path;

use super::diagnostic::{Diagnostic, Report};

/// A configuration is written by hand; anything larger is some other file.
pub const MAX_BYTES: usize = 1 << 20;

/// A text with its name, usually a path as the user wrote it.
#[derive(Debug)]
pub struct Source {
    pub name: String,
    pub text: String,
    line_starts: Vec<usize>,
}

/// Line and column, both from 1; the column counts characters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Position {
    pub line: usize,
    pub column: usize,
}

impl Source {
    pub fn new(name: impl Into<String>, text: impl Into<String>) -> Source {
        let text = text.into();
        let line_starts = std::iter::once(0).chain(text.match_indices('\n').map(|(at, _)| at + 1)).collect();
        Source { name: name.into(), text, line_starts }
    }

    /// Reads a file.
    ///
    /// # Errors
    /// It cannot be read, is larger than [`MAX_BYTES`], or is not UTF-8 text.
    pub fn read(path: &Path) -> Result<Source, Report> {
        let name = path.display().to_string();
        let refuse = |why: String| Report::from(Diagnostic::error(format!("{name}: {why}")));
        let file = std::fs::File::open(path).map_err(|error| refuse(format!("cannot be read: {error}")))?;
        let mut bytes = Vec::new();
        file.take(MAX_BYTES as u64 + 1)
            .read_to_end(&mut bytes)
            .map_err(|error| refuse(format!("cannot be read: {error}")))?;
        Source::from_bytes(&name, bytes)
    }

    /// As [`read`](Source::read), for bytes that are already here.
    pub fn from_bytes(name: &str, bytes: Vec<u8>) -> Result<Source, Report> {
        if bytes.len() > MAX_BYTES {
            let why = format!("{name}: larger than 1 MiB, so not a configuration file");
            return Err(Report::from(Diagnostic::error(why)));
        }
        match String::from_utf8(bytes) {
            Ok(text) => Ok(Source::new(name, text)),
            Err(error) => {
                let at = error.utf8_error().valid_up_to();
                let byte = error.as_bytes().get(at).copied().unwrap_or_default();
                let valid = Source::new(name, String::from_utf8_lossy(&error.as_bytes()[..at]));
                let Position { line, column } = valid.position(at);
                let why = format!("{name}:{line}:{column}: byte {byte:#04x} is not UTF-8 text");
                Err(Report::from(Diagnostic::error(why)))
            }
        }
    }

    /// Where the byte `at` stands.
    pub fn position(&self, at: usize) -> Position {
        let line = self.line_starts.partition_point(|start| *start <= at).max(1);
        let start = self.line_starts[line - 1];
        let column = self.text.get(start..at.min(self.text.len())).map_or(1, |before| before.chars().count() + 1);
        Position { line, column }
    }

    /// The text of a span, as far as it exists.
    pub fn slice(&self, span: Range<usize>) -> &str {
        self.text.get(span).unwrap_or_default()
    }

    /// The line's text without its end, and the byte where it starts.
    pub(super) fn line(&self, line: usize) -> (&str, usize) {
        let start = self.line_starts[line - 1];
        let text = self.text[start..].split('\n').next().unwrap_or_default();
        (text.strip_suffix('\r').unwrap_or(text), start)
    }
}
