//! Text to token ids, and what is known of each token.

use setu_core::{Error, Result};

use super::library::Library;
use super::spm::Spm;
use super::vocabulary::{Kind, Vocabulary};

/// How a text is encoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EncodeOptions {
    /// Adds what the model wants around a text, such as BOS. Not for a rendered chat template, which writes
    /// these itself.
    pub add_special: bool,
    /// Takes special tokens that stand in the text for what they are. Without it they are mere text, as befits text that is
    /// not trusted; user-defined tokens are found either way.
    pub parse_special: bool,
}

impl EncodeOptions {
    /// A prompt as it is written: special tokens added around it and parsed in it.
    pub const PROMPT: EncodeOptions = EncodeOptions { add_special: true, parse_special: true };
    /// What a chat template made.
    pub const RENDERED: EncodeOptions = EncodeOptions { add_special: false, parse_special: true };
    /// Text and nothing else.
    pub const PLAIN: EncodeOptions = EncodeOptions { add_special: false, parse_special: false };
}

/// A model's tokenizer, from the files beside its weights ([`Tokenizer::from_files`]) or from the metadata of a GGUF
/// file ([`Tokenizer::from_gguf`]). It is shared by all threads.
pub struct Tokenizer {
    pub(super) encoder: Encoder,
    pub(super) vocabulary: Vocabulary,
    /// What [`EncodeOptions::add_special`] adds where the encoder doesn't know.
    pub(super) prefix: Option<u32>,
    pub(super) suffix: Option<u32>,
    pub(super) bos: Option<u32>,
    pub(super) eos: Option<u32>,
    pub(super) eos_ids: Vec<u32>,
    pub(super) begins_with_space: bool,
}

pub(super) enum Encoder {
    Library(Box<Library>),
    Spm(Box<Spm>),
}

impl Tokenizer {
    /// # Errors
    /// If the text cannot be tokenized, which no text should cause.
    pub fn encode(&self, text: &str, options: EncodeOptions) -> Result<Vec<u32>> {
        let mut ids = match &self.encoder {
            Encoder::Library(library) => library.encode(text, options)?,
            Encoder::Spm(spm) => spm.encode(text, options.parse_special),
        };
        if options.add_special {
            if let Some(prefix) = self.prefix {
                ids.insert(0, prefix);
            }
            ids.extend(self.suffix);
        }
        Ok(ids)
    }

    /// The text of `ids`, which begin a text.
    ///
    /// # Errors
    /// For an id beyond the vocabulary.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String> {
        let mut bytes = Vec::new();
        for &id in ids {
            if !(skip_special && self.is_special(id)) {
                bytes.extend_from_slice(self.token_bytes(id)?);
            }
        }
        let bytes = if self.begins_with_space { bytes.strip_prefix(b" ").unwrap_or(&bytes) } else { &bytes };
        Ok(String::from_utf8_lossy(bytes).into_owned())
    }

    /// One more than the largest id; the model's embedding must have at least as many rows.
    pub fn vocab_size(&self) -> usize {
        self.vocabulary.len()
    }

    /// The bytes that a token stands for, which need not be UTF-8; of a special token, its name. Empty for an id that
    /// the vocabulary leaves out.
    ///
    /// # Errors
    /// For an id beyond the vocabulary.
    pub fn token_bytes(&self, id: u32) -> Result<&[u8]> {
        self.vocabulary.bytes(id).ok_or_else(|| {
            Error::invalid(format!("there is no token {id}: the vocabulary has {} tokens", self.vocabulary.len()))
        })
    }

    /// Whether a token marks structure and is no part of the text.
    pub fn is_special(&self, id: u32) -> bool {
        self.vocabulary.kind(id) == Some(Kind::Special)
    }

    /// The id of the token that the vocabulary writes as `token`.
    pub fn token_id(&self, token: &str) -> Option<u32> {
        match &self.encoder {
            Encoder::Library(library) => library.id(token),
            Encoder::Spm(spm) => spm.id(token),
        }
    }

    /// Begins a text.
    pub fn bos(&self) -> Option<u32> {
        self.bos
    }

    /// Ends a text; of the tokens in [`eos_ids`](Tokenizer::eos_ids) the one that chat templates name.
    pub fn eos(&self) -> Option<u32> {
        self.eos
    }

    /// The tokens that end an answer: end of text, of turn, of message. Sorted.
    pub fn eos_ids(&self) -> &[u32] {
        &self.eos_ids
    }

    pub(super) fn begins_with_space(&self) -> bool {
        self.begins_with_space
    }
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tokenizer").field("vocab_size", &self.vocab_size()).finish_non_exhaustive()
    }
}
