//! Text that was not decided on yet.

use super::Part;

/// What came and was not taken.
#[derive(Debug, Default)]
pub struct Input(String);

/// Whether something comes next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Match {
    Yes,
    /// As far as can be told.
    Maybe,
    No,
}

impl Match {
    /// Whether `text`, of which more may come, begins with `mark`.
    pub fn of(text: &str, mark: &str) -> Match {
        match (text.starts_with(mark), mark.starts_with(text)) {
            (true, _) => Match::Yes,
            (_, true) => Match::Maybe,
            _ => Match::No,
        }
    }
}

impl Input {
    pub fn push(&mut self, text: &str) {
        self.0.push_str(text);
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }

    pub fn rest(&mut self) -> &mut String {
        &mut self.0
    }

    pub fn skip(&mut self, bytes: usize) {
        self.0.drain(..bytes);
    }

    /// Passes on text up to `mark`, and takes that. False where it isn't there: then all was passed on that can't be
    /// its beginning.
    pub fn text_until(&mut self, mark: &str, at_end: bool, out: &mut Vec<Part>) -> bool {
        let found = self.0.find(mark);
        let held = if at_end { 0 } else { beginning(&self.0, mark) };
        let end = found.unwrap_or(self.0.len() - held);
        if end > 0 {
            out.push(Part::Text(self.0[..end].to_owned()));
        }
        self.skip(end + found.map_or(0, |_| mark.len()));
        found.is_some()
    }

    /// Whether `mark` comes next behind space.
    pub fn next_is(&self, mark: &str) -> Match {
        Match::of(self.0.trim_start(), mark)
    }

    /// Whether `mark` comes next behind `first`, which does, with space in between.
    pub fn next_behind(&self, first: &str, mark: &str) -> Match {
        let rest = self.0.trim_start().strip_prefix(first).unwrap_or_default();
        Match::of(rest.trim_start(), mark)
    }

    /// Takes `mark`, which comes next, with the space before it.
    pub fn take_through(&mut self, mark: &str) -> String {
        let end = self.0.len() - self.0.trim_start().len() + mark.len();
        self.0.drain(..end).collect()
    }

    /// As [`take_through`](Input::take_through).
    pub fn skip_through(&mut self, mark: &str) {
        self.take_through(mark);
    }
}

/// Bytes at the end of `text` that `mark` may begin with.
pub fn beginning(text: &str, mark: &str) -> usize {
    let longest = text.len().min(mark.len() - 1);
    let ends = |length: &usize| text.as_bytes().ends_with(&mark.as_bytes()[..*length]);
    (1..=longest).rev().find(ends).unwrap_or(0)
}
