//! Tokenizers from Mistral's `tekken.json`: byte-level BPE by ranks, special tokens in front.
//!
//! A token's rank says both what its id is and when it is merged: among neighbours that make a token, those of the
//! lowest rank merge first. The library wants merges instead, so each token's two halves are found by merging its own
//! bytes with the ranks before it. A token that doesn't come to two halves so can't come about by merging in any
//! text either, and is only found as a whole word.

use std::cmp::Reverse;
use std::collections::HashMap;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;
use setu_core::{Error, Result};

use super::files::{TextFiles, eos_ids};
use super::library::{Added, Library};
use super::merging::merge;
use super::tokenizer::{Encoder, Tokenizer};
use super::vocabulary::{Kind, Vocabulary, written_byte_level};

#[derive(Deserialize)]
struct Tekken {
    config: Config,
    vocab: Vec<Ranked>,
    #[serde(default)]
    special_tokens: Option<Vec<SpecialToken>>,
}

#[derive(Deserialize)]
struct Config {
    /// Cuts text into words.
    pattern: String,
    /// Tokens that ids are given to, special ones included; the file may list more.
    default_vocab_size: usize,
    default_num_special_tokens: usize,
}

#[derive(Deserialize)]
struct Ranked {
    rank: usize,
    token_bytes: String,
}

#[derive(Deserialize)]
struct SpecialToken {
    rank: usize,
    token_str: String,
}

/// The special tokens of the first versions, whose files don't list them.
const FIRST_SPECIAL_TOKENS: [&str; 20] = [
    "<unk>",
    "<s>",
    "</s>",
    "[INST]",
    "[/INST]",
    "[AVAILABLE_TOOLS]",
    "[/AVAILABLE_TOOLS]",
    "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]",
    "[TOOL_CALLS]",
    "[IMG]",
    "<pad>",
    "[IMG_BREAK]",
    "[IMG_END]",
    "[PREFIX]",
    "[MIDDLE]",
    "[SUFFIX]",
    "[SYSTEM_PROMPT]",
    "[/SYSTEM_PROMPT]",
    "[TOOL_CONTENT]",
];

/// More than any published vocabulary has.
const MAX_SPECIAL_TOKENS: usize = 65_536;

/// Builds the tokenizer of `files`, whose `tokenizer` is a `tekken.json`.
pub(super) fn from_files(files: &TextFiles) -> Result<Tokenizer> {
    let tekken: Tekken = serde_json::from_slice(&files.tokenizer)
        .map_err(|error| Error::invalid(format!("not a Tekken vocabulary, or cut short: {error}")))?;
    let special = special_tokens(&tekken)?;
    let ranked = ranked_tokens(&tekken, special.len())?;

    let mut vocabulary = Vocabulary::with_capacity(special.len() + ranked.len());
    for name in &special {
        vocabulary.push(Kind::Special, |bytes| bytes.extend_from_slice(name.as_bytes()))?;
    }
    for token in &ranked {
        vocabulary.push(Kind::Text, |bytes| bytes.extend_from_slice(token))?;
    }
    let place = |name: &str| special.iter().position(|known| known == name).map(|place| place as u32);
    let bos = files.token_name("bos_token").and_then(place).or_else(|| place("<s>"));
    let eos = files.token_name("eos_token").and_then(place).or_else(|| place("</s>"));

    let written = ranked.iter().map(|token| written_byte_level(token));
    let tokens = special.iter().cloned().chain(written).zip(0..).collect();
    let added = special.into_iter().map(|text| Added { text, special: true }).collect();
    let library = Library::byte_level(tokens, merges(&ranked)?, added, &[&tekken.config.pattern], true)?;
    Ok(Tokenizer {
        eos_ids: eos_ids(files, eos, vocabulary.len())?,
        encoder: Encoder::Library(Box::new(library)),
        vocabulary,
        prefix: bos,
        suffix: None,
        bos,
        eos,
        begins_with_space: false,
    })
}

/// The names of the special tokens in the order of their ids, with fillers where fewer are named than there are.
fn special_tokens(tekken: &Tekken) -> Result<Vec<String>> {
    let count = tekken.config.default_num_special_tokens;
    if count > MAX_SPECIAL_TOKENS {
        return Err(Error::invalid(format!(
            "`default_num_special_tokens` is {count}; at most {MAX_SPECIAL_TOKENS} are possible"
        )));
    }
    let mut names: Vec<String> = match &tekken.special_tokens {
        Some(listed) => {
            if let Some((place, token)) = listed.iter().enumerate().find(|(place, token)| token.rank != *place) {
                return Err(Error::invalid(format!(
                    "special_tokens[{place}] ({:?}) has the rank {}",
                    token.token_str, token.rank
                )));
            }
            listed.iter().map(|token| token.token_str.clone()).collect()
        }
        None => FIRST_SPECIAL_TOKENS.map(str::to_owned).to_vec(),
    };
    if names.len() > count {
        return Err(Error::invalid(format!(
            "there are {} special tokens, more than `default_num_special_tokens`, which is {count}",
            names.len()
        )));
    }
    if let Some(place) = names.iter().position(String::is_empty) {
        return Err(Error::invalid(format!("special_tokens[{place}] is empty")));
    }
    names.extend((names.len()..count).map(|id| format!("<SPECIAL_{id}>")));
    Ok(names)
}

/// The bytes of the tokens that get ids, by rank.
fn ranked_tokens(tekken: &Tekken, special: usize) -> Result<Vec<Vec<u8>>> {
    let size = tekken.config.default_vocab_size;
    let count = size.checked_sub(special).filter(|&count| (256..=tekken.vocab.len()).contains(&count));
    let count = count.ok_or_else(|| {
        Error::invalid(format!(
            "`default_vocab_size` is {size}, which {special} special tokens and a vocabulary of {} don't make",
            tekken.vocab.len()
        ))
    })?;
    let token = |(place, token): (usize, &Ranked)| {
        if token.rank != place {
            return Err(Error::invalid(format!("vocab[{place}] has the rank {}", token.rank)));
        }
        let bytes = STANDARD.decode(&token.token_bytes);
        let bytes = bytes.map_err(|error| {
            Error::invalid(format!("vocab[{place}].token_bytes {:?} is not base64: {error}", token.token_bytes))
        })?;
        if bytes.is_empty() { Err(Error::invalid(format!("vocab[{place}] is empty"))) } else { Ok(bytes) }
    };
    tekken.vocab[..count].iter().enumerate().map(token).collect()
}

/// For each token that merging makes, its two halves.
fn merges(ranked: &[Vec<u8>]) -> Result<Vec<(String, String)>> {
    let ranks: HashMap<&[u8], usize> = ranked.iter().zip(0..).map(|(token, rank)| (&token[..], rank)).collect();
    if let Some(byte) = (0..=255u8).find(|byte| !ranks.contains_key(&[*byte][..])) {
        return Err(Error::invalid(format!("the vocabulary has no token for the byte 0x{byte:02x}")));
    }
    let halves = |(token, rank): (&Vec<u8>, usize)| {
        let lower = |span| Some(Reverse(*ranks.get(&token[span])?)).filter(|found| found.0 < rank);
        match &merge(1..=token.len(), lower)[..] {
            [left, right] => {
                Some((written_byte_level(&token[left.clone()]), written_byte_level(&token[right.clone()])))
            }
            _ => None,
        }
    };
    Ok(ranked.iter().zip(0..).filter_map(halves).collect())
}
