//! Bytes in, whole characters out.

/// Decodes UTF-8 that arrives in pieces cut anywhere.
#[derive(Clone, Debug, Default)]
pub(super) struct Utf8Stream {
    /// The beginning of a character: at most three bytes between two pushes.
    pending: Vec<u8>,
    text: String,
}

impl Utf8Stream {
    /// Returns the text that `bytes` complete, with U+FFFD for what is no UTF-8.
    pub fn push(&mut self, bytes: &[u8]) -> &str {
        self.text.clear();
        self.pending.extend_from_slice(bytes);
        let mut held = 0;
        let mut chunks = self.pending.utf8_chunks().peekable();
        while let Some(chunk) = chunks.next() {
            self.text.push_str(chunk.valid());
            if chunk.invalid().is_empty() {
                continue;
            }
            // Only an incomplete character at the very end may still become valid.
            if chunks.peek().is_none() && is_incomplete(chunk.invalid()) {
                held = chunk.invalid().len();
            } else {
                self.text.push(char::REPLACEMENT_CHARACTER);
            }
        }
        self.pending.drain(..self.pending.len() - held);
        &self.text
    }

    /// Returns U+FFFD if a character was left incomplete, and begins anew.
    pub fn finish(&mut self) -> &str {
        self.text.clear();
        if !self.pending.is_empty() {
            self.pending.clear();
            self.text.push(char::REPLACEMENT_CHARACTER);
        }
        &self.text
    }
}

/// Whether more bytes could turn `bytes` into a character.
fn is_incomplete(bytes: &[u8]) -> bool {
    std::str::from_utf8(bytes).is_err_and(|error| error.error_len().is_none())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn next(state: &mut u64) -> u64 {
        *state ^= *state << 13;
        *state ^= *state >> 7;
        *state ^= *state << 17;
        *state
    }

    #[test]
    fn pieces_decode_to_what_the_whole_decodes_to() {
        let mut state = 0x5eed;
        let pool = ["a", " ", "é", "日", "👩‍👧", "🇫🇷", "\u{fffd}", "\u{10ffff}"];
        for _ in 0..2_000 {
            let mut bytes = Vec::new();
            for _ in 0..next(&mut state) % 12 {
                match next(&mut state) % 4 {
                    0 => bytes.push(next(&mut state) as u8),
                    1 => {
                        let character = pool[(next(&mut state) % pool.len() as u64) as usize].as_bytes();
                        bytes.extend_from_slice(&character[..1 + (next(&mut state) as usize) % character.len()]);
                    }
                    _ => bytes.extend_from_slice(pool[(next(&mut state) % pool.len() as u64) as usize].as_bytes()),
                }
            }
            let mut stream = Utf8Stream::default();
            let mut text = String::new();
            let mut at = 0;
            while at < bytes.len() {
                let end = (at + (next(&mut state) % 4) as usize).min(bytes.len());
                text.push_str(stream.push(&bytes[at..end]));
                at = end;
            }
            text.push_str(stream.finish());
            assert_eq!(text, String::from_utf8_lossy(&bytes), "{bytes:x?}");
            assert_eq!(stream.finish(), "");
        }
    }

    #[test]
    fn text_comes_as_soon_as_it_is_certain() {
        let mut stream = Utf8Stream::default();
        for (bytes, text) in [
            (&b"a\xe2"[..], "a"),
            (b"\x82", ""),
            (b"\xac!", "€!"),
            (b"\xf0\x9f", ""),
            (b"\x41", "\u{fffd}A"),
            (b"\xff\xc3", "\u{fffd}"),
        ] {
            assert_eq!(stream.push(bytes), text, "{bytes:x?}");
        }
        assert_eq!(stream.finish(), "\u{fffd}");
    }
}
