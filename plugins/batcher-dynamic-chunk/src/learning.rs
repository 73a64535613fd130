//! What is put into steps while the engine can't yet predict what a prompt costs beside running answers.
//!
//! A first chunk is small. It grows, at most twofold, as steps stay under the target, and never by more than
//! the last one left room for; a step over the target halves it. Once prompts can be predicted, predictions
//! are trusted up to twice the largest chunk that was seen, so that a model learned from a few small chunks can't ask
//! for a huge one.

use setu_core::view::StepOutcome;

/// Tokens of the first chunk.
const FIRST_TOKENS: u32 = 32;

/// See the [module](self).
#[derive(Clone, Debug)]
pub struct Learning {
    least_tokens: u32,
    /// What is tried next while nothing can be predicted.
    next_tokens: u32,
    /// Most prompt tokens that a step was seen to hold.
    seen_tokens: u32,
}

impl Learning {
    /// Starts where nothing is known; it never asks for fewer than `min_chunk_tokens`.
    pub fn new(min_chunk_tokens: u32) -> Learning {
        let least_tokens = FIRST_TOKENS.max(min_chunk_tokens);
        Learning { least_tokens, next_tokens: least_tokens, seen_tokens: 0 }
    }

    /// Takes in what a step was, given what it should have taken at most.
    pub fn observe(&mut self, outcome: &StepOutcome, target_s: f64) {
        let tokens = outcome.prefill_tokens;
        if tokens == 0 || !(outcome.took_s > 0.0 && outcome.took_s.is_finite()) {
            return;
        }
        self.seen_tokens = self.seen_tokens.max(tokens);
        // As many tokens would have filled the target if a step without them took no time, so it is no more than that.
        let filling = f64::from(tokens) * target_s / outcome.took_s;
        let doubled = 2.0 * f64::from(tokens);
        let next = if outcome.decodes == 0 {
            // Nobody had to be spared. Half, since there will be decodes.
            (0.5 * filling).min(doubled).max(f64::from(self.next_tokens))
        } else if outcome.took_s > target_s {
            f64::from(self.next_tokens.min(tokens)) / 2.0
        } else {
            filling.min(doubled).max(f64::from(self.next_tokens))
        };
        self.next_tokens = (next as u32).max(self.least_tokens);
    }

    /// Most prompt tokens that the next step may hold beside decodes, all prompts together.
    pub fn most_tokens(&self, can_predict: bool) -> u32 {
        if can_predict { self.seen_tokens.saturating_mul(2).max(self.least_tokens) } else { self.next_tokens }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outcome(prefill_tokens: u32, decodes: u32, took_s: f64) -> StepOutcome {
        let mut outcome = StepOutcome::default();
        (outcome.prefill_tokens, outcome.decodes, outcome.took_s) = (prefill_tokens, decodes, took_s);
        outcome
    }

    #[test]
    fn chunks_grow_under_the_target_and_shrink_over_it() {
        // (tokens, decodes, took in seconds, tokens to try next), one behind the other, with a target of 50 ms
        let story = [
            (0, 4, 0.010, 32),
            (32, 4, 0.016, 64),
            (64, 4, 0.022, 128),
            (20, 4, 0.012, 128),
            (128, 4, 0.040, 160),
            (160, 4, 0.060, 80),
            (80, 4, 0.500, 40),
            (40, 4, 0.500, 32),
            (32, 4, f64::NAN, 32),
            (2048, 0, 0.400, 128),
            (10, 0, 0.005, 128),
        ];
        let mut learning = Learning::new(32);
        for (tokens, decodes, took_s, next) in story {
            learning.observe(&outcome(tokens, decodes, took_s), 0.05);
            assert_eq!(learning.most_tokens(false), next, "after {tokens} tokens in {took_s} s");
        }
        assert_eq!(learning.most_tokens(true), 4096);
    }

    #[test]
    fn predictions_are_trusted_twofold() {
        let mut learning = Learning::new(0);
        assert_eq!(learning.most_tokens(true), FIRST_TOKENS);
        learning.observe(&outcome(100, 1, 1.0), 0.05);
        assert_eq!(learning.most_tokens(true), 200);
        learning.observe(&outcome(u32::MAX, 1, 1.0), 0.05);
        assert_eq!(learning.most_tokens(true), u32::MAX);
    }
}
