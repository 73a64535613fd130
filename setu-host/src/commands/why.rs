//! `setu why [SESSION] --trace FILE`: what a record of decisions tells of one session, or of all.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::BufReader;
use std::path::{Path, PathBuf};

use clap::ArgMatches;
use serde_json::json;
use setu_core::SessionId;
use setu_engine::trace::{Record, Skipped, Story, Summarizer, Teller, TraceReader};

use super::print_line;
use crate::cli::Failure;

/// Sessions that an error names.
const MOST_NAMED: usize = 8;

pub fn main(matches: &ArgMatches) -> Result<(), Failure> {
    let path: &PathBuf = matches.get_one("trace").ok_or_else(|| Failure::Usage("--trace is missing".to_owned()))?;
    let json = matches.get_flag("json");
    let Some(asked) = matches.get_one::<String>("session") else {
        let mut reader = Reader::open(path)?;
        let mut summarizer = Summarizer::new(reader.records.header());
        while let Some(record) = reader.read()? {
            summarizer.take(record);
        }
        let summary = summarizer.finish();
        if json {
            print_line(json!({ "summary": summary, "skipped": reader.skipped() }));
        } else {
            print_line(summary.to_string().trim_end());
        }
        reader.warn();
        return Ok(());
    };
    let session = session_named(path, asked)?;
    let mut reader = Reader::open(path)?;
    let story = tell(&mut reader, session)?;
    if json {
        print_line(json!({ "story": story, "skipped": reader.skipped() }));
    } else {
        print_line(story.to_string().trim_end());
    }
    reader.warn();
    Ok(())
}

/// A record with the name of its file, for errors.
struct Reader<'a> {
    path: &'a Path,
    records: TraceReader<BufReader<File>>,
}

impl<'a> Reader<'a> {
    fn open(path: &'a Path) -> Result<Reader<'a>, Failure> {
        let unreadable = |error| Failure::Failed(format!("{} can't be read: {error}", path.display()));
        let file = File::open(path).map_err(unreadable)?;
        let records =
            TraceReader::new(BufReader::with_capacity(1 << 18, file)).map_err(|error| failure(path, &error))?;
        Ok(Reader { path, records })
    }

    fn read(&mut self) -> Result<Option<Record>, Failure> {
        self.records.read().map_err(|error| failure(self.path, &error))
    }

    fn skipped(&self) -> &Skipped {
        self.records.skipped()
    }

    /// Says what of the file was skipped.
    fn warn(&self) {
        let skipped = self.skipped().to_string();
        if !skipped.is_empty() {
            eprintln!("setu: {}: {skipped}", self.path.display());
        }
    }
}

fn failure(path: &Path, error: &setu_core::Error) -> Failure {
    Failure::Failed(format!("{}, {}", path.display(), error.message()))
}

fn tell(reader: &mut Reader<'_>, session: SessionId) -> Result<Story, Failure> {
    let mut teller = Teller::new(session, reader.records.header());
    while let Some(record) = reader.read()? {
        teller.take(record);
    }
    teller.finish().ok_or_else(|| Failure::Failed(format!("{} says nothing of {session}", reader.path.display())))
}

/// The session that `asked` means: its number as it is shown, with or without leading zeros, or the beginning of
/// exactly one name.
fn session_named(path: &Path, asked: &str) -> Result<SessionId, Failure> {
    let mut known = BTreeSet::new();
    let mut reader = Reader::open(path)?;
    while let Some(record) = reader.read()? {
        match record {
            Record::Added(added) => known.insert(added.session),
            // One that was turned away at the door was never added.
            Record::Ended(ended) => known.insert(ended.session),
            _ => false,
        };
    }
    resolve(&known, asked).map_err(|problem| Failure::Failed(format!("{}: {problem}", path.display())))
}

fn resolve(known: &BTreeSet<SessionId>, asked: &str) -> Result<SessionId, String> {
    let digits = asked.strip_prefix("session_").unwrap_or(asked);
    let number = u64::from_str_radix(digits, 16).ok().map(SessionId);
    if let Some(id) = number.filter(|id| known.contains(id)) {
        return Ok(id);
    }
    let begins = |id: &&SessionId| {
        let name = id.to_string();
        name.starts_with(asked) || name.strip_prefix("session_").is_some_and(|name| name.starts_with(digits))
    };
    let alike: Vec<SessionId> = known.iter().filter(begins).copied().collect();
    match &alike[..] {
        [id] => Ok(*id),
        [] if known.is_empty() => Err("no session is in it".to_owned()),
        [] => Err(format!("no session {asked:?} is in it; there are {}", list(known.iter()))),
        several => Err(format!("{asked:?} may mean {}", list(several.iter()))),
    }
}

fn list<'a>(ids: impl ExactSizeIterator<Item = &'a SessionId>) -> String {
    let more = ids.len().saturating_sub(MOST_NAMED);
    let names: Vec<String> = ids.take(MOST_NAMED).map(SessionId::to_string).collect();
    let rest = if more > 0 { format!(" and {more} more") } else { String::new() };
    format!("{}{rest}", names.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sessions_are_found_by_number_and_by_the_beginning_of_their_name() {
        let few: BTreeSet<SessionId> = [1, 2, 0x10, 0x11, 0xabc].map(SessionId).into();
        let cases = [
            ("session_00000001", Ok(1)),
            ("1", Ok(1)),
            ("10", Ok(0x10)),
            ("00000011", Ok(0x11)),
            ("abc", Ok(0xabc)),
            ("session_00000a", Ok(0xabc)),
            ("session_0000001", Ok(1)),
            ("00000", Err("may mean session_00000001, session_00000002, session_00000010")),
            ("17", Err("no session \"17\" is in it; there are session_00000001")),
            ("hello", Err("no session \"hello\" is in it")),
            ("session_", Err("may mean session_00000001")),
            ("", Err("may mean session_00000001")),
        ];
        for (asked, expected) in cases {
            match (resolve(&few, asked), expected) {
                (Ok(id), Ok(expected)) => assert_eq!(id, SessionId(expected), "{asked}"),
                (Err(problem), Err(expected)) => assert!(problem.contains(expected), "{asked}: {problem}"),
                (found, _) => panic!("{asked}: {found:?}"),
            }
        }
        let many: BTreeSet<SessionId> = (1..=20).map(SessionId).collect();
        assert!(resolve(&many, "zzz").unwrap_err().ends_with("session_00000008 and 12 more"));
        assert_eq!(resolve(&BTreeSet::new(), "1").unwrap_err(), "no session is in it");
    }
}
