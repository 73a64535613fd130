//! A scheduler and a batcher in one file; both log what they do, at every level.

use setu_core::prelude::*;

/// Nothing to set.
#[derive(Config, Clone, Debug)]
pub struct TalkativeConfig {}

pub struct Scheduling;

impl Component for Scheduling {
    type Config = TalkativeConfig;
    const KEY: &'static str = "talkative";
    const DESCRIPTION: &'static str = "Runs everybody and talks about it.";

    fn build(_: TalkativeConfig) -> Result<Self> {
        Ok(Scheduling)
    }
}

impl Scheduler for Scheduling {
    fn schedule(&mut self, view: &StepView<'_>, decisions: &mut Decisions<'_>) -> Result<()> {
        tracing::trace!(step = view.step, "looking");
        for session in view.sessions.iter() {
            tracing::debug!(session = session.id.0, urgent = session.priority > 0, "runs");
            decisions.run(session.id);
        }
        tracing::info!(step = view.step, now_s = view.now_s, mood = "good", "planned a step");
        tracing::warn!(target: "two_in_one::warnings", delta = -3, "nothing to warn of in step {}", view.step);
        tracing::error!(cause = ?Some("none"), "no error either");
        Ok(())
    }
}

pub struct Batching;

impl Component for Batching {
    type Config = TalkativeConfig;
    const KEY: &'static str = "talkative";
    const DESCRIPTION: &'static str = "Gives everybody one token and talks about it.";

    fn build(_: TalkativeConfig) -> Result<Self> {
        Ok(Batching)
    }
}

impl Batcher for Batching {
    fn batch(&mut self, _: &StepView<'_>, ready: Column<'_, u32>, chunks: &mut Chunks<'_>) -> Result<()> {
        ready.iter().for_each(|&session| chunks.give(session, 1));
        tracing::info!(sessions = ready.len(), "gave everybody a token");
        Ok(())
    }

    fn observe(&mut self, outcome: &StepOutcome) {
        // A thread of the plugin's own: nobody calls it, so nobody but the log can tell of its panic.
        let step = outcome.step;
        let thread = std::thread::Builder::new().name("observer".into()).spawn(move || panic!("lost step {step}"));
        let _ = thread.map(std::thread::JoinHandle::join);
    }
}

setu_core::export_plugin!(scheduler: Scheduling, batcher: Batching);
