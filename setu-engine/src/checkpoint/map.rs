//! A file mapped into memory: the one place of this module that is `unsafe`.

use std::fmt::{self, Display};
use std::fs::{self, File};
use std::io::Read;
use std::ops::Range;
use std::path::{Path, PathBuf};

use memmap2::{Advice, Mmap, UncheckedAdvice};
use setu_core::{Error, Result};

/// A checkpoint's file, readable for as long as this lives.
///
/// A file that another program cuts short afterwards ends the process at the next read behind its new
/// end (SIGBUS); no check at opening can prevent that.
#[derive(Debug)]
pub struct MappedFile {
    path: PathBuf,
    map: Mmap,
}

impl MappedFile {
    /// Maps a regular file that isn't empty.
    pub fn open(path: &Path) -> Result<MappedFile> {
        let place = path.display();
        // Asked before opening, because opening a pipe would wait for its writer.
        let found = fs::metadata(path).map_err(|error| unreadable(path, &error))?;
        if !found.is_file() {
            return Err(Error::invalid(format!("`{place}` is no regular file, so it can't be mapped into memory")));
        }
        if found.len() == 0 {
            return Err(Error::invalid(format!("`{place}` is empty: the download or copy failed; fetch it again")));
        }
        let file = File::open(path).map_err(|error| unreadable(path, &error))?;
        // SAFETY: the mapping is shared and read-only. Rust asks that the bytes don't change under it; that
        // is the operator's promise, as for every engine that maps weights. Bytes are only ever read as
        // numbers, so a file that is overwritten gives wrong numbers, and text is checked when it is read.
        let map = unsafe { Mmap::map(&file) }
            .map_err(|error| Error::exhausted(format!("`{place}` can't be mapped into memory: {error}")))?;
        if map.is_empty() {
            return Err(Error::invalid(format!("`{place}` became empty while it was opened")));
        }
        Ok(MappedFile { path: path.to_path_buf(), map })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn bytes(&self) -> &[u8] {
        &self.map
    }

    /// Asks for the pages of `range` to be read ahead. Without effect where the system can't.
    pub fn prefetch(&self, range: Range<usize>) {
        if !range.is_empty() {
            let _ = self.map.advise_range(Advice::WillNeed, range.start, range.len());
        }
    }

    /// Gives the memory of the pages of `range` back; a later read brings them in from the file again.
    pub fn drop_pages(&self, range: Range<usize>) {
        if !range.is_empty() {
            // SAFETY: dropping pages of a shared, read-only mapping of a file loses nothing: the next read
            // finds the same bytes in the file. Nobody can have written to them.
            let _ = unsafe { self.map.unchecked_advise_range(UncheckedAdvice::DontNeed, range.start, range.len()) };
        }
    }
}

/// A small file read whole.
///
/// # Errors
/// It can't be read, or is longer than `most` bytes.
pub fn read_small(path: &Path, most: u64) -> Result<Vec<u8>> {
    let found = fs::metadata(path).map_err(|error| unreadable(path, &error))?;
    if !found.is_file() {
        return Err(Error::invalid(format!("`{}` is no regular file", path.display())));
    }
    let mut bytes = Vec::new();
    let file = File::open(path).map_err(|error| unreadable(path, &error))?;
    file.take(most + 1).read_to_end(&mut bytes).map_err(|error| unreadable(path, &error))?;
    if bytes.len() as u64 > most {
        return Err(Error::invalid(format!(
            "`{}` is longer than {most} bytes, far more than it needs",
            path.display()
        )));
    }
    Ok(bytes)
}

pub fn unreadable(path: &Path, error: &std::io::Error) -> Error {
    Error::invalid(format!("`{}` can't be read: {error}", path.display()))
}

/// A name from a file, fit for a message: quoted, escaped and no longer than a line.
pub struct Shown<'a>(pub &'a str);

impl Display for Shown<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("`")?;
        for char in self.0.chars().take(120) {
            // Quotes are harmless in a message, line breaks and terminal codes are not.
            if char.is_control() { write!(f, "{}", char.escape_default())? } else { write!(f, "{char}")? }
        }
        f.write_str(if self.0.chars().nth(120).is_some() { "…`" } else { "`" })
    }
}
