//! What is wrong with a configuration, where, and what to do: one compact block for each problem.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use super::source::Source;

/// Where a problem lies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// A span of the configuration file.
    File(Range<usize>),
    /// An environment variable.
    Environment(String),
    /// A command-line flag with its dashes.
    Flag(String),
    /// Nothing that anybody wrote.
    Nowhere,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Severity {
    Error,
    Warning,
}

/// One problem.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Diagnostic {
    pub severity: Severity,
    pub place: Place,
    pub message: String,
    /// What helps to mend it, a line each.
    pub notes: Vec<String>,
}

/// Problems with the file that some of them point into, sorted by place.
#[derive(Clone, Debug)]
pub struct Report {
    source: Option<Arc<Source>>,
    diagnostics: Vec<Diagnostic>,
}

impl Diagnostic {
    pub fn error(message: impl Into<String>) -> Diagnostic {
        Diagnostic { severity: Severity::Error, place: Place::Nowhere, message: message.into(), notes: Vec::new() }
    }

    pub fn warning(message: impl Into<String>) -> Diagnostic {
        Diagnostic { severity: Severity::Warning, ..Diagnostic::error(message) }
    }

    #[must_use]
    pub fn at(mut self, place: Place) -> Diagnostic {
        self.place = place;
        self
    }

    #[must_use]
    pub fn note(mut self, note: impl Into<String>) -> Diagnostic {
        self.notes.push(note.into());
        self
    }
}

impl Report {
    pub fn new(source: Option<Arc<Source>>, mut diagnostics: Vec<Diagnostic>) -> Report {
        // Stable: problems of one place, and the flags, stay in the order in which they were found.
        diagnostics.sort_by_cached_key(|diagnostic| match &diagnostic.place {
            Place::File(span) => (0, span.start, String::new()),
            Place::Environment(name) => (1, 0, name.clone()),
            Place::Flag(_) => (2, 0, String::new()),
            Place::Nowhere => (3, 0, String::new()),
        });
        Report { source, diagnostics }
    }

    pub fn diagnostics(&self) -> &[Diagnostic] {
        &self.diagnostics
    }

    pub fn is_empty(&self) -> bool {
        self.diagnostics.is_empty()
    }
}

impl From<Diagnostic> for Report {
    fn from(diagnostic: Diagnostic) -> Report {
        Report { source: None, diagnostics: vec![diagnostic] }
    }
}

impl std::error::Error for Report {}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (n, diagnostic) in self.diagnostics.iter().enumerate() {
            if n > 0 {
                writeln!(f)?;
            }
            write_diagnostic(f, diagnostic, self.source.as_deref())?;
        }
        Ok(())
    }
}

fn write_diagnostic(f: &mut fmt::Formatter<'_>, diagnostic: &Diagnostic, source: Option<&Source>) -> fmt::Result {
    match (&diagnostic.place, source) {
        (Place::File(span), Some(source)) => {
            let position = source.position(span.start);
            write!(f, "{}:{}:{}: ", source.name, position.line, position.column)?;
        }
        (Place::Environment(name), _) => write!(f, "{name}: ")?,
        (Place::Flag(name), _) => write!(f, "{name}: ")?,
        (Place::File(_) | Place::Nowhere, _) => {}
    }
    if diagnostic.severity == Severity::Warning {
        f.write_str("warning: ")?;
    }
    f.write_str(&diagnostic.message)?;
    if let (Place::File(span), Some(source)) = (&diagnostic.place, source) {
        write_excerpt(f, span.clone(), source)?;
    }
    diagnostic.notes.iter().try_for_each(|note| write!(f, "\n  note: {note}"))
}

/// The line with carets below the span, as much of it as fits a terminal.
fn write_excerpt(f: &mut fmt::Formatter<'_>, span: Range<usize>, source: &Source) -> fmt::Result {
    const WIDTH: usize = 100;
    const LEAD: usize = 40;
    let position = source.position(span.start);
    let (line, start) = source.line(position.line);
    let length = source.slice(span.start..span.end.min(start + line.len()).max(span.start)).chars().count();
    let skipped = if position.column > WIDTH { position.column - LEAD } else { 0 };

    let mut excerpt = String::new();
    let mut rest = line.chars().skip(skipped);
    // One column a character, so that the carets stand where they should; nothing reaches the terminal raw.
    excerpt.extend(rest.by_ref().take(WIDTH).map(|char| match char {
        '\t' => ' ',
        char if char.is_control() => '\u{FFFD}',
        char => char,
    }));
    let (before, after) = (if skipped > 0 { "…" } else { "" }, if rest.next().is_some() { "…" } else { "" });
    let indent = " ".repeat(position.column - 1 - skipped + before.chars().count());
    let carets = "^".repeat(length.clamp(1, WIDTH + 1 - (position.column - skipped).min(WIDTH)));
    let gutter = " ".repeat(position.line.to_string().len());
    write!(f, "\n  {} | {before}{excerpt}{after}\n  {gutter} | {indent}{carets}", position.line)
}
