//! A session's way from tokens to text.

use setu_core::Result;

use super::detokenizer::Detokenizer;
use super::stop::StopMatcher;
use crate::request::{Piece, TextSink};

/// A [`Detokenizer`] with a [`StopMatcher`] behind it: what the engine feeds a session's tokens to.
#[derive(Clone, Debug)]
pub struct TextStream {
    detokenizer: Detokenizer,
    stops: StopMatcher,
}

impl TextStream {
    pub fn new(detokenizer: Detokenizer, stops: StopMatcher) -> TextStream {
        TextStream { detokenizer, stops }
    }

    /// Takes the next token.
    ///
    /// # Errors
    /// For a token beyond the vocabulary; the stream goes on as if it had not come.
    pub fn push(&mut self, token: u32) -> Result<Piece> {
        let passed = self.stops.push(self.detokenizer.push(token)?);
        Ok(Piece { text: passed.text.to_owned(), stopped: passed.stopped })
    }

    /// Ends the text and returns what was held back.
    pub fn finish(&mut self) -> Piece {
        let passed = self.stops.push(self.detokenizer.finish());
        let (mut text, stopped) = (passed.text.to_owned(), passed.stopped);
        text.push_str(self.stops.finish());
        Piece { text, stopped }
    }
}

impl TextSink for TextStream {
    /// A token beyond the vocabulary, which a model with a padded embedding may yield, has no text.
    fn push(&mut self, token: u32) -> Piece {
        TextStream::push(self, token).unwrap_or_default()
    }

    fn finish(&mut self) -> String {
        TextStream::finish(self).text
    }

    fn stop(&self) -> Option<String> {
        self.stops.stop().map(str::to_owned)
    }
}
