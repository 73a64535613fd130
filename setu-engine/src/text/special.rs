//! Finds the tokens that stand in a text as such.

use std::collections::HashMap;

use aho_corasick::{AhoCorasick, AhoCorasickBuilder, MatchKind};
use setu_core::{Error, Result};

/// A token that is found in the text before the rest is encoded.
pub(super) struct SpecialToken {
    pub text: String,
    pub id: u32,
    /// Found only where special tokens are parsed; others (user-defined ones) always are.
    pub special: bool,
    /// Takes the whitespace behind it along.
    pub strip_right: bool,
}

#[derive(Default)]
pub(super) struct Specials {
    all: Finder,
    always: Finder,
    ids: HashMap<String, u32>,
}

#[derive(Default)]
struct Finder {
    patterns: Option<AhoCorasick>,
    /// Of each pattern, its id and whether whitespace behind it goes along.
    found: Vec<(u32, bool)>,
}

impl Specials {
    pub fn new(tokens: Vec<SpecialToken>) -> Result<Specials> {
        let tokens: Vec<SpecialToken> = tokens.into_iter().filter(|token| !token.text.is_empty()).collect();
        Ok(Specials {
            all: Finder::new(tokens.iter())?,
            always: Finder::new(tokens.iter().filter(|token| !token.special))?,
            ids: tokens.iter().map(|token| (token.text.clone(), token.id)).collect(),
        })
    }

    pub fn id(&self, token: &str) -> Option<u32> {
        self.ids.get(token).copied()
    }

    /// Hands out the pieces of `text` in order: text that is none of these tokens, or a token's id as `Err`.
    /// Of tokens that begin at one place the longest is taken.
    pub fn split(&self, text: &str, parse_special: bool, mut piece: impl FnMut(Result<&str, u32>)) {
        let finder = if parse_special { &self.all } else { &self.always };
        let mut done = 0;
        for found in finder.patterns.iter().flat_map(|patterns| patterns.find_iter(text)) {
            // Whitespace taken along may hold the beginning of the next match.
            if found.start() < done {
                continue;
            }
            if found.start() > done {
                piece(Ok(&text[done..found.start()]));
            }
            let (id, strip_right) = finder.found[found.pattern().as_usize()];
            piece(Err(id));
            done = found.end();
            if strip_right {
                done = text.len() - text[done..].trim_start().len();
            }
        }
        if done < text.len() {
            piece(Ok(&text[done..]));
        }
    }
}

impl Finder {
    fn new<'a>(tokens: impl Iterator<Item = &'a SpecialToken> + Clone) -> Result<Finder> {
        let found: Vec<(u32, bool)> = tokens.clone().map(|token| (token.id, token.strip_right)).collect();
        if found.is_empty() {
            return Ok(Finder::default());
        }
        let patterns = AhoCorasickBuilder::new()
            .match_kind(MatchKind::LeftmostLongest)
            .build(tokens.map(|token| &token.text))
            .map_err(|error| Error::invalid(format!("the special tokens cannot be searched for: {error}")))?;
        Ok(Finder { patterns: Some(patterns), found })
    }
}
