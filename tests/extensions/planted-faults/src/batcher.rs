//! A batcher at fault.

use setu_core::prelude::*;

use crate::scheduler::NoConfig;

/// Gives everybody what it wants, and looks at the budget only afterwards.
pub struct OverBudget;

impl Component for OverBudget {
    type Config = NoConfig;
    const KEY: &'static str = "over_budget";
    const DESCRIPTION: &'static str = "Overdraws the budget by its last chunk.";

    fn build(_: NoConfig) -> Result<Self> {
        Ok(OverBudget)
    }
}

impl Batcher for OverBudget {
    fn batch(&mut self, view: &StepView<'_>, ready: Column<'_, u32>, chunks: &mut Chunks<'_>) -> Result<()> {
        let mut left = view.token_budget;
        for &index in ready.iter().take(view.session_budget as usize) {
            let tokens = view.sessions.get(index as usize).map_or(0, SessionView::tokens_to_compute);
            if tokens > 0 && left > 0 {
                chunks.give(index, tokens);
                left = left.saturating_sub(tokens);
            }
        }
        Ok(())
    }
}
