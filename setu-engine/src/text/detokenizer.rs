//! Turns one session's tokens into text as they come.

use std::sync::Arc;

use setu_core::Result;

use super::tokenizer::Tokenizer;
use super::utf8::Utf8Stream;

/// Where the tokens stand in the text, and which of them are shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DetokenizeOptions {
    /// Leaves out special tokens.
    pub skip_special: bool,
    /// The tokens begin a text; otherwise they go on after a prompt. It matters to tokenizers that put a space in front of
    /// every text, which is not part of it.
    pub at_start: bool,
}

impl Default for DetokenizeOptions {
    /// An answer as it is shown: behind a prompt, without special tokens.
    fn default() -> DetokenizeOptions {
        DetokenizeOptions { skip_special: true, at_start: false }
    }
}

/// Decodes a stream of tokens; what it returns, put together, is what decoding all tokens at once gives.
///
/// A character whose bytes lie in several tokens comes whole, with the last of them. Bytes that are no UTF-8
/// become U+FFFD, as [`String::from_utf8_lossy`] does.
#[derive(Clone, Debug)]
pub struct Detokenizer {
    tokenizer: Arc<Tokenizer>,
    skip_special: bool,
    /// Special tokens that are not left out.
    shown: Arc<[u32]>,
    /// A leading space, if the next text begins with one, is the tokenizer's own.
    drop_space: bool,
    utf8: Utf8Stream,
}

impl Detokenizer {
    pub fn new(tokenizer: Arc<Tokenizer>, options: DetokenizeOptions) -> Detokenizer {
        let drop_space = options.at_start && tokenizer.begins_with_space();
        let shown = Arc::default();
        Detokenizer { tokenizer, skip_special: options.skip_special, shown, drop_space, utf8: Utf8Stream::default() }
    }

    /// Has the special tokens `shown` in the text by their names, such as marks of what a model writes.
    #[must_use]
    pub fn showing(self, shown: Arc<[u32]>) -> Detokenizer {
        Detokenizer { shown, ..self }
    }

    /// Takes the next token and returns the text that became complete with it, which may be empty.
    ///
    /// # Errors
    /// For a token beyond the vocabulary; the stream goes on as if it had not come.
    pub fn push(&mut self, token: u32) -> Result<&str> {
        let mut bytes = self.tokenizer.token_bytes(token)?;
        if self.skip_special && self.tokenizer.is_special(token) && !self.shown.contains(&token) {
            bytes = &[];
        }
        if self.drop_space && !bytes.is_empty() {
            self.drop_space = false;
            bytes = bytes.strip_prefix(b" ").unwrap_or(bytes);
        }
        Ok(self.utf8.push(bytes))
    }

    /// Ends the text: returns U+FFFD if a character was left incomplete.
    pub fn finish(&mut self) -> &str {
        self.utf8.finish()
    }
}
