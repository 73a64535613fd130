//! Decodes first, one token each; then prompts in the scheduler's order, each up to a chunk, as far as the
//! budget reaches. A long prompt so never stalls a running answer, and short prompts behind a long
//! one get into the same step.

use setu_core::prelude::*;

use crate::config::FixedChunkConfig;

/// See the [module](self).
#[derive(Debug)]
pub struct FixedChunk(FixedChunkConfig);

impl Component for FixedChunk {
    type Config = FixedChunkConfig;
    const KEY: &'static str = "fixed_chunk";
    const DESCRIPTION: &'static str = "Decodes first, then prompts in chunks of a fixed size.";

    fn build(config: FixedChunkConfig) -> Result<Self> {
        Ok(FixedChunk(config))
    }
}

impl Batcher for FixedChunk {
    fn batch(&mut self, view: &StepView<'_>, ready: Column<'_, u32>, chunks: &mut Chunks<'_>) -> Result<()> {
        let limit = if self.0.max_tokens == 0 { u32::MAX } else { self.0.max_tokens };
        let mut tokens_left = view.token_budget.min(limit);
        let mut sessions_left = view.session_budget;
        for decodes in [true, false] {
            for &index in ready.iter() {
                let wanted = view.sessions.get(index as usize).map_or(0, SessionView::tokens_to_compute);
                if wanted == 0 || (wanted == 1) != decodes {
                    continue;
                }
                let tokens = if sessions_left == 0 { 0 } else { wanted.min(self.0.chunk_tokens).min(tokens_left) };
                let full = if sessions_left == 0 {
                    "the step's sessions are used up"
                } else {
                    "the step's tokens are used up"
                };
                if tokens == wanted {
                    chunks.give(index, tokens);
                } else if tokens > 0 {
                    chunks.give_because(index, tokens, if tokens == tokens_left { full } else { "chunk_tokens" });
                } else if chunks.is_recording() {
                    chunks.defer(index, full);
                } else {
                    // Nobody behind gets anything either.
                    return Ok(());
                }
                tokens_left -= tokens;
                sessions_left = sessions_left.saturating_sub(u32::from(tokens > 0));
            }
        }
        Ok(())
    }

    fn properties(&self) -> BatcherProperties {
        let mut properties = BatcherProperties::default();
        properties.work_conserving = true;
        properties.decodes_never_stall = true;
        properties
    }
}

#[cfg(test)]
mod tests {
    use setu_testkit::views::Scene;

    use super::*;

    fn batcher(chunk_tokens: u32, max_tokens: u32) -> FixedChunk {
        FixedChunk::build(FixedChunkConfig { chunk_tokens, max_tokens }).unwrap()
    }

    /// Two prompts, two decodes between and behind them, and a session with nothing to do.
    fn scene() -> Scene {
        let mut scene = Scene::new(0.0);
        scene.prefilling(1, 0.0, 5000, 1000);
        scene.decoding(2, 0.0, 20, 3);
        scene.waiting(3, 0.0, 100);
        scene.decoding(4, 0.0, 20, 1);
        scene.prefilling(5, 0.0, 7, 7);
        scene
    }

    #[test]
    fn decodes_come_first_and_prompts_share_the_rest() {
        // (chunk, most tokens, token budget, session budget, chunks)
        type Case = (u32, u32, u32, u32, &'static [(u64, u32)]);
        let cases: [Case; 9] = [
            (512, 0, 2048, 256, &[(2, 1), (4, 1), (1, 512), (3, 100)]),
            (64, 0, 2048, 256, &[(2, 1), (4, 1), (1, 64), (3, 64)]),
            (1, 0, 2048, 256, &[(2, 1), (4, 1), (1, 1), (3, 1)]),
            (512, 100, 2048, 256, &[(2, 1), (4, 1), (1, 98)]),
            (512, 4096, 300, 256, &[(2, 1), (4, 1), (1, 298)]),
            (512, 0, 514, 256, &[(2, 1), (4, 1), (1, 512)]),
            (512, 0, 1, 256, &[(2, 1)]),
            (512, 0, 2048, 3, &[(2, 1), (4, 1), (1, 512)]),
            (512, 0, 2048, 1, &[(2, 1)]),
        ];
        for (chunk, most, tokens, sessions, expected) in cases {
            let mut scene = scene();
            scene.budgets.tokens = tokens;
            scene.budgets.sessions = sessions;
            assert_eq!(scene.batch(&mut batcher(chunk, most)), expected, "{chunk} {most} {tokens} {sessions}");
        }
    }

    #[test]
    fn only_ready_sessions_get_chunks_in_the_order_given() {
        assert_eq!(scene().batch_of(&mut batcher(512, 0), &[3, 2, 0]), [(4, 1), (3, 100), (1, 512)]);
        assert_eq!(scene().batch_of(&mut batcher(512, 0), &[]), []);
    }

    #[test]
    fn what_the_prefix_cache_holds_takes_no_budget() {
        let mut scene = Scene::new(0.0);
        scene.waiting(1, 0.0, 600).cached_tokens = 590;
        scene.waiting(2, 0.0, 600).cached_tokens = 600;
        scene.prefilling(3, 0.0, 600, 100).cached_tokens = 96;
        assert_eq!(scene.batch(&mut batcher(512, 0)), [(2, 1), (1, 10), (3, 500)]);
    }
}
