//! A model's vocabulary as `toktrie` wants it.

use std::sync::Arc;

use setu_core::{Error, Result};
use toktrie::{TokEnv, TokRxInfo, TokTrie, TokenId, TokenizerEnv};

use crate::text::{EncodeOptions, Tokenizer};

struct Vocabulary {
    trie: TokTrie,
    tokenizer: Arc<Tokenizer>,
}

/// The tokens of `tokenizer`, and for the rest of `vocab_size` logits tokens without text.
///
/// # Errors
/// No token ends an answer.
pub fn tokens(tokenizer: &Arc<Tokenizer>, vocab_size: u32) -> Result<TokEnv> {
    let ends: Vec<u32> = tokenizer.eos_ids().iter().copied().filter(|&id| id < vocab_size).collect();
    let Some(&end) = ends.first() else {
        return Err(Error::unsupported("the model's tokenizer has no token that ends an answer, so no grammar can"));
    };
    let words: Vec<Vec<u8>> = (0..vocab_size).map(|id| word(tokenizer, id)).collect();
    let trie = TokTrie::from(&TokRxInfo::new(vocab_size, end), &words).with_eos_tokens(&ends);
    Ok(Arc::new(Vocabulary { trie, tokenizer: tokenizer.clone() }))
}

/// A token's bytes; special tokens are set apart from text of the same look.
fn word(tokenizer: &Tokenizer, id: u32) -> Vec<u8> {
    let Ok(bytes) = tokenizer.token_bytes(id) else { return Vec::new() };
    if bytes.is_empty() || !tokenizer.is_special(id) {
        return bytes.to_vec();
    }
    [&[TokTrie::SPECIAL_TOKEN_MARKER], bytes].concat()
}

impl Vocabulary {
    /// The tokens that the model would read `text` as, unless the tokenizer adds to it.
    fn exact(&self, text: &str) -> Option<Vec<TokenId>> {
        let ids = self.tokenizer.encode(text, EncodeOptions::PLAIN).ok()?;
        (self.trie.decode_raw(&ids) == text.as_bytes()).then_some(ids)
    }
}

impl TokenizerEnv for Vocabulary {
    fn tok_trie(&self) -> &TokTrie {
        &self.trie
    }

    fn tokenize_bytes(&self, bytes: &[u8]) -> Vec<TokenId> {
        let exact = |text: &str| self.exact(text).unwrap_or_else(|| self.trie.greedy_tokenize(text.as_bytes()));
        self.trie.tokenize_with_greedy_fallback(bytes, exact)
    }

    /// Where a text's tokens depend on where it stands, none of them may be forced.
    fn tokenize_is_canonical(&self) -> bool {
        self.exact("{\"name\": ").is_some()
    }
}
