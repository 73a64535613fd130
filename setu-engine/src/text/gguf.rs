//! Tokenizers from the metadata of GGUF files.

use setu_core::{Error, Result};
use tracing::warn;

use super::library::{Added, Library};
use super::pretokenizer;
use super::special::{SpecialToken, Specials};
use super::spm::{Spm, SpmParts};
use super::tokenizer::{Encoder, Tokenizer};
use super::vocabulary::{Kind, Vocabulary, fallback_byte, push_byte_level};

/// What a GGUF file says of its tokenizer, under `tokenizer.ggml.` where no other key is named.
#[derive(Clone, Debug, Default)]
pub struct GgufVocab {
    /// `model`: `gpt2` is byte-level BPE with merges, `llama` is SentencePiece's with scores.
    pub model: String,
    /// `pre`: how text is cut into words.
    pub pre: Option<String>,
    pub tokens: Vec<String>,
    pub scores: Option<Vec<f32>>,
    /// `token_type`: 1 normal, 2 unknown, 3 control, 4 user-defined, 5 unused, 6 byte.
    pub token_types: Option<Vec<i32>>,
    /// Two tokens each, with a space between.
    pub merges: Option<Vec<String>>,
    pub bos: Option<u32>,
    pub eos: Option<u32>,
    /// Ends a turn of a chat.
    pub eot: Option<u32>,
    /// Ends a message that is not the turn's last.
    pub eom: Option<u32>,
    pub unknown: Option<u32>,
    pub padding: Option<u32>,
    pub add_bos: Option<bool>,
    pub add_eos: Option<bool>,
    pub add_space_prefix: Option<bool>,
    /// Name and text of the chat templates, `tokenizer.chat_template` as `default` and
    /// `tokenizer.chat_template.NAME` as `NAME`.
    pub chat_templates: Vec<(String, String)>,
    /// `general.name`: a few models need more than the metadata has room for.
    pub name: Option<String>,
}

/// A token's entry in `token_type`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Type {
    Normal,
    Unknown,
    Control,
    UserDefined,
    Byte,
}

/// Tokens that end an answer by what they are called. Many files name only one of several.
const END_TOKENS: [&str; 14] = [
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|eom_id|>",
    "<end_of_turn>",
    "<end_of_utterance>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "<｜end▁of▁sentence｜>",
];

impl Tokenizer {
    /// # Errors
    /// If the metadata is incomplete, contradicts itself, or names a kind of tokenizer that is not provided.
    pub fn from_gguf(vocab: GgufVocab) -> Result<Tokenizer> {
        check(&vocab)?;
        match vocab.model.as_str() {
            "gpt2" => byte_level(vocab),
            "llama" => sentence_piece(vocab),
            "" => Err(Error::invalid("tokenizer.ggml.model is missing: the file has no tokenizer")),
            other => Err(Error::unsupported(format!(
                "tokenizers of the kind `{other}` (tokenizer.ggml.model) are not provided, only `gpt2` and `llama`; use the \
                 model's directory with tokenizer.json instead"
            ))),
        }
    }
}

fn check(vocab: &GgufVocab) -> Result<()> {
    let count = vocab.tokens.len();
    if count == 0 {
        return Err(Error::invalid("tokenizer.ggml.tokens is missing or empty: the file has no vocabulary"));
    }
    if u32::try_from(count).is_err() {
        return Err(Error::invalid(format!("tokenizer.ggml.tokens has {count} tokens, more than ids can tell apart")));
    }
    let lengths =
        [("scores", vocab.scores.as_ref().map(Vec::len)), ("token_type", vocab.token_types.as_ref().map(Vec::len))];
    for (key, length) in lengths {
        if let Some(length) = length.filter(|&length| length != count) {
            return Err(Error::invalid(format!("tokenizer.ggml.{key} has {length} entries for {count} tokens")));
        }
    }
    let ids = [
        ("bos", vocab.bos),
        ("eos", vocab.eos),
        ("eot", vocab.eot),
        ("eom", vocab.eom),
        ("unknown", vocab.unknown),
        ("padding", vocab.padding),
    ];
    for (key, id) in ids {
        if let Some(id) = id.filter(|&id| id as usize >= count) {
            return Err(Error::invalid(format!(
                "tokenizer.ggml.{key}_token_id is {id}, but the vocabulary has {count} tokens"
            )));
        }
    }
    Ok(())
}

/// The types of all tokens, and the ids that end an answer.
fn types(vocab: &GgufVocab) -> (Vec<Type>, Vec<u32>) {
    let mut types: Vec<Type> = match &vocab.token_types {
        Some(types) => types
            .iter()
            .map(|number| match number {
                2 => Type::Unknown,
                3 => Type::Control,
                4 => Type::UserDefined,
                6 => Type::Byte,
                _ => Type::Normal,
            })
            .collect(),
        None => vec![Type::Normal; vocab.tokens.len()],
    };
    let has = |name: &str| vocab.tokens.iter().any(|token| token == name);
    // Where an answer ends with one of these two, `<|end|>` only ends one of its parts.
    let in_parts = has("<|return|>") && has("<|call|>");
    let called_end = |token: &str| END_TOKENS.contains(&token) && !(in_parts && token == "<|end|>");
    let mut ends: Vec<u32> = [vocab.eos, vocab.eot, vocab.eom].into_iter().flatten().collect();
    for ((id, token), kind) in (0..).zip(&vocab.tokens).zip(&mut types) {
        if called_end(token) {
            ends.push(id);
            // Some files call them normal.
            *kind = Type::Control;
        }
    }
    ends.sort_unstable();
    ends.dedup();
    if vocab.token_types.is_none() {
        for &id in ends.iter().chain(&vocab.bos) {
            types[id as usize] = Type::Control;
        }
    }
    (types, ends)
}

impl Type {
    fn is_special(self) -> bool {
        matches!(self, Type::Unknown | Type::Control)
    }

    fn is_found_in_text(self) -> bool {
        self.is_special() || self == Type::UserDefined
    }

    fn kind(self) -> Kind {
        if self.is_special() { Kind::Special } else { Kind::Text }
    }
}

fn byte_level(vocab: GgufVocab) -> Result<Tokenizer> {
    let name = vocab.pre.as_deref().unwrap_or_else(|| {
        warn!("the file doesn't say how text is cut into words (tokenizer.ggml.pre); the answers may be poor");
        "default"
    });
    let pre = pretokenizer::find(name)?;
    let (types, eos_ids) = types(&vocab);
    let mut vocabulary = Vocabulary::with_capacity(vocab.tokens.len());
    for (token, &kind) in vocab.tokens.iter().zip(&types) {
        vocabulary.push(kind.kind(), |bytes| {
            if kind.is_found_in_text() {
                bytes.extend_from_slice(token.as_bytes())
            } else {
                push_byte_level(token, bytes)
            }
        })?;
    }
    let added = vocab
        .tokens
        .iter()
        .zip(&types)
        .filter(|(token, kind)| kind.is_found_in_text() && !token.is_empty())
        .map(|(token, kind)| Added { text: token.clone(), special: kind.is_special() })
        .collect();
    let longest = vocab.tokens.iter().map(String::len).max().unwrap_or(0);
    let merges = vocab
        .merges
        .ok_or_else(|| Error::invalid("tokenizer.ggml.merges is missing: byte-level BPE can't do without"))?;
    let merges = (0..).zip(merges).map(|(at, merge)| split_merge(at, merge, longest)).collect::<Result<_>>()?;
    let library = Library::byte_level(numbered(vocab.tokens), merges, added, pre.patterns, pre.ignore_merges)?;
    Ok(Tokenizer {
        encoder: Encoder::Library(Box::new(library)),
        vocabulary,
        prefix: added_id("bos", vocab.add_bos.unwrap_or(pre.add_bos), vocab.bos)?,
        suffix: added_id("eos", vocab.add_eos.unwrap_or(false), vocab.eos)?,
        bos: vocab.bos,
        eos: vocab.eos,
        eos_ids,
        begins_with_space: false,
    })
}

/// The tokens with their ids. Empty ones, which some files have in place of holes, are left out.
fn numbered(tokens: Vec<String>) -> Vec<(String, u32)> {
    tokens.into_iter().zip(0..).filter(|(token, _)| !token.is_empty()).collect()
}

fn split_merge(at: usize, mut merge: String, longest: usize) -> Result<(String, String)> {
    // The left token may itself begin with a space.
    let space = merge.bytes().skip(1).position(|byte| byte == b' ').map(|position| position + 1);
    let Some(space) = space.filter(|&space| space + 1 < merge.len()) else {
        return Err(Error::invalid(format!(
            "tokenizer.ggml.merges[{at}] is {merge:?}, not two tokens with a space between"
        )));
    };
    let right = merge.split_off(space + 1);
    merge.pop();
    if merge.len() + right.len() > longest {
        return Err(Error::invalid(format!(
            "tokenizer.ggml.merges[{at}] makes a token of {} bytes, but the longest has {longest}",
            merge.len() + right.len()
        )));
    }
    Ok((merge, right))
}

fn added_id(which: &str, add: bool, id: Option<u32>) -> Result<Option<u32>> {
    match (add, id) {
        (false, _) => Ok(None),
        (true, Some(id)) => Ok(Some(id)),
        (true, None) => Err(Error::invalid(format!(
            "texts are to begin or end with a {which} token, but tokenizer.ggml.{which}_token_id is missing"
        ))),
    }
}

fn sentence_piece(mut vocab: GgufVocab) -> Result<Tokenizer> {
    let count = vocab.tokens.len();
    let scores = vocab
        .scores
        .take()
        .ok_or_else(|| Error::invalid("tokenizer.ggml.scores is missing: SentencePiece's BPE can't do without"))?;
    if let Some(at) = scores.iter().position(|score| score.is_nan()) {
        return Err(Error::invalid(format!("tokenizer.ggml.scores[{at}] is not a number")));
    }
    // What SentencePiece numbers so, files needn't name.
    vocab.unknown = vocab.unknown.or_else(|| usual(&vocab, 0, "<unk>"));
    vocab.bos = vocab.bos.or_else(|| usual(&vocab, 1, "<s>"));
    vocab.eos = vocab.eos.or_else(|| usual(&vocab, 2, "</s>"));
    let (types, eos_ids) = types(&vocab);
    let space_prefix = vocab.add_space_prefix.unwrap_or(true);
    let phi3 = vocab.name.as_deref().is_some_and(|name| {
        let name = name.to_lowercase();
        name.contains("phi-3") || name.contains("phi3")
    });

    let mut vocabulary = Vocabulary::with_capacity(count);
    let mut byte_ids = [None; 256];
    let (mut tokens, mut specials) = (Vec::with_capacity(count), Vec::new());
    for ((token, id), &kind) in vocab.tokens.into_iter().zip(0..).zip(&types) {
        let byte = if kind == Type::Byte { fallback_byte(&token) } else { None };
        vocabulary.push(kind.kind(), |bytes| match (byte, kind.is_found_in_text()) {
            (Some(byte), _) => bytes.push(byte),
            (None, true) => bytes.extend_from_slice(token.as_bytes()),
            (None, false) => bytes.extend_from_slice(token.replace('▁', " ").as_bytes()),
        })?;
        if let Some(byte) = byte {
            byte_ids[usize::from(byte)] = Some(id);
        } else if kind.is_found_in_text() {
            let special = kind.is_special();
            let strip_right = phi3 && special && !["<unk>", "<s>", "<|endoftext|>"].contains(&token.as_str());
            specials.push(SpecialToken { text: token, id, special, strip_right });
        } else if !token.is_empty() {
            tokens.push((token, id));
        }
    }
    let parts = SpmParts {
        tokens,
        scores,
        bytes: byte_ids,
        unknown: vocab.unknown,
        space_prefix,
        specials: Specials::new(specials)?,
        frozen: Specials::default(),
    };
    Ok(Tokenizer {
        encoder: Encoder::Spm(Box::new(Spm::new(parts)?)),
        vocabulary,
        prefix: added_id("bos", vocab.add_bos.unwrap_or(true), vocab.bos)?,
        suffix: added_id("eos", vocab.add_eos.unwrap_or(false), vocab.eos)?,
        bos: vocab.bos,
        eos: vocab.eos,
        eos_ids,
        begins_with_space: space_prefix,
    })
}

fn usual(vocab: &GgufVocab, id: u32, token: &str) -> Option<u32> {
    (vocab.tokens.get(id as usize).map(String::as_str) == Some(token)).then_some(id)
}
