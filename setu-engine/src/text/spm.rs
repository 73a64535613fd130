//! SentencePiece's byte-pair encoding: the vocabulary's scores say what to merge first.

use std::cmp::Ordering;
use std::collections::hash_map::Entry;
use std::collections::{BinaryHeap, HashMap};

use setu_core::Result;

use super::library::duplicate;
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
}

/// A run of characters that are one token so far; a list, since neighbours merge.
struct Symbol {
    start: usize,
    end: usize,
    previous: Option<usize>,
    next: Option<usize>,
}

/// Two neighbours whose text is a token.
struct Merge {
    score: f32,
    left: usize,
    right: usize,
    /// Where the two lay when they were found; one of them has merged since if they don't any more.
    start: usize,
    end: usize,
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
        })
    }

    pub fn id(&self, token: &str) -> Option<u32> {
        self.ids.get(token).copied().or_else(|| self.specials.id(token))
    }

    pub fn encode(&self, text: &str, parse_special: bool) -> Vec<u32> {
        let mut ids = Vec::new();
        let mut behind_special = true;
        self.specials.split(text, parse_special, |piece| match piece {
            Ok(text) => {
                let prefix = if self.space_prefix && behind_special { SPACE } else { "" };
                self.encode_text(&format!("{prefix}{}", text.replace(' ', SPACE)), &mut ids);
                behind_special = false;
            }
            Err(special) => {
                ids.push(special);
                behind_special = true;
            }
        });
        ids
    }

    /// Merges neighbours, the best score first and of equal ones the leftmost, until no two make a token.
    fn encode_text(&self, text: &str, ids: &mut Vec<u32>) {
        let mut symbols: Vec<Symbol> = text
            .char_indices()
            .enumerate()
            .map(|(at, (start, character))| Symbol {
                start,
                end: start + character.len_utf8(),
                previous: at.checked_sub(1),
                next: Some(at + 1),
            })
            .collect();
        match symbols.last_mut() {
            Some(last) => last.next = None,
            None => return,
        }
        let mut merges: BinaryHeap<Merge> =
            (1..symbols.len()).filter_map(|right| self.merge(text, &symbols, right - 1, right)).collect();
        while let Some(Merge { left, right, start, end, .. }) = merges.pop() {
            if symbols[left].start != start || symbols[left].end != symbols[right].start || symbols[right].end != end {
                continue;
            }
            let next = symbols[right].next;
            symbols[left].end = end;
            symbols[left].next = next;
            symbols[right].start = end;
            if let Some(next) = next {
                symbols[next].previous = Some(left);
                merges.extend(self.merge(text, &symbols, left, next));
            }
            if let Some(previous) = symbols[left].previous {
                merges.extend(self.merge(text, &symbols, previous, left));
            }
        }
        let mut at = Some(0);
        while let Some(symbol) = at {
            let Symbol { start, end, next, .. } = symbols[symbol];
            match self.ids.get(&text[start..end]) {
                Some(&id) => ids.push(id),
                None => ids
                    .extend(text[start..end].bytes().filter_map(|byte| self.bytes[usize::from(byte)].or(self.unknown))),
            }
            at = next;
        }
    }

    fn merge(&self, text: &str, symbols: &[Symbol], left: usize, right: usize) -> Option<Merge> {
        let (start, end) = (symbols[left].start, symbols[right].end);
        let id = *self.ids.get(&text[start..end])?;
        Some(Merge { score: self.scores[id as usize], left, right, start, end })
    }
}

impl Ord for Merge {
    fn cmp(&self, other: &Merge) -> Ordering {
        self.score.total_cmp(&other.score).then_with(|| other.left.cmp(&self.left))
    }
}

impl PartialOrd for Merge {
    fn partial_cmp(&self, other: &Merge) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Merge {
    fn eq(&self, other: &Merge) -> bool {
        self.cmp(other).is_eq()
    }
}

impl Eq for Merge {}
