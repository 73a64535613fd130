//! Tokens of a model that knows nothing.
//!
//! All logits are 0, and a token is drawn evenly from those allowed, by the session's seed and the token's
//! position alone. That holds for a greedy request too, whose every token would be the same otherwise. The
//! tokens that a slot suppresses until `min_tokens` are the ones that end the answer; they are not drawn
//! later either, so that a length asked for is the length got.

use setu_core::backend::{NO_TOKEN, SlotOpen};
use setu_core::sampling::uniform;

/// A bias from which a token counts as forbidden; requests can't ask for a lower one.
const FORBIDDING_BIAS: f32 = -100.0;

/// A sampler slot.
#[derive(Clone, Debug, Default)]
pub struct Slot {
    seed: u64,
    /// Tokens that are never drawn, sorted.
    avoided: Vec<u32>,
}

impl Slot {
    pub fn new(open: &SlotOpen<'_>) -> Slot {
        let biases = open.bias_tokens.iter().zip(open.bias_values.iter());
        let forbidden = biases.filter(|&(_, &bias)| bias <= FORBIDDING_BIAS).map(|(&token, _)| token);
        let mut avoided: Vec<u32> = open.suppressed.iter().copied().chain(forbidden).collect();
        avoided.sort_unstable();
        avoided.dedup();
        Slot { seed: open.seed, avoided }
    }

    /// The token at `position` of the session, [`NO_TOKEN`] if none is allowed. In `mask` bit `token % 32` of word
    /// `token / 32` allows a token.
    pub fn draw(&self, vocab: u32, position: u64, mask: Option<&[u32]>) -> u32 {
        let masked = |token: u32| {
            mask.is_none_or(|mask| mask.get(token as usize / 32).is_some_and(|word| word >> (token % 32) & 1 == 1))
        };
        let allowed = |token: &u32| self.avoided.binary_search(token).is_err() && masked(*token);
        let place = uniform(self.seed, position);
        let first = ((place * f64::from(vocab)) as u32).min(vocab.saturating_sub(1));
        if (first..vocab).next().as_ref().is_some_and(allowed) {
            return first;
        }
        let count = (0..vocab).filter(allowed).count();
        (0..vocab).filter(allowed).nth((place * count as f64) as usize).unwrap_or(NO_TOKEN)
    }
}

/// The log-probability of every token.
pub fn logprob(vocab: u32) -> f32 {
    -f64::from(vocab.max(1)).ln() as f32
}

#[cfg(test)]
mod tests {
    use super::*;

    const VOCAB: u32 = 70;

    fn slot(seed: u64, avoided: &[u32]) -> Slot {
        Slot { seed, avoided: avoided.to_vec() }
    }

    fn mask(allowed: &[u32]) -> [u32; 3] {
        let mut mask = [0; 3];
        allowed.iter().for_each(|token| mask[*token as usize / 32] |= 1 << (token % 32));
        mask
    }

    #[test]
    fn only_allowed_tokens_are_drawn_and_all_of_them() {
        let most: Vec<u32> = (0..VOCAB).filter(|token| token % 7 != 3).collect();
        // (avoided, mask, what can be drawn)
        type Case<'a> = (&'a [u32], Option<[u32; 3]>, Vec<u32>);
        let cases: [Case<'_>; 5] = [
            (&[], None, (0..VOCAB).collect()),
            (&[0, 69], None, (1..69).collect()),
            (&most, None, (0..10).map(|n| 7 * n + 3).collect()),
            (&[33], Some(mask(&[1, 33, 64, 69])), vec![1, 64, 69]),
            (&[5], Some(mask(&[5])), vec![NO_TOKEN]),
        ];
        for (avoided, mask, expected) in cases {
            let slot = slot(3, avoided);
            let mut drawn: Vec<u32> =
                (0..3000).map(|position| slot.draw(VOCAB, position, mask.as_ref().map(|mask| &mask[..]))).collect();
            drawn.sort_unstable();
            drawn.dedup();
            assert_eq!(drawn, expected, "{avoided:?} {mask:?}");
        }
    }

    #[test]
    fn seed_and_position_alone_decide() {
        let tokens =
            |seed| -> Vec<u32> { (0..50).map(|position| slot(seed, &[4]).draw(1000, position, None)).collect() };
        assert_eq!(tokens(1), tokens(1));
        assert_ne!(tokens(1), tokens(2));
    }

    #[test]
    fn a_mask_that_is_too_short_forbids() {
        assert_eq!(slot(1, &[]).draw(VOCAB, 0, Some(&[])), NO_TOKEN);
    }
}
