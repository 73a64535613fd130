//! GGUF: one file, or several that were split, with hyper-parameters, vocabulary and tensors.
//!
//! The format is described at <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>. Versions 2 and 3
//! in little-endian order are read. Where the description leaves a choice, the strict one is taken: no
//! nested arrays, no empty tensors, no tensor over another.

mod directory;
mod format;
mod keys;
mod reader;
mod split;

use serde_json::Value;
use setu_core::{Error, Result};

pub(super) use directory::Directory;
pub(super) use format::code as format_code;
pub(super) use keys::{Arrays, Keys, ValueType};
pub(super) use split::{check_part, check_total, group, siblings};

use reader::Reader;

pub(super) const MAGIC: [u8; 4] = *b"GGUF";

/// The header of one file, checked against the file.
#[derive(Debug)]
pub(super) struct Header {
    pub keys: Keys,
    pub directory: Directory,
}

impl Header {
    /// Reads and checks the header of a file.
    ///
    /// # Errors
    /// Says what is wrong with it; the caller adds which file.
    pub fn read(file: &[u8]) -> Result<Header> {
        let mut reader = Reader::new(file);
        let magic: [u8; 4] = reader.array(format_args!("its first four bytes"))?;
        if magic != MAGIC {
            return Err(Error::invalid(format!(
                "not a GGUF file: it starts with `{}` instead of `GGUF`",
                magic.escape_ascii()
            )));
        }
        let version = reader.u32(format_args!("the version in its header"))?;
        match version {
            2 | 3 => {}
            1 => {
                return Err(Error::unsupported(
                    "GGUF version 1 is not read; convert the file again, which gives version 3",
                ));
            }
            _ if version & 0xFFFF == 0 && version != 0 => {
                return Err(Error::unsupported(
                    "the file is big-endian, which is not read; convert it to little-endian GGUF",
                ));
            }
            _ => {
                return Err(Error::unsupported(format!(
                    "GGUF version {version} is not known; versions 2 and 3 are read"
                )));
            }
        }
        let n_tensors = reader.u64(format_args!("the number of tensors in its header"))?;
        let n_keys = reader.u64(format_args!("the number of keys in its header"))?;
        let keys = Keys::read(&mut reader, n_keys)?;
        let alignment = alignment(&keys)?;
        let directory = Directory::read(&mut reader, n_tensors, alignment)?;
        Ok(Header { keys, directory })
    }
}

/// What tensors' offsets are multiples of.
fn alignment(keys: &Keys) -> Result<usize> {
    const KEY: &str = "general.alignment";
    let Some(value) = keys.values.get(KEY) else { return Ok(32) };
    let stated = value.as_u64().filter(|alignment| alignment.is_power_of_two() && *alignment <= 1 << 20);
    stated.map(|alignment| alignment as usize).ok_or_else(|| {
        let shown = if value.is_number() { value.to_string() } else { "no number".to_owned() };
        Error::invalid(format!("the key `{KEY}` must be a power of two up to 1048576, and is {shown}"))
    })
}

/// A whole number at `key` of a split file.
fn split_number(keys: &Keys, key: &str) -> Result<Option<u64>> {
    match keys.values.get(key) {
        None => Ok(None),
        Some(value) => {
            value.as_u64().map(Some).ok_or_else(|| Error::invalid(format!("the key `{key}` must be a whole number")))
        }
    }
}

/// The value at `general.architecture`.
pub(super) fn architecture(keys: &Keys) -> Result<&str> {
    let named = keys.values.get("general.architecture").and_then(Value::as_str).filter(|name| !name.is_empty());
    named.ok_or_else(|| Error::invalid("it names no architecture: the key `general.architecture` must be a string"))
}
