//! The table of a vocabulary: for each token id its bytes and its kind.

use setu_core::{Error, Result};

/// What a token is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// Part of the text.
    Text,
    /// Marks structure (end of text, turns of a chat, …): no text of its own.
    Special,
    /// An id without a token, for which there is no text.
    Hole,
}

/// Bytes and kind of every token, in one allocation each.
#[derive(Clone, Debug, Default)]
pub(super) struct Vocabulary {
    bytes: Vec<u8>,
    /// Where each token's bytes end; they begin where the last one's end.
    ends: Vec<u32>,
    kinds: Vec<Kind>,
}

impl Vocabulary {
    pub fn with_capacity(tokens: usize) -> Vocabulary {
        Vocabulary {
            bytes: Vec::with_capacity(tokens.saturating_mul(7)),
            ends: Vec::with_capacity(tokens),
            kinds: Vec::with_capacity(tokens),
        }
    }

    /// Adds the next id's token, whose bytes `write` appends.
    pub fn push(&mut self, kind: Kind, write: impl FnOnce(&mut Vec<u8>)) -> Result<()> {
        write(&mut self.bytes);
        let end = u32::try_from(self.bytes.len())
            .map_err(|_| Error::invalid("the vocabulary's tokens are longer than 4 GiB together"))?;
        self.ends.push(end);
        self.kinds.push(kind);
        Ok(())
    }

    pub fn len(&self) -> usize {
        self.ends.len()
    }

    pub fn kind(&self, id: u32) -> Option<Kind> {
        self.kinds.get(id as usize).copied()
    }

    pub fn bytes(&self, id: u32) -> Option<&[u8]> {
        let at = id as usize;
        let end = *self.ends.get(at)? as usize;
        let start = if at == 0 { 0 } else { self.ends[at - 1] as usize };
        Some(&self.bytes[start..end])
    }
}

/// Appends the bytes that a byte-level token stands for.
///
/// Byte-level vocabularies write every byte as one printable character: printable Latin-1 as itself, the other
/// 68 bytes as U+0100 and up. A token with any other character stands for its own text.
pub(super) fn push_byte_level(token: &str, bytes: &mut Vec<u8>) {
    let start = bytes.len();
    for character in token.chars() {
        let Some(&Some(byte)) = BYTE_OF.get(character as usize) else {
            bytes.truncate(start);
            bytes.extend_from_slice(token.as_bytes());
            return;
        };
        bytes.push(byte);
    }
}

/// How byte-level vocabularies write `bytes`.
pub(crate) fn written_byte_level(bytes: &[u8]) -> String {
    bytes.iter().map(|&byte| CHARACTER_OF[usize::from(byte)]).collect()
}

const CHARACTER_OF: [char; 256] = {
    let mut character_of = ['\0'; 256];
    let mut character = 0;
    while character < BYTE_OF.len() {
        if let (Some(byte), Some(written)) = (BYTE_OF[character], char::from_u32(character as u32)) {
            character_of[byte as usize] = written;
        }
        character += 1;
    }
    character_of
};

const BYTE_OF: [Option<u8>; 256 + 68] = {
    let mut byte_of = [None; 256 + 68];
    let mut shifted = 256;
    let mut byte = 0;
    while byte < 256 {
        if matches!(byte, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff) {
            byte_of[byte] = Some(byte as u8);
        } else {
            byte_of[shifted] = Some(byte as u8);
            shifted += 1;
        }
        byte += 1;
    }
    byte_of
};

/// The byte that a byte-fallback token such as `<0x0A>` stands for.
pub(super) fn fallback_byte(token: &str) -> Option<u8> {
    let digits = token.strip_prefix("<0x")?.strip_suffix('>')?;
    if digits.len() != 2 || !digits.bytes().all(|digit| digit.is_ascii_hexdigit()) {
        return None;
    }
    u8::from_str_radix(digits, 16).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn byte_level(token: &str) -> Vec<u8> {
        let mut bytes = Vec::new();
        push_byte_level(token, &mut bytes);
        bytes
    }

    #[test]
    fn byte_level_tokens_stand_for_their_bytes() {
        for (token, bytes) in [
            ("Ġthe", b" the".to_vec()),
            ("Ċ", b"\n".to_vec()),
            ("Ā", vec![0]),
            ("Ń", vec![0xad]),
            ("Ã©", "é".as_bytes().to_vec()),
            ("ł", vec![0xa0]),
            ("", vec![]),
            ("日本", "日本".as_bytes().to_vec()),
            ("a\u{ad}", "a\u{ad}".as_bytes().to_vec()),
        ] {
            assert_eq!(byte_level(token), bytes, "{token:?}");
        }
        let all: Vec<u8> = (0..=255).collect();
        assert_eq!(byte_level(&written_byte_level(&all)), all);
    }

    #[test]
    fn fallback_tokens_name_one_byte() {
        for (token, byte) in [
            ("<0x0A>", Some(10)),
            ("<0xff>", Some(255)),
            ("<0x+A>", None),
            ("<0xA>", None),
            ("<0x0A", None),
            ("0x0A>", None),
            ("<0xé>", None),
        ] {
            assert_eq!(fallback_byte(token), byte, "{token:?}");
        }
    }
}
