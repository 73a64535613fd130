//! How many tokens of a prompt fit into a time, and where to cut them.
//!
//! Each token of a chunk attends to those before it, so a chunk of n tokens behind a context of c costs
//! p · n + a · (n · c + n · (n + 1) / 2) seconds, p and a being the model's costs of a token and of a token of context.
//! Solved for n, chunks shrink as the context grows while steps take equally long.

use setu_core::view::StepTimeModel;

/// What a chunk of `tokens` behind `context` tokens costs. As [`StepTimeModel::chunk_s`], for chunks longer than one
/// and for numbers of any size.
pub fn seconds(model: &StepTimeModel, tokens: u32, context: u32) -> f64 {
    let (tokens, context) = (f64::from(tokens), f64::from(context));
    tokens * (model.prefill_token_s + model.prefill_context_s * (context + 0.5 * (tokens + 1.0)))
}

/// Most tokens that a chunk behind `context` tokens may hold to cost at most `left_s`.
pub fn tokens_within(model: &StepTimeModel, context: u32, left_s: f64) -> u32 {
    if left_s.is_nan() || left_s <= 0.0 {
        return 0;
    }
    // The positive root of square · n² + linear · n = left, in the form that neither cancels nor divides by a small
    // square.
    let square = 0.5 * model.prefill_context_s;
    let linear = model.prefill_token_s + model.prefill_context_s * (f64::from(context) + 0.5);
    let tokens = 2.0 * left_s / (linear + (linear * linear + 4.0 * square * left_s).sqrt());
    // So that rounding doesn't carry the sum of all chunks over the limit.
    (tokens * (1.0 - 1e-9)) as u32
}

/// Where to cut a chunk of `most` tokens, fewer than the `wanted` ones, behind `rows` others in the step: the step's
/// rows fill tiles of `tile` where there is a tile to fill, and what is left of the prompt is more than one token,
/// which would count as a decode.
pub fn cut(most: u32, wanted: u32, rows: u32, tile: u32) -> u32 {
    let over = (rows.saturating_add(most)) % tile.max(1);
    let tokens = if most > over + 1 { most - over } else { most };
    if wanted - tokens > 1 {
        tokens
    } else if tokens > tile + 1 {
        tokens - tile
    } else {
        tokens - u32::from(tokens > 2)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn model(prefill_token_s: f64, prefill_context_s: f64) -> StepTimeModel {
        let mut model = StepTimeModel::default();
        model.prefill_token_s = prefill_token_s;
        model.prefill_context_s = prefill_context_s;
        model
    }

    #[test]
    fn a_chunk_is_the_largest_that_fits() {
        for (token_s, context_s) in [(2e-4, 1e-7), (2e-4, 0.0), (0.0, 1e-7), (1e-6, 4e-10)] {
            let model = model(token_s, context_s);
            for context in [0, 1, 1000, 8000, 1_000_000] {
                for left_s in [1e-3, 0.04, 1.0] {
                    let tokens = tokens_within(&model, context, left_s);
                    assert!(seconds(&model, tokens, context) <= left_s, "{tokens} {context} {left_s}");
                    assert!(
                        seconds(&model, tokens + 1, context) > left_s * (1.0 - 1e-6),
                        "{tokens} {context} {left_s}"
                    );
                    if tokens > 1 {
                        let by_model = model.chunk_s(tokens, context);
                        assert!((seconds(&model, tokens, context) / by_model - 1.0).abs() < 1e-9);
                    }
                }
            }
        }
    }

    #[test]
    fn a_model_that_makes_no_sense_gives_a_number() {
        assert_eq!(tokens_within(&model(0.0, 0.0), 10, 0.1), u32::MAX);
        assert_eq!(tokens_within(&model(1e-4, 0.0), 10, 0.0), 0);
        assert_eq!(tokens_within(&model(1e-4, 0.0), 10, f64::NAN), 0);
        assert_eq!(tokens_within(&model(f64::NAN, 0.0), 10, 0.1), 0);
        assert_eq!(tokens_within(&model(f64::INFINITY, 0.0), 10, 0.1), 0);
    }

    #[test]
    fn cuts_fill_tiles_and_leave_no_single_token() {
        // (most, wanted, rows before, tile, tokens)
        let cases = [
            (100, 600, 0, 16, 96),
            (100, 600, 16, 16, 96),
            (100, 600, 3, 16, 93),
            (100, 600, 0, 1, 100),
            (10, 600, 0, 16, 10),
            (10, 600, 10, 16, 6),
            (10, 600, 15, 16, 10),
            (20, 600, 15, 16, 17),
            (17, 18, 0, 16, 16),
            (40, 41, 9, 16, 39),
            (97, 98, 0, 16, 96),
            (16, 17, 0, 16, 15),
            (99, 100, 0, 1, 98),
            (2, 3, 0, 16, 2),
        ];
        for (most, wanted, rows, tile, tokens) in cases {
            assert_eq!(cut(most, wanted, rows, tile), tokens, "{most} {wanted} {rows} {tile}");
        }
    }
}
