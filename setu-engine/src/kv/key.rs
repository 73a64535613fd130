//! The identity of a page's content: a hash over all tokens up to its end.

use sha2::{Digest, Sha256};

/// SHA-256 of a prefix. Collisions can't be made on purpose, so no tenant can read another's pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct PageKey([u8; 32]);

impl std::hash::Hash for PageKey {
    fn hash<H: std::hash::Hasher>(&self, state: &mut H) {
        // The digest is uniform already: its first word is as good a hash as any.
        state.write_u64(u64::from_le_bytes(self.0[..8].try_into().expect("8 bytes")));
    }
}

/// The keys of a session's full pages, extended as its tokens become known.
#[derive(Clone, Debug)]
pub struct PrefixKeys {
    root: PageKey,
    keys: Vec<PageKey>,
}

impl PrefixKeys {
    /// Keys for sessions of one salt (tenant) and adapter; others never share pages with them.
    pub fn new(salt: &[u8], adapter: u32) -> PrefixKeys {
        let mut hash = Sha256::new();
        hash.update(b"setu prefix 1");
        hash.update(adapter.to_le_bytes());
        hash.update((salt.len() as u64).to_le_bytes());
        hash.update(salt);
        PrefixKeys { root: PageKey(hash.finalize().into()), keys: Vec::new() }
    }

    /// The keys of all full pages of a session whose known tokens are `prompt` and then `output`.
    pub fn extend(&mut self, prompt: &[u32], output: &[u32], page_tokens: usize) -> &[PageKey] {
        let full = (prompt.len() + output.len()) / page_tokens;
        while self.keys.len() < full {
            let start = self.keys.len() * page_tokens;
            let mut hash = Sha256::new();
            hash.update(self.keys.last().unwrap_or(&self.root).0);
            for index in start..start + page_tokens {
                let token = if index < prompt.len() { prompt[index] } else { output[index - prompt.len()] };
                hash.update(token.to_le_bytes());
            }
            self.keys.push(PageKey(hash.finalize().into()));
        }
        &self.keys
    }

    /// Those computed so far.
    pub fn known(&self) -> &[PageKey] {
        &self.keys
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_depend_on_every_token_before_on_salt_and_adapter() {
        let keys = |salt: &[u8], adapter, prompt: &[u32], output: &[u32]| {
            PrefixKeys::new(salt, adapter).extend(prompt, output, 2).to_vec()
        };
        let base = keys(b"a", 0, &[1, 2, 3, 4, 5], &[]);
        assert_eq!(base.len(), 2);
        assert_eq!(base, keys(b"a", 0, &[1, 2], &[3, 4]), "the border of prompt and output doesn't matter");
        assert_eq!(base[0], keys(b"a", 0, &[1, 2, 9, 9], &[])[0]);
        assert_ne!(base[1], keys(b"a", 0, &[9, 2, 3, 4], &[])[1]);
        assert_ne!(base[0], keys(b"b", 0, &[1, 2], &[])[0]);
        assert_ne!(base[0], keys(b"a", 1, &[1, 2], &[])[0]);
    }
}
