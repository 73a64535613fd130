//! SentencePiece's byte-pair encoding: the vocabulary's scores say what to merge first.

use std::cmp::Ordering;
use std::collections::HashMap;
use std::collections::hash_map::Entry;

use setu_core::Result;

use super::library::duplicate;
use super::merging::merge;
use super::special::Specials;

/// How SentencePiece writes a space.
const SPACE: &str = "▁";

pub(super) struct Spm {
    /// The tokens that text is made of.
    ids: HashMap<String, u32>,
    scores: Vec<f32>,
    /// The token of each byte, for characters that have none.
    bytes: [Option<u32>; 256],
    /// For bytes that have no token.
    unknown: Option<u32>,
    space_prefix: bool,
    specials: Specials,
    frozen: Specials,
}

/// What an [`Spm`] is made of.
pub(super) struct SpmParts {
    pub tokens: Vec<(String, u32)>,
    pub scores: Vec<f32>,
    pub bytes: [Option<u32>; 256],
    pub unknown: Option<u32>,
    /// A space goes in front of a text, and of what follows a special token.
    pub space_prefix: bool,
    pub specials: Specials,
    /// Found in the text as the vocabulary writes it, spaces included, and never merged.
    pub frozen: Specials,
}

impl Spm {
    pub fn new(parts: SpmParts) -> Result<Spm> {
        let mut ids = HashMap::with_capacity(parts.tokens.len());
        for (token, id) in parts.tokens {
            match ids.entry(token) {
                Entry::Vacant(vacant) => vacant.insert(id),
                Entry::Occupied(first) => return Err(duplicate(first.key(), *first.get(), id)),
            };
        }
        Ok(Spm {
            ids,
            scores: parts.scores,
            bytes: parts.bytes,
            unknown: parts.unknown,
            space_prefix: parts.space_prefix,
            specials: parts.specials,
            frozen: parts.frozen,
        })
    }

    pub fn id(&self, token: &str) -> Option<u32> {
        self.ids.get(token).copied().or_else(|| self.specials.id(token)).or_else(|| self.frozen.id(token))
    }

    pub fn encode(&self, text: &str, parse_special: bool) -> Vec<u32> {
        let mut ids = Vec::new();
        let mut behind_special = true;
        self.specials.split(text, parse_special, |piece| match piece {
            Ok(text) => {
                let prefix = if self.space_prefix && behind_special { SPACE } else { "" };
                let written = format!("{prefix}{}", text.replace(' ', SPACE));
                self.frozen.split(&written, false, |piece| match piece {
                    Ok(text) => self.encode_text(text, &mut ids),
                    Err(frozen) => ids.push(frozen),
                });
                behind_special = false;
            }
            Err(special) => {
                ids.push(special);
                behind_special = true;
            }
        });
        ids
    }

    fn encode_text(&self, text: &str, ids: &mut Vec<u32>) {
        let ends = text.char_indices().map(|(start, character)| start + character.len_utf8());
        let score = |span| Some(Score(self.scores[*self.ids.get(&text[span])? as usize]));
        for span in merge(ends, score) {
            match self.ids.get(&text[span.clone()]) {
                Some(&id) => ids.push(id),
                None => {
                    ids.extend(text[span].bytes().filter_map(|byte| self.bytes[usize::from(byte)].or(self.unknown)))
                }
            }
        }
    }
}

struct Score(f32);

impl Ord for Score {
    fn cmp(&self, other: &Score) -> Ordering {
        self.0.total_cmp(&other.0)
    }
}

impl PartialOrd for Score {
    fn partial_cmp(&self, other: &Score) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Score {
    fn eq(&self, other: &Score) -> bool {
        self.cmp(other).is_eq()
    }
}

impl Eq for Score {}
