//! A batcher at fault.

use setu_core::prelude::*;

/// What it does wrong.
#[derive(ConfigEnum, Clone, Copy, Debug, PartialEq)]
pub enum Fault {
    /// Nothing.
    None,
    /// Panics when it is built.
    PanicInBuild,
    /// Panics in `batch`.
    PanicInBatch,
    /// Panics in `observe`.
    PanicInObserve,
    /// Panics when it is dropped.
    PanicInDrop,
    /// Returns an error from `batch`.
    Error,
    /// Gives more tokens than the step may hold.
    OverBudget,
    /// Gives more tokens than the session has pending.
    OverPending,
    /// Gives chunks of no tokens.
    Zero,
    /// Names a session that doesn't exist.
    UnknownIndex,
    /// Gives every session two chunks.
    Twice,
}

/// A batcher at fault.
#[derive(Config, Clone, Debug)]
pub struct FaultyConfig {
    /// What it does wrong.
    #[config(default = Fault::None)]
    pub fault: Fault,
    /// Calls of `batch` that go well before.
    #[config(default = 0)]
    pub after: u32,
}

pub struct Faulty {
    config: FaultyConfig,
    calls: u32,
}

impl Component for Faulty {
    type Config = FaultyConfig;
    const KEY: &'static str = "faulty";
    const DESCRIPTION: &'static str = "A batcher at fault.";

    fn build(config: FaultyConfig) -> Result<Self> {
        if config.fault == Fault::PanicInBuild {
            panic!("cannot be built");
        }
        Ok(Faulty { config, calls: 0 })
    }
}

impl Batcher for Faulty {
    fn batch(&mut self, view: &StepView<'_>, ready: Column<'_, u32>, chunks: &mut Chunks<'_>) -> Result<()> {
        self.calls += 1;
        let fault = if self.calls > self.config.after { self.config.fault } else { Fault::None };
        match fault {
            Fault::PanicInBatch => panic!("cannot batch {} sessions", ready.len()),
            Fault::Error => return Err(Error::internal("does not want to batch")),
            Fault::UnknownIndex => chunks.give(u32::MAX, 1),
            _ => {}
        }
        let mut left = view.token_budget;
        for &index in ready.iter() {
            let pending = view.sessions[index as usize].pending_tokens();
            let tokens = match fault {
                Fault::OverBudget => view.token_budget.saturating_add(1),
                Fault::OverPending => pending.saturating_add(1),
                Fault::Zero => 0,
                _ => pending.min(left),
            };
            if tokens > 0 || fault == Fault::Zero {
                chunks.give(index, tokens);
                left = left.saturating_sub(tokens);
            }
            if fault == Fault::Twice {
                chunks.give(index, 1);
            }
        }
        Ok(())
    }

    fn observe(&mut self, outcome: &StepOutcome) {
        if self.config.fault == Fault::PanicInObserve && self.calls >= self.config.after {
            panic!("cannot hear of step {}", outcome.step);
        }
    }
}

impl Drop for Faulty {
    fn drop(&mut self) {
        tracing::info!(kind = "batcher", "dropped");
        if self.config.fault == Fault::PanicInDrop {
            panic!("cannot be dropped");
        }
    }
}
