//! Encoding with the `tokenizers` library, for `tokenizer.json` and for byte-level vocabularies of GGUF files.

use std::collections::hash_map::Entry;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::OnceLock;

use setu_core::{Error, Result};
use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{AddedToken, PreTokenizerWrapper, SplitDelimiterBehavior};

use super::tokenizer::EncodeOptions;

/// The library's tokenizer, twice if need be: whether special tokens are parsed is a setting of it.
pub(super) struct Library {
    parsing: tokenizers::Tokenizer,
    plain: OnceLock<tokenizers::Tokenizer>,
}

/// A token that text may contain as such.
pub(super) struct Added {
    pub text: String,
    pub special: bool,
}

impl Library {
    /// Reads `tokenizer.json`.
    pub fn from_json(bytes: &[u8]) -> Result<Library> {
        caught("loading it", || {
            let mut parsing: tokenizers::Tokenizer = serde_json::from_slice(bytes)
                .map_err(|error| Error::invalid(format!("the tokenizer cannot be built: {error}")))?;
            // They are for training: a prompt is never cut or filled up.
            parsing.with_truncation(None).map_err(|error| Error::invalid(error.to_string()))?;
            parsing.with_padding(None);
            Ok(Library { parsing, plain: OnceLock::new() })
        })
    }

    /// Builds byte-level BPE of `tokens`, each with the position that is its id. `patterns` cut text into words; with
    /// `whole_words` a word that is a token is taken whole, whatever the merges would make of it.
    pub fn byte_level(
        tokens: Vec<(String, u32)>,
        merges: Vec<(String, String)>,
        added: Vec<Added>,
        patterns: &[&str],
        whole_words: bool,
    ) -> Result<Library> {
        caught("building it", || {
            let mut vocab = Vocab::with_capacity(tokens.len());
            for (token, id) in tokens {
                match vocab.entry(token) {
                    Entry::Vacant(vacant) => vacant.insert(id),
                    Entry::Occupied(first) => return Err(duplicate(first.key(), *first.get(), id)),
                };
            }
            let model = BPE::builder()
                .vocab_and_merges(vocab, merges)
                .ignore_merges(whole_words)
                .build()
                .map_err(|error| Error::invalid(format!("the merges do not fit the tokens: {error}")))?;
            let mut parsing = tokenizers::Tokenizer::new(model);
            parsing.with_pre_tokenizer(Some(split_words(patterns)?));
            parsing
                .add_tokens(
                    added.into_iter().map(|token| AddedToken::from(token.text, token.special).normalized(false)),
                )
                .map_err(|error| Error::invalid(format!("the special tokens cannot be added: {error}")))?;
            Ok(Library { parsing, plain: OnceLock::new() })
        })
    }

    pub fn encode(&self, text: &str, options: EncodeOptions) -> Result<Vec<u32>> {
        let tokenizer = if options.parse_special { &self.parsing } else { self.plain() };
        caught("encoding a text", || {
            let encoding = tokenizer
                .encode_fast(text, options.add_special)
                .map_err(|error| Error::invalid(format!("the text cannot be tokenized: {error}")))?;
            Ok(encoding.get_ids().to_vec())
        })
    }

    pub fn id(&self, token: &str) -> Option<u32> {
        self.parsing.token_to_id(token)
    }

    /// The token of `id` as the vocabulary writes it.
    pub fn token(&self, id: u32) -> Option<String> {
        tokenizers::Model::id_to_token(self.parsing.get_model(), id)
    }

    /// How many tokens there are, those added not counted.
    pub fn model_len(&self) -> usize {
        self.parsing.get_vocab_size(false)
    }

    /// The tokens that text may contain as such, with id and whether they are special.
    pub fn added(&self) -> impl Iterator<Item = (u32, &str, bool)> {
        let added = self.parsing.get_added_vocabulary().get_added_tokens_decoder();
        added.iter().map(|(id, token)| (*id, token.content.as_str(), token.special))
    }

    fn plain(&self) -> &tokenizers::Tokenizer {
        self.plain.get_or_init(|| {
            let mut plain = self.parsing.clone();
            plain.set_encode_special_tokens(true);
            plain
        })
    }
}

/// Cuts text into words and writes their bytes as characters.
pub(super) fn split_words(patterns: &[&str]) -> Result<PreTokenizerWrapper> {
    let split = |pattern: &&str| {
        Split::new(SplitPattern::Regex((*pattern).to_owned()), SplitDelimiterBehavior::Isolated, false)
            .map(PreTokenizerWrapper::Split)
            .map_err(|error| {
                Error::invalid(format!("the pattern {pattern:?} that cuts text into words is not valid: {error}"))
            })
    };
    let mut steps = patterns.iter().map(split).collect::<Result<Vec<_>>>()?;
    steps.push(PreTokenizerWrapper::ByteLevel(ByteLevel::new(false, false, false)));
    Ok(PreTokenizerWrapper::Sequence(Sequence::new(steps)))
}

pub(super) fn duplicate(token: &str, first: u32, second: u32) -> Error {
    Error::invalid(format!("the vocabulary has the token {token:?} twice, as {first} and as {second}"))
}

/// Runs `call`: the library panics on some inputs that nobody should have made.
fn caught<T>(doing: &str, call: impl FnOnce() -> Result<T>) -> Result<T> {
    catch_unwind(AssertUnwindSafe(call)).unwrap_or_else(|panic| {
        let message = panic
            .downcast_ref::<String>()
            .map(String::as_str)
            .or_else(|| panic.downcast_ref::<&str>().copied())
            .unwrap_or("no message");
        Err(Error::invalid(format!(
            "the tokenizer is malformed: the library that reads it failed while {doing}: {message}"
        )))
    })
}
