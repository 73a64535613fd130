//! What must hold of a `tokenizer.json` before the library builds it, and what it doesn't tell afterwards.
//!
//! The library trusts the file: merges longer than any token make it panic, and ids that contradict each other
//! are given anew without an error.

use serde::de::{IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};
use setu_core::{Error, Result};

/// The parts of a `tokenizer.json` that are looked at.
#[derive(Deserialize)]
pub(super) struct Outline {
    #[serde(default)]
    pub added_tokens: Vec<AddedToken>,
    #[serde(default)]
    pub decoder: serde_json::Value,
    model: Option<Model>,
}

#[derive(Deserialize)]
pub(super) struct AddedToken {
    pub id: u32,
    pub content: String,
}

#[derive(Deserialize)]
struct Model {
    #[serde(rename = "type")]
    kind: Option<String>,
    #[serde(default)]
    vocab: Tokens,
    #[serde(default)]
    merges: Merges,
}

#[derive(Default)]
struct Tokens {
    count: usize,
    longest: usize,
    max_id: u32,
}

#[derive(Default)]
struct Merges {
    /// Bytes of the longest token that a merge makes.
    longest: usize,
}

/// Ids may leave gaps, but not so many that tables by id grow out of proportion.
const MAX_GAPS: usize = 65_536;

impl Outline {
    pub fn read(bytes: &[u8]) -> Result<Outline> {
        let outline: Outline = serde_json::from_slice(bytes).map_err(|error| match error.classify() {
            serde_json::error::Category::Data => Error::invalid(format!("not a tokenizer: {error}")),
            _ => Error::invalid(format!("not JSON, or cut short: {error}")),
        })?;
        outline.check()?;
        Ok(outline)
    }

    /// Tokens in the model's own vocabulary, each name counted as often as it is written.
    pub fn model_len(&self) -> usize {
        self.model.as_ref().map_or(0, |model| model.vocab.count)
    }

    pub fn max_id(&self) -> u32 {
        let own = self.model.as_ref().map_or(0, |model| model.vocab.max_id);
        self.added_tokens.iter().map(|token| token.id).fold(own, u32::max)
    }

    fn check(&self) -> Result<()> {
        let Some(model) = &self.model else {
            return Err(Error::invalid("not a tokenizer: it has no `model`"));
        };
        if let Some(kind) = model.kind.as_deref().filter(|kind| !["BPE", "Unigram"].contains(kind)) {
            return Err(Error::unsupported(format!(
                "tokenizers of the kind `{kind}` are not provided, only BPE and Unigram"
            )));
        }
        if model.vocab.count == 0 {
            return Err(Error::invalid("its vocabulary (model.vocab) is empty"));
        }
        let tokens = model.vocab.count + self.added_tokens.len();
        if self.max_id() as usize > tokens.saturating_mul(2).saturating_add(MAX_GAPS) {
            return Err(Error::invalid(format!("the id {} is out of proportion to {tokens} tokens", self.max_id())));
        }
        if model.merges.longest > model.vocab.longest {
            return Err(Error::invalid(format!(
                "a merge (model.merges) makes a token of {} bytes, but the longest has {}",
                model.merges.longest, model.vocab.longest
            )));
        }
        Ok(())
    }
}

impl<'de> Deserialize<'de> for Tokens {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Tokens, D::Error> {
        deserializer.deserialize_any(TokensVisitor)
    }
}

struct TokensVisitor;

impl<'de> Visitor<'de> for TokensVisitor {
    type Value = Tokens;

    fn expecting(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        f.write_str("a vocabulary: ids by token, or pairs of token and score")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Tokens, A::Error> {
        let mut tokens = Tokens::default();
        while let Some((Length(length), id)) = map.next_entry::<Length, u32>()? {
            tokens.count += 1;
            tokens.longest = tokens.longest.max(length);
            tokens.max_id = tokens.max_id.max(id);
        }
        Ok(tokens)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut pairs: A) -> Result<Tokens, A::Error> {
        let mut tokens = Tokens::default();
        while let Some((Length(length), IgnoredAny)) = pairs.next_element::<(Length, IgnoredAny)>()? {
            tokens.max_id = u32::try_from(tokens.count).unwrap_or(u32::MAX);
            tokens.count += 1;
            tokens.longest = tokens.longest.max(length);
        }
        Ok(tokens)
    }
}

impl<'de> Deserialize<'de> for Merges {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Merges, D::Error> {
        deserializer.deserialize_seq(MergesVisitor)
    }
}

struct MergesVisitor;

impl<'de> Visitor<'de> for MergesVisitor {
    type Value = Merges;

    fn expecting(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        f.write_str("a list of merges")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut merges: A) -> Result<Merges, A::Error> {
        let mut longest = 0;
        while let Some(Merge(length)) = merges.next_element()? {
            longest = longest.max(length);
        }
        Ok(Merges { longest })
    }
}

/// The bytes of the token that a merge, written as one string or as two, makes.
struct Merge(usize);

impl<'de> Deserialize<'de> for Merge {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Merge, D::Error> {
        deserializer.deserialize_any(MergeVisitor)
    }
}

struct MergeVisitor;

impl<'de> Visitor<'de> for MergeVisitor {
    type Value = Merge;

    fn expecting(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        f.write_str("a merge: two tokens")
    }

    fn visit_str<E>(self, merge: &str) -> Result<Merge, E> {
        Ok(Merge(merge.len().saturating_sub(1)))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut tokens: A) -> Result<Merge, A::Error> {
        let mut length = 0;
        while let Some(Length(token)) = tokens.next_element()? {
            length += token;
        }
        Ok(Merge(length))
    }
}

/// A string's length in bytes; the string itself is not kept.
struct Length(usize);

impl<'de> Deserialize<'de> for Length {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Length, D::Error> {
        deserializer.deserialize_str(LengthVisitor)
    }
}

struct LengthVisitor;

impl Visitor<'_> for LengthVisitor {
    type Value = Length;

    fn expecting(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        f.write_str("a string")
    }

    fn visit_str<E>(self, string: &str) -> Result<Length, E> {
        Ok(Length(string.len()))
    }
}
