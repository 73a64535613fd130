//! Sections in which a model reasons before it answers, told from the answer by the marks around them.

use super::tools::beginning;

/// The marks of a section.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Marks {
    pub open: &'static str,
    pub close: &'static str,
}

pub const THINK: Marks = Marks { open: "<think>", close: "</think>" };
pub const MISTRAL: Marks = Marks { open: "[THINK]", close: "[/THINK]" };

/// Tells a section at the beginning of an answer from the rest, as it comes. Line breaks next to the marks are part of
/// neither.
#[derive(Debug)]
pub struct Splitter {
    marks: Marks,
    state: State,
    /// What can't be told yet.
    held: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Nothing but space has come.
    Start,
    /// Within the section, before its text and in it.
    Opened,
    Within,
    /// Behind the section, before the answer's text.
    Closed,
    Answer,
}

/// A part of an answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Section {
    Reasoning(String),
    Answer(String),
}

impl Splitter {
    /// For an answer to a prompt that opened the section already, or didn't.
    pub fn new(marks: Marks, opened: bool) -> Splitter {
        let state = if opened { State::Opened } else { State::Start };
        Splitter { marks, state, held: String::new() }
    }

    /// Whether the section is open.
    pub fn is_open(&self) -> bool {
        matches!(self.state, State::Opened | State::Within)
    }

    pub fn push(&mut self, text: &str, out: &mut Vec<Section>) {
        self.held.push_str(text);
        self.run(false, out);
    }

    /// The answer is over.
    pub fn finish(&mut self, out: &mut Vec<Section>) {
        self.run(true, out);
    }

    fn run(&mut self, at_end: bool, out: &mut Vec<Section>) {
        loop {
            match self.state {
                State::Start => {
                    let rest = self.held.trim_start();
                    if let Some(behind) = rest.strip_prefix(self.marks.open) {
                        self.held = behind.to_owned();
                        self.state = State::Opened;
                    } else if !at_end && self.marks.open.starts_with(rest) {
                        return;
                    } else {
                        self.state = State::Answer;
                    }
                }
                State::Opened | State::Closed => {
                    let breaks = self.held.len() - self.held.trim_start_matches(['\n', '\r']).len();
                    self.held.drain(..breaks);
                    if self.held.is_empty() {
                        return;
                    }
                    self.state = if self.state == State::Opened { State::Within } else { State::Answer };
                }
                State::Within => {
                    let found = self.held.find(self.marks.close);
                    let held = if at_end { 0 } else { beginning(&self.held, self.marks.close) };
                    let end = found.unwrap_or(self.held.len() - held);
                    // Line breaks may stand before the mark.
                    let text = self.held[..end].trim_end_matches(['\n', '\r']).len();
                    if text > 0 {
                        out.push(Section::Reasoning(self.held[..text].to_owned()));
                    }
                    let Some(found) = found else {
                        self.held.drain(..if at_end { end } else { text });
                        return;
                    };
                    self.held.drain(..found + self.marks.close.len());
                    self.state = State::Closed;
                }
                State::Answer => {
                    if !self.held.is_empty() {
                        out.push(Section::Answer(std::mem::take(&mut self.held)));
                    }
                    return;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Reasoning and answer.
    fn split<'a>(marks: Marks, opened: bool, pieces: impl IntoIterator<Item = &'a str>) -> (String, String) {
        let mut splitter = Splitter::new(marks, opened);
        let mut sections = Vec::new();
        pieces.into_iter().for_each(|piece| splitter.push(piece, &mut sections));
        splitter.finish(&mut sections);
        let mut result = (String::new(), String::new());
        for section in sections {
            match section {
                Section::Reasoning(text) => {
                    assert!(result.1.is_empty(), "the section comes first");
                    result.0.push_str(&text);
                }
                Section::Answer(text) => result.1.push_str(&text),
            }
        }
        result
    }

    #[test]
    fn a_section_is_told_from_the_answer() {
        for (opened, text, reasoning, answer) in [
            (false, "<think>\nHm.\n\nSo.\n</think>\n\nYes.\n", "Hm.\n\nSo.", "Yes.\n"),
            (false, "\n <think>Hm</think>Yes", "Hm", "Yes"),
            (false, "Yes <think>no</think>", "", "Yes <think>no</think>"),
            (false, "  Yes", "", "  Yes"),
            (false, "<thin", "", "<thin"),
            (false, "<think>\n\n</think>\n\nYes", "", "Yes"),
            (false, "<think>Hm</thi", "Hm</thi", ""),
            (false, "<think>Hm\n", "Hm", ""),
            (true, "Hm.\n</think>\n\nYes </think>", "Hm.", "Yes </think>"),
            (true, "\nHm", "Hm", ""),
            (true, "", "", ""),
        ] {
            assert_eq!(split(THINK, opened, [text]), (reasoning.to_owned(), answer.to_owned()), "{text:?}");
        }
        assert_eq!(split(MISTRAL, false, ["[THINK]a[/THINK]b"]), ("a".to_owned(), "b".to_owned()));
    }

    #[test]
    fn reasoning_is_told_of_as_it_comes() {
        let mut splitter = Splitter::new(THINK, false);
        for (text, open, expected) in [
            (" <th", false, vec![]),
            ("ink>\n", true, vec![]),
            ("a\n", true, vec![Section::Reasoning("a".to_owned())]),
            ("b</", true, vec![Section::Reasoning("\nb".to_owned())]),
            ("think>\n", false, vec![]),
            ("c", false, vec![Section::Answer("c".to_owned())]),
        ] {
            let mut out = Vec::new();
            splitter.push(text, &mut out);
            assert_eq!((out, splitter.is_open()), (expected, open), "{text}");
        }
    }

    const PIECES: [&str; 12] =
        ["<think>", "</think>", "[THINK]", "[/THINK]", "<thi", "</th", "[", "\n", " ", "Hm. ", "é🎈", "\r\n"];

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        #[test]
        fn cutting_makes_no_difference(picks in prop::collection::vec(0..PIECES.len(), 0..12), opened: bool,
            cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..12)) {
            let text: String = picks.iter().map(|&pick| PIECES[pick]).collect();
            let ends: Vec<usize> = text.char_indices().map(|(at, _)| at).chain([text.len()]).collect();
            let mut cuts: Vec<usize> = cuts.iter().map(|cut| ends[cut.index(ends.len())]).collect();
            cuts.extend([0, text.len()]);
            cuts.sort_unstable();
            for marks in [THINK, MISTRAL] {
                let whole = split(marks, opened, [text.as_str()]);
                prop_assert_eq!(&whole, &split(marks, opened, cuts.windows(2).map(|ends| &text[ends[0]..ends[1]])), "{:?}", &text);
                // Without a section nothing is taken away.
                if !opened && !text.trim_start().starts_with(marks.open) {
                    prop_assert_eq!(&whole.1, &text);
                }
            }
        }
    }
}
