//! The plainest policies, to test others with.

use setu_core::batcher::{Batcher, Chunks};
use setu_core::rows::Column;
use setu_core::scheduler::{Decisions, Scheduler};
use setu_core::view::{SessionState, SessionView, StepView};
use setu_core::{Result, SessionId};

/// Runs everybody in order of arrival, some with a cap.
#[derive(Debug, Default)]
pub struct InOrder {
    /// Most tokens of a chunk of every third session, 0 for no limit.
    pub cap: u32,
}

impl Scheduler for InOrder {
    fn schedule(&mut self, view: &StepView<'_>, decisions: &mut Decisions<'_>) -> Result<()> {
        for session in view.sessions.iter().filter(|session| session.state() != SessionState::Held) {
            match session.id {
                SessionId(id) if id.is_multiple_of(3) && self.cap > 0 => decisions.run_capped(session.id, self.cap, ""),
                id => decisions.run(id),
            }
        }
        Ok(())
    }
}

/// Gives decodes their token, then prompts all that the budget allows.
#[derive(Debug, Default)]
pub struct DecodesFirst;

impl Batcher for DecodesFirst {
    fn batch(&mut self, view: &StepView<'_>, ready: Column<'_, u32>, chunks: &mut Chunks<'_>) -> Result<()> {
        let (mut tokens, mut sessions) = (view.token_budget, view.session_budget);
        for decodes in [true, false] {
            for &index in ready.iter() {
                let wanted = view.sessions.get(index as usize).map_or(0, SessionView::tokens_to_compute);
                let given = wanted.min(tokens);
                if given > 0 && sessions > 0 && (wanted == 1) == decodes {
                    chunks.give(index, given);
                    (tokens, sessions) = (tokens - given, sessions - 1);
                }
            }
        }
        Ok(())
    }
}
