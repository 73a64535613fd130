//! The record as a file: a line of JSON for each entry.

use std::io::{BufRead, Read, Write};

use serde::Serialize;
use setu_core::{Error, Result};

use super::{Header, Record, Tracer, VERSION};

/// Longest line that is read. A step of 10,000 sessions takes about 2 MiB.
const MOST_LINE_BYTES: u64 = 64 << 20;

/// A tracer that writes lines of JSON to `out`, each by one write, so that what was recorded is there whatever
/// happens next. An error is told to `failed`, once; nothing more is written then.
pub fn writer(out: impl Write + Send + 'static, failed: impl FnOnce(std::io::Error) + Send + 'static) -> Tracer {
    let mut out = Some((out, failed));
    let mut line = Vec::new();
    Box::new(move |record| {
        line.clear();
        let Some((file, _)) = &mut out else { return };
        let written = serde_json::to_writer(&mut line, record).map_err(Into::into);
        line.push(b'\n');
        if let Err(error) = written.and_then(|()| file.write_all(&line))
            && let Some((_, failed)) = out.take()
        {
            failed(error);
        }
    })
}

/// Reads a record line by line. What can't be read is skipped and counted.
#[derive(Debug)]
pub struct TraceReader<R> {
    input: R,
    header: Header,
    line: Vec<u8>,
    /// Number of the line read last.
    number: u64,
    skipped: Skipped,
}

/// Lines of a record that say nothing to this reader.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Skipped {
    /// Lines that can't be read.
    pub broken: u64,
    /// The first of them: its number and what is wrong with it.
    pub first: Option<(u64, String)>,
    /// Lines of events that this version doesn't know.
    pub unknown: u64,
}

impl<R: BufRead> TraceReader<R> {
    /// Reads the first line.
    ///
    /// # Errors
    /// `input` can't be read, or doesn't begin as a record of this version does.
    pub fn new(input: R) -> Result<TraceReader<R>> {
        let mut reader =
            TraceReader { input, header: Header::default(), line: Vec::new(), number: 0, skipped: Skipped::default() };
        if !reader.read_line()? {
            return Err(Error::invalid("it is empty: the engine that was to write it recorded nothing"));
        }
        reader.header = match serde_json::from_slice(&reader.line) {
            Ok(Record::Trace(header)) => header,
            Ok(_) => return Err(Error::invalid("line 1: the record's beginning, an event \"trace\", is missing")),
            Err(error) => {
                let problem = problem(&error, &reader.line);
                return Err(Error::invalid(format!("line 1: this is no record of `setu run --trace`: {problem}")));
            }
        };
        if reader.header.version != VERSION {
            let (version, engine) = (reader.header.version, &reader.header.engine);
            return Err(Error::invalid(format!(
                "line 1: the record is of version {version} (written by setu {engine}); this program reads {VERSION}"
            )));
        }
        Ok(reader)
    }

    pub fn header(&self) -> &Header {
        &self.header
    }

    /// What was skipped until now.
    pub fn skipped(&self) -> &Skipped {
        &self.skipped
    }

    /// The next entry.
    ///
    /// # Errors
    /// The input can't be read, or another record begins in it.
    pub fn read(&mut self) -> Result<Option<Record>> {
        while self.read_line()? {
            match serde_json::from_slice(&self.line) {
                Ok(Record::Unknown) => self.skipped.unknown += 1,
                Ok(Record::Trace(_)) => {
                    let number = self.number;
                    return Err(Error::invalid(format!(
                        "line {number}: another record begins here; give each its own file"
                    )));
                }
                Ok(record) => return Ok(Some(record)),
                Err(_) if self.line.trim_ascii().is_empty() => {}
                Err(error) => {
                    self.skipped.broken += 1;
                    if self.skipped.first.is_none() {
                        self.skipped.first = Some((self.number, problem(&error, &self.line)));
                    }
                }
            }
        }
        Ok(None)
    }

    /// Reads a line into `self.line`; says whether there was one.
    fn read_line(&mut self) -> Result<bool> {
        self.line.clear();
        self.number += 1;
        let number = self.number;
        let unreadable = |error| Error::invalid(format!("line {number} can't be read: {error}"));
        let mut limited = self.input.by_ref().take(MOST_LINE_BYTES);
        limited.read_until(b'\n', &mut self.line).map_err(unreadable)?;
        if self.line.len() as u64 == MOST_LINE_BYTES {
            return Err(Error::invalid(format!("line {number} is longer than {} MiB", MOST_LINE_BYTES >> 20)));
        }
        Ok(!self.line.is_empty())
    }
}

impl std::fmt::Display for Skipped {
    /// A sentence about what was skipped; empty if nothing was.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if let Some((number, problem)) = &self.first {
            match self.broken {
                1 => write!(f, "line {number} was skipped: {problem}")?,
                lines => write!(f, "{lines} lines were skipped, the first is line {number}: {problem}")?,
            }
        }
        if self.unknown > 0 {
            let gap = if self.broken > 0 { "; " } else { "" };
            let events = super::numbers::counted(self.unknown, "event");
            write!(f, "{gap}{events} of a later version can't be told")?;
        }
        Ok(())
    }
}

/// What is wrong with a line.
fn problem(error: &serde_json::Error, line: &[u8]) -> String {
    if error.is_eof() && !line.ends_with(b"\n") {
        return "it is cut off".to_owned();
    }
    // The parser counts lines of its own, of which there is one.
    let text = error.to_string();
    text.replace(" at line 1 column ", ", at column ").replace(" at line 2 column 0", "")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::trace::StepFinished;

    const HEAD: &str = "{\"event\":\"trace\",\"version\":1,\"time_s\":0}\n";
    const STEP: &str = "{\"event\":\"finished\",\"time_s\":1,\"step\":7,\"took_s\":0.5}\n";

    /// How many entries are read, and what is said about the rest; or the error.
    fn read(text: &[u8]) -> Result<(usize, String)> {
        let mut reader = TraceReader::new(text)?;
        let mut entries = 0;
        while reader.read()?.is_some() {
            entries += 1;
        }
        Ok((entries, reader.skipped().to_string()))
    }

    #[test]
    fn bad_files_are_refused_with_the_line_and_the_problem() {
        let cases: [(&[u8], &str); 8] = [
            (b"", "it is empty"),
            (b"\n\n", "line 1: this is no record of `setu run --trace`: EOF while parsing a value"),
            (b"[backend]\ntype = \"sim\"\n", "line 1: this is no record"),
            (b"\x7fELF\x02\x01\x01\x00", "line 1: this is no record"),
            (&HEAD.as_bytes()[..20], "line 1: this is no record of `setu run --trace`: it is cut off"),
            (STEP.as_bytes(), "line 1: the record's beginning, an event \"trace\", is missing"),
            (
                b"{\"event\":\"trace\",\"version\":7,\"engine\":\"9.1\",\"time_s\":0}\n",
                "of version 7 (written by setu 9.1)",
            ),
            (&[HEAD, STEP, HEAD].concat().into_bytes(), "line 3: another record begins here"),
        ];
        for (text, expected) in cases {
            let error = read(text).unwrap_err();
            assert!(error.message().contains(expected), "{error}");
        }
    }

    #[test]
    fn what_cannot_be_read_is_skipped_and_told() {
        let cases = [
            (String::new(), 0, ""),
            ([STEP, "\n", STEP].concat(), 2, ""),
            ([STEP, &STEP[..30]].concat(), 1, "line 3 was skipped: it is cut off"),
            (
                [STEP, "{}\n", "?\n", STEP].concat(),
                2,
                "2 lines were skipped, the first is line 3: missing field `event`",
            ),
            (["{\"event\":\"dreamt\"}\n", STEP].concat(), 1, "1 event of a later version can't be told"),
            (STEP.replace("0.5", "\"long\""), 0, "line 2 was skipped: invalid type: string \"long\", expected f64"),
        ];
        for (text, entries, said) in cases {
            let (read, skipped) = read(format!("{HEAD}{text}").as_bytes()).unwrap();
            assert_eq!(read, entries, "{text}");
            assert!(skipped.starts_with(said) && skipped.is_empty() == said.is_empty(), "{text}: {skipped}");
        }
    }

    #[test]
    fn an_error_of_the_file_is_told_once_and_ends_the_record() {
        struct Full(usize);
        impl Write for Full {
            fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
                self.0 = self.0.checked_sub(1).ok_or(std::io::ErrorKind::StorageFull)?;
                Ok(bytes.len())
            }
            fn flush(&mut self) -> std::io::Result<()> {
                Ok(())
            }
        }
        let (sender, errors) = std::sync::mpsc::channel();
        let mut tracer = writer(Full(3), move |error| sender.send(error.kind()).unwrap());
        (0..9).for_each(|_| tracer(&Record::Finished(StepFinished::default())));
        drop(tracer);
        assert_eq!(errors.iter().collect::<Vec<_>>(), [std::io::ErrorKind::StorageFull]);
    }
}
