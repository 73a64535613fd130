//! A cursor over the header of a GGUF file that can't leave it.

use std::fmt;
use std::ops::Range;

use setu_core::{Error, Result};

/// Reads little-endian values one behind the other. `what` is where in the file the cursor is, for errors.
pub struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

/// Longest string: chat templates take some 10 kB.
const MAX_STRING: u64 = 1 << 26;

impl<'a> Reader<'a> {
    pub fn new(bytes: &'a [u8]) -> Reader<'a> {
        Reader { bytes, at: 0 }
    }

    pub fn position(&self) -> usize {
        self.at
    }

    pub fn remaining(&self) -> usize {
        self.bytes.len() - self.at
    }

    /// A cursor over a part of the file that was passed already.
    pub fn within(&self, range: Range<usize>) -> Reader<'a> {
        Reader { bytes: &self.bytes[..range.end], at: range.start }
    }

    pub fn take(&mut self, len: usize, what: fmt::Arguments<'_>) -> Result<&'a [u8]> {
        let rest = &self.bytes[self.at..];
        let Some(taken) = rest.get(..len) else {
            return Err(Error::invalid(format!(
                "the file ends after {} bytes, inside {what}: it is cut short or damaged",
                self.bytes.len()
            )));
        };
        self.at += len;
        Ok(taken)
    }

    pub fn array<const N: usize>(&mut self, what: fmt::Arguments<'_>) -> Result<[u8; N]> {
        let taken = self.take(N, what)?;
        let mut array = [0; N];
        array.copy_from_slice(taken);
        Ok(array)
    }

    pub fn u32(&mut self, what: fmt::Arguments<'_>) -> Result<u32> {
        Ok(u32::from_le_bytes(self.array(what)?))
    }

    pub fn u64(&mut self, what: fmt::Arguments<'_>) -> Result<u64> {
        Ok(u64::from_le_bytes(self.array(what)?))
    }

    /// The bytes of a string, which are not yet known to be text.
    pub fn string_bytes(&mut self, what: fmt::Arguments<'_>) -> Result<&'a [u8]> {
        let len = self.u64(what)?;
        if len > MAX_STRING {
            return Err(Error::invalid(format!(
                "{what} is a string of {len} bytes; at most {MAX_STRING} are read: the file is damaged"
            )));
        }
        self.take(len as usize, what)
    }

    pub fn string(&mut self, what: fmt::Arguments<'_>) -> Result<&'a str> {
        text(self.string_bytes(what)?, what)
    }
}

/// `bytes` as text.
pub fn text<'a>(bytes: &'a [u8], what: fmt::Arguments<'_>) -> Result<&'a str> {
    std::str::from_utf8(bytes)
        .map_err(|error| Error::invalid(format!("{what} is not UTF-8 (byte {} of it)", error.valid_up_to())))
}
